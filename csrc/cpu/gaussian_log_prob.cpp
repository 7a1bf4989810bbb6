// The diagonal Gaussian on the CPU. The mathematics is described in glow_kernels/ops/gaussian_log_prob.py, the
// arithmetic is in cpu/kernels/gaussian_log_prob.cpp.
#include "cpu/gaussian_log_prob.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "glow_kernels/gaussian_log_prob.h"

namespace glow_kernels {
namespace {

template <typename T, typename H>
GaussianKernels<T, H> kernels() {
  GLOW_KERNELS_RETURN_TABLE(gaussian_kernels<T, H>());
}

// What a function reads and writes; the members are named as in GaussianTile.
struct Arguments {
  Tensor data, h;
  std::optional<Tensor> grad = {}, grad_log_prob = {}, result = {}, grad_h = {};
};

// Runs the kernel over all tiles in parallel and returns what it returned for each.
template <typename T, typename H>
std::vector<double> run(const Arguments& arguments, typename GaussianKernels<T, H>::Kernel* kernel,
                        const std::string& layout_name, const Tiling& tiling) {
  using A = compute_t<T>;
  const auto data = readable<T>(arguments.data);
  const auto h = readable<H>(arguments.h);
  const auto grad = readable<T>(arguments.grad);
  const auto result = writable<T>(arguments.result);
  const auto grad_h = writable<H>(arguments.grad_h);
  const A* weight = arguments.grad_log_prob ? arguments.grad_log_prob->const_data_ptr<A>() : nullptr;
  const GaussianLayout layout = parse_gaussian_layout(layout_name, data.planes.channels);
  std::vector<double> returned(tiling.size());
  torch::stable::parallel_for(0, tiling.size(), kTilesPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tiling[index];
      const auto at = [&](const auto& plane, int64_t first = 0, int64_t step = 1) {
        return tiling.at(tile, plane.data, plane.planes, first, step);
      };
      returned[index] = kernel(
          {tile.rows, tile.columns, at(data), at(h, layout.mean_first, layout.step),
           at(h, layout.log_sd_first, layout.step), at(grad), weight ? static_cast<double>(weight[tile.batch]) : 0.0,
           at(result), at(grad_h, layout.mean_first, layout.step), at(grad_h, layout.log_sd_first, layout.step)});
    }
  });
  return returned;
}

Tensor forward(const Tensor& z, const Tensor& h, Name layout) {
  check_conditioning(z, h);
  const Arguments arguments{with_planes(z), with_planes(h)};
  return dispatch(z, h, [&]<typename T, typename H>() {
    const Tiling tiling(planes_of(arguments.data));
    const std::vector<double> sums = run<T, H>(arguments, kernels<T, H>().forward, layout, tiling);
    return sum_per_sample<compute_t<T>>(sums, tiling, z.size(0), z);
  });
}

template <bool is_sample>
Tensor transform(const Tensor& data, const Tensor& h, Name layout) {
  check_conditioning(data, h);
  Tensor result = empty_output(data);
  Arguments arguments{with_planes(data), with_planes(h)};
  arguments.result = result;
  dispatch(data, h, [&]<typename T, typename H>() {
    const auto table = kernels<T, H>();
    run<T, H>(arguments, is_sample ? table.sample : table.standardize, layout, Tiling(planes_of(result)));
  });
  return result;
}

enum class Gradient { of_log_prob, of_sample, of_standardize };

template <Gradient gradient>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& data, const Tensor& h, Name layout) {
  check_conditioning(data, h);
  Tensor grad_data = empty_output(data), grad_h = empty_output(h);
  Arguments arguments{with_planes(data), with_planes(h)};
  if (gradient == Gradient::of_log_prob) {
    arguments.grad_log_prob = as_contiguous(grad);
  } else {
    arguments.grad = with_planes(grad);
  }
  arguments.result = grad_data;
  arguments.grad_h = grad_h;
  dispatch(data, h, [&]<typename T, typename H>() {
    const auto table = kernels<T, H>();
    const auto kernel = gradient == Gradient::of_log_prob ? table.backward
                        : gradient == Gradient::of_sample ? table.sample_backward
                                                          : table.standardize_backward;
    run<T, H>(arguments, kernel, layout, Tiling(planes_of(grad_data)));
  });
  return {grad_data, grad_h};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(glow_kernels, CPU, m) {
  m.impl("gaussian_log_prob_forward_native", TORCH_BOX(&forward));
  m.impl("gaussian_log_prob_backward_native", TORCH_BOX(&backward<Gradient::of_log_prob>));
  m.impl("gaussian_log_prob_sample_native", TORCH_BOX(&transform<true>));
  m.impl("gaussian_log_prob_sample_backward_native", TORCH_BOX(&backward<Gradient::of_sample>));
  m.impl("gaussian_log_prob_standardize_native", TORCH_BOX(&transform<false>));
  m.impl("gaussian_log_prob_standardize_backward_native", TORCH_BOX(&backward<Gradient::of_standardize>));
}

}  // namespace glow_kernels
