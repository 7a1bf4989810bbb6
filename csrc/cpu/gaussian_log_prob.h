// The diagonal Gaussian on the CPU: the kernels that every instruction-set variant provides.
#pragma once

#include "cpu/tile.h"

namespace glow_kernels {

// One tile of all arguments and results, `rows` x `columns` elements, at most kTile. T is the type of z and eps, H that
// of h, which holds the means and the logarithms of the standard deviations; their gradients go to `grad_mean` and
// `grad_log_sd`. GaussianKernels says which members each kernel uses.
template <typename T, typename H>
struct GaussianTile {
  int64_t rows, columns;
  Strided<const T> data;
  Strided<const H> mean, log_sd;
  Strided<const T> grad;  // of the result
  double grad_log_prob;
  Strided<T> result;  // or the gradient of the data
  Strided<H> grad_mean, grad_log_sd;
};

template <typename T, typename H>
struct GaussianKernels {
  using Kernel = double(const GaussianTile<T, H>&);
  // Returns the sum of the log-densities of z.
  Kernel* forward;
  // From z and dL/dlog_prob to dL/dz and the gradients of h; what it and those below return is meaningless.
  Kernel* backward;
  // From eps to z = mean + sd eps.
  Kernel* sample;
  // From eps and dL/dz to dL/deps and the gradients of h.
  Kernel* sample_backward;
  // From z to eps = (z - mean) / sd.
  Kernel* standardize;
  // From eps and dL/deps to dL/dz and the gradients of h.
  Kernel* standardize_backward;
};

namespace baseline {
template <typename T, typename H>
GaussianKernels<T, H> gaussian_kernels();
}
namespace avx2 {
template <typename T, typename H>
GaussianKernels<T, H> gaussian_kernels();
}
namespace avx512 {
template <typename T, typename H>
GaussianKernels<T, H> gaussian_kernels();
}

}  // namespace glow_kernels
