// The pairs of h for data with contiguous positions if h has contiguous channels, such as the output of a network that
// runs channels last. A block reads the pairs of a tile along channels and the data along positions, and its threads
// exchange the pairs through shared memory, so that both are read once, in wide accesses.
#pragma once

#include <bit>
#include <numeric>
#include <type_traits>

#include "cuda/tile.h"
#include "glow_kernels/affine_coupling.h"

namespace glow_kernels {

// Maximum channels of a tile: enough for whole cache lines of h, few enough for warps to have whole ones of the data.
constexpr int64_t kExchangedChannels = 32;
// Minimum elements per multiprocessor for an exchange: with fewer, too many multiprocessors would be idle.
constexpr int64_t kExchangedElements = 1024;

// Tiles with at most one spot of N positions for every thread of a block.
inline Tiling exchange_tiling(const Planes& planes, int N) {
  const int64_t groups = (planes.channels + kExchangedChannels - 1) / kExchangedChannels;
  // The pairs of a group begin at a multiple of 16 bytes of h, whatever its type.
  const int64_t each = ((planes.channels + groups - 1) / groups + 7) / 8 * 8;
  const int64_t channels = groups == 1 ? planes.channels : each;
  return Tiling::along_positions(planes, channels, N * std::bit_floor(static_cast<uint64_t>(kThreads / channels)));
}

// Whether the pairs of h are to be exchanged for data like x.
inline bool is_exchanged(const Launcher& launch, const Tensor& x, const Tensor& h) {
  const Planes data = planes_of(x), pairs = planes_of(h);
  return x.numel() > 0 && x.numel() >= kExchangedElements * launch.multiprocessors() && data.positions > 1 &&
         data.position_stride == 1 && pairs.channel_stride == 1 && pairs.position_stride != 1;
}

// h or its gradient in memory. The part that belongs to a tile is one or two contiguous runs per position, or a single
// run (`single_run`) if the tile has all channels of a dense tensor.
template <typename H>
struct PairRows {
  H* data = nullptr;
  int64_t batch_stride = 0;
  unsigned position_stride = 0;
  int width = 1;  // elements that a thread copies at a time
  bool single_run = false;
  unsigned run_lanes = 0;  // log2 of the threads that copy a run together; 0 for a single run
};

// How the threads of a block share the pairs of a tile. In shared memory these are stored position by position, each
// with the channels of the tile in their order in h.
struct PairExchange {
  unsigned channels, spot_lanes;             // of the data; log2 of the spots of a channel, which avoids divisions
  bool interleaved, scale_second, two_runs;  // two_runs: a position has one of raw scales and one of shifts

  PairExchange(const Tiling& tiling, const CouplingLayout& layout, int N)
      : channels(tiling.outer),
        spot_lanes(std::bit_width((tiling.columns - 1) / N)),
        interleaved(layout.step == 2),
        scale_second(layout.scale_first > layout.shift_first),
        two_runs(!interleaved && tiling.row_tiles > 1) {}

  int threads(const Tiling& tiling) const { return static_cast<int>(((tiling.rows << spot_lanes) + 31) / 32 * 32); }

  template <typename H>
  PairRows<H> rows_of(H* data, const Planes& planes, const Tiling& tiling) const {
    const int64_t of_channel = two_runs ? 1 : 2, run = of_channel * tiling.rows;
    const bool single_run = tiling.row_tiles == 1 && planes.position_stride == planes.channels;
    // Divides the lengths of all runs and the distances between them.
    int64_t step = single_run ? std::gcd(run * tiling.columns, run * tiling.inner)
                              : std::gcd(std::gcd(run, of_channel * tiling.outer), planes.position_stride);
    if (tiling.batches > 1) step = std::gcd(step, planes.batch_stride);
    PairRows<H> rows{data, planes.batch_stride, detail::narrow_stride(planes.position_stride, tiling.inner)};
    for (const int bytes : {8, 16}) {
      const int width = bytes / static_cast<int>(sizeof(H));
      if (step % width == 0 && reinterpret_cast<uintptr_t>(data) % bytes == 0) rows.width = width;
    }
    rows.single_run = single_run;
    // At most a warp's lanes, so that a thread has the same place in all runs that it helps to copy.
    rows.run_lanes =
        single_run ? 0 : std::min(5, static_cast<int>(std::bit_width(static_cast<uint64_t>(run / rows.width - 1))));
    return rows;
  }

  // The spot of this thread; its count is 0 if there is none.
  template <int N>
  __device__ Spot spot(const Tile& tile) const {
    const unsigned row = threadIdx.x >> spot_lanes, column = (threadIdx.x & ((1u << spot_lanes) - 1)) * N;
    if (row >= tile.rows || column >= tile.columns) return {0, 0, 0};
    return {row, column, tile.columns - column < N ? static_cast<int>(tile.columns - column) : N};
  }
};

namespace detail {

// The index of an element in shared memory. Every 128 bytes, one line of all banks, are followed by room for a pair, so
// that pairs that are whole lines apart are in different banks.
template <typename H>
__host__ __device__ constexpr unsigned place(unsigned element) {
  return element + element / (128 / sizeof(H)) * 2;
}

// Calls f(memory, elements, exists) until the threads of the block have visited all chunks of V contiguous elements of
// a tile, `chunks` chunks per call: their addresses in the tensor, the indices of their first elements among the
// pairs of the tile, and whether they exist.
template <int V, int chunks, typename H, typename F>
__device__ void for_each_chunk(const PairExchange& exchange, const PairRows<H>& rows, const Tile& tile, const F& f) {
  // A single run is treated as a run per chunk.
  const unsigned pairs = 2 * tile.rows, runs = rows.single_run ? pairs * tile.columns / V : tile.columns;
  const unsigned length = rows.single_run ? V : exchange.two_runs ? tile.rows : pairs;
  const unsigned step = blockDim.x >> rows.run_lanes, first_run = threadIdx.x >> rows.run_lanes;
  const unsigned in_run = (threadIdx.x & ((1u << rows.run_lanes) - 1)) * V;
  const uint64_t run_stride = rows.single_run ? V : rows.position_stride;
  H* const start = rows.data + tile.batch * rows.batch_stride + uint64_t{tile.column} * rows.position_stride +
                   (exchange.two_runs ? 1 : 2) * tile.row;
  for (unsigned half = 0; half < (exchange.two_runs ? 2 : 1); ++half) {
    for (unsigned column = in_run; column < length; column += V << rows.run_lanes) {
      H* memory = start + first_run * run_stride + half * exchange.channels + column;
      unsigned element = first_run * (rows.single_run ? V : pairs) + half * tile.rows + column;
      for (unsigned run = first_run; run < runs; run += chunks * step) {
        H* at[chunks];
        unsigned elements[chunks];
        bool exists[chunks];
#pragma unroll
        for (int i = 0; i < chunks; ++i) {
          at[i] = memory;
          elements[i] = element;
          exists[i] = run + i * step < runs;
          memory += step * run_stride;
          element += step * (rows.single_run ? V : pairs);
        }
        f(at, elements, exists);
      }
    }
  }
}

// Copies V elements between registers and the pairs of a tile, two at a time.
template <int V, typename H>
__device__ void put(H* pairs, unsigned element, const Registers<H, V>& raw) {
  H* const to = pairs + place<H>(element);
#pragma unroll
  for (int i = 0; i < V; i += 2) copy<V == 1 ? 1 : 2>(to + i, raw.values + i);
}

template <int V, typename H>
__device__ Registers<H, V> get(const H* pairs, unsigned element) {
  Registers<H, V> raw;
  const H* const from = pairs + place<H>(element);
#pragma unroll
  for (int i = 0; i < V; i += 2) copy<V == 1 ? 1 : 2>(raw.values + i, from + i);
  return raw;
}

// Calls f with the width as a compile-time constant.
template <typename H, typename F>
__device__ void with_width(int width, const F& f) {
  if (width * sizeof(H) == 16) return f(std::integral_constant<int, 16 / sizeof(H)>{});
  if (sizeof(H) < 8 && width > 1) return f(std::integral_constant<int, sizeof(H) < 8 ? 8 / sizeof(H) : 1>{});
  f(std::integral_constant<int, 1>{});
}

}  // namespace detail

// Elements of shared memory that the pairs of a tile take, a multiple of 16 bytes.
template <typename H>
int64_t exchanged_elements(const Tiling& tiling) {
  return (detail::place<H>(2 * tiling.rows * tiling.columns) + 15) / 16 * 16;
}

// Reads the pairs of a tile from memory. A barrier must follow.
template <typename H>
__device__ void load_pairs(const PairExchange& exchange, const PairRows<const H>& rows, const Tile& tile, H* pairs) {
  detail::with_width<H>(rows.width, [&](auto width) {
    constexpr int V = decltype(width)::value, chunks = V * sizeof(H) == 16 ? 2 : 4;
    detail::for_each_chunk<V, chunks>(exchange, rows, tile,
                                      [&](const auto& at, const auto& elements, const auto& exists) {
                                        detail::Registers<H, V> raw[chunks];  // so that a thread waits once
#pragma unroll
                                        for (int i = 0; i < chunks; ++i) {
                                          if (exists[i]) detail::copy<V>(raw[i].values, at[i]);
                                        }
#pragma unroll
                                        for (int i = 0; i < chunks; ++i) {
                                          if (exists[i]) detail::put<V>(pairs, elements[i], raw[i]);
                                        }
                                      });
  });
}

// Writes the pairs of a tile to memory, after a barrier.
template <typename H>
__device__ void store_pairs(const PairExchange& exchange, const PairRows<H>& rows, const Tile& tile, const H* pairs) {
  detail::with_width<H>(rows.width, [&](auto width) {
    constexpr int V = decltype(width)::value;
    detail::for_each_chunk<V, 1>(exchange, rows, tile, [&](const auto& at, const auto& elements, const auto&) {
      detail::copy<V>(at[0], detail::get<V>(pairs, elements[0]).values);
    });
  });
}

// The raw scales u and the shifts t at a spot, 0 beyond its count.
template <int N, typename H, typename A>
__device__ void load(const PairExchange& exchange, const H* pairs, const Tile& tile, const Spot& spot, A (&u)[N],
                     A (&t)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    H first = H(0), second = H(0);
    if (i < spot.count) {
      const unsigned position = (spot.column + i) * 2 * tile.rows;
      if (exchange.interleaved) {
        const auto both = detail::get<2>(pairs, position + 2 * spot.row);
        first = both.values[0];
        second = both.values[1];
      } else {
        first = pairs[detail::place<H>(position + spot.row)];
        second = pairs[detail::place<H>(position + tile.rows + spot.row)];
      }
    }
    u[i] = static_cast<A>(exchange.scale_second ? second : first);
    t[i] = static_cast<A>(exchange.scale_second ? first : second);
  }
}

template <int N, typename H, typename A>
__device__ void store(const PairExchange& exchange, H* pairs, const Tile& tile, const Spot& spot, const A (&u)[N],
                      const A (&t)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= spot.count) break;
    const H first = static_cast<H>(exchange.scale_second ? t[i] : u[i]);
    const H second = static_cast<H>(exchange.scale_second ? u[i] : t[i]);
    const unsigned position = (spot.column + i) * 2 * tile.rows;
    if (exchange.interleaved) {
      detail::put<2>(pairs, position + 2 * spot.row, detail::Registers<H, 2>{{first, second}});
    } else {
      pairs[detail::place<H>(position + spot.row)] = first;
      pairs[detail::place<H>(position + tile.rows + spot.row)] = second;
    }
  }
}

}  // namespace glow_kernels
