// Products of the linear map of actnorm_conv1x1 on tensor cores, for many channels of float32; a warp computes them on
// its own for a strip of positions. A factor is split into a large part of 11 bits and a small one, both TF32, and a
// product is the sum, in float32, of small by large, large by small, and large by large; what is omitted, small by
// small and the low bits of small parts, is 2^-22 of it. An infinity becomes NaN.
//
// Fragments are those of the PTX ISA, "Matrix Fragments for mma.m16n8k8". With group l / 4 and quarter l % 4, lane l
// has, of A (16 x 8), the rows group and group + 8 in the columns quarter and quarter + 4, of B (8 x 8) the rows
// quarter and quarter + 4 in column group, and of C (16 x 8) the rows group and group + 8 in the columns 2 quarter and
// 2 quarter + 1.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/actnorm_conv1x1_tile.h"
#include "cuda/launch.h"
#include "cuda/tile.h"

namespace glow_kernels::linear {

// c += a b in TF32, of which tensor cores ignore the low 13 bits. All lanes of a warp must call it.
inline __device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  // Volatile, so that it is not moved into a divergent branch.
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  cuda_host::multiply_add(CUDA_HOST_PLACE, c, a, b);
#endif
}

// N elements of a matrix, split. The low bits of the small parts are left for the tensor cores to ignore.
template <unsigned N>
struct Split {
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

// Splits two adjacent elements.
inline __device__ Split<2> split_pair(const float* pair) {
  detail::Registers<float, 2> elements;
  detail::copy<2>(elements.values, pair);
  Split<2> split;
  split.set(0, elements.values[0]);
  split.set(1, elements.values[1]);
  return split;
}

// c[m][n] += a[m] b[n] for all m and n. Each of the three steps is done for all m and n before the next, since a step
// has to wait for the previous one on the same c.
template <unsigned M, unsigned N>
__device__ void multiply_add(const Split<4> (&a)[M], const Split<2> (&b)[N], float (&c)[M][N][4]) {
#pragma unroll
  for (unsigned step = 0; step < 3; ++step) {
#pragma unroll
    for (unsigned n = 0; n < N; ++n) {
#pragma unroll
      for (unsigned m = 0; m < M; ++m) {
        multiply_add(c[m][n], step == 0 ? a[m].small : a[m].large, step == 1 ? b[n].small : b[n].large);
      }
    }
  }
}

// What a warp works on at a time: 32 positions of `kSide` channels, the existing ones rounded up.
template <unsigned kChannels>
struct Strip {
  static constexpr unsigned kSide = kChannels, kPositions = 32, kSize = kSide * kPositions, kTiles = kSide / 8;
  // A lane's part of a product: [m][n][2 h + b] is, in tile n of 8 channels, channel 8 n + quarter + 4 b at position
  // 4 group + 2 m + h. So a lane has 16 contiguous bytes of a channel.
  using Values = float[2][kTiles][4];

  // The index of an element in shared memory. Rows are swizzled so that there are no bank conflicts when neighbouring
  // lanes access 16 bytes of four rows, 8 bytes of four rows, or an element of eight rows.
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
      start_copy<4>(strip + S::at(i + row, position), from + (i + row) * x.channel_stride, i + row < count);
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
      start_copy<1>(strip + S::at(channel, position), x.at(span, position) + channel * x.channel_stride,
                    channel < channels && position < span.count);
    }
  }
}

// 16 bytes of a lane's values: channel 8 n + quarter + 4 b at the positions from 4 group on.
inline __device__ detail::Registers<float, 4> vector_of(const float (&first)[4], const float (&second)[4], unsigned b) {
  return {{first[b], first[2 + b], second[b], second[2 + b]}};
}

// Writes the values of the lanes to a strip, which no lane may still be reading.
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

// Writes the values of the lanes to a tensor: directly if its positions are contiguous and aligned, 128 bytes of a
// channel by 8 lanes; otherwise by way of a strip, which other lanes may still be reading.
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

// The row stride of a matrix for multiply(), at which the lanes' reads have no bank conflicts.
template <typename S, bool transposed>
constexpr unsigned kMatrixRowStride = S::kSide + (transposed ? 8 : 4);

// M x + shift of a strip, or M^T x + shift; no shift if that is null. The positions are the rows of the product.
template <typename S, bool transposed>
__device__ void multiply(const float* matrix, const float* shift, const float* strip, typename S::Values& total) {
#pragma unroll
  for (unsigned n = 0; n < S::kTiles; ++n) {
#pragma unroll
    for (unsigned b = 0; b < 2; ++b) {
      const float start = shift == nullptr ? 0.0f : shift[8 * n + quarter() + 4 * b];
      total[0][n][b] = total[0][n][2 + b] = total[1][n][b] = total[1][n][2 + b] = start;
    }
  }
  // Column 2 q + b of the product is channel q + 4 b, so that a lane's part of a result is its part of a factor.
  const unsigned out = group() / 2 + group() % 2 * 4;
  constexpr unsigned row = kMatrixRowStride<S, transposed>, of_in = transposed ? row : 1, of_out = transposed ? 1 : row;
  const float* const elements = matrix + quarter() * of_in + out * of_out;
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
    Split<2> b[S::kTiles];
#pragma unroll
    for (unsigned n = 0; n < S::kTiles; ++n) {
#pragma unroll
      for (unsigned i = 0; i < 2; ++i) b[n].set(i, elements[(8 * k + 4 * i) * of_in + 8 * n * of_out]);
    }
    multiply_add(a, b, total);
  }
}

// sum g x^T and sum g over the positions of a warp's strips.
template <typename S>
class StripSums {
  static constexpr unsigned kRowTiles = S::kSide / 16;
  // The row stride at which the lanes' writes have no bank conflicts, transposed or not.
  static constexpr unsigned kRowStride = S::kSide + 4;

 public:
  static constexpr unsigned kScratch = (S::kSide + 1) * kRowStride;

  __device__ void add(const float* g, const float* x) {
#pragma unroll 1
    for (unsigned k = 0; k < S::kPositions; k += 8) {
      // Of 8 positions a lane has two, of the channels group, group + 8, ...
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
      Split<2> b[S::kTiles];
#pragma unroll
      for (unsigned n = 0; n < S::kTiles; ++n) b[n] = split_pair(x + first + n * 8 * S::kPositions);
      multiply_add(a, b, matrix_);
    }
  }

  // Adds the sums of the warps and writes them to `parts`: C x C, which may be transposed, then C. `scratch` has
  // kScratch elements for every warp, which nothing else may still be using. All threads must call it.
  __device__ void write(unsigned channels, bool transposed, float* scratch, float* parts) {
    const unsigned warp = threadIdx.x / 32, warps = blockDim.x / 32;
    float* const matrix = scratch + warp * kScratch;
    const unsigned row_stride = transposed ? 1 : kRowStride, column_stride = transposed ? kRowStride : 1;
#pragma unroll
    for (unsigned m = 0; m < 2 * kRowTiles; ++m) {
      const unsigned row = 8 * m + group();
#pragma unroll
      for (unsigned n = 0; n < S::kTiles; ++n) {
        const float* const sums = matrix_[m / 2][n] + m % 2 * 2;
        float* const to = matrix + row * row_stride + (8 * n + 2 * quarter()) * column_stride;
        to[0] = sums[0];
        to[column_stride] = sums[1];
      }
      float sum = shift_[m] + __shfl_xor_sync(0xffffffffu, shift_[m], 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (quarter() == 0) matrix[S::kSide * kRowStride + row] = sum;
    }
    __syncthreads();
    for (unsigned index = threadIdx.x; index < channels * (channels + 1); index += blockDim.x) {
      const unsigned i = index / channels, j = index - i * channels;
      const float* const from = scratch + (i < channels ? i : S::kSide) * kRowStride + j;
      float sum = 0;
      for (unsigned other = 0; other < warps; ++other) sum += from[other * kScratch];
      parts[index] = sum;
    }
  }

 private:
  float matrix_[kRowTiles][S::kTiles][4] = {}, shift_[2 * kRowTiles] = {};
};

}  // namespace glow_kernels::linear
