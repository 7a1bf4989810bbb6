// Products of the linear map of actnorm_conv1x1 in shared memory. A thread computes R channels of V neighbouring
// positions (16 bytes), which makes V V multiply-adds for every 16 bytes of the matrix that it reads, and R V for every
// 16 bytes of the tile. For the gradient of the matrix a thread accumulates 6 x 6 elements over positions, in registers
// from tile to tile.
#pragma once

#include <cstdint>

#include "cuda/actnorm_conv1x1_tile.h"
#include "cuda/launch.h"
#include "cuda/tile.h"

namespace glow_kernels::linear {

// M x + v of a tile, or M^T x, with the matrix and the shift in shared memory.
template <bool transposed, typename W, typename A = typename W::A>
__device__ void multiply(const W& work, const A* matrix, const A* tile, typename W::Values& total) {
  constexpr unsigned V = W::V, R = W::kRows;
  using Vector = detail::Registers<A, V>;
  if (!work.has_row()) return;
  const unsigned row = work.row();
#pragma unroll
  for (unsigned i = 0; i < R; ++i) {
    const A start = transposed ? A(0) : matrix[work.side * work.side + row + i];
#pragma unroll
    for (unsigned v = 0; v < V; ++v) total[i][v] = start;
  }
  const A* x = tile + work.at(0, work.column());
  const A* factors = matrix + (transposed ? row : row * work.side);
#pragma unroll 1
  for (unsigned k = 0; k < work.channels; k += V) {
    Vector values[V];
#pragma unroll
    for (unsigned j = 0; j < V; ++j) detail::copy<V>(values[j].values, x + j * work.kStride);
#pragma unroll
    for (unsigned i = 0; i < R; ++i) {
      // V factors: of one channel of the result and V of x or, transposed, of V channels of the result and one of x.
      const unsigned first = i % (R / V) * V, j = i / (R / V);
      Vector m;
      detail::copy<V>(m.values, factors + (transposed ? j * work.side + first : i * work.side));
#pragma unroll
      for (unsigned a = 0; a < V; ++a) {
#pragma unroll
        for (unsigned v = 0; v < V; ++v) {
          if constexpr (transposed) {
            total[first + a][v] += m.values[a] * values[j].values[v];
          } else {
            total[i][v] += m.values[a] * values[a].values[v];
          }
        }
      }
    }
    x += V * work.kStride;
    factors += transposed ? V * work.side : V;
  }
}

// Elements (i + e, j + f) of sum g x^T, and i + e of sum g, which a thread sums over some positions of its tiles.
template <typename W>
class OuterSum {
  using A = typename W::A;

 public:
  __device__ explicit OuterSum(const W& work) : cells_(cells(work)), splits_(splits(work, blockDim.x)) {
    const unsigned cell = threadIdx.x % cells_;
    split_ = threadIdx.x / cells_;
    i_ = cell % (work.side / kEdge) * kEdge;
    j_ = cell / (work.side / kEdge) * kEdge;
  }

  // Bytes that write() needs.
  static int64_t scratch_bytes(const W& work) {
    return int64_t{splits(work, work.threads())} * work.channels * (work.channels + 1) * sizeof(A);
  }

  __device__ void add(const W& work, const A* g, const A* x) {
    constexpr unsigned V = W::V;
    using Vector = detail::Registers<A, V>;
    if (split_ >= splits_) return;
#pragma unroll 1
    for (unsigned column = split_ * V; column < work.positions(); column += splits_ * V) {
      const A *const rows = g + work.at(i_, column), *const columns = x + work.at(j_, column);
      Vector left[kEdge];
#pragma unroll
      for (unsigned e = 0; e < kEdge; ++e) detail::copy<V>(left[e].values, rows + e * W::kStride);
#pragma unroll
      for (unsigned f = 0; f < kEdge; ++f) {
        Vector right;
        detail::copy<V>(right.values, columns + f * W::kStride);
#pragma unroll
        for (unsigned e = 0; e < kEdge; ++e) {
#pragma unroll
          for (unsigned v = 0; v < V; ++v) matrix_[e][f] += left[e].values[v] * right.values[v];
        }
      }
      if (j_ == 0) {
#pragma unroll
        for (unsigned e = 0; e < kEdge; ++e) {
#pragma unroll
          for (unsigned v = 0; v < V; ++v) shift_[e] += left[e].values[v];
        }
      }
    }
  }

  // Adds the sums of the threads and writes them to `parts`: C x C, or its transpose, then C. `scratch` is shared
  // memory that nothing else may use.
  __device__ void write(const W& work, A* scratch, A* parts, bool transposed = false) const {
    const unsigned channels = work.channels, size = channels * (channels + 1);
    const unsigned row_stride = transposed ? 1 : channels, column_stride = transposed ? channels : 1;
    if (split_ < splits_) {
      A* const own = scratch + split_ * size;
#pragma unroll
      for (unsigned e = 0; e < kEdge; ++e) {
        if (i_ + e >= channels) continue;
        if (j_ == 0) own[channels * channels + i_ + e] = shift_[e];
#pragma unroll
        for (unsigned f = 0; f < kEdge; ++f) {
          if (j_ + f < channels) own[(i_ + e) * row_stride + (j_ + f) * column_stride] = matrix_[e][f];
        }
      }
    }
    __syncthreads();
    for (unsigned index = threadIdx.x; index < size; index += blockDim.x) {
      A sum = 0;
      for (unsigned split = 0; split < splits_; ++split) sum += scratch[split * size + index];
      parts[index] = sum;
    }
  }

 private:
  static constexpr unsigned kEdge = kManyRows / 2;
  static __host__ __device__ unsigned cells(const W& work) { return work.side / kEdge * (work.side / kEdge); }
  // The number of threads that have the same elements and share the positions.
  static __host__ __device__ unsigned splits(const W& work, unsigned threads) {
    const unsigned all = threads / cells(work), most = work.positions() / W::V;
    return all < most ? all : most;
  }

  unsigned cells_, splits_, split_, i_, j_;
  A matrix_[kEdge][kEdge] = {}, shift_[kEdge] = {};
};

}  // namespace glow_kernels::linear
