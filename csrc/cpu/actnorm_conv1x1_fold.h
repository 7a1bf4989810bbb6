// Folding ActNorm and the 1x1 convolution into one matrix on the CPU: the kernels that every instruction-set variant
// provides. A call handles one step; matrices are n x n, row-major, and arithmetic is in double.
#pragma once

#include <cstdint>

namespace glow_kernels {

// The largest C that the kernels take: larger matrices do not fit into the caches, and BLAS and LAPACK do better there.
constexpr int64_t kMaxChannels = 512;

// The parameters of a step, or their gradients. A is float or double, const or not.
template <typename A>
struct StepParameters {
  A *log_scale, *bias, *weight;
  A* weight_log_det;  // null where it is computed from weight
};

// A folded step, x -> M x + v, or the gradients of M and v.
template <typename A>
struct Folded {
  A *matrix, *shift;
};

// The factors of W = P L (U + diag(s)), or their gradients.
template <typename A>
struct LuFactors {
  A *permutation, *lower, *upper, *log_diagonal, *diagonal_sign;
};

template <typename A>
struct FoldKernels {
  using Parameters = StepParameters<const A>;
  // Folds x -> z.
  void (*fold)(int64_t n, const Parameters& step, const Folded<A>& result);
  // Returns the log-determinant of x -> z per position, minus infinity for a singular matrix.
  double (*fold_log_det)(int64_t n, const Parameters& step);
  // Folds z -> x, into NaN for a singular matrix, and returns its log-determinant per position.
  double (*fold_inverse)(int64_t n, const Parameters& step, const Folded<A>& result);
  // Computes the gradients of the parameters from those of fold's results. `inverse` is M^-1, or null if not known.
  void (*fold_backward)(int64_t n, const Folded<const A>& grad, double grad_log_det, const Parameters& step,
                        const A* inverse, const StepParameters<A>& result);
  // Computes the gradients of the parameters from those of fold_inverse's results.
  void (*fold_inverse_backward)(int64_t n, const Folded<const A>& grad, double grad_log_det, const Parameters& step,
                                const A* inverse, const StepParameters<A>& result);
  // Writes W and returns log|det W|.
  double (*lu_weight)(int64_t n, const LuFactors<const A>& factors, A* weight);
  // Computes the gradients of lower, upper and log_diagonal from those of W and log|det W|.
  void (*lu_weight_backward)(int64_t n, const A* grad_weight, double grad_log_det, const LuFactors<const A>& factors,
                             const LuFactors<A>& result);
};

namespace baseline {
template <typename A>
FoldKernels<A> fold_kernels();
}
namespace avx2 {
template <typename A>
FoldKernels<A> fold_kernels();
}
namespace avx512 {
template <typename A>
FoldKernels<A> fold_kernels();
}

}  // namespace glow_kernels
