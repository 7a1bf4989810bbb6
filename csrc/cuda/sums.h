// Sums in a fixed order, in two stages: a block adds the values of its threads, and a second kernel adds the sums of
// the blocks. There are no floating-point atomics, so results are bitwise reproducible.
#pragma once

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/tile.h"
#include "glow_kernels/tensors.h"

namespace glow_kernels {

constexpr unsigned kWholeWarp = 0xffffffffu;

// The sum over the lanes of a warp, in every lane.
template <typename A>
__device__ A warp_sum(A value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kWholeWarp, value, distance);
  return value;
}

// The sum over the threads of a block, in thread 0. All threads must call it, with a barrier before they call it again.
template <typename A>
__device__ A block_sum(A value) {
  GLOW_KERNELS_SHARED(A, sums, [32]);
  value = warp_sum(value);
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  if (warp == 0) value = warp_sum(lane < warps ? sums[lane] : A(0));
  return value;
}

// sums[i] = the sum of row i of parts (rows, columns); a warp for every row.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(const double* parts, unsigned rows, unsigned columns, A* sums) {
  wait_for_previous();
  const unsigned row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  double total = 0;
  for (unsigned column = lane; column < columns; column += 32) total += parts[int64_t{row} * columns + column];
  total = warp_sum(total);
  if (lane == 0) sums[row] = static_cast<A>(total);
}

// Uninitialised memory for the parts of a sum, on the device of x.
inline Tensor empty_parts(int64_t size, const Tensor& x) { return empty_vector(size, ScalarType::Double, x); }

// Sums every row of parts (rows, columns), a tensor of empty_parts().
template <typename A>
void sum_rows(const Launcher& launch, const Tensor& parts, int64_t rows, int64_t columns, A* sums) {
  launch.next((rows + kThreads / 32 - 1) / (kThreads / 32), kThreads, 0, sum_rows_kernel<A>,
              parts.const_data_ptr<double>(), static_cast<unsigned>(rows), static_cast<unsigned>(columns), sums);
}

// Sums every column of parts (rows, columns); the first `split` sums go to `first`, the others to `second`. A block has
// 32 columns, and its warps take turns at the rows.
template <typename A>
__global__ void __launch_bounds__(1024)
    sum_columns_kernel(const A* parts, unsigned rows, unsigned columns, unsigned split, A* first, A* second) {
  GLOW_KERNELS_SHARED(double, sums, [32][32]);
  wait_for_previous();
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const unsigned column = blockIdx.x * 32 + lane;
  double total = 0;
  if (column < columns) {
#pragma unroll 8
    for (unsigned row = warp; row < rows; row += warps) {
      total += static_cast<double>(parts[int64_t{row} * columns + column]);
    }
  }
  sums[warp][lane] = total;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (unsigned other = 1; other < warps; ++other) total += sums[other][lane];
  (column < split ? first[column] : second[column - split]) = static_cast<A>(total);
}

// Sums every column of parts (rows, columns): the first columns into `first`, the others, if any, into `second`.
template <typename A>
void sum_columns(const Launcher& launch, const Tensor& parts, int64_t rows, Tensor& first, Tensor* second = nullptr) {
  const int64_t split = first.numel(), columns = split + (second == nullptr ? 0 : second->numel());
  const int64_t warps = std::clamp<int64_t>(rows / 4, 1, 32);  // each with several loads in flight
  launch.next((columns + 31) / 32, static_cast<int>(32 * warps), 0, sum_columns_kernel<A>, parts.const_data_ptr<A>(),
              static_cast<unsigned>(rows), static_cast<unsigned>(columns), static_cast<unsigned>(split),
              first.mutable_data_ptr<A>(), second == nullptr ? nullptr : second->mutable_data_ptr<A>());
}

// Where the blocks of a kernel leave their sums over a sample: `sums` if a block has a whole sample, otherwise `parts`.
template <typename A>
struct SampleSums {
  A* sums = nullptr;
  double* parts = nullptr;

  // The sum of the block must be in its thread 0.
  __device__ void write(int64_t batch, double sum) const {
    if (threadIdx.x != 0) return;
    if (parts == nullptr) {
      sums[batch] = static_cast<A>(sum);
    } else {
      parts[blockIdx.x] = sum;
    }
  }
};

// Returns a sum for every sample of x, (B,). `run` launches, with a SampleSums, a kernel that has `per_sample` blocks
// for each sample, one sample after the other. With one block per sample no second kernel is needed.
template <typename A, typename F>
Tensor sum_samples(const Launcher& launch, const Tensor& x, int64_t per_sample, const F& run) {
  constexpr ScalarType type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  Tensor sums = empty_vector(x.size(0), type, x);
  if (per_sample == 1) {
    run(SampleSums<A>{sums.mutable_data_ptr<A>(), nullptr});
  } else {
    const Tensor parts = empty_parts(x.size(0) * per_sample, x);
    run(SampleSums<A>{nullptr, parts.mutable_data_ptr<double>()});
    sum_rows(launch, parts, x.size(0), per_sample, sums.mutable_data_ptr<A>());
  }
  return sums;
}

}  // namespace glow_kernels
