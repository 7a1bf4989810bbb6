// Products and inverses of C x C matrices on the CPU, row by row and in double: what the folding of a step is made of.
#pragma once

#include <cstdint>

namespace glow_kernels {

struct SmallMatrixKernels {
  // c = a b for n x n matrices.
  void (*multiply)(int64_t n, const double* a, const double* b, double* c);
  // The inverse of a, which is destroyed, and log|det a|; of a singular matrix NaN and minus infinity.
  double (*invert)(int64_t n, double* a, double* inverse);
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
