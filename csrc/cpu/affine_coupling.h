// The affine coupling on the CPU: what the instruction-set variants of its kernels offer.
#pragma once

#include "cpu/tile.h"
#include "glow_kernels/scale_map.h"

namespace glow_kernels {

enum class CouplingOrder { shift_scale, scale_shift, unshift_scale };

struct CouplingOptions {
  ScaleKind kind;
  CouplingOrder order;
  ScaleParameters<double> map;
};

// Each function works on one tile of `rows` x `columns` elements, at most kTile. T is the type of x and y, H that of h,
// of which u holds the raw scales and t the shifts.
template <typename T, typename H>
struct CouplingKernels {
  // Writes y, returns the sum of log s.
  double (*forward)(Strided<const T> x, Strided<const H> u, Strided<const H> t, Strided<T> y, int64_t rows,
                    int64_t columns, const CouplingOptions& options);
  // Writes x, returns minus the sum of log s.
  double (*inverse)(Strided<const T> y, Strided<const H> u, Strided<const H> t, Strided<T> x, int64_t rows,
                    int64_t columns, const CouplingOptions& options);
  // From dL/dy, dL/dlog_det and y to dL/dx, dL/du and dL/dt.
  void (*backward)(Strided<const T> grad, double grad_log_det, Strided<const T> y, Strided<const H> u,
                   Strided<const H> t, Strided<T> grad_x, Strided<H> grad_u, Strided<H> grad_t, int64_t rows,
                   int64_t columns, const CouplingOptions& options);
  // From dL/dx, dL/dlog_det and x to dL/dy, dL/du and dL/dt.
  void (*inverse_backward)(Strided<const T> grad, double grad_log_det, Strided<const T> x, Strided<const H> u,
                           Strided<const H> t, Strided<T> grad_y, Strided<H> grad_u, Strided<H> grad_t, int64_t rows,
                           int64_t columns, const CouplingOptions& options);
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
