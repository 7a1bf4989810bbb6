// The affine coupling on the CPU. The mathematics is described in glow_kernels/ops/affine_coupling.py, the arithmetic
// is in cpu/kernels/affine_coupling.cpp.
#include "cpu/affine_coupling.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "glow_kernels/affine_coupling.h"

namespace glow_kernels {
namespace {

// The kernels access rows in place if these are whole vectors, and 16 elements are in every instruction set.
Tiling tiling_of(const Tensor& x) {
  constexpr int64_t kWholeVectors = 16;
  const Planes planes = planes_of(x);
  return Tiling(planes, planes.positions % kWholeVectors == 0 ? kTile : kLongRow);
}

template <typename T, typename H>
CouplingKernels<T, H> kernels() {
  GLOW_KERNELS_RETURN_TABLE(coupling_kernels<T, H>());
}

// What a direction reads and writes; `data`, `result` and the gradients are those of CouplingTile.
struct Arguments {
  Tensor data, h;
  std::optional<Tensor> gain = {}, grad = {}, grad_log_det = {}, result = {}, grad_data = {}, grad_h = {};
};

// Runs the kernel over all tiles in parallel and returns what it returned for each. Writes the gradient of the gain,
// summed over samples and positions in a fixed order, to `grad_gain` unless that is null.
template <typename T, typename H>
std::vector<double> run(const Arguments& arguments, typename CouplingKernels<T, H>::Kernel* kernel,
                        const CouplingOptions& options, const CouplingLayout& layout, const Tiling& tiling,
                        compute_t<T>* grad_gain) {
  using A = compute_t<T>;
  const auto data = readable<T>(arguments.data);
  const auto h = readable<H>(arguments.h);
  const auto grad = readable<T>(arguments.grad);
  const auto result = writable<T>(arguments.result), grad_data = writable<T>(arguments.grad_data);
  const auto grad_h = writable<H>(arguments.grad_h);
  const A* lambda = arguments.grad_log_det ? arguments.grad_log_det->const_data_ptr<A>() : nullptr;
  const int64_t channels = data.planes.channels, per_tile = grad_gain ? tiling.channels_per_tile() : 0;
  Plane<const A> gain{};
  if (arguments.gain) gain = {arguments.gain->const_data_ptr<A>(), {0, channels, 1, 0, arguments.gain->stride(0), 0}};

  const bool streamed = data.planes.batches * channels * data.planes.positions * int64_t{sizeof(T)} > kCacheBytes;
  std::vector<double> returned(tiling.size()), gain_sums(tiling.size() * per_tile);
  torch::stable::parallel_for(0, tiling.size(), kTilesPerThread, [&](int64_t begin, int64_t end) {
    A contributions[kTile];
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tiling[index];
      const auto at = [&](const auto& plane, int64_t first = 0, int64_t step = 1) {
        return tiling.at(tile, plane.data, plane.planes, first, step);
      };
      returned[index] =
          kernel({tile.rows, tile.columns, at(data), at(h, layout.scale_first, layout.step),
                  at(h, layout.shift_first, layout.step), at(gain), at(grad),
                  lambda ? static_cast<double>(lambda[tile.batch]) : 0.0, at(result), at(grad_data),
                  at(grad_h, layout.scale_first, layout.step), at(grad_h, layout.shift_first, layout.step),
                  grad_gain ? contributions : nullptr, streamed},
                 options);
      if (grad_gain) tiling.add_per_channel(tile, contributions, &gain_sums[index * per_tile]);
    }
  });
  if (grad_gain) {
    std::vector<double> totals(channels);
    for (int64_t index = 0; index < tiling.size(); ++index) {
      const Tile tile = tiling[index];
      for (int64_t i = 0; i < tiling.channels(tile); ++i) {
        totals[tiling.first_channel(tile) + i] += gain_sums[index * per_tile + i];
      }
    }
    for (int64_t channel = 0; channel < channels; ++channel) grad_gain[channel] = static_cast<A>(totals[channel]);
  }
  return returned;
}

template <bool is_inverse>
std::tuple<Tensor, Tensor> transform(const Tensor& x, const Tensor& h, std::optional<Tensor> log_scale_gain, Name kind,
                                     std::vector<double> scale_parameters, Name layout, Name order) {
  check_coupling(x, h, log_scale_gain);
  const CouplingOptions options = parse_options(kind, scale_parameters, order);
  Tensor y = empty_output(x);
  Arguments arguments{with_planes(x), with_planes(h), log_scale_gain};
  arguments.result = y;
  return dispatch(x, h, [&]<typename T, typename H>() -> std::tuple<Tensor, Tensor> {
    const CouplingKernels<T, H> table = kernels<T, H>();
    const Tiling tiling = tiling_of(y);
    const std::vector<double> sums = run<T, H>(arguments, is_inverse ? table.inverse : table.forward, options,
                                               parse_coupling_layout(layout, x.size(1)), tiling, nullptr);
    return {y, sum_per_sample<compute_t<T>>(sums, tiling, x.size(0), x)};
  });
}

enum class Direction { backward, inverse_backward, reversible_backward };

template <Direction direction>
auto gradients(const Tensor& grad, const Tensor& grad_log_det, const Tensor& y, const Tensor& h,
               std::optional<Tensor> log_scale_gain, Name kind, std::vector<double> scale_parameters, Name layout,
               Name order) {
  check_coupling(y, h, log_scale_gain);
  const CouplingOptions options = parse_options(kind, scale_parameters, order);
  Tensor grad_x = empty_output(y), grad_h = empty_output(h);
  Tensor grad_gain = empty_vector(log_scale_gain ? y.size(1) : 0, grad_log_det.scalar_type(), y);
  Arguments arguments{with_planes(y), with_planes(h), log_scale_gain, with_planes(grad), as_contiguous(grad_log_det)};
  arguments.grad_data = grad_x;
  arguments.grad_h = grad_h;
  if constexpr (direction == Direction::reversible_backward) arguments.result = empty_output(y);
  dispatch(y, h, [&]<typename T, typename H>() {
    const CouplingKernels<T, H> table = kernels<T, H>();
    const auto kernel = direction == Direction::backward           ? table.backward
                        : direction == Direction::inverse_backward ? table.inverse_backward
                                                                   : table.reversible_backward;
    compute_t<T>* gain_data = log_scale_gain ? grad_gain.mutable_data_ptr<compute_t<T>>() : nullptr;
    run<T, H>(arguments, kernel, options, parse_coupling_layout(layout, y.size(1)), tiling_of(grad_x), gain_data);
  });
  if constexpr (direction == Direction::reversible_backward) {
    return std::tuple<Tensor, Tensor, Tensor, Tensor>{*arguments.result, grad_x, grad_h, grad_gain};
  } else {
    return std::tuple<Tensor, Tensor, Tensor>{grad_x, grad_h, grad_gain};
  }
}

// The kernels cannot work in place: if a sigmoid is out of range, they read their inputs again.
Tensor in_place_backward(Tensor grad, const Tensor& grad_log_det, Tensor y, const Tensor& h, Name kind,
                         std::vector<double> scale_parameters, Name layout, Name order) {
  const auto [x, grad_x, grad_h, _] = gradients<Direction::reversible_backward>(
      grad, grad_log_det, y, h, std::nullopt, kind, std::move(scale_parameters), layout, order);
  torch::stable::copy_(y, x);
  torch::stable::copy_(grad, grad_x);
  return grad_h;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(glow_kernels, CPU, m) {
  m.impl("affine_coupling_forward_native", TORCH_BOX(&transform<false>));
  m.impl("affine_coupling_inverse_native", TORCH_BOX(&transform<true>));
  m.impl("affine_coupling_backward_native", TORCH_BOX(&gradients<Direction::backward>));
  m.impl("affine_coupling_inverse_backward_native", TORCH_BOX(&gradients<Direction::inverse_backward>));
  m.impl("affine_coupling_reversible_backward_native", TORCH_BOX(&gradients<Direction::reversible_backward>));
  m.impl("affine_coupling_in_place_backward_native", TORCH_BOX(&in_place_backward));
}

}  // namespace glow_kernels
