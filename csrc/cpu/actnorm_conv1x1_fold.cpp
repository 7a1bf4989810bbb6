// Folding ActNorm and the 1x1 convolution into one matrix on the CPU, for a batch of steps, in double. The mathematics
// stands in glow_kernels/ops/actnorm_conv1x1.py.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/small_matrix.h"

namespace glow_kernels {
namespace {

using Values = std::vector<double>;

SmallMatrixKernels kernels() { GLOW_KERNELS_RETURN_TABLE(small_matrix_kernels()); }

// Calls f.operator()<A>() with the type of the parameters, float or double.
template <typename F>
auto dispatch_parameters(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Float) return f.template operator()<float>();
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, "parameters must be float32 or float64");
  return f.template operator()<double>();
}

// Tensors (*K, ...) of parameters or gradients, read and written a step at a time.
template <typename A>
class Input {
 public:
  Input(const Tensor& tensor, int64_t size) : tensor_(as_contiguous(tensor)), size_(size) {
    const ScalarType type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(tensor.numel() % size == 0 && tensor.scalar_type() == type,
                    "the sizes or the types of the parameters do not agree");
  }
  Values step(int64_t k) const {
    const A* data = tensor_.template const_data_ptr<A>() + k * size_;
    return Values(data, data + size_);
  }

 private:
  Tensor tensor_;
  int64_t size_;
};

template <typename A>
void write(const Values& values, Tensor& tensor, int64_t k) {
  std::transform(values.begin(), values.end(), tensor.mutable_data_ptr<A>() + k * values.size(),
                 [](double value) { return static_cast<A>(value); });
}

Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, const Tensor& like) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device());
}

// Sizes of a batch (*K, C) or (*K, C, C).
struct Sizes {
  int64_t steps, n;

  explicit Sizes(const Tensor& matrix) : steps(1), n(matrix.size(-1)) {
    STD_TORCH_CHECK(matrix.dim() >= 2 && matrix.size(-2) == n, "weight must be (*K, C, C)");
    for (int64_t dimension = 0; dimension < matrix.dim() - 2; ++dimension) steps *= matrix.size(dimension);
  }
};

// The leading sizes (*K) of a tensor without its last `trailing` dimensions.
std::vector<int64_t> leading(const Tensor& x, int64_t trailing) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end() - trailing};
}

// Steps that a thread gets at least.
template <typename F>
void for_each_step(const Sizes& sizes, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / (sizes.n * sizes.n * sizes.n));
  torch::stable::parallel_for(0, sizes.steps, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(k);
  });
}

Values transposed(const Values& matrix, int64_t n) {
  Values result(n * n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) result[j * n + i] = matrix[i * n + j];
  }
  return result;
}

Values product(const Values& a, const Values& b, int64_t n) {
  Values c(n * n);
  kernels().multiply(n, a.data(), b.data(), c.data());
  return c;
}

struct Inverse {
  Values matrix;
  double log_det;  // of the matrix that was inverted
};

Inverse inverted(Values matrix, int64_t n) {
  const double log_det = kernels().invert(n, matrix.data(), false);
  return {std::move(matrix), log_det};
}

double log_abs_det(Values matrix, int64_t n) { return kernels().invert(n, matrix.data(), true); }

double sum(const Values& values) {
  double total = 0;
  for (double value : values) total += value;
  return total;
}

Values exponentials(Values values, double sign) {
  for (double& value : values) value = std::exp(sign * value);
  return values;
}

// L with its diagonal of ones, and U + diag(s).
struct Triangles {
  Values lower, upper;

  Triangles(Values lower_values, Values upper_values, const Values& log_diagonal, const Values& sign)
      : lower(std::move(lower_values)), upper(std::move(upper_values)) {
    const int64_t n = static_cast<int64_t>(sign.size());
    // Whatever an optimizer with momentum writes outside the triangles does not matter.
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        if (j >= i) lower[i * n + j] = i == j;
        if (j <= i) upper[i * n + j] = i == j ? sign[i] * std::exp(log_diagonal[i]) : 0;
      }
    }
  }
};

std::tuple<Tensor, Tensor> lu_weight(const Tensor& permutation, const Tensor& lower, const Tensor& upper,
                                     const Tensor& log_diagonal, const Tensor& sign) {
  const Sizes sizes(lower);
  const int64_t n = sizes.n;
  Tensor weight = empty(lower.sizes(), lower), log_det = empty(leading(lower, 2), lower);
  dispatch_parameters(lower, [&]<typename A>() {
    const Input<A> p(permutation, n * n), l(lower, n * n), u(upper, n * n), d(log_diagonal, n), signs(sign, n);
    for_each_step(sizes, [&](int64_t k) {
      const Triangles triangles(l.step(k), u.step(k), d.step(k), signs.step(k));
      write<A>(product(p.step(k), product(triangles.lower, triangles.upper, n), n), weight, k);
      write<A>({sum(d.step(k))}, log_det, k);
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
  Tensor grad_lower = empty(lower.sizes(), lower), grad_upper = empty(upper.sizes(), lower);
  Tensor grad_diagonal = empty(log_diagonal.sizes(), lower);
  dispatch_parameters(lower, [&]<typename A>() {
    const Input<A> g(grad_weight, n * n), lambda(grad_log_det, 1), p(permutation, n * n), l(lower, n * n);
    const Input<A> u(upper, n * n), d(log_diagonal, n), signs(sign, n);
    for_each_step(sizes, [&](int64_t k) {
      const Triangles triangles(l.step(k), u.step(k), d.step(k), signs.step(k));
      const Values permuted = product(transposed(p.step(k), n), g.step(k), n);
      Values in_lower = product(permuted, transposed(triangles.upper, n), n);
      Values in_upper = product(transposed(triangles.lower, n), permuted, n), in_diagonal(n);
      for (int64_t i = 0; i < n; ++i) {
        in_diagonal[i] = in_upper[i * n + i] * triangles.upper[i * n + i] + lambda.step(k)[0];
        for (int64_t j = 0; j < n; ++j) {
          if (j >= i) in_lower[i * n + j] = 0;
          if (j <= i) in_upper[i * n + j] = 0;
        }
      }
      write<A>(in_lower, grad_lower, k);
      write<A>(in_upper, grad_upper, k);
      write<A>(in_diagonal, grad_diagonal, k);
    });
  });
  return {grad_lower, grad_upper, grad_diagonal};
}

std::tuple<Tensor, Tensor, Tensor> fold(const Tensor& log_scale, const Tensor& bias, const Tensor& weight,
                                        std::optional<Tensor> weight_log_det) {
  const Sizes sizes(weight);
  const int64_t n = sizes.n;
  Tensor matrix = empty(weight.sizes(), weight), shift = empty(bias.sizes(), weight);
  Tensor log_det = empty(leading(weight, 2), weight);
  dispatch_parameters(weight, [&]<typename A>() {
    const Input<A> scales(log_scale, n), biases(bias, n), weights(weight, n * n);
    const std::optional<Input<A>> known = weight_log_det ? std::optional(Input<A>(*weight_log_det, 1)) : std::nullopt;
    for_each_step(sizes, [&](int64_t k) {
      const Values log_s = scales.step(k), b = biases.step(k), w = weights.step(k);
      Values m(n * n), v(n);
      const Values s = exponentials(log_s, 1);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          m[i * n + j] = w[i * n + j] * s[j];
          v[i] += m[i * n + j] * b[j];
        }
      }
      write<A>({sum(log_s) + (known ? known->step(k)[0] : log_abs_det(w, n))}, log_det, k);
      write<A>(m, matrix, k);
      write<A>(v, shift, k);
    });
  });
  return {matrix, shift, log_det};
}

using FoldGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

FoldGradients empty_gradients(const Tensor& log_scale, const Tensor& bias, const Tensor& weight,
                              const std::optional<Tensor>& weight_log_det) {
  Tensor grad_log_det =
      weight_log_det ? empty(weight_log_det->sizes(), weight) : empty_vector(0, weight.scalar_type(), weight);
  return {empty(log_scale.sizes(), weight), empty(bias.sizes(), weight), empty(weight.sizes(), weight), grad_log_det};
}

FoldGradients fold_backward(const Tensor& grad_matrix, const Tensor& grad_shift, const Tensor& grad_log_det,
                            const Tensor& log_scale, const Tensor& bias, const Tensor& weight,
                            std::optional<Tensor> weight_log_det) {
  const Sizes sizes(weight);
  const int64_t n = sizes.n;
  FoldGradients grads = empty_gradients(log_scale, bias, weight, weight_log_det);
  auto& [grad_log_scale, grad_bias, grad_weight, grad_weight_log_det] = grads;
  dispatch_parameters(weight, [&, &in_log_scale = grad_log_scale, &in_bias = grad_bias, &in_weight = grad_weight,
                               &in_log_det = grad_weight_log_det]<typename A>() {
    const Input<A> in_matrix(grad_matrix, n * n), in_shift(grad_shift, n), lambda(grad_log_det, 1);
    const Input<A> scales(log_scale, n), biases(bias, n), weights(weight, n * n);
    for_each_step(sizes, [&](int64_t k) {
      const Values log_s = scales.step(k), b = biases.step(k), w = weights.step(k), dv = in_shift.step(k);
      const double in_log_abs_det = lambda.step(k)[0];
      // The gradient in M, of which v = M b.
      Values total = in_matrix.step(k), dlog_s(n, in_log_abs_det), db(n), dw(n * n);
      if (!weight_log_det) dw = transposed(inverted(w, n).matrix, n);
      const Values s = exponentials(log_s, 1);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          const double sum_ij = total[i * n + j] + dv[i] * b[j];
          dw[i * n + j] = sum_ij * s[j] + in_log_abs_det * dw[i * n + j];
          dlog_s[j] += s[j] * w[i * n + j] * sum_ij;
          db[j] += s[j] * w[i * n + j] * dv[i];
        }
      }
      write<A>(dlog_s, in_log_scale, k);
      write<A>(db, in_bias, k);
      write<A>(dw, in_weight, k);
      if (weight_log_det) write<A>({in_log_abs_det}, in_log_det, k);
    });
  });
  return grads;
}

std::tuple<Tensor, Tensor, Tensor> fold_inverse(const Tensor& log_scale, const Tensor& bias, const Tensor& weight,
                                                std::optional<Tensor> weight_log_det) {
  const Sizes sizes(weight);
  const int64_t n = sizes.n;
  Tensor matrix = empty(weight.sizes(), weight), shift = empty(bias.sizes(), weight);
  Tensor log_det = empty(leading(weight, 2), weight);
  std::vector<char> is_singular(sizes.steps);
  dispatch_parameters(weight, [&]<typename A>() {
    const Input<A> scales(log_scale, n), biases(bias, n), weights(weight, n * n);
    const std::optional<Input<A>> known = weight_log_det ? std::optional(Input<A>(*weight_log_det, 1)) : std::nullopt;
    for_each_step(sizes, [&](int64_t k) {
      const Values log_s = scales.step(k);
      Values minus_b = biases.step(k);
      Inverse inverse = inverted(weights.step(k), n);
      const Values inverse_s = exponentials(log_s, -1);
      for (int64_t i = 0; i < n; ++i) {
        minus_b[i] = -minus_b[i];
        for (int64_t j = 0; j < n; ++j) inverse.matrix[i * n + j] *= inverse_s[i];
      }
      for (double value : inverse.matrix) is_singular[k] |= !std::isfinite(value);
      write<A>({-sum(log_s) - (known ? known->step(k)[0] : inverse.log_det)}, log_det, k);
      write<A>(inverse.matrix, matrix, k);
      write<A>(minus_b, shift, k);
    });
  });
  for (char singular : is_singular) {  // an exception does not leave a parallel loop
    STD_TORCH_CHECK(!singular, "weight must be invertible, got a singular (", n, ", ", n, ") matrix");
  }
  return {matrix, shift, log_det};
}

FoldGradients fold_inverse_backward(const Tensor& grad_matrix, const Tensor& grad_shift, const Tensor& grad_log_det,
                                    const Tensor& log_scale, const Tensor& bias, const Tensor& weight,
                                    std::optional<Tensor> weight_log_det) {
  const Sizes sizes(weight);
  const int64_t n = sizes.n;
  FoldGradients grads = empty_gradients(log_scale, bias, weight, weight_log_det);
  auto& [grad_log_scale, grad_bias, grad_weight, grad_weight_log_det] = grads;
  dispatch_parameters(weight, [&, &in_log_scale = grad_log_scale, &in_bias = grad_bias, &in_weight = grad_weight,
                               &in_log_det = grad_weight_log_det]<typename A>() {
    const Input<A> in_matrix(grad_matrix, n * n), in_shift(grad_shift, n), lambda(grad_log_det, 1);
    const Input<A> scales(log_scale, n), weights(weight, n * n);
    for_each_step(sizes, [&](int64_t k) {
      const Values log_s = scales.step(k), dn = in_matrix.step(k);
      const double in_log_abs_det = lambda.step(k)[0];
      const Values inverse = inverted(weights.step(k), n).matrix, inverse_transposed = transposed(inverse, n);
      const Values inverse_s = exponentials(log_s, -1);
      Values matrix = inverse, dlog_s(n, -in_log_abs_det), minus_db = in_shift.step(k);
      for (int64_t i = 0; i < n; ++i) {
        minus_db[i] = -minus_db[i];
        for (int64_t j = 0; j < n; ++j) {
          matrix[i * n + j] *= inverse_s[i];
          dlog_s[i] -= dn[i * n + j] * matrix[i * n + j];
        }
      }
      Values dw = product(product(transposed(matrix, n), dn, n), inverse_transposed, n);
      for (int64_t i = 0; i < n * n; ++i) {
        dw[i] = -dw[i] - (weight_log_det ? 0.0 : in_log_abs_det * inverse_transposed[i]);
      }
      write<A>(dlog_s, in_log_scale, k);
      write<A>(minus_db, in_bias, k);
      write<A>(dw, in_weight, k);
      if (weight_log_det) write<A>({-in_log_abs_det}, in_log_det, k);
    });
  });
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(glow_kernels, CPU, m) {
  m.impl("actnorm_conv1x1_lu_weight_native", TORCH_BOX(&lu_weight));
  m.impl("actnorm_conv1x1_lu_weight_backward_native", TORCH_BOX(&lu_weight_backward));
  m.impl("actnorm_conv1x1_fold_native", TORCH_BOX(&fold));
  m.impl("actnorm_conv1x1_fold_backward_native", TORCH_BOX(&fold_backward));
  m.impl("actnorm_conv1x1_fold_inverse_native", TORCH_BOX(&fold_inverse));
  m.impl("actnorm_conv1x1_fold_inverse_backward_native", TORCH_BOX(&fold_inverse_backward));
}

}  // namespace glow_kernels
