// Tensors (B, C, *spatial) as the CPU kernels see them: batches of C x P planes, cut into tiles.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cpu/tile.h"

namespace glow_kernels {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The planes of x, unless its spatial dimensions do not collapse into one.
inline std::optional<Planes> try_planes(const Tensor& x) {
  Planes planes{x.size(0), x.size(1), 1, x.stride(0), x.stride(1), 1};
  // Strides mean nothing where there is no element.
  const bool empty = x.numel() == 0;
  for (int64_t dimension = x.dim() - 1; dimension >= 2; --dimension) {
    const int64_t size = x.size(dimension);
    if (size == 1) continue;
    if (planes.positions == 1) {
      planes.position_stride = x.stride(dimension);
    } else if (!empty && x.stride(dimension) != planes.position_stride * planes.positions) {
      return std::nullopt;
    }
    planes.positions *= size;
  }
  return planes;
}

// x itself or, where its positions do not lie at one stride, a contiguous copy.
inline Tensor with_planes(const Tensor& x) { return try_planes(x) ? x : torch::stable::contiguous(x); }

inline Planes planes_of(const Tensor& x) { return *try_planes(x); }

// x itself or, where it is not contiguous, a contiguous copy. Asking first is cheaper than a call that does nothing.
inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// An uninitialised tensor with the shape of x, channels last if x is and contiguous otherwise; the rule is that of
// output_format in glow_kernels/backends/numerics.py.
inline Tensor empty_output(const Tensor& x) {
  MemoryFormat format = MemoryFormat::Contiguous;
  const bool channels_last = x.dim() >= 4 && x.size(1) > 1 && x.stride(1) == 1 && !x.is_contiguous();
  if (channels_last) format = x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
  return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt, format);
}

inline Tensor empty_vector(int64_t size, ScalarType type, const Tensor& like) {
  return torch::stable::empty({size}, type, std::nullopt, like.device());
}

// Some rows and columns of one sample. Rows and columns are channels and positions, or the other way round, whichever
// makes the columns lie next to each other.
struct Tile {
  int64_t batch, row, column, rows, columns;
};

// Elements of a row that are a tile by themselves, for kernels where several rows that do not follow each other go
// through a buffer.
constexpr int64_t kLongRow = 256;

// All tiles of a tensor, in a fixed order that does not depend on the number of threads.
class Tiling {
 public:
  explicit Tiling(const Planes& planes, int64_t long_row = kLongRow)
      : channels_inside_(planes.positions == 1 || planes.position_stride != 1),
        outer_(channels_inside_ ? planes.positions : planes.channels),
        inner_(channels_inside_ ? planes.channels : planes.positions),
        columns_(std::clamp<int64_t>(inner_, 1, kTile)),
        rows_(columns_ >= long_row ? 1 : kTile / columns_),
        row_tiles_((outer_ + rows_ - 1) / rows_),
        column_tiles_((inner_ + columns_ - 1) / columns_),
        batches_(planes.batches) {}

  int64_t per_sample() const { return row_tiles_ * column_tiles_; }
  int64_t size() const { return batches_ * per_sample(); }

  Tile operator[](int64_t index) const {
    const int64_t batch = index / per_sample(), in_sample = index % per_sample();
    const int64_t row = in_sample / column_tiles_ * rows_, column = in_sample % column_tiles_ * columns_;
    return {batch, row, column, std::min(rows_, outer_ - row), std::min(columns_, inner_ - column)};
  }

  // Whether the columns of a tile are channels.
  bool channels_inside() const { return channels_inside_; }

  // The channels of a tile, and at most how many a tile has.
  int64_t first_channel(const Tile& tile) const { return channels_inside_ ? tile.column : tile.row; }
  int64_t channels(const Tile& tile) const { return channels_inside_ ? tile.columns : tile.rows; }
  int64_t channels_per_tile() const { return channels_inside_ ? columns_ : rows_; }

  // sums[c] += the values of a tile's channel c.
  template <typename A>
  void add_per_channel(const Tile& tile, const A* values, double* sums) const {
    for (int64_t row = 0; row < tile.rows; ++row) {
      for (int64_t column = 0; column < tile.columns; ++column) {
        sums[channels_inside_ ? column : row] += values[row * tile.columns + column];
      }
    }
  }

  // The tile in a tensor whose channel c stands at channel `first_channel + channel_step * c`.
  template <typename T>
  Strided<T> at(const Tile& tile, T* data, const Planes& planes, int64_t first_channel = 0,
                int64_t channel_step = 1) const {
    if (data == nullptr) return {};
    const int64_t channel = channel_step * planes.channel_stride, position = planes.position_stride;
    const int64_t row_stride = channels_inside_ ? position : channel;
    const int64_t column_stride = channels_inside_ ? channel : position;
    T* start = data + tile.batch * planes.batch_stride + first_channel * planes.channel_stride;
    return {start + tile.row * row_stride + tile.column * column_stride, row_stride, column_stride};
  }

 private:
  bool channels_inside_;
  int64_t outer_, inner_, columns_, rows_, row_tiles_, column_tiles_, batches_;
};

// Tiles a thread gets at least: fewer would cost more to hand out than to compute.
constexpr int64_t kTilesPerThread = 16;

}  // namespace glow_kernels
