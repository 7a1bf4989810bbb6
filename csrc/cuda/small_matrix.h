// Products and inverses of n x n matrices, row by row and in double, each by one block: what the folding of a step is
// made of.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/sums.h"
#include "cuda/warp_elimination.h"

namespace glow_kernels {

// The sum of f(i) over i < n in every thread of a warp, all of which must call it.
template <typename F>
__device__ double sum_over(unsigned n, const F& f) {
  double total = 0;
  for (unsigned i = threadIdx.x % 32; i < n; i += 32) total += f(i);
  return warp_sum(total);
}

// Calls f(i) for all rows; a warp for each.
template <typename F>
__device__ void for_each_row(unsigned n, const F& f) {
  for (unsigned i = threadIdx.x / 32; i < n; i += blockDim.x / 32) f(i);
}

// Columns that are eliminated at a time.
constexpr unsigned kPanel = 8;

// Gauss-Jordan elimination in place with partial pivoting, without moving rows: step k takes the largest element of
// column k among the rows not yet taken, row `row_of_step[k]`. A panel of columns is eliminated by itself, and then its
// pivot rows from all other columns: as here, or where rows of a panel fit into the registers of a warp as
// WarpElimination does. A singular matrix has a log-determinant of minus infinity and an inverse that is not finite.
class Elimination {
 public:
  // Where the matrix fits into the shared memory of every GPU from sm_80 on.
  static bool fits(int64_t n) { return n <= 96; }
  static int64_t shared_bytes(int64_t n) {
    if (n <= WarpElimination::kMost) return WarpElimination::shared_bytes(n);
    const int64_t doubles = (fits(n) ? n * n : 0) + (2 * kPanel + 1) * n + kPanel, integers = 2 * n;
    return doubles * 8 + integers * 4;
  }

  // `workspace` has room for the matrices of all blocks, or is null where they fit into shared memory.
  __device__ Elimination(unsigned n, double* shared, double* workspace) : n_(n), stride_(n) {
    if (n <= WarpElimination::kMost) {
      const WarpElimination by_warp(n, shared);
      stride_ = WarpElimination::stride(n);
      left_ = by_warp.left;
      pivots_ = by_warp.pivots;
      step_of_row_ = by_warp.step_of_row;
      row_of_step_ = by_warp.row_of_step;
      panel_ = shared;  // from where it is made again
      return;
    }
    left_ = workspace != nullptr ? workspace + int64_t{blockIdx.x} * n * n : shared;
    panel_ = workspace != nullptr ? shared : shared + n * n;
    rows_ = panel_ + kPanel * n;
    pivots_ = rows_ + kPanel * n;
    scaled_ = pivots_ + n;
    step_of_row_ = reinterpret_cast<unsigned*>(scaled_ + kPanel);
    row_of_step_ = step_of_row_ + n;
  }

  // Inverts the matrix with the elements value(i, j), or does only what the determinant needs. For all threads.
  template <typename F>
  __device__ void run(const F& value, bool only_log_det) {
    if (n_ <= WarpElimination::kMost) {
      WarpElimination(n_, panel_).run(value, only_log_det);
      return;
    }
    for_each([&](unsigned i, unsigned j) { left_[i * n_ + j] = value(i, j); });
    for (unsigned i = threadIdx.x; i < n_; i += blockDim.x) step_of_row_[i] = n_;
    __syncthreads();
    for (unsigned first = 0; first < n_; first += kPanel) {
      const unsigned count = n_ - first < kPanel ? n_ - first : kPanel;
      for (unsigned i = threadIdx.x; i < n_; i += blockDim.x) {
        for (unsigned k = 0; k < kPanel; ++k) panel_[k * n_ + i] = k < count ? left_[i * n_ + first + k] : 0;
      }
      __syncthreads();
      eliminate_panel(first, count);
      for (unsigned j = threadIdx.x; j < n_; j += blockDim.x) {
        for (unsigned k = 0; k < kPanel; ++k) {
          rows_[k * n_ + j] = k < count ? left_[row_of_step_[first + k] * n_ + j] : 0;
        }
      }
      __syncthreads();
      eliminate_rest(first, count, only_log_det);
      __syncthreads();
    }
  }

  // Element of the inverse, after a barrier.
  __device__ double inverse(unsigned i, unsigned j) const { return left_[row_of_step_[i] * stride_ + step_of_row_[j]]; }

  // log|det| in every thread of a warp, all of which must call it.
  __device__ double log_det() const {
    double total = 0;
    bool singular = false;
    for (unsigned k = threadIdx.x % 32; k < n_; k += 32) {
      total += std::log(std::fabs(pivots_[k]));
      singular = singular || pivots_[k] == 0;
    }
    total = warp_sum(total);
    return __any_sync(kWholeWarp, singular) ? -INFINITY : total;
  }

 private:
  // Calls f(i, j) for all elements; a warp has rows.
  template <typename F>
  __device__ void for_each(const F& f) const {
    for (unsigned i = threadIdx.x / 32; i < n_; i += blockDim.x / 32) {
      for (unsigned j = threadIdx.x % 32; j < n_; j += 32) f(i, j);
    }
  }

  __device__ void eliminate_panel(unsigned first, unsigned count) {
    for (unsigned k = 0; k < count; ++k) {
      if (threadIdx.x < 32) choose_pivot(first, k);
      __syncthreads();
      const unsigned pivot_row = row_of_step_[first + k];
      for (unsigned i = threadIdx.x; i < n_; i += blockDim.x) {
        const double factor = panel_[k * n_ + i];
#pragma unroll
        for (unsigned j = 0; j < kPanel; ++j) {
          const double rest = (j == k ? 0 : panel_[j * n_ + i]) - factor * scaled_[j];
          panel_[j * n_ + i] = i == pivot_row ? scaled_[j] : rest;
        }
      }
      __syncthreads();
    }
  }

  // By one warp: the row of step first + k, and what that row becomes in the panel.
  __device__ void choose_pivot(unsigned first, unsigned k) {
    double largest = 0;
    unsigned row = n_;
    for (unsigned i = threadIdx.x; i < n_; i += 32) {
      const double size = std::fabs(panel_[k * n_ + i]), order = size == size ? size : INFINITY;
      if (step_of_row_[i] == n_ && (row == n_ || order > largest)) {
        largest = order;
        row = i;
      }
    }
    // Numbers that are not negative have the order of their bits. The first row of those with the largest.
    const auto bits = static_cast<uint64_t>(__double_as_longlong(largest));
    const unsigned high = static_cast<unsigned>(bits >> 32), low = static_cast<unsigned>(bits);
    const unsigned most_high = __reduce_max_sync(kWholeWarp, high);
    const unsigned most_low = __reduce_max_sync(kWholeWarp, high == most_high ? low : 0);
    row = __reduce_min_sync(kWholeWarp, high == most_high && low == most_low ? row : n_);
    const double pivot = panel_[k * n_ + row];
    __syncwarp();  // until here others read which rows are taken
    if (threadIdx.x < kPanel) {
      scaled_[threadIdx.x] = (threadIdx.x == k ? 1 : panel_[threadIdx.x * n_ + row]) / pivot;
    }
    if (threadIdx.x == 0) {
      pivots_[first + k] = pivot;
      step_of_row_[row] = first + k;
      row_of_step_[first + k] = row;
    }
  }

  // Takes the pivot rows of the panel from the other columns, of which a determinant needs those to the right and the
  // rows not yet taken.
  __device__ void eliminate_rest(unsigned first, unsigned count, bool only_log_det) {
    for (unsigned i = threadIdx.x / 32; i < n_; i += blockDim.x / 32) {
      const unsigned step = step_of_row_[i];
      if (only_log_det && step != n_) continue;
      const bool of_panel = step >= first && step < first + count;
      double factors[kPanel];
#pragma unroll
      for (unsigned k = 0; k < kPanel; ++k) factors[k] = panel_[k * n_ + i];
      for (unsigned j = (only_log_det ? first + count : 0) + threadIdx.x % 32; j < n_; j += 32) {
        double value = of_panel ? 0 : left_[i * n_ + j];
#pragma unroll
        for (unsigned k = 0; k < kPanel; ++k) value += factors[k] * rows_[k * n_ + j];
        left_[i * n_ + j] = j >= first && j < first + count ? panel_[(j - first) * n_ + i] : value;
      }
    }
  }

  unsigned n_, stride_;
  double *left_, *panel_, *rows_, *pivots_, *scaled_;
  unsigned *step_of_row_, *row_of_step_;
};

// Threads of a block that works on n x n matrices: the square of an even number, for product().
inline int matrix_threads(int64_t n) { return n <= 32 ? 64 : 256; }

// Shared memory of product().
constexpr unsigned kProductDepth = 8, kProductStride = 65;
constexpr unsigned kProductSize = 2 * kProductDepth * kProductStride;

// Calls put(i, j, sum over k of a(i, k) b(k, j)) for all elements of n x n matrices. For all threads of a block; before
// others read what it puts there must be a barrier.
template <typename F, typename G, typename H>
__device__ void product(unsigned n, double* shared, const F& a, const G& b, const H& put) {
  const unsigned across = blockDim.x == 64 ? 8 : 16, edge = 4 * across;  // a thread has 4 x 4 elements at this distance
  const unsigned row = threadIdx.x / across, column = threadIdx.x % across;
  double *const left = shared, *const right = shared + kProductDepth * kProductStride;
  for (unsigned tile = 0; tile < (n + edge - 1) / edge * ((n + edge - 1) / edge); ++tile) {
    const unsigned down = tile / ((n + edge - 1) / edge) * edge, right_of = tile % ((n + edge - 1) / edge) * edge;
    double sums[4][4] = {};
    for (unsigned first = 0; first < n; first += kProductDepth) {
      for (unsigned index = threadIdx.x; index < kProductDepth * edge; index += blockDim.x) {
        const unsigned i = down + index / kProductDepth, k = first + index % kProductDepth;
        left[index % kProductDepth * kProductStride + index / kProductDepth] = i < n && k < n ? a(i, k) : 0;
        const unsigned j = right_of + index % edge, l = first + index / edge;
        right[index / edge * kProductStride + index % edge] = j < n && l < n ? b(l, j) : 0;
      }
      __syncthreads();
      for (unsigned k = 0; k < kProductDepth; ++k) {
        double factors[4], values[4];
#pragma unroll
        for (unsigned r = 0; r < 4; ++r) {
          factors[r] = left[k * kProductStride + row + r * across];
          values[r] = right[k * kProductStride + column + r * across];
        }
#pragma unroll
        for (unsigned r = 0; r < 4; ++r) {
#pragma unroll
          for (unsigned c = 0; c < 4; ++c) sums[r][c] += factors[r] * values[c];
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (unsigned r = 0; r < 4; ++r) {
#pragma unroll
      for (unsigned c = 0; c < 4; ++c) {
        const unsigned i = down + row + r * across, j = right_of + column + c * across;
        if (i < n && j < n) put(i, j, sums[r][c]);
      }
    }
  }
}

}  // namespace glow_kernels
