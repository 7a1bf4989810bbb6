// What scale_filters checks on any device. A filter is one contiguous piece of memory in either memory format.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "glow_kernels/tensors.h"

namespace glow_kernels {

inline int64_t size_of_filter(const Tensor& weight) {
  return weight.size(0) == 0 ? 0 : weight.numel() / weight.size(0);
}

// Checks that the tensor has this type and these sizes, and is dense in the memory format of the weight.
inline void check_dense(const char* name, const Tensor& tensor, ScalarType type, const Tensor& weight,
                        torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  bool same = tensor.scalar_type() == type && tensor.sizes().equals(sizes);
  const int64_t dimensions = tensor.dim();
  int64_t stride = 1;
  for (int64_t i = 0; same && i < dimensions && tensor.numel() > 0; ++i) {
    // From the innermost dimension outwards; in channels last these are 1, then the last down to 2, then 0.
    const bool last = is_channels_last(weight);
    const int64_t dimension = !last ? dimensions - 1 - i : i == 0 ? 1 : i == dimensions - 1 ? 0 : dimensions - i;
    same = tensor.size(dimension) == 1 || tensor.stride(dimension) == stride;
    stride *= tensor.size(dimension);
  }
  STD_TORCH_CHECK(same, name, " must have its type and shape, and be contiguous or channels last as weight is");
}

inline void check_vector(const char* name, const Tensor& vector, ScalarType type, int64_t size) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == size && vector.scalar_type() == type, name,
                  " must have the type of weight, and a number for every filter");
}

// The sizes (count, channels, *kernel) for a weight (O, I, *kernel); count >= O and channels >= I.
inline std::vector<int64_t> padded_sizes(const Tensor& weight, int64_t count, int64_t channels) {
  STD_TORCH_CHECK(weight.dim() >= 2 && count >= weight.size(0) && channels >= weight.size(1),
                  "sizes must be at least those of the weight");
  std::vector<int64_t> sizes(weight.sizes().begin(), weight.sizes().end());
  sizes[0] = count;
  sizes[1] = channels;
  return sizes;
}

// Checks that there is one of each, and below also two gradients, for every convolution.
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
