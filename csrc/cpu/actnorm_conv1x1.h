// The linear map of actnorm_conv1x1 on the CPU: what the instruction-set variants of its kernels offer.
#pragma once

#include <cstdint>

#include "cpu/tile.h"

namespace glow_kernels {

// Largest C of the kernels; more channels are a matrix product that belongs to a BLAS.
constexpr int64_t kMaxChannels = 64;

// Positions that are worked on at a time; the tiles of x and z fill the first-level cache for kMaxChannels floats.
constexpr int64_t kPositions = 64;

// A tensor (B, C, *spatial) as C rows of B * P positions.
template <typename T>
struct Positions {
  T* data;
  Planes planes;
};

template <typename T>
struct LinearKernels {
  using A = compute_t<T>;
  // z = M x + v at positions [begin, end); `matrix` is C x C row by row.
  void (*apply)(Positions<const T> x, const A* matrix, const A* shift, Positions<T> z, int64_t begin, int64_t end);
  // Adds sum g x^T (C x C) and sum g (C) over positions [begin, end) to `grad_matrix` and `grad_shift` and, unless
  // grad_x.data is null, writes grad_x = M^T g; `transposed` is M^T row by row.
  void (*backward)(Positions<const T> grad, Positions<const T> x, const A* transposed, Positions<T> grad_x,
                   int64_t begin, int64_t end, A* grad_matrix, A* grad_shift);
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
