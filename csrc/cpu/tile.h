// Tiles: the unit of work of the CPU kernels. A tile is a small matrix of elements that is loaded from strided memory
// into the first-level cache in the type of arithmetic, computed on as one contiguous vector, and stored back.
#pragma once

#include <cstdint>

#include "glow_kernels/types.h"

namespace glow_kernels {

// Maximum number of elements of a tile. Eight float buffers of this size fill a 32 KiB cache, but most tiles need none.
constexpr int64_t kTile = 1024;

// Tensors larger than this, in bytes, are evicted from the caches before anything reads them.
constexpr int64_t kCacheBytes = int64_t{16} << 20;

// A matrix in memory; strides are in elements.
template <typename T>
struct Strided {
  T* data;
  int64_t row_stride;
  int64_t column_stride;
};

}  // namespace glow_kernels
