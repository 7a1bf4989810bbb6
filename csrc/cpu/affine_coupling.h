// The affine coupling on the CPU: the kernels that every instruction-set variant provides.
#pragma once

#include "cpu/tile.h"
#include "glow_kernels/coupling_options.h"

namespace glow_kernels {

// One tile of all arguments and results, `rows` x `columns` elements, at most kTile. T is the type of x and y, H that
// of h, which holds the raw scales `u` and the shifts `t`. CouplingKernels says which members each kernel uses.
template <typename T, typename H>
struct CouplingTile {
  using A = compute_t<T>;
  int64_t rows, columns;
  Strided<const T> data;  // x or y
  Strided<const H> u, t;
  Strided<const A> gain;  // of each element's channel; null for none
  Strided<const T> grad;  // gradient of the result
  double grad_log_det;
  Strided<T> result;  // y, or x for the inverse and the reversible backward
  Strided<T> grad_data;
  Strided<H> grad_u, grad_t;
  A* grad_gain;   // the contribution of every element, rows x columns; null for none
  bool streamed;  // whether the results are too large for the caches
};

template <typename T, typename H>
struct CouplingKernels {
  using Kernel = double(const CouplingTile<T, H>&, const CouplingOptions&);
  // From x to y; returns the sum of log s.
  Kernel* forward;
  // From y to x; returns minus the sum of log s.
  Kernel* inverse;
  // From y, dL/dy and dL/dlog_det to dL/dx, dL/du, dL/dt and dL/dgain; what it and those below return is meaningless.
  Kernel* backward;
  // From x, dL/dx and dL/dlog_det to dL/dy, dL/du, dL/dt and dL/dgain.
  Kernel* inverse_backward;
  // The same as backward, and x.
  Kernel* reversible_backward;
};

namespace baseline {
template <typename T, typename H>
CouplingKernels<T, H> coupling_kernels();
}
namespace avx2 {
template <typename T, typename H>
CouplingKernels<T, H> coupling_kernels();
}
namespace avx512 {
template <typename T, typename H>
CouplingKernels<T, H> coupling_kernels();
}

}  // namespace glow_kernels
