// The linear map of actnorm_conv1x1 on the CPU: the kernels that every instruction-set variant provides.
#pragma once

#include <cstdint>

#include "cpu/tile.h"

namespace glow_kernels {

// Positions per tile: by default, and at most. A longer tile pays because reducing its accumulators takes as long as
// summing over a hundred positions.
constexpr int64_t kPositions = 256, kMaxSummedPositions = 1024;

// With few channels even the longer tile stays in the second-level cache from the sums to the product.
constexpr int64_t summed_positions(int64_t channels) { return channels <= 48 ? kMaxSummedPositions : kPositions; }

// A tensor (B, C, *spatial) as C rows of B * P positions; `data` is null if there is no tensor.
template <typename T>
struct Positions {
  T* data;
  Planes planes;
};

// What the backward reads and writes. All matrices are C x C, row-major.
template <typename T>
struct LinearBackward {
  using A = compute_t<T>;
  Positions<const T> grad, data;  // g, and x (z in the reversible backward)
  const A* matrix;                // M
  const A* inverse;               // M^-1, and the shift of x = M^-1 z + shift; null unless reversible
  const A* inverse_shift;
  Positions<T> x;       // written by the reversible backward only
  Positions<T> grad_x;  // M^T g; null if it is not wanted
};

template <typename T>
struct LinearKernels {
  using A = compute_t<T>;
  // z = M x + v at positions [begin, end).
  void (*apply)(Positions<const T> x, const A* matrix, const A* shift, Positions<T> z, int64_t begin, int64_t end);
  // Adds sum g x^T (C x C) and sum g (C) over positions [begin, end) to `grad_matrix` and `grad_shift`, and writes the
  // other results at these positions.
  void (*backward)(const LinearBackward<T>& arguments, int64_t begin, int64_t end, A* grad_matrix, A* grad_shift);
};

namespace baseline {
template <typename T>
LinearKernels<T> linear_kernels();
}
namespace avx2 {
template <typename T>
LinearKernels<T> linear_kernels();
}
namespace avx512 {
template <typename T>
LinearKernels<T> linear_kernels();
}

}  // namespace glow_kernels
