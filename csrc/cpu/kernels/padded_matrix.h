// Square matrices whose rows are padded to whole vectors; compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/kept_buffer.h"
#include "cpu/kernels/products.h"

namespace glow_kernels::GLOW_KERNELS_ISA {

inline int64_t padded(int64_t channels, int64_t lanes) { return (channels + lanes - 1) / lanes * lanes; }

// A square matrix, or its transpose, and a shift, with their rows padded to whole vectors by zeros, so that products
// may read beyond the last column. It lies in `buffer` until that is used again.
template <typename A>
class PaddedMatrix {
 public:
  template <typename From>
  PaddedMatrix(KeptBuffer<A>& buffer, Rows<From> matrix, bool transpose, const A* shift, int64_t channels)
      : stride_(padded(channels, kLanes<A>)), values_(buffer.reserve((channels + 1) * stride_)) {
    if (transpose) {
      // By blocks of columns, so that the cache lines that a transpose reads are still there for the next row.
      for (int64_t first = 0; first < channels; first += kLanes<A>) {
        const int64_t last = std::min(first + kLanes<A>, channels);
        for (int64_t i = 0; i < channels; ++i) {
          for (int64_t j = first; j < last; ++j) values_[i * stride_ + j] = matrix.data[j * matrix.stride + i];
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
  int64_t stride_;
  A* values_;
  const A* shift_;
};

}  // namespace glow_kernels::GLOW_KERNELS_ISA
