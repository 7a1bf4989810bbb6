// Tensors (B, C, *spatial), as batches of C x P planes, cut into tiles.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/tile.h"
#include "glow_kernels/types.h"

namespace glow_kernels {

// Some rows and columns of one sample. Rows and columns are channels and positions, or the other way round, whichever
// makes neighbouring columns adjacent in memory.
struct Tile {
  int64_t batch, row, column, rows, columns;
};

// A row with this many elements is a tile by itself, for kernels that copy several non-adjacent rows through a buffer.
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

  // The channels of a tile, and the most that any tile has.
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

  // The tile in a tensor that holds channel c at index `first_channel + channel_step * c`.
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

// Minimum number of tiles per thread: fewer would cost more to distribute than to compute.
constexpr int64_t kTilesPerThread = 16;

}  // namespace glow_kernels
