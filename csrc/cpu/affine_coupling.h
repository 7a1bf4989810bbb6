// The affine coupling on the CPU: what the instruction-set variants of its kernels offer.
#pragma once

#include "cpu/tile.h"
#include "glow_kernels/coupling_options.h"

namespace glow_kernels {

// One tile of all arguments and results, `rows` x `columns` elements, at most kTile. T is the type of x and y, H that
// of h, of which `u` holds the raw scales and `t` the shifts. Which members a kernel uses stands with the kernel.
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
  A* grad_gain;   // contributions of all elements, rows x columns; null for none
  bool streamed;  // whether the results are too large for the caches
};

template <typename T, typename H>
struct CouplingKernels {
  using Kernel = double(const CouplingTile<T, H>&, const CouplingOptions&);
  // From x to y; returns the sum of log s.
  Kernel* forward;
  // From y to x; returns minus the sum of log s.
  Kernel* inverse;
  // From y, dL/dy and dL/dlog_det to dL/dx, dL/du, dL/dt and dL/dgain; returns nothing of use, as those below.
  Kernel* backward;
  // From x, dL/dx and dL/dlog_det to dL/dy, dL/du, dL/dt and dL/dgain.
  Kernel* inverse_backward;
  // What backward does, and x.
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
