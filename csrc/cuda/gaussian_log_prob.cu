// The diagonal Gaussian on NVIDIA GPUs. The mathematics is described in glow_kernels/ops/gaussian_log_prob.py.
#include <string>
#include <tuple>

#include "cuda/launch.h"
#include "cuda/sums.h"
#include "cuda/tile.h"
#include "glow_kernels/gaussian_log_prob.h"

namespace glow_kernels {
namespace {

// What a kernel reads and writes, named as in `Arguments` below; T is the type of the data, H that of h.
template <typename T, typename H>
struct Views {
  using A = compute_t<T>;
  Tiling tiling;
  View<const T> data;
  Pair<const H> h;  // mean and log standard deviation
  View<const T> grad;
  const A* grad_log_prob;
  View<T> result;  // or the gradient of the data
  Pair<H> grad_h;
  SampleSums<A> log_prob;
};

template <typename T, typename H>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Views<T, H> views) {
  let_next_start();
  using A = compute_t<T>;
  constexpr int N = kVector<T, H>;
  const Tile tile = views.tiling[blockIdx.x];
  A total = 0;
  for_each_spot<N>(tile, [&](const Spot& spot) {
    const auto raw_z = fetch<N>(views.data, tile, spot);
    A z[N], mean[N], log_sd[N];
    load(views.h, tile, spot, mean, log_sd);
    widen(raw_z, z);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A standardized = (z[i] - mean[i]) * exponential(-log_sd[i]);
      if (i < spot.count) total += log_sd[i] + A(0.5) * standardized * standardized;
    }
  });
  // log(2 pi) / 2 for every element.
  views.log_prob.write(tile.batch, -(double(tile.rows) * tile.columns * 0.918938533204672742 + block_sum(total)));
}

enum class Map { sample, standardize };

template <typename T, typename H, Map map>
__global__ void __launch_bounds__(kThreads) transform_kernel(const Views<T, H> views) {
  using A = compute_t<T>;
  constexpr int N = kVector<T, H>;
  const Tile tile = views.tiling[blockIdx.x];
  for_each_spot<N>(tile, [&](const Spot& spot) {
    const auto raw_data = fetch<N>(views.data, tile, spot);
    A data[N], mean[N], log_sd[N];
    load(views.h, tile, spot, mean, log_sd);
    widen(raw_data, data);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      data[i] = map == Map::sample ? mean[i] + exponential(log_sd[i]) * data[i]
                                   : (data[i] - mean[i]) * exponential(-log_sd[i]);
    }
    store(views.result, tile, spot, data);
  });
}

enum class Gradient { of_log_prob, of_sample, of_standardize };

template <typename T, typename H, Gradient gradient>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Views<T, H> views) {
  using A = compute_t<T>;
  constexpr int N = kVector<T, H>;
  const Tile tile = views.tiling[blockIdx.x];
  const A weight = gradient == Gradient::of_log_prob ? views.grad_log_prob[tile.batch] : A(0);
  for_each_spot<N>(tile, [&](const Spot& spot) {
    const auto raw_data = fetch<N>(views.data, tile, spot);
    decltype(raw_data) raw_grad = gradient == Gradient::of_log_prob ? raw_data : fetch<N>(views.grad, tile, spot);
    A data[N], mean[N], log_sd[N], grad[N];
    load(views.h, tile, spot, mean, log_sd);
    widen(raw_data, data);
    widen(raw_grad, grad);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A factor = exponential(gradient == Gradient::of_sample ? log_sd[i] : -log_sd[i]);
      if constexpr (gradient == Gradient::of_log_prob) {
        const A standardized = (data[i] - mean[i]) * factor;
        mean[i] = weight * standardized * factor;
        data[i] = -mean[i];
        log_sd[i] = weight * (standardized * standardized - A(1));
      } else {
        const A in_data = grad[i] * factor;
        log_sd[i] = gradient == Gradient::of_sample ? in_data * data[i] : -grad[i] * data[i];
        mean[i] = gradient == Gradient::of_sample ? grad[i] : -in_data;
        data[i] = in_data;
      }
    }
    store(views.result, tile, spot, data);
    store(views.grad_h, tile, spot, mean, log_sd);
  });
}

struct Arguments {
  Tensor data, h;
  std::optional<Tensor> grad = {}, grad_log_prob = {}, result = {}, grad_h = {};
};

template <typename T, typename H>
Views<T, H> views_of(const Arguments& arguments, const Tiling& tiling, const std::string& layout_name) {
  constexpr int N = kVector<T, H>;
  using A = compute_t<T>;
  const GaussianLayout layout = parse_gaussian_layout(layout_name, arguments.data.size(1));
  const auto& weight = arguments.grad_log_prob;
  return {tiling,
          readable<N, T>(arguments.data, tiling),
          readable_pair<N, H>(arguments.h, tiling, layout.mean_first, layout.log_sd_first, layout.step),
          readable<N, T>(arguments.grad, tiling),
          weight ? weight->const_data_ptr<A>() : nullptr,
          writable<N, T>(arguments.result, tiling),
          writable_pair<N, H>(arguments.grad_h, tiling, layout.mean_first, layout.log_sd_first, layout.step),
          {}};
}

Tensor forward(const Tensor& z, const Tensor& h, Name layout) {
  check_conditioning(z, h);
  const Launcher launch(z);
  Arguments arguments{with_planes(z), with_planes(h)};
  const Tiling tiling(planes_of(arguments.data), /*whole_samples=*/true);
  return dispatch(z, h, [&]<typename T, typename H>() {
    using A = compute_t<T>;
    Views<T, H> views = views_of<T, H>(arguments, tiling, layout);
    return sum_samples<A>(launch, z, tiling.per_sample, [&](const SampleSums<A>& sums) {
      views.log_prob = sums;
      launch(tiling.size(), forward_kernel<T, H>, views);
    });
  });
}

template <Map map>
Tensor transform(const Tensor& data, const Tensor& h, Name layout) {
  check_conditioning(data, h);
  const Launcher launch(data);
  Tensor result = empty_output(data);
  Arguments arguments{with_planes(data), with_planes(h)};
  arguments.result = result;
  const Tiling tiling(planes_of(result));
  dispatch(data, h, [&]<typename T, typename H>() {
    launch(tiling.size(), transform_kernel<T, H, map>, views_of<T, H>(arguments, tiling, layout));
  });
  return result;
}

template <Gradient gradient>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& data, const Tensor& h, Name layout) {
  check_conditioning(data, h);
  const Launcher launch(data);
  Tensor grad_data = empty_output(data), grad_h = empty_output(h);
  Arguments arguments{with_planes(data), with_planes(h)};
  if (gradient == Gradient::of_log_prob) {
    arguments.grad_log_prob = as_contiguous(grad);
  } else {
    arguments.grad = with_planes(grad);
  }
  arguments.result = grad_data;
  arguments.grad_h = grad_h;
  const Tiling tiling(planes_of(grad_data));
  dispatch(data, h, [&]<typename T, typename H>() {
    launch(tiling.size(), backward_kernel<T, H, gradient>, views_of<T, H>(arguments, tiling, layout));
  });
  return {grad_data, grad_h};
}

}  // namespace

GLOW_KERNELS_CUDA_LIBRARY(m) {
  m.impl("gaussian_log_prob_forward_native", TORCH_BOX(&forward));
  m.impl("gaussian_log_prob_backward_native", TORCH_BOX(&backward<Gradient::of_log_prob>));
  m.impl("gaussian_log_prob_sample_native", TORCH_BOX(&transform<Map::sample>));
  m.impl("gaussian_log_prob_sample_backward_native", TORCH_BOX(&backward<Gradient::of_sample>));
  m.impl("gaussian_log_prob_standardize_native", TORCH_BOX(&transform<Map::standardize>));
  m.impl("gaussian_log_prob_standardize_backward_native", TORCH_BOX(&backward<Gradient::of_standardize>));
}

}  // namespace glow_kernels
