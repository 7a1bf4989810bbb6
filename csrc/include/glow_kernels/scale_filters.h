// What scale_filters checks on any device. A filter lies in one piece of memory, in either memory format.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "glow_kernels/tensors.h"

namespace glow_kernels {

inline int64_t size_of_filter(const Tensor& weight) {
  return weight.size(0) == 0 ? 0 : weight.numel() / weight.size(0);
}

// The tensor must have this type and lie as result does, which is dense.
inline void check_like(const char* name, const Tensor& tensor, ScalarType type, const Tensor& result) {
  bool same = tensor.dim() == result.dim() && tensor.scalar_type() == type;
  for (int64_t i = 0; same && i < result.dim(); ++i) {
    same = tensor.size(i) == result.size(i) &&
           (result.numel() == 0 || result.size(i) == 1 || tensor.stride(i) == result.stride(i));
  }
  STD_TORCH_CHECK(same, name, " must have its type and shape, and be contiguous or channels last as weight is");
}

// What every convolution has one of, and its gradients of which it has two.
inline void check_counts(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                         const std::vector<Tensor>& log_scales, const std::vector<double>& factors) {
  STD_TORCH_CHECK(!weights.empty() && biases.size() == weights.size() && log_scales.size() == weights.size() &&
                      factors.size() == weights.size(),
                  "weights, biases, log_scales and factors must be of as many convolutions, at least one");
}

inline void check_counts(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                         const std::vector<Tensor>& biases, const std::vector<Tensor>& log_scales,
                         const std::vector<double>& factors) {
  check_counts(weights, biases, log_scales, factors);
  STD_TORCH_CHECK(grads.size() == 2 * weights.size(), "grads must be two for every weight");
}

}  // namespace glow_kernels
