// The parameters of ActNorm and the 1x1 convolution as operators receive them, for one step or a batch (*K) of steps.
#pragma once

#include <optional>
#include <type_traits>

#include "cpu/actnorm_conv1x1_fold.h"
#include "cpu/dispatch.h"

namespace glow_kernels {

template <typename A>
constexpr ScalarType kScalarType = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

template <typename A>
FoldKernels<A> fold_kernels() {
  GLOW_KERNELS_RETURN_TABLE(fold_kernels<A>());
}

// A contiguous tensor with `size` elements of type A for every step.
template <typename A>
class Input {
 public:
  Input(const Tensor& tensor, int64_t steps, int64_t size)
      : tensor_(as_contiguous(tensor)), data_(nullptr), size_(size) {
    STD_TORCH_CHECK(tensor.numel() == steps * size && tensor.scalar_type() == kScalarType<A>,
                    "the sizes or the types of the parameters do not agree");
    data_ = tensor_.template const_data_ptr<A>();
  }

  const A* step(int64_t k) const { return data_ + k * size_; }

 private:
  Tensor tensor_;
  const A* data_;
  int64_t size_;
};

template <typename A>
class InputParameters {
 public:
  InputParameters(const Tensor& log_scale, const Tensor& bias, const Tensor& weight,
                  const std::optional<Tensor>& weight_log_det, int64_t steps, int64_t n)
      : log_scale_(log_scale, steps, n), bias_(bias, steps, n), weight_(weight, steps, n * n) {
    if (weight_log_det) weight_log_det_.emplace(*weight_log_det, steps, 1);
  }

  StepParameters<const A> step(int64_t k = 0) const {
    return {log_scale_.step(k), bias_.step(k), weight_.step(k), weight_log_det_ ? weight_log_det_->step(k) : nullptr};
  }

 private:
  Input<A> log_scale_, bias_, weight_;
  std::optional<Input<A>> weight_log_det_;
};

// Uninitialised gradients of the parameters; that of weight_log_det is empty if the parameter is absent.
class ParameterGradients {
 public:
  Tensor log_scale, bias, weight, weight_log_det;

  ParameterGradients(const Tensor& log_scale_like, const Tensor& bias_like, const Tensor& weight_like,
                     const std::optional<Tensor>& weight_log_det_like)
      : log_scale(empty_contiguous(log_scale_like)),
        bias(empty_contiguous(bias_like)),
        weight(empty_contiguous(weight_like)),
        weight_log_det(weight_log_det_like ? empty_contiguous(*weight_log_det_like)
                                           : empty_vector(0, weight_like.scalar_type(), weight_like)),
        n_(weight_like.size(-1)),
        has_weight_log_det_(weight_log_det_like.has_value()) {}

  template <typename A>
  StepParameters<A> step(int64_t k = 0) {
    return {log_scale.mutable_data_ptr<A>() + k * n_, bias.mutable_data_ptr<A>() + k * n_,
            weight.mutable_data_ptr<A>() + k * n_ * n_,
            has_weight_log_det_ ? weight_log_det.mutable_data_ptr<A>() + k : nullptr};
  }

 private:
  int64_t n_;
  bool has_weight_log_det_;
};

inline void check_invertible(bool is_invertible, int64_t n) {
  STD_TORCH_CHECK(is_invertible, "weight must be invertible, got a singular (", n, ", ", n,
                  ") matrix, or parameters that are not finite");
}

}  // namespace glow_kernels
