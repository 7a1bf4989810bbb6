// How a block of coupling_conv1x1 divides its work: on tiles of the linear map, whose transformed channels its threads
// share evenly, with the network's output in any layout.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/actnorm_conv1x1_tile.h"
#include "cuda/launch.h"
#include "cuda/tile.h"

namespace glow_kernels::linear {

// Shared memory that a block can have on every GPU from sm_80 on.
constexpr int64_t kMaxSharedBytes = 99 * 1024;

// Adjacent elements of h that a thread takes at a time: two, since the halves of a Glow have 6, 12 and 24 channels.
constexpr int kSpotSize = 2;

// Work on tiles that end where their sample does, so that a block has one log-determinant. There may be more threads
// than have rows of the product.
template <typename Arithmetic, unsigned R>
struct SampleWork : Work<Arithmetic, R> {
  using Base = Work<Arithmetic, R>;
  using Base::kLanes, Base::kSmall, Base::kStrip;

  unsigned in_sample;  // tiles per sample

  // With `tile_count` tiles in shared memory.
  SampleWork(const Tensor& z, int64_t transformed, int64_t tile_count, int64_t multiprocessors)
      : Base(z, std::max<int64_t>(1, multiprocessors)) {
    const bool several = tile_count > 1;
    const int64_t of_sample = std::max<int64_t>(1, (this->per_sample + kStrip - 1) / kStrip);
    const int64_t of_strip = int64_t{this->side / R} * kLanes;  // threads with rows
    int64_t most = of_sample;
    if (!kSmall) {
      // Smaller tiles if there are several, so that they leave room for more blocks.
      most = several ? this->strips / 2 : this->strips;
    } else if (several || of_sample * of_strip > kThreads) {
      // As few positions as give every thread a part of the coupling. Otherwise a tile is a whole sample, which saves
      // the kernel that adds parts of log-determinants.
      most = std::min<int64_t>(this->strips, kThreads / (kStrip / kSpotSize) / transformed);
    }
    this->strips = static_cast<unsigned>(std::clamp<int64_t>(most, 1, of_sample));
    in_sample = static_cast<unsigned>((this->per_sample + this->positions() - 1) / this->positions());
    const int with_rows = static_cast<int>(of_strip * this->strips);
    threads_ = kSmall ? kThreads : with_rows < 128 ? 128 : several ? static_cast<int>(kMaxThreads) : with_rows;
  }

  int threads() const { return threads_; }
  int64_t tiles() const { return this->batches * in_sample; }
  // Whether most positions of the tiles exist.
  bool is_filled() const { return 2 * this->per_sample > int64_t{in_sample} * this->positions(); }
  __device__ bool has_row() const { return this->row() < this->side; }
  __device__ Span span(unsigned tile) const {
    const unsigned batch = tile / in_sample, first = (tile - batch * in_sample) * this->positions();
    const int64_t left = this->per_sample - first;
    return {batch, first, left < this->positions() ? static_cast<unsigned>(left) : this->positions()};
  }

 private:
  int threads_;
};

// The network's output or its gradient: scales and shifts for the channels from `first` on. The columns of the pair are
// the channels if these are contiguous, otherwise the positions.
template <typename T>
struct Conditioning {
  Pair<T> pair;
  unsigned first, channels;
  bool channels_inside;
};

// Iterates over a thread's elements of the transformed channels, kSpotSize at a time. 8 neighbouring threads have
// neighbouring positions, or 16 threads have pairs of them, so that a warp accesses every bank once, and whole sectors
// of memory.
class Walk {
 public:
  template <typename T>
  __device__ Walk(const Conditioning<T>& h, const Span& span)
      : inside_(h.channels_inside), channels_(h.channels), positions_(span.count) {
    const unsigned group = threadIdx.x >> bits(), step = blockDim.x >> bits();
    const unsigned high = group / chunks(), high_step = step / chunks();
    chunk_ = group - high * chunks();
    chunk_step_ = step - high_step * chunks();
    place_ = (high << bits()) + (threadIdx.x & ((1u << bits()) - 1));
    place_step_ = high_step << bits();
  }

  __device__ bool has_ended() const { return place_ * (inside_ ? 1 : kSpotSize) >= positions_; }
  __device__ void advance() {
    place_ += place_step_;
    chunk_ += chunk_step_;
    if (chunk_ >= chunks()) {
      chunk_ -= chunks();
      place_ += 1u << bits();
    }
  }
  // In the rows and columns of h.
  __device__ Spot spot() const {
    const unsigned column = kSpotSize * (inside_ ? chunk_ : place_), columns = inside_ ? channels_ : positions_;
    const unsigned left = columns - column;
    return {inside_ ? place_ : chunk_, column, left < kSpotSize ? static_cast<int>(left) : kSpotSize};
  }

 private:
  __device__ unsigned bits() const { return inside_ ? 3 : 4; }
  __device__ unsigned chunks() const { return inside_ ? (channels_ + kSpotSize - 1) / kSpotSize : channels_; }

  bool inside_;
  unsigned channels_, positions_;
  unsigned chunk_, chunk_step_;  // of channels
  unsigned place_, place_step_;  // a position, or kSpotSize of them
};

// Iterates over the scales and shifts of a tile, and prefetches the next while the last are processed.
template <typename H>
class Reader {
  using A = compute_t<H>;

 public:
  __device__ Reader(const Conditioning<const H>& h, const Span& span)
      : h_(&h), walk_(h, span), tile_(tile_of(h, span)) {
    fetch_next();
  }

  // The tile in the rows and columns of h.
  template <typename T>
  __device__ static Tile tile_of(const Conditioning<T>& h, const Span& span) {
    const unsigned batch = static_cast<unsigned>(span.batch), position = static_cast<unsigned>(span.position);
    return h.channels_inside ? Tile{batch, position, 0, 0, 0} : Tile{batch, 0, position, 0, 0};
  }
  __device__ const Tile& tile() const { return tile_; }

  // Calls f(spot, u, t).
  template <typename F>
  __device__ void for_each(const F& f) {
    while (!walk_.has_ended()) {
      const Spot spot = walk_.spot();
      const auto raw = raw_;
      walk_.advance();
      fetch_next();
      A u[kSpotSize], t[kSpotSize];
      widen(h_->pair, spot, raw, u, t);
      f(spot, u, t);
    }
  }

 private:
  __device__ void fetch_next() {
    if (!walk_.has_ended()) raw_ = fetch<kSpotSize>(h_->pair, tile_, walk_.spot());
  }

  const Conditioning<const H>* h_;
  Walk walk_;
  Tile tile_;
  detail::Registers<H, 2 * kSpotSize> raw_;
};

// The index in a tile of the elements at a spot of h.
template <typename W, typename T>
__device__ unsigned index_of(const W& work, const Conditioning<T>& h, const Spot& spot) {
  return h.channels_inside ? work.at(h.first + spot.column, spot.row) : work.at(h.first + spot.row, spot.column);
}

template <typename W, typename T, typename A = typename W::A>
__device__ detail::Registers<A, kSpotSize> read_spot(const W&, const Conditioning<T>& h, const Spot& spot,
                                                     const A* from) {
  detail::Registers<A, kSpotSize> elements;
  if (!h.channels_inside && spot.count == kSpotSize) {
    detail::copy<kSpotSize>(elements.values, from);
  } else {
#pragma unroll
    for (int i = 0; i < kSpotSize; ++i) {
      elements.values[i] = i < spot.count ? from[h.channels_inside ? i * W::kStride : i] : A(0);
    }
  }
  return elements;
}

template <typename W, typename T, typename A = typename W::A>
__device__ void write_spot(const W&, const Conditioning<T>& h, const Spot& spot,
                           const detail::Registers<A, kSpotSize>& elements, A* to) {
  if (!h.channels_inside && spot.count == kSpotSize) {
    detail::copy<kSpotSize>(to, elements.values);
  } else {
#pragma unroll
    for (int i = 0; i < kSpotSize; ++i) {
      if (i < spot.count) to[h.channels_inside ? i * W::kStride : i] = elements.values[i];
    }
  }
}

}  // namespace glow_kernels::linear
