// Tiles: the unit of work of the CPU kernels. A tile is a small matrix of elements that is loaded from strided memory
// into the first-level cache in the type of arithmetic, computed on as one contiguous vector, and stored back.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace glow_kernels {

// Elements of a tile: eight buffers of floats fill a 32 KiB cache, and most tiles need none.
constexpr int64_t kTile = 1024;

// Tensors above this size, in bytes, leave the caches before anything reads them.
constexpr int64_t kCached = int64_t{16} << 20;

// A matrix in memory; strides count elements.
template <typename T>
struct Strided {
  T* data;
  int64_t row_stride;
  int64_t column_stride;
};

// Sizes and strides of a tensor whose positions lie at one stride; strides count elements.
struct Planes {
  int64_t batches, channels, positions;
  int64_t batch_stride, channel_stride, position_stride;
};

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

}  // namespace glow_kernels
