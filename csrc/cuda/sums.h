// Sums in a fixed order, in two stages: a block adds what its threads have, and a second kernel what the blocks have.
// No floating-point atomics, so that a result is the same to the last bit at every run.
#pragma once

#include "cuda/launch.h"
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

// The sum over the threads of a block, in thread 0. All threads must call it, and may again only after a barrier.
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

// sums[i] = scale * the sum of parts (rows, columns) over row i; a warp for every row.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(const double* parts, unsigned rows, unsigned columns, double scale, A* sums) {
  const unsigned row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  double total = 0;
  for (unsigned column = lane; column < columns; column += 32) total += parts[int64_t{row} * columns + column];
  total = warp_sum(total);
  if (lane == 0) sums[row] = static_cast<A>(scale * total);
}

// sums[i] = the sum of parts (rows, columns) over column i; a thread for every column.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    sum_columns_kernel(const double* parts, unsigned rows, unsigned columns, A* sums) {
  const unsigned column = blockIdx.x * kThreads + threadIdx.x;
  if (column >= columns) return;
  double total = 0;
  for (unsigned row = 0; row < rows; ++row) total += parts[int64_t{row} * columns + column];
  sums[column] = static_cast<A>(total);
}

// Uninitialised memory for the parts of a sum, on the device of x.
inline Tensor empty_parts(int64_t size, const Tensor& x) { return empty_vector(size, ScalarType::Double, x); }

// From parts (rows, columns) of empty_parts() to a sum for every row or column.
template <typename A>
void sum_rows(const Launcher& launch, const Tensor& parts, int64_t rows, int64_t columns, A* sums, double scale = 1) {
  launch((rows + kThreads / 32 - 1) / (kThreads / 32), sum_rows_kernel<A>, parts.const_data_ptr<double>(),
         static_cast<unsigned>(rows), static_cast<unsigned>(columns), scale, sums);
}

template <typename A>
void sum_columns(const Launcher& launch, const Tensor& parts, int64_t rows, int64_t columns, A* sums) {
  launch((columns + kThreads - 1) / kThreads, sum_columns_kernel<A>, parts.const_data_ptr<double>(),
         static_cast<unsigned>(rows), static_cast<unsigned>(columns), sums);
}

}  // namespace glow_kernels
