// Filters times a learned scale on the CPU. The mathematics is described in glow_kernels/ops/scale_filters.py. PyTorch
// needs a call and a pass for every factor, and for filters this small the calls cost more than the passes.
#include "glow_kernels/scale_filters.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "glow_kernels/tensors.h"

namespace glow_kernels {
namespace {

constexpr int kSums = 16;  // independent accumulators, which the compiler keeps in vector registers

template <typename A>
struct Vectors {
  const A *bias, *log_scale;
  Vectors(const Tensor& bias_tensor, const Tensor& log_scale_tensor)
      : bias(bias_tensor.const_data_ptr<A>()), log_scale(log_scale_tensor.const_data_ptr<A>()) {}
  A scale(int64_t index, double factor) const { return std::exp(static_cast<A>(factor) * log_scale[index]); }
};

// Calls f.operator()<A>() with the type of x, which is float or double.
template <typename F>
void with_type(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Double) return f.template operator()<double>();
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "unsupported type of weight");
  f.template operator()<float>();
}

std::tuple<Tensor, Tensor> forward(const Tensor& weight, const Tensor& bias, const Tensor& log_scale, double factor,
                                   ScalarType dtype) {
  STD_TORCH_CHECK(dtype == weight.scalar_type(), "dtype must be that of weight");
  const int64_t filters = weight.size(0), size = size_of_filter(weight);
  Tensor result = empty_output(weight), result_bias = empty_vector(filters, dtype, weight);
  const Tensor bias_ = as_contiguous(bias), log_scale_ = as_contiguous(log_scale);
  check_dense("weight", weight, dtype, weight, weight.sizes());
  check_vector("bias", bias_, dtype, filters);
  check_vector("log_scale", log_scale_, dtype, filters);
  with_type(weight, [&]<typename A>() {
    const Vectors<A> vectors(bias_, log_scale_);
    const A* from = weight.const_data_ptr<A>();
    A *to = result.mutable_data_ptr<A>(), *to_bias = result_bias.mutable_data_ptr<A>();
    for (int64_t index = 0; index < filters; ++index, from += size, to += size) {
      const A scale = vectors.scale(index, factor);
      for (int64_t i = 0; i < size; ++i) to[i] = scale * from[i];
      to_bias[index] = scale * vectors.bias[index];
    }
  });
  return {result, result_bias};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_weight, const Tensor& grad_bias, const Tensor& weight,
                                            const Tensor& bias, const Tensor& log_scale, double factor) {
  const int64_t filters = weight.size(0), size = size_of_filter(weight);
  const ScalarType type = weight.scalar_type();
  Tensor result = empty_output(weight);
  Tensor result_bias = empty_vector(filters, type, weight), result_log_scale = empty_vector(filters, type, weight);
  const Tensor bias_ = as_contiguous(bias), log_scale_ = as_contiguous(log_scale);
  const Tensor grad_bias_ = as_contiguous(grad_bias);
  check_dense("weight", weight, type, weight, weight.sizes());
  check_dense("grad_weight", grad_weight, type, weight, weight.sizes());
  check_vector("bias", bias_, type, filters);
  check_vector("log_scale", log_scale_, type, filters);
  check_vector("grad_bias", grad_bias_, type, filters);
  with_type(weight, [&]<typename A>() {
    const Vectors<A> vectors(bias_, log_scale_);
    const A *data = weight.const_data_ptr<A>(), *grad = grad_weight.const_data_ptr<A>();
    const A* of_bias = grad_bias_.const_data_ptr<A>();
    A *to = result.mutable_data_ptr<A>(), *to_bias = result_bias.mutable_data_ptr<A>();
    A* to_log_scale = result_log_scale.mutable_data_ptr<A>();
    for (int64_t index = 0; index < filters; ++index, data += size, grad += size, to += size) {
      const A scale = vectors.scale(index, factor);
      std::array<A, kSums> sums{};
      int64_t i = 0;
      for (; i + kSums <= size; i += kSums) {
        for (int lane = 0; lane < kSums; ++lane) {
          to[i + lane] = scale * grad[i + lane];
          sums[lane] += to[i + lane] * data[i + lane];
        }
      }
      for (; i < size; ++i) {
        to[i] = scale * grad[i];
        sums[0] += to[i] * data[i];
      }
      to_bias[index] = scale * of_bias[index];
      A total = to_bias[index] * vectors.bias[index];
      for (const A sum : sums) total += sum;
      to_log_scale[index] = static_cast<A>(factor) * total;
    }
  });
  return {result, result_bias, result_log_scale};
}

std::vector<Tensor> forward_all(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                                const std::vector<Tensor>& log_scales, const std::vector<double>& factors,
                                ScalarType dtype, const std::vector<int64_t>& sizes) {
  check_counts(weights, biases, log_scales, factors);
  STD_TORCH_CHECK(sizes.size() == 2 * weights.size(), "sizes must be two for every weight");
  std::vector<Tensor> results;
  for (size_t i = 0; i < weights.size(); ++i) {
    STD_TORCH_CHECK(sizes[2 * i] == weights[i].size(0) && sizes[2 * i + 1] == weights[i].size(1),
                    "on the CPU filters get no zeros");
    auto [weight, bias] = forward(weights[i], biases[i], log_scales[i], factors[i], dtype);
    results.insert(results.end(), {weight, bias});
  }
  return results;
}

std::vector<Tensor> backward_all(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& biases, const std::vector<Tensor>& log_scales,
                                 const std::vector<double>& factors) {
  check_counts(grads, weights, biases, log_scales, factors);
  std::vector<Tensor> results;
  for (size_t i = 0; i < weights.size(); ++i) {
    auto [weight, bias, log_scale] =
        backward(grads[2 * i], grads[2 * i + 1], weights[i], biases[i], log_scales[i], factors[i]);
    results.insert(results.end(), {weight, bias, log_scale});
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(glow_kernels, CPU, m) {
  m.impl("scale_filters_forward_native", TORCH_BOX(&forward));
  m.impl("scale_filters_backward_native", TORCH_BOX(&backward));
  m.impl("scale_filters_forward_all_native", TORCH_BOX(&forward_all));
  m.impl("scale_filters_backward_all_native", TORCH_BOX(&backward_all));
}

}  // namespace glow_kernels
