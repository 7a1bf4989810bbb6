// Filters times a learned scale on NVIDIA GPUs, those of several convolutions in one launch. The mathematics stands in
// glow_kernels/ops/scale_filters.py.
#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "cuda/launch.h"
#include "cuda/sums.h"
#include "cuda/tile.h"
#include "glow_kernels/math.h"
#include "glow_kernels/scale_filters.h"

namespace glow_kernels {
namespace {

// Convolutions of a launch, one more than a coupling network has.
constexpr size_t kMost = 4;
constexpr unsigned kWarps = kThreads / 32;
// Vectors that a thread fetches before it waits for any, and elements that a warp then has.
constexpr int kAtOnce = 3;
template <int N>
constexpr int64_t kOfWarp = 32 * N * kAtOnce;

// The filters of one convolution as a kernel reads and writes them, weights of type T and scaled ones of type H.
template <typename T, typename H>
struct Filters {
  using A = compute_t<T>;
  View<const T> weight;
  const T *bias, *log_scale;
  double factor;
  // Forward.
  View<H> scaled;
  H* scaled_bias;
  // Backward; one of the two gradients of the bias is null.
  View<const H> grad;
  const H* grad_bias;
  const A* wide_grad_bias;
  View<T> result;
  A *result_bias, *result_log_scale;

  unsigned count, size;         // filters, and elements of each
  unsigned warps, first_block;  // that share a filter, and the first that has to do with these

  __device__ A scale(unsigned index) const {
    return exponential(static_cast<A>(factor) * static_cast<A>(log_scale[index]));
  }
};

template <typename T, typename H>
struct Batch {
  Filters<T, H> all[kMost];

  // Those of this block.
  __device__ const Filters<T, H>& of_block() const {
    unsigned i = 0;
    while (i + 1 < kMost && blockIdx.x >= all[i + 1].first_block) ++i;
    return all[i];
  }
};

// A filter, and the warp's number among those that share it.
struct Place {
  unsigned index, warp;

  template <typename T, typename H>
  __device__ explicit Place(const Filters<T, H>& filters) {
    const unsigned all = (blockIdx.x - filters.first_block) * kWarps + threadIdx.x / 32;
    index = all / filters.warps;
    warp = all - index * filters.warps;
  }
};

// Up to N elements from `column` on.
template <int N>
__device__ Spot spot_at(unsigned column, unsigned size) {
  return {0, column, column >= size ? 0 : size - column < N ? static_cast<int>(size - column) : N};
}

template <typename T, typename H>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Batch<T, H> batch) {
  using A = compute_t<T>;
  constexpr int N = kVector<T, H>;
  const Filters<T, H>& filters = batch.of_block();
  const Place place(filters);
  if (place.index >= filters.count) return;
  const Tile tile{place.index, 0, 0, 1, filters.size};
  const unsigned lane = threadIdx.x % 32, start = place.warp * static_cast<unsigned>(kOfWarp<N>) + lane * N;
  Spot spots[kAtOnce];
  detail::Registers<T, N> raw[kAtOnce];
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k) {
    spots[k] = spot_at<N>(start + k * 32 * N, filters.size);
    raw[k] = fetch<N>(filters.weight, tile, spots[k]);
  }
  const A scale = filters.scale(place.index);
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k) {
    A values[N];
    widen(raw[k], values);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] *= scale;
    store(filters.scaled, tile, spots[k], values);
  }
  if (place.warp == 0 && lane == 0) {
    filters.scaled_bias[place.index] = static_cast<H>(scale * static_cast<A>(filters.bias[place.index]));
  }
}

// A filter by one warp, or by all of a block.
template <typename T, typename H>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Batch<T, H> batch) {
  using A = compute_t<T>;
  constexpr int N = kVector<T, H>;
  const Filters<T, H>& filters = batch.of_block();
  const Place place(filters);
  if (place.index >= filters.count) return;
  const Tile tile{place.index, 0, 0, 1, filters.size};
  const unsigned threads = filters.warps * 32, thread = place.warp * 32 + threadIdx.x % 32;
  const A scale = filters.scale(place.index), bias = static_cast<A>(filters.bias[place.index]);
  const A grad_bias = filters.wide_grad_bias != nullptr ? filters.wide_grad_bias[place.index]
                                                        : static_cast<A>(filters.grad_bias[place.index]);
  A total = 0;
  for (unsigned start = thread * N; start < filters.size; start += kAtOnce * threads * N) {
    Spot spots[kAtOnce];
    detail::Registers<T, N> raw_weight[kAtOnce];
    detail::Registers<H, N> raw_grad[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      spots[k] = spot_at<N>(start + k * threads * N, filters.size);
      raw_weight[k] = fetch<N>(filters.weight, tile, spots[k]);
      raw_grad[k] = fetch<N>(filters.grad, tile, spots[k]);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      A weight[N], grad[N];
      widen(raw_weight[k], weight);
      widen(raw_grad[k], grad);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        total += weight[i] * grad[i];
        grad[i] *= scale;
      }
      store(filters.result, tile, spots[k], grad);
    }
  }
  total = filters.warps > 1 ? block_sum(total) : warp_sum(total);
  if (thread == 0) {
    filters.result_bias[place.index] = scale * grad_bias;
    filters.result_log_scale[place.index] = static_cast<A>(filters.factor) * scale * (total + grad_bias * bias);
  }
}

// Filters that lie one after the other.
template <int N, typename T>
View<T> view_of(T* data, int64_t size) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % std::min<size_t>(16, N * sizeof(T)) == 0;
  return {data, size, 0, 1, aligned && size % N == 0};
}

// What forward and backward have in common. Vectors must be contiguous.
template <typename T, typename H>
Filters<T, H> filters_of(const Tensor& weight, const Tensor& bias, const Tensor& log_scale, double factor) {
  constexpr int64_t limit = int64_t{1} << 30;
  const int64_t count = weight.size(0), size = size_of_filter(weight);
  STD_TORCH_CHECK(count < limit && size < limit, "the weight is too large");
  Filters<T, H> filters{};
  filters.weight = view_of<kVector<T, H>>(weight.const_data_ptr<T>(), size);
  filters.bias = bias.const_data_ptr<T>();
  filters.log_scale = log_scale.const_data_ptr<T>();
  filters.factor = factor;
  filters.count = static_cast<unsigned>(count);
  filters.size = static_cast<unsigned>(size);
  return filters;
}

// Launches a kernel over filters_at(i) for every i < count.
template <typename T, typename H, typename F>
void launch_all(const Launcher& launch, size_t count, void (*kernel)(Batch<T, H>), const F& filters_at) {
  for (size_t first = 0; first < count; first += kMost) {
    Batch<T, H> batch{};
    int64_t blocks = 0;
    for (size_t i = 0; i < kMost; ++i) {
      Filters<T, H>& filters = batch.all[i];
      if (first + i < count) filters = filters_at(first + i);
      filters.first_block = static_cast<unsigned>(blocks);
      blocks += (int64_t{filters.count} * filters.warps + kWarps - 1) / kWarps;
    }
    STD_TORCH_CHECK(blocks < (int64_t{1} << 28), "the weights are too large");
    launch(blocks, kernel, batch);
  }
}

std::vector<Tensor> forward_all(const std::vector<Tensor>& weights, std::vector<Tensor> biases,
                                std::vector<Tensor> log_scales, const std::vector<double>& factors, ScalarType dtype) {
  check_counts(weights, biases, log_scales, factors);
  const Launcher launch(weights[0]);
  const ScalarType type = weights[0].scalar_type();
  std::vector<Tensor> results;
  for (size_t i = 0; i < weights.size(); ++i) {
    results.push_back(empty_output(weights[i], dtype));
    results.push_back(empty_vector(weights[i].size(0), dtype, weights[i]));
    check_like("weight", weights[i], type, results[2 * i]);
    for (Tensor* vector : {&biases[i], &log_scales[i]}) {
      *vector = as_contiguous(*vector);
      check_like("bias and log_scale", *vector, type, results[2 * i + 1]);
    }
  }
  dispatch(weights[0], results[0], [&]<typename T, typename H>() {
    constexpr int N = kVector<T, H>;
    launch_all<T, H>(launch, weights.size(), forward_kernel<T, H>, [&](size_t i) {
      auto filters = filters_of<T, H>(weights[i], biases[i], log_scales[i], factors[i]);
      filters.scaled = view_of<N>(results[2 * i].mutable_data_ptr<H>(), filters.size);
      filters.scaled_bias = results[2 * i + 1].mutable_data_ptr<H>();
      filters.warps = std::max<int64_t>(1, (filters.size + kOfWarp<N> - 1) / kOfWarp<N>);
      return filters;
    });
  });
  return results;
}

std::vector<Tensor> backward_all(std::vector<Tensor> grads, const std::vector<Tensor>& weights,
                                 std::vector<Tensor> biases, std::vector<Tensor> log_scales,
                                 const std::vector<double>& factors) {
  check_counts(grads, weights, biases, log_scales, factors);
  const Launcher launch(weights[0]);
  const ScalarType type = weights[0].scalar_type(), grad_type = grads[0].scalar_type();
  const ScalarType compute = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::vector<Tensor> results;
  for (size_t i = 0; i < weights.size(); ++i) {
    results.push_back(empty_output(weights[i]));
    for (int k = 0; k < 2; ++k) results.push_back(empty_vector(weights[i].size(0), compute, weights[i]));
    check_like("weight", weights[i], type, results[3 * i]);
    check_like("the gradient of weight", grads[2 * i], grad_type, results[3 * i]);
    Tensor& grad_bias = grads[2 * i + 1];
    for (Tensor* vector : {&biases[i], &log_scales[i], &grad_bias}) *vector = as_contiguous(*vector);
    for (Tensor* vector : {&biases[i], &log_scales[i]}) {
      check_like("bias and log_scale", *vector, type, results[3 * i + 1]);
    }
    check_like("the gradient of bias", grad_bias, grad_bias.scalar_type() == compute ? compute : grad_type,
               results[3 * i + 1]);
  }
  dispatch(weights[0], grads[0], [&]<typename T, typename H>() {
    using A = compute_t<T>;
    constexpr int N = kVector<T, H>;
    launch_all<T, H>(launch, weights.size(), backward_kernel<T, H>, [&](size_t i) {
      auto filters = filters_of<T, H>(weights[i], biases[i], log_scales[i], factors[i]);
      filters.grad = view_of<N>(grads[2 * i].const_data_ptr<H>(), filters.size);
      const Tensor& grad_bias = grads[2 * i + 1];
      if (grad_bias.scalar_type() == compute) {
        filters.wide_grad_bias = grad_bias.const_data_ptr<A>();
      } else {
        filters.grad_bias = grad_bias.const_data_ptr<H>();
      }
      filters.result = view_of<N>(results[3 * i].mutable_data_ptr<T>(), filters.size);
      filters.result_bias = results[3 * i + 1].mutable_data_ptr<A>();
      filters.result_log_scale = results[3 * i + 2].mutable_data_ptr<A>();
      filters.warps = filters.size <= 2 * kOfWarp<N> ? 1 : kWarps;
      return filters;
    });
  });
  return results;
}

std::tuple<Tensor, Tensor> forward(const Tensor& weight, const Tensor& bias, const Tensor& log_scale, double factor,
                                   ScalarType dtype) {
  const auto results = forward_all({weight}, {bias}, {log_scale}, {factor}, dtype);
  return {results[0], results[1]};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_weight, const Tensor& grad_bias, const Tensor& weight,
                                            const Tensor& bias, const Tensor& log_scale, double factor) {
  const auto results = backward_all({grad_weight, grad_bias}, {weight}, {bias}, {log_scale}, {factor});
  return {results[0], results[1], results[2]};
}

}  // namespace

GLOW_KERNELS_CUDA_LIBRARY(m) {
  m.impl("scale_filters_forward_native", TORCH_BOX(&forward));
  m.impl("scale_filters_backward_native", TORCH_BOX(&backward));
  m.impl("scale_filters_forward_all_native", TORCH_BOX(&forward_all));
  m.impl("scale_filters_backward_all_native", TORCH_BOX(&backward_all));
}

}  // namespace glow_kernels
