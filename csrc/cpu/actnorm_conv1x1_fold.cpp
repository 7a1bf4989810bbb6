// Folding ActNorm and the 1x1 convolution into one matrix on the CPU, for a batch of steps. The mathematics is
// described in glow_kernels/ops/actnorm_conv1x1.py, the arithmetic is in cpu/kernels/actnorm_conv1x1_fold.cpp.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/steps.h"

namespace glow_kernels {
namespace {

// Calls f.operator()<A>() with the type of the parameters, float or double.
template <typename F>
auto dispatch_parameters(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Float) return f.template operator()<float>();
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, "parameters must be float32 or float64");
  return f.template operator()<double>();
}

// Sizes of a batch (*K, C, C).
struct Sizes {
  int64_t steps, n;

  explicit Sizes(const Tensor& matrix) : steps(1), n(matrix.size(-1)) {
    STD_TORCH_CHECK(matrix.dim() >= 2 && matrix.size(-2) == n, "weight must be (*K, C, C)");
    STD_TORCH_CHECK(n >= 1 && n <= kMaxChannels, "the native backend takes 1 to ", kMaxChannels, " channels, got ", n);
    for (int64_t dimension = 0; dimension < matrix.dim() - 2; ++dimension) steps *= matrix.size(dimension);
  }
};

// An uninitialised tensor (*K) for a matrix (*K, C, C).
Tensor empty_per_step(const Tensor& matrix) {
  const auto sizes = matrix.sizes();
  return empty(std::vector<int64_t>{sizes.begin(), sizes.end() - 2}, matrix.scalar_type(), matrix);
}

template <typename F>
void for_each_step(const Sizes& sizes, const F& f) {
  // Minimum number of steps per thread.
  const int64_t grain = std::max<int64_t>(1, 32768 / (sizes.n * sizes.n * sizes.n));
  torch::stable::parallel_for(0, sizes.steps, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(k);
  });
}

template <bool is_inverse>
std::tuple<Tensor, Tensor, Tensor> fold(const Tensor& log_scale, const Tensor& bias, const Tensor& weight,
                                        std::optional<Tensor> weight_log_det) {
  const Sizes sizes(weight);
  const int64_t n = sizes.n;
  Tensor matrix = empty_contiguous(weight), shift = empty_contiguous(bias);
  Tensor log_det = empty_per_step(weight);
  std::vector<char> is_singular(sizes.steps);
  dispatch_parameters(weight, [&]<typename A>() {
    const InputParameters<A> parameters(log_scale, bias, weight, weight_log_det, sizes.steps, n);
    const FoldKernels<A> kernels = fold_kernels<A>();
    A *matrices = matrix.mutable_data_ptr<A>(), *shifts = shift.mutable_data_ptr<A>();
    A* log_dets = log_det.mutable_data_ptr<A>();
    for_each_step(sizes, [&](int64_t k) {
      const Folded<A> result{matrices + k * n * n, shifts + k * n};
      if constexpr (is_inverse) {
        log_dets[k] = static_cast<A>(kernels.fold_inverse(n, parameters.step(k), result));
        is_singular[k] = std::isnan(*result.matrix);
      } else {
        kernels.fold(n, parameters.step(k), result);
        log_dets[k] = static_cast<A>(kernels.fold_log_det(n, parameters.step(k)));
      }
    });
  });
  for (char singular : is_singular) check_invertible(!singular, n);  // an exception must not leave a parallel loop
  return {matrix, shift, log_det};
}

template <bool is_inverse>
std::tuple<Tensor, Tensor, Tensor, Tensor> fold_backward(const Tensor& grad_matrix, const Tensor& grad_shift,
                                                         const Tensor& grad_log_det, const Tensor& log_scale,
                                                         const Tensor& bias, const Tensor& weight,
                                                         std::optional<Tensor> weight_log_det) {
  const Sizes sizes(weight);
  const int64_t n = sizes.n;
  ParameterGradients grads(log_scale, bias, weight, weight_log_det);
  dispatch_parameters(weight, [&]<typename A>() {
    const InputParameters<A> parameters(log_scale, bias, weight, weight_log_det, sizes.steps, n);
    const Input<A> matrices(grad_matrix, sizes.steps, n * n), shifts(grad_shift, sizes.steps, n);
    const Input<A> log_dets(grad_log_det, sizes.steps, 1);
    const auto table = fold_kernels<A>();
    const auto kernel = is_inverse ? table.fold_inverse_backward : table.fold_backward;
    for_each_step(sizes, [&](int64_t k) {
      kernel(n, {matrices.step(k), shifts.step(k)}, *log_dets.step(k), parameters.step(k), nullptr, grads.step<A>(k));
    });
  });
  return {grads.log_scale, grads.bias, grads.weight, grads.weight_log_det};
}

template <typename A>
class InputFactors {
 public:
  InputFactors(const Tensor& permutation, const Tensor& lower, const Tensor& upper, const Tensor& log_diagonal,
               const Tensor& sign, const Sizes& sizes)
      : permutation_(permutation, sizes.steps, sizes.n * sizes.n),
        lower_(lower, sizes.steps, sizes.n * sizes.n),
        upper_(upper, sizes.steps, sizes.n * sizes.n),
        log_diagonal_(log_diagonal, sizes.steps, sizes.n),
        sign_(sign, sizes.steps, sizes.n) {}

  LuFactors<const A> step(int64_t k) const {
    return {permutation_.step(k), lower_.step(k), upper_.step(k), log_diagonal_.step(k), sign_.step(k)};
  }

 private:
  Input<A> permutation_, lower_, upper_, log_diagonal_, sign_;
};

std::tuple<Tensor, Tensor> lu_weight(const Tensor& permutation, const Tensor& lower, const Tensor& upper,
                                     const Tensor& log_diagonal, const Tensor& sign) {
  const Sizes sizes(lower);
  Tensor weight = empty_contiguous(lower), log_det = empty_per_step(lower);
  dispatch_parameters(lower, [&]<typename A>() {
    const InputFactors<A> factors(permutation, lower, upper, log_diagonal, sign, sizes);
    const auto kernel = fold_kernels<A>().lu_weight;
    A *weights = weight.mutable_data_ptr<A>(), *log_dets = log_det.mutable_data_ptr<A>();
    for_each_step(sizes, [&](int64_t k) {
      log_dets[k] = static_cast<A>(kernel(sizes.n, factors.step(k), weights + k * sizes.n * sizes.n));
    });
  });
  return {weight, log_det};
}

std::tuple<Tensor, Tensor, Tensor> lu_weight_backward(const Tensor& grad_weight, const Tensor& grad_log_det,
                                                      const Tensor& permutation, const Tensor& lower,
                                                      const Tensor& upper, const Tensor& log_diagonal,
                                                      const Tensor& sign) {
  const Sizes sizes(lower);
  const int64_t n = sizes.n;
  Tensor grad_lower = empty_contiguous(lower), grad_upper = empty_contiguous(upper);
  Tensor grad_diagonal = empty_contiguous(log_diagonal);
  dispatch_parameters(lower, [&]<typename A>() {
    const InputFactors<A> factors(permutation, lower, upper, log_diagonal, sign, sizes);
    const Input<A> weights(grad_weight, sizes.steps, n * n), log_dets(grad_log_det, sizes.steps, 1);
    const auto kernel = fold_kernels<A>().lu_weight_backward;
    A *in_lower = grad_lower.mutable_data_ptr<A>(), *in_upper = grad_upper.mutable_data_ptr<A>();
    A* in_diagonal = grad_diagonal.mutable_data_ptr<A>();
    for_each_step(sizes, [&](int64_t k) {
      const LuFactors<A> result{nullptr, in_lower + k * n * n, in_upper + k * n * n, in_diagonal + k * n, nullptr};
      kernel(n, weights.step(k), *log_dets.step(k), factors.step(k), result);
    });
  });
  return {grad_lower, grad_upper, grad_diagonal};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(glow_kernels, CPU, m) {
  m.impl("actnorm_conv1x1_lu_weight_native", TORCH_BOX(&lu_weight));
  m.impl("actnorm_conv1x1_lu_weight_backward_native", TORCH_BOX(&lu_weight_backward));
  m.impl("actnorm_conv1x1_fold_native", TORCH_BOX(&fold<false>));
  m.impl("actnorm_conv1x1_fold_backward_native", TORCH_BOX(&fold_backward<false>));
  m.impl("actnorm_conv1x1_fold_inverse_native", TORCH_BOX(&fold<true>));
  m.impl("actnorm_conv1x1_fold_inverse_backward_native", TORCH_BOX(&fold_backward<true>));
}

}  // namespace glow_kernels
