// Tiles: the unit of work of a block. A tile is some rows and columns of one sample of (B, C, *spatial); rows and
// columns are channels and positions, or the other way round, whichever makes neighbouring columns adjacent in memory.
// Threads take N neighbouring columns at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <optional>

#include "cuda/launch.h"
#include "glow_kernels/math.h"
#include "glow_kernels/tensors.h"

namespace glow_kernels {

// Elements of a tile: many in large tensors, few in small ones, which would otherwise leave multiprocessors idle.
constexpr int64_t kLargeTile = 4096, kSmallTile = 1024;
constexpr int64_t kManyTiles = 1024;
// With fewer than kFewElements per multiprocessor, threads may take elements one by one, in smaller tiles and in blocks
// of more threads, so that more threads wait for memory at the same time.
constexpr int64_t kFewElements = 4096, kTileOfFew = 256, kMaxThreadsPerBlock = 1024;

inline bool has_few_elements(const Launcher& launch, const Tensor& x) {
  return x.numel() < kFewElements * launch.multiprocessors();
}

// Columns that a thread takes at a time: 16 bytes of the narrowest type.
template <typename... T>
constexpr int kVector = 16 / std::min({sizeof(T)...});

struct Tile {
  unsigned batch, row, column, rows, columns;
};

// N columns of one row of a tile, of which `count` exist.
struct Spot {
  unsigned row, column;
  int count;
};

// All tiles of a tensor, sample after sample, in an order that depends on its sizes alone.
struct Tiling {
  bool channels_inside;  // whether the columns are channels
  unsigned outer, inner, batches;
  unsigned rows, columns, row_tiles, column_tiles, per_sample;

  // With `whole_samples` a tile is a whole sample if that fits, so that a sum over a sample needs no second kernel;
  // otherwise tiles of a small tensor have `small` elements.
  explicit Tiling(const Planes& planes, bool whole_samples = false, int64_t small = kSmallTile)
      : channels_inside(planes.positions == 1 || planes.position_stride != 1) {
    const int64_t outer_size = channels_inside ? planes.positions : planes.channels;
    const int64_t inner_size = channels_inside ? planes.channels : planes.positions;
    const bool many = planes.batches * outer_size * inner_size >= kManyTiles * kLargeTile;
    const bool whole = whole_samples && outer_size * inner_size <= kLargeTile;
    const int64_t tile = many || whole ? kLargeTile : small, most = std::clamp<int64_t>(inner_size, 1, tile);
    cut(planes.batches, outer_size, inner_size, tile / most, most);
  }

  // Tiles of this many channels and positions, for data whose positions are contiguous.
  static Tiling along_positions(const Planes& planes, int64_t channels, int64_t positions) {
    Tiling tiling;
    tiling.cut(planes.batches, planes.channels, planes.positions, channels, positions);
    return tiling;
  }

  int64_t size() const { return int64_t{batches} * per_sample; }
  // Threads of a block that takes N columns at a time: no more whole warps than have work.
  int threads(int N) const {
    const int64_t spots = int64_t{rows} * ((columns + N - 1) / N);
    return static_cast<int>(std::min<int64_t>(N == 1 ? kMaxThreadsPerBlock : kThreads, (spots + 31) / 32 * 32));
  }
  // Tiles that share a channel.
  int64_t per_channel() const { return int64_t{batches} * (channels_inside ? row_tiles : column_tiles); }

  // In 32 bits, since every thread of a block does these divisions.
  __device__ Tile operator[](unsigned index) const {
    const unsigned batch = index / per_sample, in_sample = index - batch * per_sample;
    const unsigned outer_size = in_sample / column_tiles, inner_size = in_sample - outer_size * column_tiles;
    const unsigned row = outer_size * rows, column = inner_size * columns;
    return {batch, row, column, least(rows, outer - row), least(columns, inner - column)};
  }

 private:
  Tiling() : channels_inside(false) {}

  void cut(int64_t samples, int64_t outer_size, int64_t inner_size, int64_t max_rows, int64_t max_columns) {
    columns = static_cast<unsigned>(std::clamp<int64_t>(inner_size, 1, max_columns));
    rows = static_cast<unsigned>(std::clamp<int64_t>(outer_size, 1, max_rows));
    const int64_t row_count = (outer_size + rows - 1) / rows, column_count = (inner_size + columns - 1) / columns;
    constexpr int64_t limit = int64_t{1} << 31;
    STD_TORCH_CHECK(outer_size < limit && inner_size < limit && samples < limit &&
                        row_count * column_count * std::max<int64_t>(1, samples) < limit,
                    "the tensor is too large");
    outer = static_cast<unsigned>(outer_size);
    inner = static_cast<unsigned>(inner_size);
    batches = static_cast<unsigned>(samples);
    row_tiles = static_cast<unsigned>(row_count);
    column_tiles = static_cast<unsigned>(column_count);
    per_sample = row_tiles * column_tiles;
  }

  static __device__ unsigned least(unsigned a, unsigned b) { return a < b ? a : b; }
};

// Calls f(spot) for all columns of a tile, N at a time, spread over the threads of the block.
template <int N, typename F>
__device__ void for_each_spot(const Tile& tile, const F& f) {
  const unsigned per_row = (tile.columns + N - 1) / N;
  // A thread divides once and not for every spot: a division takes as long as a few elements.
  const unsigned rows = blockDim.x / per_row, rest = blockDim.x - rows * per_row;
  unsigned row = threadIdx.x / per_row, in_row = threadIdx.x - row * per_row;
  while (row < tile.rows) {
    const unsigned column = in_row * N;
    f(Spot{row, column, tile.columns - column < N ? static_cast<int>(tile.columns - column) : N});
    row += rows;
    in_row += rest;
    if (in_row >= per_row) {
      in_row -= per_row;
      ++row;
    }
  }
}

// A tensor in the rows and columns of a tiling; strides are in elements, `data` is null if there is no tensor. Strides
// inside a sample have 32 bits, so that an address takes few instructions; their products have 64.
template <typename T>
struct View {
  T* data = nullptr;
  int64_t batch_stride = 0;
  unsigned row_stride = 0, column_stride = 0;
  bool vectors = false;  // whether N columns at a time are contiguous and aligned

  // The address of a spot, whose columns are `step` elements apart.
  __device__ T* at(const Tile& tile, const Spot& spot, unsigned step) const {
    return data + tile.batch * batch_stride + uint64_t{tile.row + spot.row} * row_stride +
           uint64_t{tile.column + spot.column} * step;
  }
};

// Two views into the same tensor, such as the scales and the shifts in h.
template <typename T>
struct Pair {
  View<T> first, second;
  // 1 if the two alternate and N columns of both at a time are contiguous and aligned; -1 if the second comes first.
  int interleaved = 0;
};

namespace detail {

// With at most one element there is nothing to step to, and the stride is meaningless.
inline unsigned narrow_stride(int64_t stride, unsigned count) {
  if (count <= 1) return 0;
  STD_TORCH_CHECK(stride <= std::numeric_limits<unsigned>::max(), "a stride of ", stride, " elements is too large");
  return static_cast<unsigned>(stride);
}

template <typename T>
bool starts_vectors(const T* data, int64_t batch_stride, int64_t row_stride, const Tiling& tiling, int width) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % std::min<size_t>(16, width * sizeof(T)) == 0;
  return aligned && (tiling.batches <= 1 || batch_stride % width == 0) &&
         (tiling.outer <= 1 || row_stride % width == 0);
}

template <typename T>
View<T> view(T* data, const Planes& planes, const Tiling& tiling, int64_t first, int64_t step) {
  const int64_t channel = step * planes.channel_stride, position = planes.position_stride;
  return {data + first * planes.channel_stride, planes.batch_stride,
          narrow_stride(tiling.channels_inside ? position : channel, tiling.outer),
          narrow_stride(tiling.channels_inside ? channel : position, tiling.inner), false};
}

template <int N, typename T>
View<T> with_vectors(View<T> view, const Tiling& tiling) {
  view.vectors = view.column_stride == 1 && starts_vectors(view.data, view.batch_stride, view.row_stride, tiling, N);
  return view;
}

template <int N, typename T>
Pair<T> pair(T* data, const Planes& planes, const Tiling& tiling, int64_t first, int64_t second, int64_t step) {
  Pair<T> pair{view(data, planes, tiling, first, step), view(data, planes, tiling, second, step), 0};
  const View<T>& lower = first < second ? pair.first : pair.second;
  const bool neighbours = planes.channel_stride == 1 && std::abs(second - first) == 1;
  const bool stride_fits = N == 1 ? lower.column_stride % 2 == 0 : lower.column_stride == 2;
  if (neighbours && stride_fits && starts_vectors(lower.data, lower.batch_stride, lower.row_stride, tiling, 2 * N)) {
    pair.interleaved = first < second ? 1 : -1;
  }
  pair.first = with_vectors<N>(pair.first, tiling);
  pair.second = with_vectors<N>(pair.second, tiling);
  return pair;
}

// Copies N elements, up to 16 bytes at a time, between registers and memory that is aligned to that.
template <int N, typename T>
__device__ void copy(T* to, const T* from) {
  constexpr int bytes = N * static_cast<int>(sizeof(T));
  using Small = std::conditional_t<bytes % 4 == 0, unsigned, unsigned short>;
  using Chunk = std::conditional_t<bytes % 16 == 0, uint4, std::conditional_t<bytes % 8 == 0, uint2, Small>>;
  static_assert(bytes % sizeof(Chunk) == 0);
#pragma unroll
  for (unsigned i = 0; i < bytes / sizeof(Chunk); ++i) {
    reinterpret_cast<Chunk*>(to)[i] = reinterpret_cast<const Chunk*>(from)[i];
  }
}

// N elements in registers, in the type that they have in memory, and aligned for copy().
template <typename T, int N>
struct alignas(16) Registers {
  T values[N];
};

}  // namespace detail

// Views that kernels read and write. A pair views the channels `first + step * c` and `second + step * c`.
template <int N, typename T>
View<const T> readable(const std::optional<Tensor>& x, const Tiling& tiling) {
  if (!x) return {};
  return detail::with_vectors<N>(detail::view(x->const_data_ptr<T>(), planes_of(*x), tiling, 0, 1), tiling);
}

template <int N, typename T>
View<T> writable(const std::optional<Tensor>& x, const Tiling& tiling) {
  if (!x) return {};
  return detail::with_vectors<N>(detail::view(x->mutable_data_ptr<T>(), planes_of(*x), tiling, 0, 1), tiling);
}

template <int N, typename T>
Pair<const T> readable_pair(const Tensor& h, const Tiling& tiling, int64_t first, int64_t second, int64_t step) {
  return detail::pair<N>(h.const_data_ptr<T>(), planes_of(h), tiling, first, second, step);
}

template <int N, typename T>
Pair<T> writable_pair(const std::optional<Tensor>& h, const Tiling& tiling, int64_t first, int64_t second,
                      int64_t step) {
  if (!h) return {};
  return detail::pair<N>(h->mutable_data_ptr<T>(), planes_of(*h), tiling, first, second, step);
}

// A value for every channel, the same for all samples and positions.
template <int N, typename T>
View<const T> per_channel(const std::optional<Tensor>& vector, const Tiling& tiling) {
  if (!vector) return {};
  const Planes planes{0, vector->size(0), 1, 0, vector->stride(0), 0};
  return detail::with_vectors<N>(detail::view(vector->const_data_ptr<T>(), planes, tiling, 0, 1), tiling);
}

// The elements at a spot; 0 beyond its count. A thread that fetches all it needs before it widens any waits only once.
template <int N, typename T>
__device__ detail::Registers<T, N> fetch(const View<const T>& view, const Tile& tile, const Spot& spot) {
  detail::Registers<T, N> raw;
  if (view.vectors && spot.count == N) {
    detail::copy<N>(raw.values, view.at(tile, spot, 1));
  } else {
    const T* from = view.at(tile, spot, view.column_stride);
#pragma unroll
    for (int i = 0; i < N; ++i) raw.values[i] = i < spot.count ? from[int64_t{i} * view.column_stride] : T(0);
  }
  return raw;
}

// The same elements in the type of arithmetic.
template <int N, typename T, typename A>
__device__ void widen(const detail::Registers<T, N>& raw, A (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = static_cast<A>(raw.values[i]);
}

template <int N, typename T, typename A>
__device__ void load(const View<const T>& view, const Tile& tile, const Spot& spot, A (&values)[N]) {
  widen(fetch<N>(view, tile, spot), values);
}

template <int N, typename T, typename A>
__device__ void store(const View<T>& view, const Tile& tile, const Spot& spot, const A (&values)[N]) {
  if (view.vectors && spot.count == N) {
    detail::Registers<T, N> raw;
#pragma unroll
    for (int i = 0; i < N; ++i) raw.values[i] = static_cast<T>(values[i]);
    detail::copy<N>(view.at(tile, spot, 1), raw.values);
    return;
  }
  T* to = view.at(tile, spot, view.column_stride);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < spot.count) to[int64_t{i} * view.column_stride] = static_cast<T>(values[i]);
  }
}

template <int N, typename T, typename A>
__device__ void load(const Pair<const T>& pair, const Tile& tile, const Spot& spot, A (&first)[N], A (&second)[N]) {
  if (pair.interleaved != 0 && spot.count == N) {
    const View<const T>& lower = pair.interleaved > 0 ? pair.first : pair.second;
    detail::Registers<T, 2 * N> raw;
    detail::copy<2 * N>(raw.values, lower.at(tile, spot, N == 1 ? lower.column_stride : 2));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A even = static_cast<A>(raw.values[2 * i]), odd = static_cast<A>(raw.values[2 * i + 1]);
      first[i] = pair.interleaved > 0 ? even : odd;
      second[i] = pair.interleaved > 0 ? odd : even;
    }
    return;
  }
  const detail::Registers<T, N> raw_first = fetch<N>(pair.first, tile, spot),
                                raw_second = fetch<N>(pair.second, tile, spot);
  widen(raw_first, first);
  widen(raw_second, second);
}

// The first of the two steps of load(), for a thread that has other work in between: reads the elements of both views
// at a spot, which alternate if the pair is `interleaved`; otherwise one view comes after the other.
template <int N, typename T>
__device__ detail::Registers<T, 2 * N> fetch(const Pair<const T>& pair, const Tile& tile, const Spot& spot) {
  detail::Registers<T, 2 * N> raw;
  if (pair.interleaved != 0 && spot.count == N) {
    const View<const T>& lower = pair.interleaved > 0 ? pair.first : pair.second;
    detail::copy<2 * N>(raw.values, lower.at(tile, spot, N == 1 ? lower.column_stride : 2));
  } else {
    const detail::Registers<T, N> first = fetch<N>(pair.first, tile, spot), second = fetch<N>(pair.second, tile, spot);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      raw.values[i] = first.values[i];
      raw.values[N + i] = second.values[i];
    }
  }
  return raw;
}

// The second step: converts them to the type of arithmetic.
template <int N, typename T, typename A>
__device__ void widen(const Pair<const T>& pair, const Spot& spot, const detail::Registers<T, 2 * N>& raw,
                      A (&first)[N], A (&second)[N]) {
  const bool interleaved = pair.interleaved != 0 && spot.count == N;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const T even = raw.values[2 * i], odd = raw.values[2 * i + 1], early = raw.values[i], late = raw.values[N + i];
    first[i] = static_cast<A>(!interleaved ? early : pair.interleaved > 0 ? even : odd);
    second[i] = static_cast<A>(!interleaved ? late : pair.interleaved > 0 ? odd : even);
  }
}

template <int N, typename T, typename A>
__device__ void store(const Pair<T>& pair, const Tile& tile, const Spot& spot, const A (&first)[N],
                      const A (&second)[N]) {
  if (pair.interleaved != 0 && spot.count == N) {
    const View<T>& lower = pair.interleaved > 0 ? pair.first : pair.second;
    detail::Registers<T, 2 * N> raw;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      raw.values[2 * i] = static_cast<T>(pair.interleaved > 0 ? first[i] : second[i]);
      raw.values[2 * i + 1] = static_cast<T>(pair.interleaved > 0 ? second[i] : first[i]);
    }
    detail::copy<2 * N>(lower.at(tile, spot, N == 1 ? lower.column_stride : 2), raw.values);
    return;
  }
  store(pair.first, tile, spot, first);
  store(pair.second, tile, spot, second);
}

}  // namespace glow_kernels
