// Loading and storing tiles; compiled once per instruction set.
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

template <typename To, typename From>
inline __attribute__((always_inline)) To converted(From value) {
  if constexpr (std::is_same_v<To, float> || std::is_same_v<To, double>) {
    return widened<To>(value);
  } else {
    return narrowed<To>(value);
  }
}

// target[i] = source[i], converted, for a count small enough to unroll.
template <int count, typename To, typename From>
inline __attribute__((always_inline)) void copy_block(const From* __restrict source, To* __restrict target) {
#pragma omp simd
  for (int i = 0; i < count; ++i) target[i] = converted<To>(source[i]);
}

// target[i * target_stride] = source[i * source_stride], converted. Short rows are common: a 4 x 4 image has 16
// positions, and a row of a channels-last tensor is a few channels.
template <typename To, typename From>
inline __attribute__((always_inline)) void copy_row(const From* __restrict source, int64_t source_stride,
                                                    To* __restrict target, int64_t target_stride, int64_t count) {
  int64_t i = 0;
  if (source_stride == 1 && target_stride == 1) {
    for (; i + 16 <= count; i += 16) copy_block<16>(source + i, target + i);
    // The tail, in two blocks that may overlap.
    const int64_t left = count - i;
    if (left >= 8) {
      copy_block<8>(source + i, target + i);
      return copy_block<8>(source + count - 8, target + count - 8);
    }
    if (left >= 4) {
      copy_block<4>(source + i, target + i);
      return copy_block<4>(source + count - 4, target + count - 4);
    }
  }
  for (; i < count; ++i) target[i * target_stride] = converted<To>(source[i * source_stride]);
}

// Memory for a tile that is not accessed in place.
template <typename A>
struct alignas(64) TileBuffer {
  A values[kTile];
};

template <typename A, typename T>
inline bool is_contiguous_tile(const Strided<T>& matrix, int64_t rows, int64_t columns) {
  return std::is_same_v<std::remove_const_t<T>, A> && matrix.column_stride == 1 &&
         (rows == 1 || matrix.row_stride == columns);
}

// The tile as one contiguous vector in the type of arithmetic: in place if it is one, otherwise copied to `buffer`.
template <typename A, typename T>
inline const A* load(const Strided<const T>& source, int64_t rows, int64_t columns, A* buffer) {
  if constexpr (std::is_same_v<A, T>) {
    if (is_contiguous_tile<A>(source, rows, columns)) return source.data;
  }
  for (int64_t row = 0; row < rows; ++row) {
    copy_row(source.data + row * source.row_stride, source.column_stride, buffer + row * columns, 1, columns);
  }
  return buffer;
}

// Where to compute a tile that `store` will write: in place if it is one contiguous vector, otherwise in `buffer`.
template <typename A, typename T>
inline A* destination(const Strided<T>& target, int64_t rows, int64_t columns, A* buffer) {
  if constexpr (std::is_same_v<A, T>) {
    if (is_contiguous_tile<A>(target, rows, columns)) return target.data;
  }
  return buffer;
}

template <typename A, typename T>
inline void store(const A* values, int64_t rows, int64_t columns, const Strided<T>& target) {
  if constexpr (std::is_same_v<A, T>) {
    if (values == target.data) return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    copy_row(values + row * columns, 1, target.data + row * target.row_stride, target.column_stride, columns);
  }
}

}  // namespace glow_kernels::GLOW_KERNELS_ISA
