// Tiles of the linear map. In contiguous tensors (NCHW) a row holds positions of one channel, in channels-last tensors
// it holds channels of one position. Tiles are read and written in place if the tensor has the type of arithmetic and
// its rows are whole vectors, otherwise through a buffer. Compiled once per instruction set.
#pragma once

#include <algorithm>

#include "cpu/actnorm_conv1x1.h"
#include "cpu/kernels/padded_matrix.h"
#include "cpu/kernels/tile_access.h"

namespace glow_kernels::GLOW_KERNELS_ISA {

// What a tile of at most `positions` positions needs: memory, in case it is not accessed in place, and the offsets of
// its vectors.
template <typename A>
struct PositionsBuffer {
  A* values;
  int64_t stride;  // not a power of 2, whose multiples would map to few cache sets
  int64_t offsets[kMaxSummedPositions / kLanes<A>];

  PositionsBuffer(KeptBuffer<A>& buffer, int64_t channels, int64_t positions)
      : values(buffer.reserve(padded(channels, kLanes<A>) * (positions + kLanes<A>))), stride(positions + kLanes<A>) {}
};

// Calls visit(offset, count, data) for every sample that overlaps positions [begin, end): where the overlap begins
// among these positions, how many positions it has, and its first element.
template <typename T, typename F>
inline void for_each_sample(const Positions<T>& x, int64_t begin, int64_t end, const F& visit) {
  const Planes& p = x.planes;
  for (int64_t position = begin; position < end;) {
    const int64_t batch = position / p.positions, inside = position % p.positions;
    const int64_t count = std::min(p.positions - inside, end - position);
    visit(position - begin, count, x.data + batch * p.batch_stride + inside * p.position_stride);
    position += count;
  }
}

// Whether tiles that are written in place should be streamed to memory: the tensor exceeds the caches and its tiles are
// aligned to vectors.
template <typename T>
bool is_streamed(const Positions<T>& z) {
  const Planes& p = z.planes;
  const auto is_aligned = [](int64_t bytes) { return bytes % kVectorBytes == 0; };
  return p.batches * p.channels * p.positions * int64_t{sizeof(T)} > kCacheBytes &&
         is_aligned(reinterpret_cast<intptr_t>(z.data)) && is_aligned(p.batch_stride * sizeof(T)) &&
         is_aligned(std::max(p.channel_stride, p.position_stride) * sizeof(T)) && is_aligned(p.positions * sizeof(T));
}

// From this many channels on, x is transposed before outer products are summed, which saves the sums over lanes.
constexpr int64_t kTransposedChannels = 64;

// Whether a tile is read vector by vector, or only element by element as the factors of a product.
enum class Read { vectors, factors };

// Tiles with a row per channel.
struct Planar {
  // Whether a tile can be accessed in place: it is whole vectors, none of which crosses from one sample to the next.
  template <typename A, typename T>
  static bool is_in_place(const Positions<T>& x, int64_t begin, int64_t end) {
    const int64_t positions = x.planes.positions;
    return std::is_same_v<std::remove_const_t<T>, A> && x.planes.position_stride == 1 &&
           (end - begin) % kLanes<A> == 0 &&
           (positions % kLanes<A> == 0 || begin % positions + end - begin <= positions);
  }

  template <Read, typename A, typename T>
  static VectorRows<const A> load(const Positions<const T>& x, int64_t begin, int64_t end, PositionsBuffer<A>& buffer) {
    if constexpr (std::is_same_v<A, T>) {
      if (is_in_place<A>(x, begin, end)) return in_place<const A>(x, begin, end, buffer);
    }
    const Planes& p = x.planes;
    for_each_sample(x, begin, end, [&](int64_t offset, int64_t count, const T* data) {
      for (int64_t channel = 0; channel < p.channels; ++channel) {
        copy_row(data + channel * p.channel_stride, p.position_stride, buffer.values + channel * buffer.stride + offset,
                 1, count);
      }
    });
    const int64_t whole = padded(end - begin, kLanes<A>);
    for (int64_t channel = 0; channel < p.channels; ++channel) {
      for (int64_t i = end - begin; i < whole; ++i) buffer.values[channel * buffer.stride + i] = A(0);
    }
    return in_buffer(buffer).as_const();
  }

  template <typename A, typename T>
  static VectorRows<A> destination(const Positions<T>& z, int64_t begin, int64_t end, PositionsBuffer<A>& buffer) {
    if constexpr (std::is_same_v<A, T>) {
      if (is_in_place<A>(z, begin, end)) return in_place<A>(z, begin, end, buffer);
    }
    return in_buffer(buffer);
  }

  template <typename A, typename T>
  static void store(const VectorRows<A>& tile, const Positions<T>& z, int64_t begin, int64_t end,
                    const PositionsBuffer<A>& buffer) {
    if (tile.data != buffer.values) return;
    const Planes& p = z.planes;
    for_each_sample(z, begin, end, [&](int64_t offset, int64_t count, T* data) {
      for (int64_t channel = 0; channel < p.channels; ++channel) {
        copy_row(tile.data + channel * tile.stride + offset, 1, data + channel * p.channel_stride, p.position_stride,
                 count);
      }
    });
  }

  // z = M x + v for a tile, given the transpose of M.
  template <Stores stores, typename A>
  static void multiply_tile(const PaddedMatrix<A>& transposed, VectorRows<const A> x, VectorRows<A> z, int64_t channels,
                            int64_t count) {
    for (int64_t begin = 0, end; begin < count; begin = end) {
      end = begin + kLanes<A>;
      while (end < count && x.follows(end) && z.follows(end)) end += kLanes<A>;
      multiply<Small::left, stores, Start::shift, A>(transposed.rows(), {x.at(0, begin), x.stride}, transposed.shift(),
                                                     {z.at(0, begin), z.stride}, channels, channels, end - begin);
    }
  }

  // grad_matrix += g x^T, grad_shift += sum g.
  template <typename A>
  static void accumulate(VectorRows<const A> g, VectorRows<const A> x, A* grad_matrix, A* grad_shift, int64_t channels,
                         int64_t count) {
    if (channels >= kTransposedChannels && channels % kLanes<A> == 0) {
      static thread_local KeptBuffer<A> buffer;
      const int64_t stride = channels + kLanes<A>;
      const Rows<A> transposed{buffer.reserve(padded(count, kLanes<A>) * stride), stride};
      transpose(x, transposed, channels, count);
      sum_outer_products(g, transposed.as_const(), grad_matrix, channels, count);
    } else {
      sum_over_columns(g, x, grad_matrix, channels, count);
    }
    for (int64_t row = 0; row < channels; ++row) {
      Vector<A> total = {};
      for (int64_t i = 0; i < count; i += kLanes<A>) total += vector_at(g.at(row, i));
      A added;
      sum_lanes<1>(&total, &added);
      grad_shift[row] += added;
    }
  }

 private:
  template <typename A, typename T, typename Buffer>
  static VectorRows<A> in_place(const Positions<T>& x, int64_t begin, int64_t end, Buffer& buffer) {
    int64_t* next = buffer.offsets;
    for_each_sample(x, begin, end, [&](int64_t, int64_t count, T* data) {
      for (int64_t i = 0; i < count; i += kLanes<A>) *next++ = data + i - x.data;
    });
    const Planes& p = x.planes;
    const int64_t after = end / p.positions * p.batch_stride + end % p.positions;
    return {x.data, p.channel_stride, buffer.offsets, after - buffer.offsets[0]};
  }

  template <typename A>
  static VectorRows<A> in_buffer(PositionsBuffer<A>& buffer) {
    for (int64_t i = 0; i < static_cast<int64_t>(std::size(buffer.offsets)); ++i) buffer.offsets[i] = i * kLanes<A>;
    return {buffer.values, buffer.stride, buffer.offsets, 0};
  }
};

// Tiles with a row per position. In a buffer rows are padded to whole vectors with arbitrary values, since lanes are
// never combined.
struct Interleaved {
  template <typename A, typename T>
  static bool is_in_place(const Positions<T>& x, int64_t begin, int64_t end) {
    const Planes& p = x.planes;
    const bool one_stride = p.batch_stride == p.positions * p.position_stride;
    return std::is_same_v<std::remove_const_t<T>, A> &&
           (one_stride || begin % p.positions + end - begin <= p.positions);
  }

  template <Read read, typename A, typename T>
  static Rows<const A> load(const Positions<const T>& x, int64_t begin, int64_t end, PositionsBuffer<A>& buffer) {
    const Planes& p = x.planes;
    if constexpr (std::is_same_v<A, T>) {
      const bool fits = read == Read::factors || p.channels % kLanes<A> == 0;
      if (fits && is_in_place<A>(x, begin, end)) return in_place<const A>(x, begin);
    }
    const int64_t stride = padded(p.channels, kLanes<A>);
    for_each_sample(x, begin, end, [&](int64_t offset, int64_t count, const T* data) {
      for (int64_t i = 0; i < count; ++i) {
        copy_row(data + i * p.position_stride, 1, buffer.values + (offset + i) * stride, 1, p.channels);
      }
    });
    return {buffer.values, stride};
  }

  template <typename A, typename T>
  static Rows<A> destination(const Positions<T>& z, int64_t begin, int64_t end, PositionsBuffer<A>& buffer) {
    if constexpr (std::is_same_v<A, T>) {
      if (z.planes.channels % kLanes<A> == 0 && is_in_place<A>(z, begin, end)) return in_place<A>(z, begin);
    }
    return {buffer.values, padded(z.planes.channels, kLanes<A>)};
  }

  template <typename A, typename T>
  static void store(const Rows<A>& tile, const Positions<T>& z, int64_t begin, int64_t end,
                    const PositionsBuffer<A>& buffer) {
    if (tile.data != buffer.values) return;
    const Planes& p = z.planes;
    for_each_sample(z, begin, end, [&](int64_t offset, int64_t count, T* data) {
      for (int64_t i = 0; i < count; ++i) {
        copy_row(tile.data + (offset + i) * tile.stride, 1, data + i * p.position_stride, 1, p.channels);
      }
    });
  }

  // z = M x + v for a tile, given the transpose of M.
  template <Stores stores, typename A>
  static void multiply_tile(const PaddedMatrix<A>& transposed, Rows<const A> x, Rows<A> z, int64_t channels,
                            int64_t count) {
    multiply<Small::right, stores>(x, transposed.rows(), transposed.shift(), z, count, channels, channels);
  }

  // grad_matrix += g x^T, grad_shift += sum g.
  template <typename A>
  static void accumulate(Rows<const A> g, Rows<const A> x, A* grad_matrix, A* grad_shift, int64_t channels,
                         int64_t count) {
    sum_over_rows(g, x, grad_matrix, channels, count);
    for (int64_t column = 0; column < channels; column += kLanes<A>) {
      Vector<A> total = {};
      for (int64_t i = 0; i < count; ++i) total += vector_at(g.data + i * g.stride + column);
      add_lanes<A>(total, grad_shift + column, channels - column);
    }
  }

 private:
  template <typename A, typename T>
  static Rows<A> in_place(const Positions<T>& x, int64_t begin) {
    const Planes& p = x.planes;
    return {x.data + begin / p.positions * p.batch_stride + begin % p.positions * p.position_stride, p.position_stride};
  }
};

}  // namespace glow_kernels::GLOW_KERNELS_ISA
