// The members of a tile of the affine coupling as runs of elements; compiled once per instruction set.
#pragma once

#include "cpu/affine_coupling.h"
#include "cpu/kernels/tile_access.h"
#include "cpu/kernels/vector.h"

namespace glow_kernels::GLOW_KERNELS_ISA {

enum class Direction { forward, inverse, backward, inverse_backward, reversible_backward };

constexpr bool is_gradient(Direction direction) { return direction >= Direction::backward; }

// Whether a direction multiplies by 1 / s.
constexpr bool is_inverse(Direction direction) {
  return direction == Direction::inverse || direction == Direction::inverse_backward;
}

constexpr bool has_result(Direction direction) {
  return !is_gradient(direction) || direction == Direction::reversible_backward;
}

// The distance from one run, or one vector, to the next, in elements, for every member of a Run.
struct Strides {
  int64_t data, u, t, gain, g, result, grad_data, grad_u, grad_t, grad_gain;
};

// Contiguous elements of a tile or of one of its rows, for every member of CouplingTile; `g` and `lambda` are its
// `grad` and `grad_log_det`.
template <typename A>
struct Run {
  const A *data, *u, *t, *gain, *g;
  A lambda;
  A *result, *grad_data, *grad_u, *grad_t, *grad_gain;

  inline __attribute__((always_inline)) void advance(const Strides& stride, int64_t times = 1) {
    data += times * stride.data;
    u += times * stride.u;
    t += times * stride.t;
    gain += times * stride.gain;
    g += times * stride.g;
    result += times * stride.result;
    grad_data += times * stride.grad_data;
    grad_u += times * stride.grad_u;
    grad_t += times * stride.grad_t;
    grad_gain += times * stride.grad_gain;
  }
};

// `rows` runs of `count` elements each, `stride` apart.
template <typename A>
struct Runs {
  Run<A> first;
  Strides stride;
  int64_t rows, count;

  // The distance from one vector of a run to the next; 0 for members that are null.
  Strides vector_step() const {
    const auto step = [](const A* member) { return member ? kLanes<A> : 0; };
    return {step(first.data),   step(first.u),         step(first.t),      step(first.gain),   step(first.g),
            step(first.result), step(first.grad_data), step(first.grad_u), step(first.grad_t), step(first.grad_gain)};
  }

  // Calls f with every run.
  template <typename F>
  inline __attribute__((always_inline)) void for_each(const F& f) const {
    Run<A> run = first;
    for (int64_t row = 0; row < rows; ++row) {
      f(run);
      run.advance(stride);
    }
  }
};

// All members of a tile as runs: a run per row if rows are whole vectors, otherwise a single run. Members whose memory
// has that form are accessed in place, the others through buffers.
template <typename T, typename H, Direction direction>
class TileRuns {
 public:
  using A = compute_t<T>;

  explicit TileRuns(const CouplingTile<T, H>& tile)
      : tile_(tile), by_row_(tile.columns % kLanes<A> == 0 && tile.rows > 1) {
    data_ = source(tile.data, buffers_[0]);
    u_ = source(tile.u, buffers_[1]);
    t_ = source(tile.t, buffers_[2]);
    if (tile.gain.data) gain_ = source(tile.gain, buffers_[3]);
    if constexpr (has_result(direction)) result_ = target(tile.result, buffers_[4]);
    if constexpr (is_gradient(direction)) {
      g_ = source(tile.grad, buffers_[5]);
      grad_data_ = target(tile.grad_data, buffers_[6]);
      grad_u_ = target(tile.grad_u, buffers_[7]);
      grad_t_ = target(tile.grad_t, buffers_[8]);
    }
  }

  Runs<A> runs() const {
    A* grad_gain = tile_.grad_gain;
    return {{data_.values, u_.values, t_.values, gain_.values, g_.values, static_cast<A>(tile_.grad_log_det),
             result_.values, grad_data_.values, grad_u_.values, grad_t_.values, grad_gain},
            {data_.stride, u_.stride, t_.stride, gain_.stride, g_.stride, result_.stride, grad_data_.stride,
             grad_u_.stride, grad_t_.stride, grad_gain ? tile_.columns : 0},
            by_row_ ? tile_.rows : 1,
            by_row_ ? tile_.columns : tile_.rows * tile_.columns};
  }

  // Whether all results are written in place, by aligned vectors.
  bool is_aligned() const {
    return (by_row_ || tile_.columns % kLanes<A> == 0) && is_aligned_in_place(result_, 4) &&
           is_aligned_in_place(grad_data_, 6) && is_aligned_in_place(grad_u_, 7) && is_aligned_in_place(grad_t_, 8);
  }

  void store() {
    if constexpr (has_result(direction)) store(result_, tile_.result, 4);
    if constexpr (is_gradient(direction)) {
      store(grad_data_, tile_.grad_data, 6);
      store(grad_u_, tile_.grad_u, 7);
      store(grad_t_, tile_.grad_t, 8);
    }
  }

 private:
  template <typename P>
  struct Part {
    P* values = nullptr;
    int64_t stride = 0;
  };

  template <typename S>
  bool is_in_place(const Strided<S>& matrix) const {
    return by_row_ ? std::is_same_v<std::remove_const_t<S>, A> && matrix.column_stride == 1
                   : is_contiguous_tile<A>(matrix, tile_.rows, tile_.columns);
  }

  template <typename S>
  Part<const A> source(const Strided<const S>& matrix, TileBuffer<A>& buffer) const {
    if constexpr (std::is_same_v<A, S>) {
      if (is_in_place(matrix)) return {matrix.data, matrix.row_stride};
    }
    return {load(matrix, tile_.rows, tile_.columns, buffer.values), tile_.columns};
  }

  template <typename S>
  Part<A> target(const Strided<S>& matrix, TileBuffer<A>& buffer) const {
    if constexpr (std::is_same_v<A, S>) {
      if (is_in_place(matrix)) return {matrix.data, matrix.row_stride};
    }
    return {buffer.values, tile_.columns};
  }

  template <typename S>
  void store(const Part<A>& part, const Strided<S>& matrix, int buffer) const {
    if (part.values == buffers_[buffer].values) {
      glow_kernels::GLOW_KERNELS_ISA::store(part.values, tile_.rows, tile_.columns, matrix);
    }
  }

  bool is_aligned_in_place(const Part<A>& part, int buffer) const {
    return part.values == nullptr || (part.values != buffers_[buffer].values && part.stride % kLanes<A> == 0 &&
                                      reinterpret_cast<intptr_t>(part.values) % kVectorBytes == 0);
  }

  const CouplingTile<T, H>& tile_;
  bool by_row_;
  Part<const A> data_, u_, t_, gain_, g_;
  Part<A> result_, grad_data_, grad_u_, grad_t_;
  TileBuffer<A> buffers_[9];
};

}  // namespace glow_kernels::GLOW_KERNELS_ISA
