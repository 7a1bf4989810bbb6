// Square matrices whose rows are padded to whole vectors; compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/kept_buffer.h"
#include "cpu/kernels/products.h"

namespace glow_kernels::GLOW_KERNELS_ISA {

inline int64_t padded(int64_t channels, int64_t lanes) { return (channels + lanes - 1) / lanes * lanes; }

// A square matrix, or its transpose, and a shift, with rows zero-padded to whole vectors, so that products may read
// beyond the last column. It is stored in `buffer` and valid until that is reused.
template <typename A>
class PaddedMatrix {
 public:
  template <typename From>
  PaddedMatrix(KeptBuffer<A>& buffer, Rows<From> matrix, bool transpose, const A* shift, int64_t channels)
      : stride_(padded(channels, kLanes<A>)), values_(buffer.reserve((channels + 1) * stride_)) {
    if (transpose) {
      for (int64_t row = 0; row < channels; row += kLanes<A>) {
        for (int64_t column = 0; column < channels; column += kLanes<A>) {
          transpose_into(values_ + row * stride_ + column,
                         Rows<From>{matrix.data + column * matrix.stride + row, matrix.stride},
                         std::min(kLanes<A>, channels - row), std::min(kLanes<A>, channels - column));
        }
      }
    } else {
      for (int64_t i = 0; i < channels; ++i) {
        const From* row = matrix.data + i * matrix.stride;
        A* to = values_ + i * stride_;
#pragma omp simd
        for (int64_t j = 0; j < channels; ++j) to[j] = row[j];
      }
    }
    for (int64_t i = 0; i <= channels; ++i)
      std::fill(values_ + i * stride_ + channels, values_ + (i + 1) * stride_, A(0));
    if (shift) std::copy_n(shift, channels, values_ + channels * stride_);
    shift_ = shift ? values_ + channels * stride_ : nullptr;
  }

  Rows<A> rows() { return {values_, stride_}; }
  Rows<const A> rows() const { return {values_, stride_}; }
  const A* shift() const { return shift_; }

 private:
  // Writes a block of the transpose, with at most as many rows and columns as a vector has lanes.
  template <typename From>
  void transpose_into(A* to, Rows<From> matrix, int64_t rows, int64_t columns) {
    if (rows < kLanes<A> || columns < kLanes<A>) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) to[i * stride_ + j] = matrix.data[j * matrix.stride + i];
      }
      return;
    }
    Vector<A> block[kLanes<A>];
    for (int64_t j = 0; j < kLanes<A>; ++j) {
      for (int64_t i = 0; i < kLanes<A>; ++i) block[j][i] = matrix.data[j * matrix.stride + i];
    }
    transpose_block<A>(block);
    for (int64_t i = 0; i < kLanes<A>; ++i) vector_at(to + i * stride_) = block[i];
  }

  int64_t stride_;
  A* values_;
  const A* shift_;
};

}  // namespace glow_kernels::GLOW_KERNELS_ISA
