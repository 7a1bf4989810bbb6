// Products and inverses of small matrices; compiled once per instruction set.
#include "cpu/small_matrix.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace glow_kernels::GLOW_KERNELS_ISA {
namespace {

// row += factor * other
inline void add_row(int64_t n, double factor, const double* __restrict other, double* __restrict row) {
  for (int64_t j = 0; j < n; ++j) row[j] += factor * other[j];
}

void multiply(int64_t n, const double* a, const double* b, double* c) {
  std::fill_n(c, n * n, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < n; ++k) {
      if (a[i * n + k] != 0.0) add_row(n, a[i * n + k], b + k * n, c + i * n);  // half of a triangle is zero
    }
  }
}

// Gauss-Jordan elimination with partial pivoting.
double invert(int64_t n, double* a, double* inverse) {
  std::fill_n(inverse, n * n, 0.0);
  for (int64_t i = 0; i < n; ++i) inverse[i * n + i] = 1.0;
  double log_det = 0;
  for (int64_t k = 0; k < n; ++k) {
    int64_t pivot = k;
    for (int64_t i = k + 1; i < n; ++i) {
      if (std::fabs(a[i * n + k]) > std::fabs(a[pivot * n + k])) pivot = i;
    }
    if (pivot != k) {
      std::swap_ranges(a + k * n, a + k * n + n, a + pivot * n);
      std::swap_ranges(inverse + k * n, inverse + k * n + n, inverse + pivot * n);
    }
    const double value = a[k * n + k];
    if (value == 0.0) {
      std::fill_n(inverse, n * n, std::numeric_limits<double>::quiet_NaN());
      return -std::numeric_limits<double>::infinity();
    }
    log_det += std::log(std::fabs(value));
    for (int64_t j = 0; j < n; ++j) {
      a[k * n + j] /= value;
      inverse[k * n + j] /= value;
    }
    for (int64_t i = 0; i < n; ++i) {
      if (i == k) continue;
      const double factor = -a[i * n + k];
      add_row(n, factor, a + k * n, a + i * n);
      add_row(n, factor, inverse + k * n, inverse + i * n);
    }
  }
  return log_det;
}

}  // namespace

SmallMatrixKernels small_matrix_kernels() { return {multiply, invert}; }

}  // namespace glow_kernels::GLOW_KERNELS_ISA
