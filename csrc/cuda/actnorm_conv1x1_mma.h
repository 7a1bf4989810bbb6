// Products of the linear map of actnorm_conv1x1 on the matrix units, for many channels of float32, which a warp
// computes on its own for a strip of positions. A factor is split into a large part of 11 bits and a small one, both
// TF32, and a product is small by large, large by small, and large by large, added in float32: what is left out is
// 2^-22 of it. An infinity becomes NaN.
//
// Fragments are those of the PTX ISA, "Matrix Fragments for mma.m16n8k8". Lane l has group l / 4 and quarter l % 4 in
// them: of A (16 x 8) the rows group and group + 8 by the columns quarter and quarter + 4, of B (8 x 8) the rows
// quarter and quarter + 4 of column group, of C (16 x 8) the rows group and group + 8 by the columns 2 quarter and 2
// quarter + 1.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/actnorm_conv1x1_tile.h"
#include "cuda/launch.h"
#include "cuda/tile.h"

namespace glow_kernels::linear {

// c += a b, of TF32, whose low 13 bits the matrix units ignore. All lanes of a warp must call it.
inline __device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  // Volatile, since it must not go to where only some lanes do.
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  cuda_host::multiply_add(CUDA_HOST_PLACE, c, a, b);
#endif
}

// N elements of a matrix, split. The low bits of the small parts are left to the matrix units to drop.
template <unsigned N>
struct alignas(16) Split {
  uint32_t large[N], small[N];

  __device__ void set(unsigned i, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    large[i] = (bits + 0x1000u) & ~0x1fffu;  // to the nearest
    float rounded;
    std::memcpy(&rounded, &large[i], sizeof rounded);
    const float rest = x - rounded;
    std::memcpy(&small[i], &rest, sizeof rest);
  }
};

// c(m) += a[m] b for all m, one step after the other: a step waits for the one before on the same c.
template <unsigned M, typename C>
__device__ void multiply_add(const Split<4> (&a)[M], const Split<2>& b, const C& c) {
#pragma unroll
  for (unsigned m = 0; m < M; ++m) multiply_add(c(m), a[m].small, b.large);
#pragma unroll
  for (unsigned m = 0; m < M; ++m) multiply_add(c(m), a[m].large, b.small);
#pragma unroll
  for (unsigned m = 0; m < M; ++m) multiply_add(c(m), a[m].large, b.large);
}

// How a warp works: on 32 positions of `kSide` channels, those that exist rounded up.
template <unsigned kChannels>
struct Strip {
  static constexpr unsigned kSide = kChannels, kPositions = 32, kSize = kSide * kPositions, kTiles = kSide / 8;
  // What a lane has of a product: of tile n of 8 channels, the channels 8 n + quarter + 4 b at the positions
  // 4 group + 2 m + h, at [m][n][2 h + b]. So it has 16 bytes of a channel.
  using Values = float[2][kTiles][4];

  // Where an element stands in shared memory. Rows are turned against each other so that neighbouring lanes find in
  // different banks: 16 bytes of four rows, 8 bytes of four rows, and an element of eight rows.
  static __device__ unsigned at(unsigned channel, unsigned position) {
    return channel * kPositions + (position ^ ((channel & 3) << 3) ^ ((channel & 4) << 2));
  }
};

inline __device__ unsigned lane() { return threadIdx.x % 32; }
inline __device__ unsigned group() { return lane() / 4; }
inline __device__ unsigned quarter() { return lane() % 4; }

// Starts to load a strip, with zeros for the positions and the channels that do not exist.
template <typename S>
__device__ void load_strip(const Positions<const float>& x, unsigned channels, const Span& span, float* strip) {
  using Vector = detail::Registers<float, 4>;
  if (x.vectors && !x.channels_inside) {
    const unsigned row = lane() / 8, position = lane() % 8 * 4, count = position < span.count ? channels : 0;
    const float* const from = x.at(span, position);
#pragma unroll
    for (unsigned i = 0; i < S::kSide; i += 4) {
      float* const to = strip + S::at(i + row, position);
      if (i + row < count) {
        start_copy<4>(to, from + (i + row) * x.channel_stride);
      } else {
        detail::copy<4>(to, Vector{}.values);
      }
    }
  } else if (x.vectors) {  // two lanes have 32 bytes of a position
#pragma unroll
    for (unsigned half = 0; half < S::kPositions; half += 16) {
      const unsigned position = half + lane() % 16, count = position < span.count ? channels : 0;
      const float* const from = x.at(span, position);
#pragma unroll
      for (unsigned i = 0; i < S::kSide; i += 8) {
        const unsigned channel = i + lane() / 16 * 4;
        Vector values{};
        if (channel < count) detail::copy<4>(values.values, from + channel);
#pragma unroll
        for (unsigned v = 0; v < 4; ++v) strip[S::at(channel + v, position)] = values.values[v];
      }
    }
  } else {
#pragma unroll 4
    for (unsigned index = lane(); index < S::kSize; index += 32) {
      const unsigned channel = x.channels_inside ? index % S::kSide : index / S::kPositions;
      const unsigned position = x.channels_inside ? index / S::kSide : index % S::kPositions;
      float* const to = strip + S::at(channel, position);
      if (channel < channels && position < span.count) {
        start_copy<1>(to, x.at(span, position) + channel * x.channel_stride);
      } else {
        *to = 0;
      }
    }
  }
}

// 16 bytes of what a lane has: channel 8 n + quarter + 4 b at the positions from 4 group on.
inline __device__ detail::Registers<float, 4> vector_of(const float (&first)[4], const float (&second)[4], unsigned b) {
  return {{first[b], first[2 + b], second[b], second[2 + b]}};
}

// Writes what the lanes have to a strip. Nobody may read it any more.
template <typename S>
__device__ void put_strip(const typename S::Values& values, float* strip) {
#pragma unroll
  for (unsigned n = 0; n < S::kTiles; ++n) {
#pragma unroll
    for (unsigned b = 0; b < 2; ++b) {
      detail::copy<4>(strip + S::at(8 * n + quarter() + 4 * b, 4 * group()),
                      vector_of(values[0][n], values[1][n], b).values);
    }
  }
}

// Writes what the lanes have to a tensor, by way of a strip that other lanes may still read, unless they can write it
// themselves: 128 bytes of a channel by 8 lanes.
template <typename S>
__device__ void store_strip(const Positions<float>& z, unsigned channels, const Span& span,
                            const typename S::Values& values, float* strip) {
  if (z.vectors && !z.channels_inside) {
    const unsigned count = 4 * group() < span.count ? channels : 0;
    float* const to = z.at(span, 4 * group());
#pragma unroll
    for (unsigned n = 0; n < S::kTiles; ++n) {
#pragma unroll
      for (unsigned b = 0; b < 2; ++b) {
        const unsigned channel = 8 * n + quarter() + 4 * b;
        const auto vector = vector_of(values[0][n], values[1][n], b);
        if (channel < count) detail::copy<4>(to + channel * z.channel_stride, vector.values);
      }
    }
    return;
  }
  __syncwarp();
  put_strip<S>(values, strip);
  __syncwarp();
  if (z.vectors) {
#pragma unroll
    for (unsigned half = 0; half < S::kPositions; half += 16) {
      const unsigned position = half + lane() % 16, count = position < span.count ? channels : 0;
      float* const to = z.at(span, position);
#pragma unroll
      for (unsigned i = 0; i < S::kSide; i += 8) {
        const unsigned channel = i + lane() / 16 * 4;
        detail::Registers<float, 4> vector;
#pragma unroll
        for (unsigned v = 0; v < 4; ++v) vector.values[v] = strip[S::at(channel + v, position)];
        if (channel < count) detail::copy<4>(to + channel, vector.values);
      }
    }
  } else {
#pragma unroll 4
    for (unsigned index = lane(); index < S::kSize; index += 32) {
      const unsigned channel = z.channels_inside ? index % S::kSide : index / S::kPositions;
      const unsigned position = z.channels_inside ? index / S::kSide : index % S::kPositions;
      if (channel >= channels || position >= span.count) continue;
      z.at(span, position)[channel * z.channel_stride] = strip[S::at(channel, position)];
    }
  }
}

// All fragments of a matrix C x C, or of its transpose, as multiply() takes them: for every 8 channels that go in and
// every 8 that come out, and every lane, its two elements split.
template <typename S>
__device__ void split_matrix(const float* matrix, unsigned channels, bool transposed, Split<2>* fragments) {
  for (unsigned index = threadIdx.x; index < S::kTiles * S::kTiles * 32; index += blockDim.x) {
    const unsigned lane = index % 32, tile = index / 32;
    // Column 2 q + b of a product is channel q + 4 b, so that lanes have of a result what they take of a factor.
    const unsigned out = tile % S::kTiles * 8 + lane / 8 + lane / 4 % 2 * 4;
    Split<2> fragment;
#pragma unroll
    for (unsigned b = 0; b < 2; ++b) {
      const unsigned in = tile / S::kTiles * 8 + lane % 4 + 4 * b;
      const bool exists = in < channels && out < channels;
      fragment.set(b, exists ? matrix[transposed ? in * channels + out : out * channels + in] : 0.0f);
    }
    fragments[index] = fragment;
  }
}

// A vector C with zeros behind it.
template <typename S>
__device__ void pad_vector(const float* vector, unsigned channels, float* to) {
  for (unsigned i = threadIdx.x; i < S::kSide; i += blockDim.x) to[i] = i < channels ? vector[i] : 0.0f;
}

// M x + shift of a strip, with the fragments of M; no shift if that is null. The positions are the rows of the product.
template <typename S>
__device__ void multiply(const Split<2>* fragments, const float* shift, const float* strip, typename S::Values& total) {
#pragma unroll
  for (unsigned n = 0; n < S::kTiles; ++n) {
#pragma unroll
    for (unsigned b = 0; b < 2; ++b) {
      const float start = shift == nullptr ? 0.0f : shift[8 * n + quarter() + 4 * b];
      total[0][n][b] = total[0][n][2 + b] = total[1][n][b] = total[1][n][2 + b] = start;
    }
  }
  const float* const low = strip + S::at(quarter(), 4 * group());
  const float* const high = strip + S::at(quarter() + 4, 4 * group());
#pragma unroll 1
  for (unsigned k = 0; k < S::kTiles; ++k) {
    detail::Registers<float, 4> columns[2];
    detail::copy<4>(columns[0].values, low + k * 8 * S::kPositions);
    detail::copy<4>(columns[1].values, high + k * 8 * S::kPositions);
    Split<4> a[2];
#pragma unroll
    for (unsigned m = 0; m < 2; ++m) {
#pragma unroll
      for (unsigned i = 0; i < 4; ++i) a[m].set(i, columns[i / 2].values[2 * m + i % 2]);
    }
#pragma unroll
    for (unsigned n = 0; n < S::kTiles; ++n) {
      const Split<2> b = fragments[(k * S::kTiles + n) * 32 + lane()];
      multiply_add(a, b, [&](unsigned m) -> float (&)[4] { return total[m][n]; });
    }
  }
}

// sum g x^T and sum g over the positions of a warp's strips.
template <typename S>
class StripSums {
 public:
  __device__ void add(const float* g, const float* x) {
#pragma unroll 1
    for (unsigned k = 0; k < S::kPositions; k += 8) {
      // The two positions that a lane has of 8, of the channels group, group + 8, ...
      const unsigned first = S::at(group(), k + 2 * quarter());
      Split<4> a[kRowTiles];
#pragma unroll
      for (unsigned m = 0; m < 2 * kRowTiles; ++m) {
        detail::Registers<float, 2> row;
        detail::copy<2>(row.values, g + first + m * 8 * S::kPositions);
        a[m / 2].set(m % 2, row.values[0]);
        a[m / 2].set(m % 2 + 2, row.values[1]);
        shift_[m] += row.values[0] + row.values[1];
      }
#pragma unroll
      for (unsigned n = 0; n < S::kTiles; ++n) {
        detail::Registers<float, 2> column;
        detail::copy<2>(column.values, x + first + n * 8 * S::kPositions);
        Split<2> b;
        b.set(0, column.values[0]);
        b.set(1, column.values[1]);
        multiply_add(a, b, [&](unsigned m) -> float (&)[4] { return matrix_[m][n]; });
      }
    }
  }

  // Adds what the warps have and writes it to `parts`: C x C, then C. For every warp there are kSide^2 elements at
  // `matrices` and kSide at `shifts`, which nobody may use any more. All threads must call it.
  __device__ void write(unsigned channels, float* matrices, float* shifts, float* parts) {
    const unsigned warp = threadIdx.x / 32, warps = blockDim.x / 32;
    float* const own = matrices + warp * S::kSide * S::kSide;
#pragma unroll
    for (unsigned m = 0; m < 2 * kRowTiles; ++m) {
      const unsigned row = 8 * m + group();
#pragma unroll
      for (unsigned n = 0; n < S::kTiles; ++n) {
        const float* const sums = matrix_[m / 2][n] + m % 2 * 2;
        const detail::Registers<float, 2> pair{{sums[0], sums[1]}};
        detail::copy<2>(own + row * S::kSide + 8 * n + 2 * quarter(), pair.values);
      }
      float sum = shift_[m] + __shfl_xor_sync(0xffffffffu, shift_[m], 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (quarter() == 0) shifts[warp * S::kSide + row] = sum;
    }
    __syncthreads();
    for (unsigned index = threadIdx.x; index < channels * (channels + 1); index += blockDim.x) {
      const unsigned i = index / channels, j = index - i * channels;
      const bool in_matrix = i < channels;
      const float* const from = in_matrix ? matrices + i * S::kSide + j : shifts + j;
      const unsigned step = in_matrix ? S::kSide * S::kSide : S::kSide;
      float sum = 0;
      for (unsigned other = 0; other < warps; ++other) sum += from[other * step];
      parts[index] = sum;
    }
  }

 private:
  static constexpr unsigned kRowTiles = S::kSide / 16;
  float matrix_[kRowTiles][S::kTiles][4] = {}, shift_[2 * kRowTiles] = {};
};

}  // namespace glow_kernels::linear
