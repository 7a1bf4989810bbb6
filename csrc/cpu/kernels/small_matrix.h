// Determinants, inverses and products of n x n matrices in double, whose rows are zero-padded to whole vectors: the
// building blocks of folding a step. Compiled once per instruction set.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/kernels/padded_matrix.h"

namespace glow_kernels::GLOW_KERNELS_ISA {

// Columns that are eliminated at a time. A multiple of every vector length, so that the columns to their right begin at
// a whole vector.
constexpr int64_t kBlock = 16;

// The workspace of an elimination, besides the matrix itself.
struct Elimination {
  Rows<double> panel;  // columns of the matrix as rows, kBlock x n
  Rows<double> rows;   // rows of the matrix, kBlock x n
  double* factors;     // n x kBlock
  int64_t* swaps;      // n, row k was swapped with swaps[k]
  int64_t* order;      // n

  explicit Elimination(int64_t n) {
    static thread_local KeptBuffer<double> values;
    static thread_local KeptBuffer<int64_t> indices;
    const int64_t stride = padded(n, kLanes<double>);
    double* data = values.reserve(3 * kBlock * stride);
    panel = {data, stride};
    rows = {data + kBlock * stride, stride};
    factors = data + 2 * kBlock * stride;
    swaps = indices.reserve(2 * n);
    order = swaps + n;
  }
};

// The index of the largest magnitude in values[begin, end), the first if there are several.
inline int64_t index_of_largest(const double* values, int64_t begin, int64_t end) {
  double max_magnitude = 0;
#pragma omp simd reduction(max : max_magnitude)
  for (int64_t i = begin; i < end; ++i) {
    const double magnitude = std::fabs(values[i]);
    max_magnitude = magnitude > max_magnitude ? magnitude : max_magnitude;
  }
  for (int64_t i = begin; i < end; ++i) {
    if (std::fabs(values[i]) == max_magnitude) return i;
  }
  return begin;  // all are NaN
}

// Factors a copy of columns [first, first + count) of a, from row `first` on, with partial pivoting: `panel` then holds
// U and, below its diagonal, the negated multipliers. Swaps rows of a from column `from` on.
inline void factor_panel(int64_t n, int64_t first, int64_t count, int64_t from, Rows<double> a,
                         const Elimination& work) {
  const auto column = [&](int64_t k) { return work.panel.data + k * work.panel.stride; };
  for (int64_t i = first; i < n; ++i) {
    for (int64_t k = 0; k < count; ++k) column(k)[i] = a.data[i * a.stride + first + k];
  }
  for (int64_t k = 0; k < count; ++k) {
    const int64_t row = first + k, pivot = index_of_largest(column(k), row, n);
    work.swaps[row] = pivot;
    if (pivot != row) {
      for (int64_t j = 0; j < count; ++j) std::swap(column(j)[row], column(j)[pivot]);
      std::swap_ranges(a.data + row * a.stride + from, a.data + row * a.stride + n, a.data + pivot * a.stride + from);
    }
    double* multipliers = column(k);
    const double minus_reciprocal = -1.0 / multipliers[row];
#pragma omp simd
    for (int64_t i = row + 1; i < n; ++i) multipliers[i] *= minus_reciprocal;
    for (int64_t j = k + 1; j < count; ++j) {
      double* other = column(j);
      const double factor = other[row];
#pragma omp simd
      for (int64_t i = row + 1; i < n; ++i) other[i] += multipliers[i] * factor;
    }
  }
}

// The logarithm of a product of magnitudes, which may exceed the range of a double. A sum of their logarithms would
// lose accuracy: its partial sums can be large where the total is not.
class LogProduct {
 public:
  void multiply(double value) {
    int of_value, of_product;
    mantissa_ = std::frexp(mantissa_ * std::frexp(std::fabs(value), &of_value), &of_product);
    exponent_ += of_value + of_product;
  }

  double log() const { return exponent_ * 0.693147180559945309 + std::log(mantissa_); }

 private:
  double mantissa_ = 1;
  int64_t exponent_ = 0;
};

// log|det a|, minus infinity for a singular matrix, by an LU decomposition that keeps only what it needs; overwrites a.
inline double log_abs_det(int64_t n, Rows<double> a) {
  const Elimination work(n);
  LogProduct det;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t count = std::min(kBlock, n - first), next = first + count;
    factor_panel(n, first, count, first, a, work);
    for (int64_t k = 0; k < count; ++k) {
      const double pivot = work.panel.data[k * work.panel.stride + first + k];
      if (pivot == 0.0) return -std::numeric_limits<double>::infinity();
      det.multiply(pivot);
    }
    if (next == n) break;
    // Completes the rows of U, then updates the trailing submatrix.
    double* upper = a.data + first * a.stride + next;
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t i = k + 1; i < count; ++i) {
        const double factor = work.panel.data[k * work.panel.stride + first + i];
        const double* source = upper + k * a.stride;
        double* target = upper + i * a.stride;
#pragma omp simd
        for (int64_t j = 0; j < n - next; ++j) target[j] += factor * source[j];
      }
    }
    multiply<Small::left, Stores::cached, Start::result, double>(
        {work.panel.data + next, work.panel.stride}, {upper, a.stride}, nullptr,
        {a.data + next * a.stride + next, a.stride}, n - next, count, n - next);
  }
  return det.log();
}

// Inverts the block d (count x count, in rows of kBlock), whose rows are already pivoted, and multiplies `det` by its
// pivots. Returns whether d is invertible.
inline bool invert_block(int64_t count, double* d, LogProduct& det) {
  for (int64_t k = 0; k < count; ++k) {
    const double pivot = d[k * kBlock + k];
    det.multiply(pivot);
    if (pivot == 0.0) return false;
    const double reciprocal = 1.0 / pivot;
    d[k * kBlock + k] = 1.0;
    for (int64_t j = 0; j < kBlock; ++j) d[k * kBlock + j] *= reciprocal;
    for (int64_t i = 0; i < count; ++i) {
      if (i == k) continue;
      const double factor = d[i * kBlock + k];
      d[i * kBlock + k] = 0.0;
      for (int64_t j = 0; j < kBlock; ++j) d[i * kBlock + j] -= factor * d[k * kBlock + j];
    }
  }
  return true;
}

// Inverts a in place and returns log|det a|. A singular matrix becomes NaN, and its result is minus infinity or NaN.
//
// Gauss-Jordan elimination by blocks. For the block of rows and columns K with D = A[K, K]: A[K, :] = D^-1 A[K, :] and
// A[i, :] -= A[i, K] A[K, :] for the other rows, while the columns K become those of the inverse.
inline double invert(int64_t n, Rows<double> a) {
  const Elimination work(n);
  const auto row = [&](int64_t i) { return a.data + i * a.stride; };
  LogProduct det;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t count = std::min(kBlock, n - first), next = first + count;
    factor_panel(n, first, count, 0, a, work);
    double inverse[kBlock * kBlock] = {};
    for (int64_t k = 0; k < count; ++k) std::copy_n(row(first + k) + first, count, inverse + k * kBlock);
    if (!invert_block(count, inverse, det)) break;
    multiply<Small::right, Stores::cached, Start::shift, double>({inverse, kBlock}, {row(first), a.stride}, nullptr,
                                                                 work.rows, count, count, n);
    for (int64_t k = 0; k < count; ++k) {
      double* result = work.rows.data + k * work.rows.stride;
      std::copy_n(inverse + k * kBlock, count, result + first);
      std::copy_n(result, n, row(first + k));
    }
    for (int64_t i = 0; i < n; ++i) {
      if (i >= first && i < next) continue;
      for (int64_t k = 0; k < count; ++k) {
        work.factors[i * kBlock + k] = -row(i)[first + k];
        row(i)[first + k] = 0.0;
      }
    }
    const auto eliminate = [&](int64_t begin, int64_t end) {
      multiply<Small::right, Stores::cached, Start::result, double>({work.factors + begin * kBlock, kBlock},
                                                                    {work.rows.data, work.rows.stride}, nullptr,
                                                                    {row(begin), a.stride}, end - begin, count, n);
    };
    eliminate(0, first);
    eliminate(next, n);
  }
  const double log_det = det.log();
  if (!std::isfinite(log_det)) {
    for (int64_t i = 0; i < n; ++i) std::fill_n(row(i), n, std::numeric_limits<double>::quiet_NaN());
    return log_det;
  }
  // Swapped rows of the matrix are swapped columns of the inverse.
  for (int64_t k = 0; k < n; ++k) work.order[k] = k;
  for (int64_t k = n - 1; k >= 0; --k) std::swap(work.order[k], work.order[work.swaps[k]]);
  double* swapped = work.rows.data;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < n; ++k) swapped[k] = row(i)[work.order[k]];
    std::copy_n(swapped, n, row(i));
  }
  return log_det;
}

// c = a b.
inline void multiply(int64_t n, Rows<const double> a, Rows<const double> b, Rows<double> c) {
  multiply<Small::right>(a, b, static_cast<const double*>(nullptr), c, n, n, n);
}

}  // namespace glow_kernels::GLOW_KERNELS_ISA
