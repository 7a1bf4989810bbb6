// Gauss-Jordan elimination, in double and by one block, of an n x n matrix that is small enough for a warp to hold a
// panel of its columns in registers.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/sums.h"

namespace glow_kernels {

// One warp eliminates a panel of columns: a lane has whole rows of it, so that a step takes one barrier of the warp and
// none of the block. Then all warps eliminate the pivot rows from the other columns. Rows are multiplied by the
// reciprocals of the pivots, which are finite for pivots from 2^-1024 on.
struct WarpElimination {
  static constexpr unsigned kPanel = 4, kSlots = 2, kMaxSize = 32 * kSlots;
  // Row strides that avoid bank conflicts: of the panel for reads of 16 bytes, and of the matrix.
  static constexpr unsigned kPanelStride = kPanel + 2;
  __host__ __device__ static constexpr unsigned stride(unsigned n) { return n | 1; }
  static constexpr int64_t shared_bytes(int64_t n) {
    const int64_t doubles = 1 + kPanelStride * n + 2 * kPanel + n * (n | 1) + n, integers = 3 * n;
    return doubles * 8 + integers * 4;
  }

  unsigned n;
  double *panel, *scaled, *matrix, *pivots;
  unsigned *step_of_row, *row_of_step;  // a row that is not taken yet has step n
  unsigned* free_rows;                  // the rows not taken yet

  __device__ WarpElimination(unsigned size, double* shared) : n(size) {
    panel = shared + reinterpret_cast<uintptr_t>(shared) / sizeof(double) % 2;  // aligned to 16 bytes
    scaled = panel + kPanelStride * n;
    matrix = scaled + 2 * kPanel;
    pivots = matrix + n * stride(n);
    step_of_row = reinterpret_cast<unsigned*>(pivots + n);
    row_of_step = step_of_row + n;
    free_rows = row_of_step + n;
  }

  // All threads must call it, of a block of at least two warps.
  template <typename F>
  __device__ void run(const F& value, bool only_log_det) const {
    load(value);
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) step_of_row[i] = n;
    __syncthreads();
    for (unsigned first = 0; first < n; first += kPanel) {
      const unsigned count = n - first < kPanel ? n - first : kPanel;
      if (threadIdx.x < 32) eliminate_panel(first, count);
      __syncthreads();
      eliminate_other_columns(first, count, only_log_det);
      __syncthreads();
    }
  }

 private:
  // A warp loads pieces of rows, several of which are in flight at once.
  template <typename F>
  __device__ void load(const F& value) const {
    constexpr unsigned kLoads = 6;
    const unsigned two = n > 32 ? 1 : 0, pieces = n << two, warps = blockDim.x / 32, lane = threadIdx.x % 32;
    for (unsigned first = threadIdx.x / 32; first < pieces; first += kLoads * warps) {
      double values[kLoads];
#pragma unroll
      for (unsigned k = 0; k < kLoads; ++k) {
        const unsigned piece = first + k * warps, i = piece >> two, j = (piece & two) * 32 + lane;
        const bool inside = piece < pieces && j < n;
        values[k] = value(inside ? i : 0, inside ? j : 0);  // without a branch, which would wait for each load
      }
#pragma unroll
      for (unsigned k = 0; k < kLoads; ++k) {
        const unsigned piece = first + k * warps, i = piece >> two, j = (piece & two) * 32 + lane;
        if (piece < pieces && j < n) matrix[i * stride(n) + j] = values[k];
      }
    }
  }

  // By one warp, whose lanes have two rows each. The column of a step is always the first in the registers: a step
  // shifts all columns to the left, and what its own column becomes goes to the end.
  __device__ void eliminate_panel(unsigned first, unsigned count) const {
    const unsigned lane = threadIdx.x;
    double rows[kSlots][kPanel];
    bool free[kSlots];
#pragma unroll
    for (unsigned s = 0; s < kSlots; ++s) {
      const unsigned i = lane + 32 * s;
      free[s] = i < n && step_of_row[i] == n;
#pragma unroll
      for (unsigned k = 0; k < kPanel; ++k) {
        rows[s][k] = i < n && k < count ? matrix[i * stride(n) + first + k] : 0;
      }
    }
#pragma unroll 1
    for (unsigned k = 0; k < count; ++k) {
      double* const pivot_row = scaled + k % 2 * kPanel;  // other lanes may still read that of the last step
      choose_pivot(rows, free, first + k, pivot_row);
      __syncwarp();
      double factors[kSlots];
#pragma unroll
      for (unsigned s = 0; s < kSlots; ++s) factors[s] = rows[s][0];
      double become[kPanel];
#pragma unroll
      for (unsigned j = 0; j < kPanel; j += 2) {
        const double2 pair = *reinterpret_cast<const double2*>(pivot_row + j);
        become[j] = pair.x;
        become[j + 1] = pair.y;
      }
#pragma unroll
      for (unsigned s = 0; s < kSlots; ++s) {
#pragma unroll
        for (unsigned j = 1; j < kPanel; ++j) rows[s][j - 1] = rows[s][j] - factors[s] * become[j];
        rows[s][kPanel - 1] = -factors[s] * become[0];
      }
    }
    unsigned before = 0;
#pragma unroll
    for (unsigned s = 0; s < kSlots; ++s) {
      const unsigned i = lane + 32 * s, all_free = __ballot_sync(kWholeWarp, free[s]);
      if (free[s]) free_rows[before + __popc(all_free & ((1u << lane) - 1))] = i;
      before += __popc(all_free);
      if (i >= n) continue;
#pragma unroll
      for (unsigned j = 0; j < kPanel; ++j) {
        const unsigned k = (j + count) % kPanel;
        panel[i * kPanelStride + k] = rows[s][j];
        if (k < count) matrix[i * stride(n) + first + k] = rows[s][j];
      }
    }
  }

  // Chooses the pivot row of a step and writes to `pivot_row` what it becomes: its elements divided by the pivot, and
  // 1 / pivot in place of the pivot. In the registers the row becomes (-1, 0, ...), from which the step computes the
  // same values as for other rows: 0 - (-1) times `pivot_row`.
  __device__ void choose_pivot(double (&rows)[kSlots][kPanel], bool (&free)[kSlots], unsigned step,
                               double* pivot_row) const {
    constexpr uint64_t kSign = uint64_t{1} << 63, kInfinity = 0x7ff0000000000000u;
    // Numbers that are not negative are ordered like their bits; NaN counts as infinity.
    uint64_t largest = 0;
    unsigned mine = n;
    double pivot = 1;
#pragma unroll
    for (unsigned s = 0; s < kSlots; ++s) {
      const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(rows[s][0])) & ~kSign;
      const uint64_t order = bits < kInfinity ? bits : kInfinity;
      if (free[s] && (mine == n || order > largest)) {
        largest = order;
        mine = threadIdx.x + 32 * s;
        pivot = rows[s][0];
      }
    }
    const unsigned high = static_cast<unsigned>(largest >> 32), low = static_cast<unsigned>(largest);
    const unsigned max_high = __reduce_max_sync(kWholeWarp, high);
    const double reciprocal = 1 / pivot;  // overlaps with the choice among the lanes, which takes as long
    bool chosen = high == max_high;
    if (__popc(__ballot_sync(kWholeWarp, chosen)) > 1) {
      const unsigned max_low = __reduce_max_sync(kWholeWarp, chosen ? low : 0);
      chosen = chosen && low == max_low;
      chosen = mine == __reduce_min_sync(kWholeWarp, chosen ? mine : n);
    }
    if (!chosen) return;
#pragma unroll
    for (unsigned s = 0; s < kSlots; ++s) {
      if (mine != threadIdx.x + 32 * s) continue;
      pivot_row[0] = reciprocal;
      rows[s][0] = -1;
#pragma unroll
      for (unsigned j = 1; j < kPanel; ++j) {
        pivot_row[j] = rows[s][j] * reciprocal;
        rows[s][j] = 0;
      }
      free[s] = false;
    }
    pivots[step] = pivot;
    step_of_row[mine] = step;
    row_of_step[step] = mine;
  }

  // Eliminates the pivot rows of the panel from the other columns, of which a determinant needs those to the right, in
  // the rows not yet taken. A warp has 32 columns of some rows.
  __device__ void eliminate_other_columns(unsigned first, unsigned count, bool only_log_det) const {
    constexpr unsigned kRows = 3;  // at a time
    const unsigned begin = only_log_det ? first + count : 0, pieces = (n - begin + 31) / 32;
    const unsigned warp = threadIdx.x / 32, groups = pieces == 2 ? blockDim.x / 64 : blockDim.x / 32;
    const unsigned group = pieces == 2 ? warp / 2 : warp,
                   j = begin + (pieces == 2 ? warp % 2 * 32 : 0) + threadIdx.x % 32;
    const bool works = group < groups && j < n && (j < first || j >= first + count);
    double pivot_rows[kPanel];
#pragma unroll
    for (unsigned k = 0; k < kPanel; ++k) {
      pivot_rows[k] = works && k < count ? matrix[row_of_step[first + k] * stride(n) + j] : 0;
    }
    __syncthreads();  // before others overwrite the pivot rows
    if (!works) return;
    const unsigned end = only_log_det ? n - begin : n;
    for (unsigned at = group; at < end; at += kRows * groups) {
      unsigned row[kRows];
      double values[kRows];
#pragma unroll
      for (unsigned r = 0; r < kRows; ++r) {
        const unsigned index = at + r * groups < end ? at + r * groups : at;
        row[r] = only_log_det ? free_rows[index] : index;
        const unsigned step = step_of_row[row[r]];
        values[r] = step >= first && step < first + count ? 0 : matrix[row[r] * stride(n) + j];
      }
#pragma unroll
      for (unsigned k = 0; k < kPanel; k += 2) {
#pragma unroll
        for (unsigned r = 0; r < kRows; ++r) {
          const double2 factors = *reinterpret_cast<const double2*>(panel + row[r] * kPanelStride + k);
          values[r] += factors.x * pivot_rows[k];
          values[r] += factors.y * pivot_rows[k + 1];
        }
      }
#pragma unroll
      for (unsigned r = 0; r < kRows; ++r) {
        if (at + r * groups < end) matrix[row[r] * stride(n) + j] = values[r];
      }
    }
  }
};

}  // namespace glow_kernels
