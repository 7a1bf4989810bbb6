// Types that host and device code share.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace glow_kernels {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Type of arithmetic, as glow_kernels/backends/numerics.py defines it.
template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <typename T>
using compute_t = typename Compute<T>::type;

// Sizes and strides of a tensor whose positions have a single stride; strides are in elements.
struct Planes {
  int64_t batches, channels, positions;
  int64_t batch_stride, channel_stride, position_stride;
};

}  // namespace glow_kernels
