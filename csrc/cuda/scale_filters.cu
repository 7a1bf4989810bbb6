// Filters times a learned scale on NVIDIA GPUs, those of several convolutions in one launch. The mathematics is
// described in glow_kernels/ops/scale_filters.py.
//
// A filter is some rows of memory: in channels last each row has the channels of one position, otherwise there is a
// single row. Padding of channels follows every row, and padding of filters follows the last filter.
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

// Maximum number of convolutions of a launch, one more than a coupling network has.
constexpr size_t kMaxConvolutions = 4;
constexpr unsigned kWarps = kThreads / 32;
// Vectors that a thread fetches before it waits for any, and those of a whole warp.
constexpr int kVectorsInFlight = 3;
constexpr unsigned kVectorsPerWarp = 32 * kVectorsInFlight;

// The rows of a filter: their number, and the size of each in elements and in vectors of a thread.
struct Rows {
  unsigned count, size, vectors;

  template <int N>
  static Rows of(int64_t count, int64_t size) {
    return {static_cast<unsigned>(count), static_cast<unsigned>(size), static_cast<unsigned>((size + N - 1) / N)};
  }
  __host__ __device__ unsigned size_in_vectors() const { return count * vectors; }

  // The elements of a vector of the filter that exist.
  template <int N>
  __device__ Spot operator[](unsigned vector) const {
    const unsigned row = count == 1 ? 0 : vector / vectors, column = (vector - row * vectors) * N;
    return part<N>({row, column, vector < size_in_vectors() ? N : 0});
  }
  // The elements of a spot of longer, padded rows that exist in these rows.
  template <int N>
  __device__ Spot part(const Spot& spot) const {
    const unsigned left = spot.column < size ? size - spot.column : 0;
    return {spot.row, spot.column, static_cast<int>(left) < spot.count ? static_cast<int>(left) : spot.count};
  }
};

// The filters of one convolution as a kernel reads and writes them, with weights of type T and scaled ones of type H.
template <typename T, typename H>
struct Filters {
  using A = compute_t<T>;
  View<const T> weight;
  const T *bias, *log_scale;
  double factor;
  // Forward.
  View<H> scaled;
  H* scaled_bias;
  // Backward. One of the two gradients of the bias is null; the wide one is the sum of `parts` padded biases.
  View<const H> grad;
  const H* grad_bias;
  const A* wide_grad_bias;
  unsigned parts, part_size;
  View<T> result;
  A *result_bias, *result_log_scale;

  unsigned count, padded_count;  // filters, and filters that the kernel writes
  Rows rows, padded;
  unsigned warps, first_block;  // warps that share a filter, and the first block of this convolution

  __device__ A scale(unsigned index) const {
    return exponential(static_cast<A>(factor) * static_cast<A>(log_scale[index]));
  }

  // By a whole warp; the warps of a block have neighbouring filters, and so read the same sectors of memory.
  __device__ A sum_grad_bias(unsigned index) const {
    if (wide_grad_bias == nullptr) return static_cast<A>(grad_bias[index]);
    double total = 0;
    for (unsigned part = threadIdx.x % 32; part < parts; part += 32) {
      total += static_cast<double>(wide_grad_bias[int64_t{part} * part_size + index]);
    }
    return static_cast<A>(warp_sum(total));
  }
};

template <typename T, typename H>
struct Batch {
  Filters<T, H> all[kMaxConvolutions];

  // The filters of this block.
  __device__ const Filters<T, H>& of_block() const {
    unsigned i = 0;
    while (i + 1 < kMaxConvolutions && blockIdx.x >= all[i + 1].first_block) ++i;
    return all[i];
  }
};

// The filter of a warp, and the warp's number among those that share the filter.
struct Place {
  unsigned index, warp;

  template <typename T, typename H>
  __device__ explicit Place(const Filters<T, H>& filters) {
    const unsigned all = (blockIdx.x - filters.first_block) * kWarps + threadIdx.x / 32;
    index = all / filters.warps;
    warp = all - index * filters.warps;
  }
};

template <typename T, typename H>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Batch<T, H> batch) {
  using A = compute_t<T>;
  constexpr int N = kVector<T, H>;
  const Filters<T, H>& filters = batch.of_block();
  const Place place(filters);
  if (place.index >= filters.padded_count) return;
  const bool exists = place.index < filters.count;
  const Tile tile{place.index, 0, 0, filters.padded.count, filters.padded.size};
  const unsigned lane = threadIdx.x % 32, start = place.warp * kVectorsPerWarp + lane;
  Spot spots[kVectorsInFlight];
  detail::Registers<T, N> raw[kVectorsInFlight];
#pragma unroll
  for (int k = 0; k < kVectorsInFlight; ++k) {
    spots[k] = filters.padded.template operator[]<N>(start + k * 32);
    Spot own = filters.rows.template part<N>(spots[k]);
    if (!exists) own.count = 0;
    raw[k] = fetch<N>(filters.weight, tile, own);
  }
  const A scale = exists ? filters.scale(place.index) : A(0);
#pragma unroll
  for (int k = 0; k < kVectorsInFlight; ++k) {
    A values[N];
    widen(raw[k], values);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] *= scale;
    store(filters.scaled, tile, spots[k], values);
  }
  if (place.warp == 0 && lane == 0) {
    const A bias = exists ? static_cast<A>(filters.bias[place.index]) : A(0);
    filters.scaled_bias[place.index] = static_cast<H>(scale * bias);
  }
}

// A filter is handled by one warp, or by all warps of a block.
template <typename T, typename H>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Batch<T, H> batch) {
  using A = compute_t<T>;
  constexpr int N = kVector<T, H>;
  const Filters<T, H>& filters = batch.of_block();
  const Place place(filters);
  if (place.index >= filters.count) return;
  const Tile tile{place.index, 0, 0, filters.rows.count, filters.rows.size};
  const unsigned threads = filters.warps * 32, thread = place.warp * 32 + threadIdx.x % 32;
  const A scale = filters.scale(place.index), bias = static_cast<A>(filters.bias[place.index]);
  const A grad_bias = place.warp == 0 ? filters.sum_grad_bias(place.index) : A(0);
  A total = 0;
  for (unsigned start = thread; start < filters.rows.size_in_vectors(); start += kVectorsInFlight * threads) {
    Spot spots[kVectorsInFlight];
    detail::Registers<T, N> raw_weight[kVectorsInFlight];
    detail::Registers<H, N> raw_grad[kVectorsInFlight];
#pragma unroll
    for (int k = 0; k < kVectorsInFlight; ++k) {
      spots[k] = filters.rows.template operator[]<N>(start + k * threads);
      raw_weight[k] = fetch<N>(filters.weight, tile, spots[k]);
      raw_grad[k] = fetch<N>(filters.grad, tile, spots[k]);
    }
#pragma unroll
    for (int k = 0; k < kVectorsInFlight; ++k) {
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

// A view of filters that follow each other in memory, as do the rows of each.
template <int N, typename T>
View<T> view_of(T* data, const Rows& rows) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % std::min<size_t>(16, N * sizeof(T)) == 0;
  return {data, int64_t{rows.count} * rows.size, rows.size, 1, aligned && rows.size % N == 0};
}

// What forward and backward have in common; `padded` is like the weight, but padded. Vectors must be contiguous.
template <typename T, typename H>
Filters<T, H> filters_of(const Tensor& weight, const Tensor& padded, const Tensor& bias, const Tensor& log_scale,
                         double factor) {
  constexpr int N = kVector<T, H>;
  constexpr int64_t limit = int64_t{1} << 30;
  const int64_t size = size_of_filter(weight), padded_size = size_of_filter(padded);
  STD_TORCH_CHECK(padded.size(0) < limit && padded_size < limit, "the weight is too large");
  // Without padding of channels, all rows are treated as one.
  const bool in_rows = is_channels_last(weight) && weight.size(1) < padded.size(1);
  const int64_t rows = in_rows ? size / weight.size(1) : 1;
  Filters<T, H> filters{};
  filters.rows = Rows::of<N>(rows, size / rows);
  filters.padded = Rows::of<N>(rows, padded_size / rows);
  filters.weight = view_of<N>(weight.const_data_ptr<T>(), filters.rows);
  filters.bias = bias.const_data_ptr<T>();
  filters.log_scale = log_scale.const_data_ptr<T>();
  filters.factor = factor;
  filters.count = filters.padded_count = static_cast<unsigned>(weight.size(0));
  return filters;
}

// Launches a kernel over filters_at(i) for every i < count.
template <typename T, typename H, typename F>
void launch_all(const Launcher& launch, size_t count, void (*kernel)(Batch<T, H>), const F& filters_at) {
  for (size_t first = 0; first < count; first += kMaxConvolutions) {
    Batch<T, H> batch{};
    int64_t blocks = 0;
    for (size_t i = 0; i < kMaxConvolutions; ++i) {
      Filters<T, H>& filters = batch.all[i];
      if (first + i < count) filters = filters_at(first + i);
      filters.first_block = static_cast<unsigned>(blocks);
      blocks += (int64_t{filters.padded_count} * filters.warps + kWarps - 1) / kWarps;
    }
    STD_TORCH_CHECK(blocks < (int64_t{1} << 28), "the weights are too large");
    launch(blocks, kernel, batch);
  }
}

std::vector<Tensor> forward_all(const std::vector<Tensor>& weights, std::vector<Tensor> biases,
                                std::vector<Tensor> log_scales, const std::vector<double>& factors, ScalarType dtype,
                                const std::vector<int64_t>& sizes) {
  check_counts(weights, biases, log_scales, factors);
  STD_TORCH_CHECK(sizes.size() == 2 * weights.size(), "sizes must be two for every weight");
  const Launcher launch(weights[0]);
  const ScalarType type = weights[0].scalar_type();
  std::vector<Tensor> results;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto padded = padded_sizes(weights[i], sizes[2 * i], sizes[2 * i + 1]);
    results.push_back(empty_output(weights[i], dtype, padded));
    results.push_back(empty_vector(padded[0], dtype, weights[i]));
    check_dense("weight", weights[i], type, weights[i], weights[i].sizes());
    for (Tensor* vector : {&biases[i], &log_scales[i]}) {
      *vector = as_contiguous(*vector);
      check_vector("bias and log_scale", *vector, type, weights[i].size(0));
    }
  }
  dispatch(weights[0], results[0], [&]<typename T, typename H>() {
    constexpr int N = kVector<T, H>;
    launch_all<T, H>(launch, weights.size(), forward_kernel<T, H>, [&](size_t i) {
      auto filters = filters_of<T, H>(weights[i], results[2 * i], biases[i], log_scales[i], factors[i]);
      filters.scaled = view_of<N>(results[2 * i].mutable_data_ptr<H>(), filters.padded);
      filters.scaled_bias = results[2 * i + 1].mutable_data_ptr<H>();
      filters.padded_count = static_cast<unsigned>(results[2 * i].size(0));
      filters.warps = std::max(1u, (filters.padded.size_in_vectors() + kVectorsPerWarp - 1) / kVectorsPerWarp);
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
    const Tensor& grad = grads[2 * i];
    STD_TORCH_CHECK(grad.dim() == weights[i].dim(), "the gradient of weight must have its dimensions");
    check_dense("weight", weights[i], type, weights[i], weights[i].sizes());
    check_dense("the gradient of weight", grad, grad_type, weights[i],
                padded_sizes(weights[i], grad.size(0), grad.size(1)));
    Tensor& grad_bias = grads[2 * i + 1];
    for (Tensor* vector : {&biases[i], &log_scales[i], &grad_bias}) *vector = as_contiguous(*vector);
    for (Tensor* vector : {&biases[i], &log_scales[i]}) {
      check_vector("bias and log_scale", *vector, type, weights[i].size(0));
    }
    const ScalarType of_bias = grad_bias.scalar_type();
    STD_TORCH_CHECK((of_bias == compute || (of_bias == grad_type && grad_bias.dim() == 1)) && grad_bias.dim() >= 1 &&
                        grad_bias.dim() <= 2 && grad_bias.size(-1) >= weights[i].size(0),
                    "the gradient of bias must be (O,), or (parts, O) in the type of arithmetic");
  }
  dispatch(weights[0], grads[0], [&]<typename T, typename H>() {
    using A = compute_t<T>;
    constexpr int N = kVector<T, H>;
    launch_all<T, H>(launch, weights.size(), backward_kernel<T, H>, [&](size_t i) {
      auto filters = filters_of<T, H>(weights[i], grads[2 * i], biases[i], log_scales[i], factors[i]);
      filters.grad = view_of<N>(grads[2 * i].const_data_ptr<H>(), filters.padded);
      const Tensor& grad_bias = grads[2 * i + 1];
      filters.parts = grad_bias.dim() == 2 ? static_cast<unsigned>(grad_bias.size(0)) : 1;
      filters.part_size = static_cast<unsigned>(grad_bias.size(-1));
      if (grad_bias.scalar_type() == compute) {
        filters.wide_grad_bias = grad_bias.const_data_ptr<A>();
      } else {
        filters.grad_bias = grad_bias.const_data_ptr<H>();
      }
      filters.result = view_of<N>(results[3 * i].mutable_data_ptr<T>(), filters.rows);
      filters.result_bias = results[3 * i + 1].mutable_data_ptr<A>();
      filters.result_log_scale = results[3 * i + 2].mutable_data_ptr<A>();
      filters.warps = filters.rows.size_in_vectors() <= 2 * kVectorsPerWarp ? 1 : kWarps;
      return filters;
    });
  });
  return results;
}

std::tuple<Tensor, Tensor> forward(const Tensor& weight, const Tensor& bias, const Tensor& log_scale, double factor,
                                   ScalarType dtype) {
  STD_TORCH_CHECK(weight.dim() >= 2, "weight must be (O, I, *kernel)");
  const auto results = forward_all({weight}, {bias}, {log_scale}, {factor}, dtype, {weight.size(0), weight.size(1)});
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
