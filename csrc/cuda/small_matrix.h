// Products and inverses of n x n matrices, row-major and in double, each by one block or, tile by tile, by several: the
// building blocks of folding a step.
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

// Calls f(i) for all rows, each in one warp of one of the layers.
template <typename F>
__device__ void for_each_row(unsigned n, const F& f) {
  const unsigned warps = blockDim.x / 32;
  for (unsigned i = blockIdx.y * warps + threadIdx.x / 32; i < n; i += gridDim.y * warps) f(i);
}

// Calls put(j, get(j)) for j < n, spread over the lanes of a warp; a lane has several loads in flight.
template <typename F, typename G>
__device__ void along_row(unsigned n, const F& get, const G& put) {
  constexpr unsigned kLoads = 6;
  for (unsigned first = threadIdx.x % 32; first < n; first += 32 * kLoads) {
    double values[kLoads];
#pragma unroll
    for (unsigned r = 0; r < kLoads; ++r) values[r] = get(first + 32 * r < n ? first + 32 * r : first);
#pragma unroll
    for (unsigned r = 0; r < kLoads; ++r) {
      if (first + 32 * r < n) put(first + 32 * r, values[r]);
    }
  }
}

// Columns that are eliminated at a time, and the row stride of the panel, which avoids bank conflicts of 16 bytes.
constexpr unsigned kPanel = 8, kPanelStride = kPanel + 2;

// Gauss-Jordan elimination in place with partial pivoting, without moving rows: step k takes the largest element of
// column k among the rows not yet taken, row `row_of_step[k]`. A panel of columns is eliminated by itself, and then its
// pivot rows are eliminated from all other columns; if a panel fits into the registers of a warp, by WarpElimination. A
// singular matrix has a log-determinant of minus infinity and an inverse that is not finite.
class Elimination {
 public:
  // Whether the matrix fits into the shared memory of every GPU from sm_80 on.
  static bool fits(int64_t n) { return n <= 96; }
  static int64_t shared_bytes(int64_t n) {
    if (n <= WarpElimination::kMaxSize) return WarpElimination::shared_bytes(n);
    const int64_t doubles = 1 + (kPanelStride + 1) * n + kPanel + (fits(n) ? n * n : 0), integers = 2 * n;
    return doubles * 8 + integers * 4;
  }

  // `workspace` has room for the matrices of all blocks, or is null if they fit into shared memory.
  __device__ Elimination(unsigned n, double* shared, double* workspace) : n_(n), stride_(n) {
    if (n <= WarpElimination::kMaxSize) {
      const WarpElimination by_warp(n, shared);
      stride_ = WarpElimination::stride(n);
      matrix_ = by_warp.matrix;
      pivots_ = by_warp.pivots;
      step_of_row_ = by_warp.step_of_row;
      row_of_step_ = by_warp.row_of_step;
      panel_ = shared;  // run_small() constructs WarpElimination again from here
      return;
    }
    panel_ = shared + reinterpret_cast<uintptr_t>(shared) / sizeof(double) % 2;  // aligned to 16 bytes
    scaled_ = panel_ + kPanelStride * n;
    pivots_ = scaled_ + kPanel;
    matrix_ = workspace != nullptr ? workspace + int64_t{blockIdx.x} * n * n : pivots_ + n;
    step_of_row_ = reinterpret_cast<unsigned*>(pivots_ + n + (workspace != nullptr ? 0 : n * n));
    row_of_step_ = step_of_row_ + n;
  }

  // Inverts the matrix of elements value(i, j), or does only what the determinant needs. All threads must call it.
  template <typename F>
  __device__ void run(const F& value, bool only_log_det) {
    if (n_ <= WarpElimination::kMaxSize) {
      run_small(value, only_log_det);
      return;
    }
    for (unsigned i = threadIdx.x / 32; i < n_; i += blockDim.x / 32) {
      along_row(
          n_, [&](unsigned j) { return value(i, j); },
          [&](unsigned j, double element) { matrix_[i * n_ + j] = element; });
    }
    for (unsigned i = threadIdx.x; i < n_; i += blockDim.x) step_of_row_[i] = n_;
    __syncthreads();
    for (unsigned first = 0; first < n_; first += kPanel) {
      const unsigned count = n_ - first < kPanel ? n_ - first : kPanel;
      for (unsigned i = threadIdx.x; i < n_; i += blockDim.x) {
#pragma unroll
        for (unsigned k = 0; k < kPanel; ++k) row_of_panel(i)[k] = k < count ? matrix_[i * n_ + first + k] : 0;
      }
      __syncthreads();
      eliminate_panel(first, count);
      eliminate_other_columns(first, count, only_log_det);
      __syncthreads();
    }
  }

  // The same for a matrix that is small enough for a warp, for kernels that have no registers for larger ones.
  template <typename F>
  __device__ void run_small(const F& value, bool only_log_det) {
    WarpElimination(n_, panel_).run(value, only_log_det);
  }

  // Element of the inverse, after a barrier.
  __device__ double inverse(unsigned i, unsigned j) const {
    return matrix_[row_of_step_[i] * stride_ + step_of_row_[j]];
  }

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
  __device__ double* row_of_panel(unsigned i) const { return panel_ + i * kPanelStride; }

  __device__ void eliminate_panel(unsigned first, unsigned count) {
    for (unsigned k = 0; k < count; ++k) {
      if (threadIdx.x < 32) choose_pivot(first, k);
      __syncthreads();
      const unsigned pivot_row = row_of_step_[first + k];
      for (unsigned i = threadIdx.x; i < n_; i += blockDim.x) {
        double* const row = row_of_panel(i);
        const double factor = row[k];
#pragma unroll
        for (unsigned j = 0; j < kPanel; j += 2) {
          const double2 old = *reinterpret_cast<const double2*>(row + j);
          const double first_rest = (j == k ? 0 : old.x) - factor * scaled_[j];
          const double second_rest = (j + 1 == k ? 0 : old.y) - factor * scaled_[j + 1];
          *reinterpret_cast<double2*>(row + j) = {i == pivot_row ? scaled_[j] : first_rest,
                                                  i == pivot_row ? scaled_[j + 1] : second_rest};
        }
      }
      __syncthreads();
    }
    for (unsigned i = threadIdx.x; i < n_; i += blockDim.x) {
      for (unsigned k = 0; k < count; ++k) matrix_[i * n_ + first + k] = row_of_panel(i)[k];
    }
  }

  // By one warp: chooses the row of step first + k, and computes what that row becomes in the panel.
  __device__ void choose_pivot(unsigned first, unsigned k) {
    double largest = 0;
    unsigned row = n_;
    for (unsigned i = threadIdx.x; i < n_; i += 32) {
      const double size = std::fabs(row_of_panel(i)[k]), order = size == size ? size : INFINITY;
      if (step_of_row_[i] == n_ && (row == n_ || order > largest)) {
        largest = order;
        row = i;
      }
    }
    // Numbers that are not negative are ordered like their bits. Of the rows with the largest, the first is chosen.
    const auto bits = static_cast<uint64_t>(__double_as_longlong(largest));
    const unsigned high = static_cast<unsigned>(bits >> 32), low = static_cast<unsigned>(bits);
    const unsigned max_high = __reduce_max_sync(kWholeWarp, high);
    const unsigned max_low = __reduce_max_sync(kWholeWarp, high == max_high ? low : 0);
    row = __reduce_min_sync(kWholeWarp, high == max_high && low == max_low ? row : n_);
    const double pivot = row_of_panel(row)[k];
    __syncwarp();  // until here other lanes read which rows are taken
    if (threadIdx.x < kPanel) {
      scaled_[threadIdx.x] = (threadIdx.x == k ? 1 : row_of_panel(row)[threadIdx.x]) / pivot;
    }
    if (threadIdx.x == 0) {
      pivots_[first + k] = pivot;
      step_of_row_[row] = first + k;
      row_of_step_[first + k] = row;
    }
  }

  // Eliminates the pivot rows of the panel from the other columns; a determinant needs only those to the right. A warp
  // has 64 columns of some rows, and the pivot rows in these columns in its registers.
  __device__ void eliminate_other_columns(unsigned first, unsigned count, bool only_log_det) {
    constexpr unsigned kColumns = 2, kRows = 8;  // of a lane at a time
    const unsigned begin = only_log_det ? first + count : 0, strips = (n_ - begin + 63) / 64;
    if (strips == 0) return;
    const unsigned warp = threadIdx.x / 32, groups = blockDim.x / 32 / strips, group = warp / strips;
    unsigned column[kColumns];
    bool has[kColumns];
    double pivot_rows[kColumns][kPanel];
#pragma unroll
    for (unsigned c = 0; c < kColumns; ++c) {
      const unsigned j = column[c] = begin + warp % strips * 64 + c * 32 + threadIdx.x % 32;
      has[c] = group < groups && j < n_ && (j < first || j >= first + count);
#pragma unroll
      for (unsigned k = 0; k < kPanel; ++k) {
        pivot_rows[c][k] = has[c] && k < count ? matrix_[row_of_step_[first + k] * n_ + j] : 0;
      }
    }
    __syncthreads();  // before others overwrite the pivot rows
    if (group >= groups) return;
    for (unsigned at = group; at < n_; at += kRows * groups) {
      double values[kRows][kColumns];
#pragma unroll
      for (unsigned r = 0; r < kRows; ++r) {
        const unsigned i = at + r * groups < n_ ? at + r * groups : at, step = step_of_row_[i];
        const bool of_panel = step >= first && step < first + count;
#pragma unroll
        for (unsigned c = 0; c < kColumns; ++c) values[r][c] = of_panel || !has[c] ? 0 : matrix_[i * n_ + column[c]];
      }
#pragma unroll
      for (unsigned r = 0; r < kRows; ++r) {
        const double* const factors = row_of_panel(at + r * groups < n_ ? at + r * groups : at);
#pragma unroll
        for (unsigned k = 0; k < kPanel; k += 2) {
          const double2 two = *reinterpret_cast<const double2*>(factors + k);
#pragma unroll
          for (unsigned c = 0; c < kColumns; ++c) {
            values[r][c] += two.x * pivot_rows[c][k];
            values[r][c] += two.y * pivot_rows[c][k + 1];
          }
        }
      }
#pragma unroll
      for (unsigned r = 0; r < kRows; ++r) {
        const unsigned i = at + r * groups;
#pragma unroll
        for (unsigned c = 0; c < kColumns; ++c) {
          if (i < n_ && has[c]) matrix_[i * n_ + column[c]] = values[r][c];
        }
      }
    }
  }

  unsigned n_, stride_;
  double *matrix_, *panel_, *pivots_, *scaled_;
  unsigned *step_of_row_, *row_of_step_;
};

// Threads of a block that works on n x n matrices: the square of an even number, for product().
inline int matrix_threads(int64_t n) { return n <= 32 ? 64 : 256; }

// Where the lines of a matrix, its rows or its columns, have nonzero elements. Those of a permutation have one each, so
// that multiplying by it is much faster than a product.
class Spans {
 public:
  // Doubles of shared memory.
  static int64_t size(int64_t n) { return n; }

  __device__ Spans(unsigned n, double* shared) : n_(n), first_(reinterpret_cast<unsigned*>(shared)), end_(first_ + n) {}

  // Finds the spans of the rows from `first` to `end`. All threads of a block must call it, as for find_in_columns().
  template <typename T>
  __device__ void find_in_rows(const T* matrix, unsigned first, unsigned end) {
    find(matrix, first, end, [](unsigned i, unsigned) { return i; }, [](unsigned, unsigned j) { return j; });
  }
  // Finds the spans of all columns.
  template <typename T>
  __device__ void find_in_columns(const T* matrix) {
    find(matrix, 0, n_, [](unsigned, unsigned j) { return j; }, [](unsigned i, unsigned) { return i; });
  }

  // The sum of f(place) over the span of a line, which is nearly always one place.
  template <typename F>
  __device__ double sum(unsigned line, const F& f) const {
    double total = 0;
#pragma unroll 1
    for (unsigned place = first_[line]; place < end_[line]; ++place) total += f(place);
    return total;
  }

 private:
  template <typename T, typename F, typename G>
  __device__ void find(const T* matrix, unsigned first, unsigned end, const F& line, const G& place) {
    constexpr unsigned kLoads = 8;  // loads in flight per thread
    for (unsigned i = threadIdx.x; i < n_; i += blockDim.x) {
      first_[i] = n_;
      end_[i] = 0;
    }
    __syncthreads();
#pragma unroll 1
    for (unsigned start = first * n_ + threadIdx.x; start < end * n_; start += kLoads * blockDim.x) {
      T found[kLoads];
#pragma unroll
      for (unsigned r = 0; r < kLoads; ++r) {
        const unsigned index = start + r * blockDim.x;
        found[r] = index < end * n_ ? matrix[index] : 0;
      }
      unsigned marks = 0;
#pragma unroll
      for (unsigned r = 0; r < kLoads; ++r) marks |= (found[r] != 0 ? 1u : 0u) << r;
      for (unsigned index = start; marks != 0; index += blockDim.x, marks >>= 1) {
        if ((marks & 1) == 0) continue;
        const unsigned i = index / n_, j = index % n_;
        atomicMin(&first_[line(i, j)], place(i, j));
        atomicMax(&end_[line(i, j)], place(i, j) + 1);
      }
    }
    __syncthreads();
  }

  unsigned n_;
  unsigned *first_, *end_;
};

// Shared memory of product(), in doubles.
constexpr unsigned kProductDepth = 8, kProductStride = 65;
constexpr unsigned kProductSize = 2 * kProductDepth * kProductStride;

// A square of elements of an n x n matrix that a block computes at a time.
struct MatrixTile {
  unsigned n, edge, first_row, first_column;

  // The number of tiles of a matrix.
  static __host__ __device__ unsigned count(unsigned n) { return (n + 63) / 64 * ((n + 63) / 64); }
  __device__ MatrixTile(unsigned n, unsigned index) : n(n), edge(n <= 32 ? 32 : 64) {
    const unsigned in_row = (n + edge - 1) / edge;
    first_row = index / in_row * edge;
    first_column = index % in_row * edge;
  }
  __device__ unsigned end_row() const { return first_row + edge < n ? first_row + edge : n; }
  __device__ unsigned end_column() const { return first_column + edge < n ? first_column + edge : n; }
};

// Calls put(i, j, sum over k of a(i, k) b(k, j)), k from `from` to `to`, for the elements of a tile. All threads of a
// block must call it, with a barrier before other threads read what is put.
template <typename F, typename G, typename H>
__device__ void product(const MatrixTile& tile, unsigned from, unsigned to, double* shared, const F& a, const G& b,
                        const H& put) {
  const unsigned n = tile.n, side = tile.edge / 4;  // a thread has 4 x 4 elements at this distance
  const unsigned row = threadIdx.x / side, column = threadIdx.x % side;
  double *const left = shared, *const right = shared + kProductDepth * kProductStride;
  double sums[4][4] = {};
  for (unsigned first = from; first < to; first += kProductDepth) {
    for (unsigned index = threadIdx.x; index < kProductDepth * tile.edge; index += blockDim.x) {
      const unsigned i = tile.first_row + index / kProductDepth, k = first + index % kProductDepth;
      left[index % kProductDepth * kProductStride + index / kProductDepth] = i < n && k < to ? a(i, k) : 0;
      const unsigned j = tile.first_column + index % tile.edge, l = first + index / tile.edge;
      right[index / tile.edge * kProductStride + index % tile.edge] = j < n && l < to ? b(l, j) : 0;
    }
    __syncthreads();
    for (unsigned k = 0; k < kProductDepth; ++k) {
      double factors[4], values[4];
#pragma unroll
      for (unsigned r = 0; r < 4; ++r) {
        factors[r] = left[k * kProductStride + row + r * side];
        values[r] = right[k * kProductStride + column + r * side];
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
      const unsigned i = tile.first_row + row + r * side, j = tile.first_column + column + c * side;
      if (i < n && j < n) put(i, j, sums[r][c]);
    }
  }
}

// The same for all elements, by one block.
template <typename F, typename G, typename H>
__device__ void product(unsigned n, double* shared, const F& a, const G& b, const H& put) {
  for (unsigned index = 0; index < MatrixTile::count(n); ++index) {
    product(MatrixTile(n, index), 0, n, shared, a, b, put);
  }
}

}  // namespace glow_kernels
