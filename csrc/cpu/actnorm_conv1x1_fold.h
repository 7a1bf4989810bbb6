// Folding ActNorm and the 1x1 convolution into one matrix on the CPU: what the instruction-set variants of its kernels
// offer. Everything is for one step; matrices are n x n, row by row, and arithmetic is in double.
#pragma once

#include <cstdint>

namespace glow_kernels {

// Largest C of the kernels; beyond, the matrix leaves the caches and the work belongs to BLAS and LAPACK.
constexpr int64_t kMaxChannels = 512;

// The parameters of a step, and the gradients in them. A is their type, float or double, const or not.
template <typename A>
struct StepParameters {
  A *log_scale, *bias, *weight;
  A* weight_log_det;  // null where it is computed from weight
};

// What a step is folded into, x -> M x + v, or the gradient in it.
template <typename A>
struct Folded {
  A *matrix, *shift;
};

// W = P L (U + diag(s)), or the gradients in it.
template <typename A>
struct LuFactors {
  A *permutation, *lower, *upper, *log_diagonal, *diagonal_sign;
};

template <typename A>
struct FoldKernels {
  using Parameters = StepParameters<const A>;
  // Writes x -> z.
  void (*fold)(int64_t n, const Parameters& step, const Folded<A>& result);
  // Returns its log-determinant per position, minus infinity for a singular matrix.
  double (*fold_log_det)(int64_t n, const Parameters& step);
  // Writes z -> x, NaN for a singular matrix, and returns its log-determinant per position.
  double (*fold_inverse)(int64_t n, const Parameters& step, const Folded<A>& result);
  // From the gradients of fold's results to those of the parameters. `inverse` is M^-1 where it is known, else null.
  void (*fold_backward)(int64_t n, const Folded<const A>& grad, double grad_log_det, const Parameters& step,
                        const A* inverse, const StepParameters<A>& result);
  // From the gradients of fold_inverse's results to those of the parameters.
  void (*fold_inverse_backward)(int64_t n, const Folded<const A>& grad, double grad_log_det, const Parameters& step,
                                const A* inverse, const StepParameters<A>& result);
  // Writes W and returns log|det W|.
  double (*lu_weight)(int64_t n, const LuFactors<const A>& factors, A* weight);
  // From the gradients of W and log|det W| to those of lower, upper and log_diagonal.
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
