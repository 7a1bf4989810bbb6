// Tiles of positions of all channels, as the linear map of actnorm_conv1x1 works on them: between tensors, where the
// positions or the channels lie next to each other, and shared memory, where the positions do.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/tile.h"
#include "glow_kernels/tensors.h"

namespace glow_kernels::linear {

// More channels are a matrix product that is limited by arithmetic: cuBLAS, through the reference. support.py knows it.
// In double, 60 are what fits into the shared memory of every GPU from sm_80 on.
template <typename A>
constexpr int64_t kMaxChannels = sizeof(A) == 8 ? 60 : 64;

// A thread has 12 channels, since Glow's tensors have 12, 24 and 48, and V positions, 16 bytes of the type of
// arithmetic; a warp has 32 V neighbouring positions.
constexpr unsigned kRows = 12, kMaxThreads = 192;
template <typename A>
constexpr unsigned kWide = 16 / sizeof(A);
template <typename A>
constexpr unsigned kStripBits = sizeof(A) == 8 ? 6 : 7;
template <typename A>
constexpr unsigned kStrip = 1u << kStripBits<A>;
// Elements from a channel of a strip to the next: V more than its positions, so that they lie in different banks.
template <typename A>
constexpr unsigned kStride = kStrip<A> + kWide<A>;

template <typename A>
using Values = A[kRows][kWide<A>];

// The positions of a tile: `count` of them from one of a sample on, which may reach into the next samples.
struct Span {
  int64_t batch, position;
  unsigned count;
};

// How a block works: on `strips` strips of positions, with warps for the channels of each.
template <typename A>
struct Work {
  unsigned channels, strips;
  unsigned side;  // the channels, rounded up to those of whole warps
  int64_t batches, per_sample;

  explicit Work(const Tensor& x)
      : channels(static_cast<unsigned>(x.size(1))), batches(x.size(0)), per_sample(planes_of(x).positions) {
    const unsigned rows = (channels + kRows - 1) / kRows;
    strips = rows < 4 ? 4 / rows : 1;
    side = rows * kRows;
  }
  int threads() const { return static_cast<int>(side / kRows * strips * 32); }
  int64_t tiles() const { return (batches * per_sample + positions() - 1) / positions(); }
  // Of `count` tiles, a matrix and a shift.
  int64_t shared_bytes(int64_t count) const {
    return (count * tile_size() + int64_t{side} * (side + 1)) * static_cast<int64_t>(sizeof(A));
  }
  __host__ __device__ unsigned positions() const { return strips * kStrip<A>; }
  __host__ __device__ unsigned tile_size() const { return strips * side * kStride<A>; }

  // Of this thread: its first channel, its first position in the tile, and where both stand in memory.
  __device__ unsigned row() const { return threadIdx.x / 32 / strips * kRows; }
  __device__ unsigned column() const { return threadIdx.x / 32 % strips * kStrip<A> + threadIdx.x % 32 * kWide<A>; }
  __device__ unsigned at(unsigned channel, unsigned position) const {
    return (position / kStrip<A> * side + channel) * kStride<A> + position % kStrip<A>;
  }
  __device__ Span span(unsigned tile) const {
    const int64_t first = int64_t{tile} * positions(), batch = first / per_sample;
    const int64_t left = batches * per_sample - first;
    return {batch, first - batch * per_sample, left < positions() ? static_cast<unsigned>(left) : positions()};
  }
};

// A tensor (B, C, *spatial); strides count elements, `data` is null for none.
template <typename T>
struct Positions {
  T* data = nullptr;
  int64_t per_sample = 0, batch_stride = 0, channel_stride = 0, position_stride = 0;
  bool channels_inside = false;  // whether channels lie next to each other
  bool vectors = false;          // whether V at a time lie together and are aligned

  // Channel 0 at a position that is counted from the beginning of a tile.
  __device__ T* at(const Span& span, unsigned offset) const {
    int64_t batch = span.batch, position = span.position + offset;
    if (position >= per_sample) {  // then what is beyond is less than a tile, and so is the size of a sample further on
      const auto beyond = static_cast<unsigned>(position - per_sample), size = static_cast<unsigned>(per_sample);
      const unsigned more = beyond < per_sample ? 0 : beyond / size;
      batch += 1 + more;
      position = beyond - more * size;
    }
    return data + batch * batch_stride + position * position_stride;
  }
};

template <typename T>
Positions<T> positions_of(const Tensor& x, T* data) {
  constexpr int64_t V = kWide<compute_t<std::remove_const_t<T>>>;
  const Planes p = planes_of(x);
  const bool inside = p.channels > 1 && p.channel_stride == 1 && (p.positions == 1 || p.position_stride != 1);
  const int64_t inner = inside ? p.channels : p.positions, outer = inside ? p.positions : p.channels;
  const int64_t inner_stride = inside ? p.channel_stride : p.position_stride;
  const int64_t outer_stride = inside ? p.position_stride : p.channel_stride;
  const bool vectors = inner % V == 0 && inner_stride == 1 && (outer == 1 || outer_stride % V == 0) &&
                       (p.batches == 1 || p.batch_stride % V == 0) &&
                       reinterpret_cast<uintptr_t>(data) % (V * sizeof(T)) == 0;
  return {data, p.positions, p.batch_stride, p.channel_stride, p.position_stride, inside, vectors};
}

template <typename T>
Positions<const T> readable(const Tensor& x) {
  return positions_of(x, x.const_data_ptr<T>());
}

template <typename T>
Positions<T> writable(const Tensor& x) {
  return positions_of(x, x.mutable_data_ptr<T>());
}

// A matrix C x C with zeros around it, `side` squared, and after it a shift, zeros where there is none.
template <typename A>
__device__ void load_matrix(const A* from, const A* shift, const Work<A>& work, A* matrix) {
  constexpr unsigned V = kWide<A>;
  const unsigned size = work.side * work.side;
  for (unsigned i = threadIdx.x; i < work.side; i += blockDim.x) {
    matrix[size + i] = shift != nullptr && i < work.channels ? shift[i] : A(0);
  }
  if (work.channels == work.side && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll 2
    for (unsigned index = threadIdx.x * V; index < size; index += blockDim.x * V) {
      detail::copy<V>(matrix + index, from + index);
    }
    return;
  }
#pragma unroll 2
  for (unsigned index = threadIdx.x; index < size; index += blockDim.x) {
    const unsigned i = index / work.side, j = index - i * work.side;
    matrix[index] = i < work.channels && j < work.channels ? from[i * work.channels + j] : A(0);
  }
}

// Calls f(channel, position) for all elements of a tile, `step` channels at a time. Where the channels lie together,
// 8 neighbouring threads have neighbouring positions, which lie in different banks, and 32 threads 64 bytes and more of
// each; otherwise neighbouring threads have neighbouring positions.
template <typename A, typename F>
__device__ void for_each_chunk(const Work<A>& work, unsigned channels, bool channels_inside, unsigned step,
                               const F& f) {
  const unsigned bits = channels_inside ? 3 : kStripBits<A>, chunks = channels / step;
#pragma unroll 4
  for (unsigned index = threadIdx.x; index < chunks * work.positions(); index += blockDim.x) {
    const unsigned rest = index >> bits, high = rest / chunks;
    f((rest - high * chunks) * step, index + ((high - rest) << bits));
  }
}

// A tile, with zeros for the positions and the channels that do not exist.
template <typename T, typename A>
__device__ void load_tile(const Positions<const T>& x, const Work<A>& work, const Span& span, A* tile) {
  constexpr unsigned V = kWide<A>;
  using Vector = detail::Registers<T, V>;
  if (x.vectors && !x.channels_inside) {
    const unsigned row = work.row(), column = work.column();
    const T* const from = x.at(span, column) + row * x.channel_stride;
    A* const to = tile + work.at(row, column);
    const unsigned channels = column < span.count ? work.channels - row : 0;
    Vector values[kRows];  // all on their way before the first is waited for
#pragma unroll
    for (unsigned r = 0; r < kRows; ++r) {
      values[r] = Vector{};
      if (r < channels) detail::copy<V>(values[r].values, from + r * x.channel_stride);
    }
#pragma unroll
    for (unsigned r = 0; r < kRows; ++r) {
      detail::Registers<A, V> wide;
#pragma unroll
      for (unsigned v = 0; v < V; ++v) wide.values[v] = static_cast<A>(values[r].values[v]);
      detail::copy<V>(to + r * kStride<A>, wide.values);
    }
  } else if (x.vectors) {
    for_each_chunk(work, work.side, true, V, [&](unsigned channel, unsigned position) {
      Vector values{};
      if (channel < work.channels && position < span.count) {
        detail::copy<V>(values.values, x.at(span, position) + channel);
      }
      A* const to = tile + work.at(channel, position);
#pragma unroll
      for (unsigned v = 0; v < V; ++v) to[v * kStride<A>] = static_cast<A>(values.values[v]);
    });
  } else {
    for_each_chunk(work, work.side, x.channels_inside, 1, [&](unsigned channel, unsigned position) {
      const bool exists = channel < work.channels && position < span.count;
      tile[work.at(channel, position)] =
          exists ? static_cast<A>(x.at(span, position)[channel * x.channel_stride]) : A(0);
    });
  }
}

// Writes what the threads have to a tile.
template <typename A>
__device__ void put_tile(const Work<A>& work, const Values<A>& values, A* tile) {
  constexpr unsigned V = kWide<A>;
  A* const to = tile + work.at(work.row(), work.column());
#pragma unroll
  for (unsigned r = 0; r < kRows; ++r) {
    detail::Registers<A, V> vector;
#pragma unroll
    for (unsigned v = 0; v < V; ++v) vector.values[v] = values[r][v];
    detail::copy<V>(to + r * kStride<A>, vector.values);
  }
}

// Writes what the threads have to a tensor, by way of a tile that other threads may still read, unless they can write
// it themselves. All threads must call it.
template <typename T, typename A>
__device__ void store_tile(const Positions<T>& z, const Work<A>& work, const Span& span, const Values<A>& values,
                           A* tile) {
  constexpr unsigned V = kWide<A>;
  using Vector = detail::Registers<T, V>;
  if (z.vectors && !z.channels_inside) {
    const unsigned row = work.row(), column = work.column();
    const unsigned channels = column < span.count ? work.channels - row : 0;
    T* const to = z.at(span, column) + row * z.channel_stride;
#pragma unroll
    for (unsigned r = 0; r < kRows; ++r) {
      Vector vector;
#pragma unroll
      for (unsigned v = 0; v < V; ++v) vector.values[v] = static_cast<T>(values[r][v]);
      if (r < channels) detail::copy<V>(to + r * z.channel_stride, vector.values);
    }
    return;
  }
  __syncthreads();
  put_tile(work, values, tile);
  __syncthreads();
  if (z.vectors) {
    for_each_chunk(work, work.channels, true, V, [&](unsigned channel, unsigned position) {
      const A* const from = tile + work.at(channel, position);
      Vector vector;
#pragma unroll
      for (unsigned v = 0; v < V; ++v) vector.values[v] = static_cast<T>(from[v * kStride<A>]);
      if (position < span.count) detail::copy<V>(z.at(span, position) + channel, vector.values);
    });
  } else {
    for_each_chunk(work, work.channels, z.channels_inside, 1, [&](unsigned channel, unsigned position) {
      if (position >= span.count) return;
      z.at(span, position)[channel * z.channel_stride] = static_cast<T>(tile[work.at(channel, position)]);
    });
  }
}

}  // namespace glow_kernels::linear
