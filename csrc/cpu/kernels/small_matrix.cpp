// Products and inverses of small matrices; compiled once per instruction set. All of them are made of one loop, which
// adds a few rows at once to another: so every element that is loaded and stored takes several products.
#include "cpu/small_matrix.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace glow_kernels::GLOW_KERNELS_ISA {
namespace {

constexpr int64_t kBlock = 8;

// For every r < rows: target[r][j] += sum over k of factors[r][k] source[k][j], j < n. All have rows at a stride;
// factors has kBlock columns, zeros where source has fewer rows.
template <int rows>
inline void add_rows(int64_t n, int64_t count, const double* factors, const double* __restrict source,
                     int64_t source_stride, double* __restrict target, int64_t target_stride) {
  if (count == kBlock) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      double sum[rows];
      for (int r = 0; r < rows; ++r) sum[r] = target[r * target_stride + j];
      for (int64_t k = 0; k < kBlock; ++k) {
        const double value = source[k * source_stride + j];
        for (int r = 0; r < rows; ++r) sum[r] += factors[r * kBlock + k] * value;
      }
      for (int r = 0; r < rows; ++r) target[r * target_stride + j] = sum[r];
    }
    return;
  }
  for (int r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t j = 0; j < n; ++j)
        target[r * target_stride + j] += factors[r * kBlock + k] * source[k * source_stride + j];
    }
  }
}

// The same for rows [begin, end) of a target; their factors are `sign` times columns [first, first + count) of a.
void add_products(int64_t n, int64_t begin, int64_t end, const double* a, int64_t a_stride, int64_t first,
                  int64_t count, double sign, const double* source, int64_t source_stride, double* target,
                  int64_t target_stride) {
  constexpr int kMany = 4;
  for (int64_t i = begin; i < end;) {
    const int rows = end - i >= kMany ? kMany : 1;
    double factors[kMany * kBlock] = {};
    for (int r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < count; ++k) factors[r * kBlock + k] = sign * a[(i + r) * a_stride + first + k];
    }
    if (rows == kMany) {
      add_rows<kMany>(n, count, factors, source, source_stride, target + i * target_stride, target_stride);
    } else {
      add_rows<1>(n, count, factors, source, source_stride, target + i * target_stride, target_stride);
    }
    i += rows;
  }
}

void multiply(int64_t n, const double* a, const double* b, double* c) {
  std::fill_n(c, n * n, 0.0);
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t count = std::min(kBlock, n - first);
    add_products(n, 0, n, a, n, first, count, 1.0, b + first * n, n, c, n);
  }
}

// Partial pivoting in columns [first, first + count): brings rows into place by swaps, which it writes to `swaps`.
// `panel` is a copy of these columns, in rows of kBlock, that is factored to find the pivots.
void choose_pivots(int64_t n, int64_t first, int64_t count, double* a, double* panel, int64_t* swaps) {
  for (int64_t i = first; i < n; ++i) std::copy_n(a + i * n + first, count, panel + i * kBlock);
  for (int64_t k = 0; k < count; ++k) {
    int64_t pivot = first + k;
    for (int64_t i = pivot + 1; i < n; ++i) {
      if (std::fabs(panel[i * kBlock + k]) > std::fabs(panel[pivot * kBlock + k])) pivot = i;
    }
    swaps[first + k] = pivot;
    if (pivot != first + k) {
      std::swap_ranges(a + pivot * n, a + pivot * n + n, a + (first + k) * n);
      std::swap_ranges(panel + pivot * kBlock, panel + pivot * kBlock + kBlock, panel + (first + k) * kBlock);
    }
    double row[kBlock];
    for (int64_t j = 0; j < kBlock; ++j) row[j] = j < k ? 0.0 : panel[(first + k) * kBlock + j];
    const double reciprocal = 1.0 / row[k];
    for (int64_t i = first + k + 1; i < n; ++i) {
      const double factor = panel[i * kBlock + k] * reciprocal;
      for (int64_t j = 0; j < kBlock; ++j) panel[i * kBlock + j] -= factor * row[j];
    }
  }
}

// Inverts the block d (count x count, its rows at a stride) whose pivots are in place; returns log|det d|.
double invert_block(int64_t count, double* d, int64_t stride) {
  double log_det = 0;
  for (int64_t k = 0; k < count; ++k) {
    const double pivot = d[k * stride + k];
    if (pivot == 0.0) return -std::numeric_limits<double>::infinity();
    log_det += std::log(std::fabs(pivot));
    d[k * stride + k] = 1.0;
    for (int64_t j = 0; j < count; ++j) d[k * stride + j] /= pivot;
    for (int64_t i = 0; i < count; ++i) {
      if (i == k) continue;
      const double factor = d[i * stride + k];
      d[i * stride + k] = 0.0;
      for (int64_t j = 0; j < count; ++j) d[i * stride + j] -= factor * d[k * stride + j];
    }
  }
  return log_det;
}

// Rows [begin, end) of A -= A[:, K] A[K, :], of which `rows` has the last `width` columns. Column K of A is zero
// meanwhile.
void eliminate(int64_t n, int64_t first, int64_t count, int64_t begin, int64_t end, const double* rows, int64_t width,
               double* a) {
  if (begin >= end) return;
  std::vector<double> factors((end - begin) * kBlock);
  for (int64_t i = begin; i < end; ++i) {
    std::copy_n(a + i * n + first, count, &factors[(i - begin) * kBlock]);
    std::fill_n(a + i * n + first, count, 0.0);
  }
  add_products(width, 0, end - begin, factors.data(), kBlock, 0, count, -1.0, rows, width, a + begin * n + n - width,
               n);
}

// Gauss-Jordan elimination by blocks, in place. For the block of rows and columns K with D = A[K, K]:
// A[K, :] = D^-1 A[K, :] and A[i, :] -= A[i, K] A[K, :] for the other rows, where column K becomes that of the inverse.
double invert(int64_t n, double* a, bool only_log_det) {
  std::vector<double> panel(n * kBlock), rows(n * kBlock);
  std::vector<int64_t> swaps(n);
  double log_det = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t count = std::min(kBlock, n - first);
    choose_pivots(n, first, count, a, panel.data(), swaps.data());
    double inverse[kBlock * kBlock];
    for (int64_t k = 0; k < count; ++k) std::copy_n(a + (first + k) * n + first, count, inverse + k * kBlock);
    log_det += invert_block(count, inverse, kBlock);
    if (!(log_det > -std::numeric_limits<double>::infinity())) break;
    // A[K, :] = D^-1 A[K, :], with D^-1 itself in its own columns.
    const int64_t from = only_log_det ? first : 0, width = n - from;
    std::fill(rows.begin(), rows.end(), 0.0);
    add_products(width, 0, count, inverse, kBlock, 0, count, 1.0, a + first * n + from, n, rows.data(), width);
    for (int64_t k = 0; k < count; ++k) {
      std::copy_n(inverse + k * kBlock, count, rows.data() + k * width + first - from);
      std::copy_n(rows.data() + k * width, width, a + (first + k) * n + from);
    }
    eliminate(n, first, count, only_log_det ? first + count : 0, first, rows.data(), width, a);
    eliminate(n, first, count, first + count, n, rows.data(), width, a);
  }
  const bool singular = !std::isfinite(log_det);
  if (singular && !only_log_det) std::fill_n(a, n * n, std::numeric_limits<double>::quiet_NaN());
  // A swap of rows of the matrix is one of columns of the inverse.
  for (int64_t k = n - 1; k >= 0 && !singular && !only_log_det; --k) {
    if (swaps[k] == k) continue;
    for (int64_t i = 0; i < n; ++i) std::swap(a[i * n + k], a[i * n + swaps[k]]);
  }
  return log_det;
}

}  // namespace

SmallMatrixKernels small_matrix_kernels() { return {multiply, invert}; }

}  // namespace glow_kernels::GLOW_KERNELS_ISA
