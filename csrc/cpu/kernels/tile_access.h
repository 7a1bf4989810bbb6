// Loading and storing of tiles; compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/tile.h"

namespace glow_kernels::GLOW_KERNELS_ISA {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename A, typename T>
inline __attribute__((always_inline)) A widened(T value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
  } else {
    return static_cast<A>(value);
  }
}

// Rounds to nearest, ties to even.
template <typename T, typename A>
inline __attribute__((always_inline)) T narrowed(A value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40;
    return BFloat16(static_cast<uint16_t>(value != value ? quiet_nan : rounded), BFloat16::from_bits());
  } else {
    return static_cast<T>(value);
  }
}

template <typename A, typename T>
inline bool lies_as_tile(const Strided<T>& matrix, int64_t rows) {
  return std::is_same_v<std::remove_const_t<T>, A> && matrix.column_stride == 1 && rows == 1;
}

// buffer[r * columns + c] = source[r][c]
template <typename A, typename T>
inline void copy_in(Strided<const T> source, int64_t rows, int64_t columns, A* __restrict buffer) {
  for (int64_t row = 0; row < rows; ++row, buffer += columns) {
    const T* __restrict data = source.data + row * source.row_stride;
    if (source.column_stride == 1) {
      for (int64_t column = 0; column < columns; ++column) buffer[column] = widened<A>(data[column]);
    } else {
      for (int64_t column = 0; column < columns; ++column)
        buffer[column] = widened<A>(data[column * source.column_stride]);
    }
  }
}

// The tile as one vector in the type of arithmetic: where it lies, if it lies so, otherwise in `buffer`.
template <typename A, typename T>
inline const A* load(Strided<const T> source, int64_t rows, int64_t columns, A* buffer) {
  if constexpr (std::is_same_v<A, T>) {
    if (lies_as_tile<A>(source, rows)) return source.data;
  }
  copy_in(source, rows, columns, buffer);
  return buffer;
}

// Where to compute a tile that `store` will write: in place, if it lies as one vector there, otherwise in `buffer`.
template <typename A, typename T>
inline A* destination(const Strided<T>& target, int64_t rows, A* buffer) {
  if constexpr (std::is_same_v<A, T>) {
    if (lies_as_tile<A>(target, rows)) return target.data;
  }
  return buffer;
}

template <typename A, typename T>
inline void store(const A* values, int64_t rows, int64_t columns, Strided<T> target) {
  if constexpr (std::is_same_v<A, T>) {
    if (values == target.data) return;
  }
  for (int64_t row = 0; row < rows; ++row, values += columns) {
    T* __restrict data = target.data + row * target.row_stride;
    if (target.column_stride == 1) {
      for (int64_t column = 0; column < columns; ++column) data[column] = narrowed<T>(values[column]);
    } else {
      for (int64_t column = 0; column < columns; ++column)
        data[column * target.column_stride] = narrowed<T>(values[column]);
    }
  }
}

}  // namespace glow_kernels::GLOW_KERNELS_ISA
