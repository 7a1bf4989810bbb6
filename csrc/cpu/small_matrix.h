// Products and inverses of C x C matrices on the CPU, row by row and in double: what the folding of a step is made of.
#pragma once

#include <cstdint>

namespace glow_kernels {

struct SmallMatrixKernels {
  // c = a b for n x n matrices.
  void (*multiply)(int64_t n, const double* a, const double* b, double* c);
  // Puts the inverse of a in its place, unless only the determinant is asked for, and returns log|det a|; for a
  // singular matrix NaN, and minus infinity or NaN.
  double (*invert)(int64_t n, double* a, bool only_log_det);
};

namespace baseline {
SmallMatrixKernels small_matrix_kernels();
}
namespace avx2 {
SmallMatrixKernels small_matrix_kernels();
}
namespace avx512 {
SmallMatrixKernels small_matrix_kernels();
}

}  // namespace glow_kernels
