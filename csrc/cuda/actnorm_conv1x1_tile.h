// Tiles of positions with all channels, which the linear map of actnorm_conv1x1 works on: copies between tensors, in
// which either positions or channels are contiguous, and shared memory, in which positions are.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/tile.h"
#include "glow_kernels/tensors.h"

namespace glow_kernels::linear {

// With more channels the map is a compute-bound matrix product, left to cuBLAS through the reference; support.py has
// the same limit. In double, 60 are what fits into the shared memory of every GPU from sm_80 on.
template <typename A>
constexpr int64_t kMaxChannels = sizeof(A) == 8 ? 60 : 64;

// Channels of a thread: 12 for large tensors, since Glow's have 12, 24 and 48. For small ones that would leave a
// multiprocessor too few threads to hide the latencies of memory and arithmetic.
constexpr unsigned kManyRows = 12, kFewRows = 4;
constexpr unsigned kMaxThreads = 192;

// The positions of a tile: `count` of them from `position` of sample `batch` on, which may reach into the next samples.
struct Span {
  int64_t batch, position;
  unsigned count;
};

// The layout of a C x C matrix in shared memory: zero-padded to `side` x `side`, with rows `row_stride` elements apart
// and a shift after it.
struct Frame {
  unsigned channels, side, row_stride;

  __host__ __device__ unsigned shift() const { return side * row_stride; }
  __host__ __device__ unsigned size() const { return side * (row_stride + 1); }
};

// How a block divides its work: a tile is `strips` strips of positions, with threads for the channels of each. A thread
// has R channels and V neighbouring positions, which are 16 bytes in the type of arithmetic.
template <typename Arithmetic, unsigned R>
struct Work {
  using A = Arithmetic;
  static constexpr bool kSmall = R == kFewRows;
  static constexpr unsigned kRows = R, V = 16 / sizeof(A), kLanes = kSmall ? 8 : 32, kStrip = kLanes * V;
  // The distance from one channel of a strip to the next: V more than its positions, which avoids bank conflicts.
  static constexpr unsigned kStride = kStrip + V;
  using Values = A[R][V];

  unsigned channels, strips;
  unsigned side;  // the channels, rounded up to a multiple of kManyRows
  int64_t batches, per_sample;

  Work(const Tensor& x, int64_t multiprocessors)
      : channels(static_cast<unsigned>(x.size(1))), batches(x.size(0)), per_sample(planes_of(x).positions) {
    side = (channels + kManyRows - 1) / kManyRows * kManyRows;
    const unsigned rows = side / R;
    if (kSmall) {
      const int64_t most = std::min(4u, kMaxThreads / (rows * kLanes));
      strips = static_cast<unsigned>(std::clamp<int64_t>(batches * per_sample / kStrip / multiprocessors, 1, most));
    } else {
      strips = rows < 4 ? 4 / rows : 1;
    }
  }
  // At least four warps for small tensors, of which some only help to load and to add.
  int threads() const {
    const unsigned with_rows = side / R * strips * kLanes;
    return static_cast<int>(kSmall ? std::max(128u, (with_rows + 31) / 32 * 32) : with_rows);
  }
  int64_t tiles() const { return (batches * per_sample + positions() - 1) / positions(); }
  // For this many tiles, and matrices with a shift.
  int64_t shared_bytes(int64_t tile_count, int64_t matrix_count) const {
    return (tile_count * tile_size() + matrix_count * matrix_size()) * static_cast<int64_t>(sizeof(A));
  }
  __host__ __device__ unsigned positions() const { return strips * kStrip; }
  __host__ __device__ unsigned tile_size() const { return strips * side * kStride; }
  __host__ __device__ Frame frame() const { return {channels, side, side}; }
  __host__ __device__ unsigned matrix_size() const { return frame().size(); }

  // The first channel of this thread, if it has any, its first position in the tile, and an element's index in memory.
  __device__ bool has_row() const { return !kSmall || row() < side; }
  __device__ unsigned row() const { return threadIdx.x / kLanes / strips * R; }
  __device__ unsigned column() const { return threadIdx.x / kLanes % strips * kStrip + threadIdx.x % kLanes * V; }
  __device__ unsigned at(unsigned channel, unsigned position) const {
    return (position / kStrip * side + channel) * kStride + position % kStrip;
  }
  __device__ Span span(unsigned tile) const {
    const int64_t first = int64_t{tile} * positions(), batch = first / per_sample;
    const int64_t left = batches * per_sample - first;
    return {batch, first - batch * per_sample, left < positions() ? static_cast<unsigned>(left) : positions()};
  }
};

// A tensor (B, C, *spatial); strides are in elements, `data` is null if there is no tensor.
template <typename T>
struct Positions {
  T* data = nullptr;
  int64_t per_sample = 0, batch_stride = 0, channel_stride = 0, position_stride = 0;
  bool channels_inside = false;  // whether channels are contiguous
  bool vectors = false;          // whether V elements at a time are contiguous and aligned

  // The address of channel 0 at a position that is counted from the beginning of a tile.
  __device__ T* at(const Span& span, unsigned offset) const {
    int64_t batch = span.batch, position = span.position + offset;
    if (position >= per_sample) {  // `beyond` is less than a tile; so is `size` where it is used, both fit into 32 bits
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
  constexpr int64_t V = 16 / sizeof(compute_t<std::remove_const_t<T>>);
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

// Starts to copy N elements to shared memory, where they can be read after wait_for_copies() and a barrier. They take
// no registers, so that a thread can have many in flight.
template <int N, typename A>
__device__ void start_copy(A* to, const A* from) {
  __pipeline_memcpy_async(to, from, N * sizeof(A));
}

// The same, or writes zeros if the elements do not exist.
template <int N, typename A>
__device__ void start_copy(A* to, const A* from, bool exists) {
  __pipeline_memcpy_async(to, from, N * sizeof(A), exists ? 0 : N * sizeof(A));
}

// Ends a group of copies: those that this thread has started since the last group ended.
inline __device__ void commit_copies() { __pipeline_commit(); }

// Waits for all groups except the last `left`.
template <int left>
__device__ void wait_for_groups() {
  __pipeline_wait_prior(left);
}

// Ends a group, then does the same.
template <int left = 0>
__device__ void wait_for_copies() {
  commit_copies();
  wait_for_groups<left>();
}

// Starts to load a C x C matrix, zero-padded, and a shift if there is one.
template <typename A>
__device__ void load_matrix(const A* from, const A* shift, const Frame& frame, A* matrix) {
  constexpr unsigned V = 16 / sizeof(A);
  const unsigned channels = frame.channels, side = frame.side;
  if (channels == side && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    const unsigned in_row = side / V;
    for (unsigned index = threadIdx.x; index < side * in_row; index += blockDim.x) {
      const unsigned i = index / in_row, j = (index - i * in_row) * V;
      start_copy<V>(matrix + i * frame.row_stride + j, from + i * channels + j);
    }
  } else {
    for (unsigned index = threadIdx.x; index < side * side; index += blockDim.x) {
      const unsigned i = index / side, j = index - i * side;
      const bool exists = i < channels && j < channels;
      start_copy<1>(matrix + i * frame.row_stride + j, exists ? from + i * channels + j : from, exists);
    }
  }
  if (shift == nullptr) return;
  for (unsigned i = threadIdx.x; i < side; i += blockDim.x) {
    start_copy<1>(matrix + frame.shift() + i, i < channels ? shift + i : shift, i < channels);
  }
}

// Calls f(channel, position) for all elements of a tile, `step` channels at a time. If the channels are contiguous, 8
// neighbouring threads have neighbouring positions, which are in different banks, and a warp has 4 x `step` channels of
// each; otherwise neighbouring threads have neighbouring positions.
template <typename W, typename F>
__device__ void for_each_chunk(const W& work, unsigned channels, bool channels_inside, unsigned step, const F& f) {
  constexpr unsigned of_strip = W::kStrip == 128 ? 7 : W::kStrip == 64 ? 6 : W::kStrip == 32 ? 5 : 4;
  static_assert(W::kStrip == 1u << of_strip);
  const unsigned bits = channels_inside ? 3 : of_strip, chunks = channels / step;
#pragma unroll 4
  for (unsigned index = threadIdx.x; index < chunks * work.positions(); index += blockDim.x) {
    const unsigned rest = index >> bits, high = rest / chunks;
    f((rest - high * chunks) * step, index + ((high - rest) << bits));
  }
}

// Starts to load a tile, with zeros for the positions and the channels that do not exist.
template <typename T, typename W, typename A = typename W::A>
__device__ void load_tile(const Positions<const T>& x, const W& work, const Span& span, A* tile) {
  constexpr unsigned V = W::V, R = W::kRows;
  using Vector = detail::Registers<T, V>;
  if (x.vectors && !x.channels_inside) {
    if (!work.has_row()) return;
    const unsigned row = work.row(), column = work.column();
    const T* const from = x.at(span, column) + row * x.channel_stride;
    A* const to = tile + work.at(row, column);
    const unsigned channels = column < span.count && row < work.channels ? work.channels - row : 0;
    if constexpr (std::is_same_v<T, A>) {
#pragma unroll
      for (unsigned r = 0; r < R; ++r) {
        if (r < channels) {
          start_copy<V>(to + r * W::kStride, from + r * x.channel_stride);
        } else {
          detail::copy<V>(to + r * W::kStride, Vector{}.values);
        }
      }
    } else {
      Vector values[R];  // all in flight before the first is waited for
#pragma unroll
      for (unsigned r = 0; r < R; ++r) {
        values[r] = Vector{};
        if (r < channels) detail::copy<V>(values[r].values, from + r * x.channel_stride);
      }
#pragma unroll
      for (unsigned r = 0; r < R; ++r) {
        detail::Registers<A, V> wide;
#pragma unroll
        for (unsigned v = 0; v < V; ++v) wide.values[v] = static_cast<A>(values[r].values[v]);
        detail::copy<V>(to + r * W::kStride, wide.values);
      }
    }
  } else if (x.vectors) {
    for_each_chunk(work, work.side, true, V, [&](unsigned channel, unsigned position) {
      Vector values{};
      if (channel < work.channels && position < span.count) {
        detail::copy<V>(values.values, x.at(span, position) + channel);
      }
      A* const to = tile + work.at(channel, position);
#pragma unroll
      for (unsigned v = 0; v < V; ++v) to[v * W::kStride] = static_cast<A>(values.values[v]);
    });
  } else {
    for_each_chunk(work, work.side, x.channels_inside, 1, [&](unsigned channel, unsigned position) {
      const bool exists = channel < work.channels && position < span.count;
      tile[work.at(channel, position)] =
          exists ? static_cast<A>(x.at(span, position)[channel * x.channel_stride]) : A(0);
    });
  }
}

// Writes the values of the threads to a tile.
template <typename W>
__device__ void put_tile(const W& work, const typename W::Values& values, typename W::A* tile) {
  using A = typename W::A;
  constexpr unsigned V = W::V;
  if (!work.has_row()) return;
  A* const to = tile + work.at(work.row(), work.column());
#pragma unroll
  for (unsigned r = 0; r < W::kRows; ++r) {
    detail::Registers<A, V> vector;
#pragma unroll
    for (unsigned v = 0; v < V; ++v) vector.values[v] = values[r][v];
    detail::copy<V>(to + r * W::kStride, vector.values);
  }
}

// Writes a tile to a tensor whose positions are not contiguous or not aligned.
template <typename T, typename W, typename A = typename W::A>
__device__ void store_elements(const Positions<T>& z, const W& work, const Span& span, const A* tile) {
  constexpr unsigned V = W::V;
  using Vector = detail::Registers<T, V>;
  if (z.vectors) {
    for_each_chunk(work, work.channels, true, V, [&](unsigned channel, unsigned position) {
      const A* const from = tile + work.at(channel, position);
      Vector vector;
#pragma unroll
      for (unsigned v = 0; v < V; ++v) vector.values[v] = static_cast<T>(from[v * W::kStride]);
      if (position < span.count) detail::copy<V>(z.at(span, position) + channel, vector.values);
    });
  } else {
    for_each_chunk(work, work.channels, z.channels_inside, 1, [&](unsigned channel, unsigned position) {
      if (position >= span.count) return;
      z.at(span, position)[channel * z.channel_stride] = static_cast<T>(tile[work.at(channel, position)]);
    });
  }
}

// Writes a tile to a tensor.
template <typename T, typename W, typename A = typename W::A>
__device__ void write_tile(const Positions<T>& z, const W& work, const Span& span, const A* tile) {
  constexpr unsigned V = W::V;
  if (!z.vectors || z.channels_inside) return store_elements(z, work, span, tile);
  for (unsigned index = threadIdx.x; index < work.strips * work.channels * W::kLanes; index += blockDim.x) {
    const unsigned row = index / W::kLanes, strip = row / work.channels, channel = row - strip * work.channels;
    const unsigned position = strip * W::kStrip + index % W::kLanes * V;
    if (position >= span.count) continue;
    detail::Registers<A, V> values;
    detail::copy<V>(values.values, tile + work.at(channel, position));
    detail::Registers<T, V> vector;
#pragma unroll
    for (unsigned v = 0; v < V; ++v) vector.values[v] = static_cast<T>(values.values[v]);
    detail::copy<V>(z.at(span, position) + channel * z.channel_stride, vector.values);
  }
}

// Writes the values of the threads to a tensor: directly if its positions are contiguous and aligned, otherwise by way
// of a tile, which other threads may still be reading. All threads must call it.
template <typename T, typename W, typename A = typename W::A>
__device__ void store_tile(const Positions<T>& z, const W& work, const Span& span, const typename W::Values& values,
                           A* tile) {
  constexpr unsigned V = W::V, R = W::kRows;
  using Vector = detail::Registers<T, V>;
  if (z.vectors && !z.channels_inside) {
    if (!work.has_row()) return;
    const unsigned row = work.row(), column = work.column();
    const unsigned channels = column < span.count && row < work.channels ? work.channels - row : 0;
    T* const to = z.at(span, column) + row * z.channel_stride;
#pragma unroll
    for (unsigned r = 0; r < R; ++r) {
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
  store_elements(z, work, span, tile);
}

}  // namespace glow_kernels::linear
