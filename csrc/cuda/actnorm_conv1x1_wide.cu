// The linear map of actnorm_conv1x1 on the matrix units. The mathematics stands in glow_kernels/ops/actnorm_conv1x1.py.
//
// A block stays on its multiprocessor, with the fragments of its matrices and strips of positions for every warp in
// shared memory. Warps take strips by turns and wait for nobody: while some multiply, others load and store.
#include <algorithm>

#include "cuda/actnorm_conv1x1_mma.h"
#include "cuda/actnorm_conv1x1_tile.h"
#include "cuda/actnorm_conv1x1_wide.h"
#include "cuda/launch.h"
#include "cuda/sums.h"

namespace glow_kernels {
namespace {

using namespace linear;  // NOLINT: what the tile header is for

// With fewer channels the ordinary units keep up with the memory. The sums of more than 48 leave too few registers.
constexpr int64_t kLeastChannels = 25, kMostOfApply = 64, kMostOfBackward = 48;
// Of a block. Two share a multiprocessor where shared memory, and registers for 64 channels, let them.
constexpr int kApplyWarps = 8, kBackwardWarps = 4;

// All strips of a tensor with this many positions in all.
struct Strips {
  unsigned channels, count, positions, per_sample;

  __device__ Span span(unsigned strip) const {
    const unsigned first = strip * Strip<8>::kPositions, batch = first / per_sample, left = positions - first;
    return {batch, first - batch * per_sample, left < Strip<8>::kPositions ? left : Strip<8>::kPositions};
  }
  // The first of a warp, so that multiprocessors differ by one strip at most, and how many further on the next is.
  __device__ unsigned first() const { return threadIdx.x / 32 * gridDim.x + blockIdx.x; }
  __device__ unsigned step() const { return blockDim.x / 32 * gridDim.x; }
};

template <typename S>
constexpr unsigned kFragments = S::kTiles * S::kTiles * 32;

struct Apply {
  Strips strips;
  Positions<const float> x;
  const float *matrix, *shift;
  Positions<float> z;
};

template <typename S>
__global__ void __launch_bounds__(kApplyWarps * 32, S::kSide == 64 ? 1 : 2) apply_kernel(const Apply arguments) {
  const Strips& strips = arguments.strips;
  GLOW_KERNELS_DYNAMIC_SHARED(Split<2>, fragments);
  float* const shift = reinterpret_cast<float*>(fragments + kFragments<S>);
  float* const strip = shift + S::kSide + threadIdx.x / 32 * S::kSize;
  const auto load = [&](unsigned index) {
    if (index < strips.count) load_strip<S>(arguments.x, strips.channels, strips.span(index), strip);
  };
  load(strips.first());
  split_matrix<S>(arguments.matrix, strips.channels, false, fragments);
  pad_vector<S>(arguments.shift, strips.channels, shift);
  __syncthreads();
  for (unsigned index = strips.first(); index < strips.count; index += strips.step(), load(index)) {
    wait_for_copies();
    __syncwarp();
    typename S::Values total;
    multiply<S>(fragments, shift, strip, total);
    store_strip<S>(arguments.z, strips.channels, strips.span(index), total, strip);
    __syncwarp();
  }
}

struct Backward {
  Strips strips;
  Positions<const float> grad = {}, data = {};  // g, and x, or z for the reversible backward
  const float* matrix = nullptr;                // M
  const float* inverse = nullptr;               // M^-1, and the shift of x = M^-1 z + shift; null unless reversible
  const float* inverse_shift = nullptr;
  Positions<float> x = {};       // of the reversible backward
  Positions<float> grad_x = {};  // M^T g; null if it is not wanted
  float* parts = nullptr;        // sum g x^T and sum g of every block
};

template <typename S>
__global__ void __launch_bounds__(kBackwardWarps * 32, 2) backward_kernel(const Backward arguments) {
  const Strips& strips = arguments.strips;
  const bool reversible = arguments.inverse != nullptr;
  GLOW_KERNELS_DYNAMIC_SHARED(Split<2>, fragments);
  Split<2>* const inverse = fragments + kFragments<S>;
  float* const shift = reinterpret_cast<float*>(inverse + (reversible ? kFragments<S> : 0));
  float* const all_strips = shift + S::kSide;
  float *const x = all_strips + threadIdx.x / 32 * 2 * S::kSize, *const g = x + S::kSize;
  const auto load = [&](unsigned index) {
    if (index >= strips.count) return;
#pragma unroll 1
    for (int input = 0; input < 2; ++input) {
      const Positions<const float> from = input == 0 ? arguments.data : arguments.grad;
      load_strip<S>(from, strips.channels, strips.span(index), input == 0 ? x : g);
    }
  };
  load(strips.first());
  split_matrix<S>(arguments.matrix, strips.channels, true, fragments);
  if (reversible) {
    split_matrix<S>(arguments.inverse, strips.channels, false, inverse);
    pad_vector<S>(arguments.inverse_shift, strips.channels, shift);
  }
  StripSums<S> sums;
  __syncthreads();
  for (unsigned index = strips.first(); index < strips.count; index += strips.step(), load(index)) {
    const Span span = strips.span(index);
    wait_for_copies();
    __syncwarp();
    typename S::Values total;
    if (reversible) {
      multiply<S>(inverse, shift, x, total);
      __syncwarp();
      put_strip<S>(total, x);
      __syncwarp();
      store_strip<S>(arguments.x, strips.channels, span, total, x);
    }
    sums.add(g, x);
    if (arguments.grad_x.data != nullptr) {
      multiply<S>(fragments, nullptr, g, total);
      store_strip<S>(arguments.grad_x, strips.channels, span, total, g);
    }
    __syncwarp();
  }
  __syncthreads();
  sums.write(strips.channels, all_strips, reinterpret_cast<float*>(fragments),
             arguments.parts + int64_t{blockIdx.x} * strips.channels * (strips.channels + 1));
}

// Calls f.operator()<S>(strips) where these kernels are for x.
template <int64_t kMostChannels, typename F>
bool with_strips(const Launcher& launch, const Tensor& x, const F& f) {
  const int64_t channels = x.size(1);
  if (x.scalar_type() != ScalarType::Float || channels < kLeastChannels || channels > kMostChannels) return false;
  const Planes planes = planes_of(x);
  const int64_t positions = planes.batches * planes.positions;
  const int64_t count = (positions + Strip<8>::kPositions - 1) / Strip<8>::kPositions;
  // Of fewer, some multiprocessors would have none for all of their warps.
  const int64_t least = 2 * kBackwardWarps * launch.multiprocessors();
  if (count < std::max<int64_t>(1, least) || positions >= int64_t{1} << 31) return false;
  const Strips strips{static_cast<unsigned>(channels), static_cast<unsigned>(count), static_cast<unsigned>(positions),
                      static_cast<unsigned>(planes.positions)};
  if (channels <= 32) {
    f.template operator()<Strip<32>>(strips);
  } else if (kMostChannels <= 48 || channels <= 48) {
    f.template operator()<Strip<48>>(strips);
  } else if constexpr (kMostChannels > 48) {
    f.template operator()<Strip<64>>(strips);
  }
  return true;
}

// Bytes that a block has for matrices, a shift, and some strips of each of its warps.
template <typename S>
constexpr int64_t shared_bytes(int64_t matrices, int64_t strips) {
  return matrices * kFragments<S> * sizeof(Split<2>) + (S::kSide + strips * S::kSize) * sizeof(float);
}

int64_t blocks_for(const Launcher& launch, const Strips& strips, int64_t warps, int64_t bytes) {
  return std::min<int64_t>((strips.count + warps - 1) / warps, launch.resident_blocks(bytes, 2));
}

// Runs the kernel and adds the sums of its blocks. `fill` completes the arguments.
template <typename F>
bool run_backward(const Launcher& launch, const Tensor& like, bool reversible, Tensor& grad_matrix, Tensor& grad_shift,
                  const F& fill) {
  return with_strips<kMostOfBackward>(launch, like, [&]<typename S>(const Strips& strips) {
    const int64_t bytes = shared_bytes<S>(reversible ? 2 : 1, 2 * kBackwardWarps);
    const int64_t blocks = blocks_for(launch, strips, kBackwardWarps, bytes);
    Tensor parts = empty_vector(blocks * strips.channels * (strips.channels + 1), ScalarType::Float, like);
    Backward arguments{strips};
    arguments.parts = parts.mutable_data_ptr<float>();
    fill(arguments);
    launch(blocks, 32 * kBackwardWarps, bytes, backward_kernel<S>, arguments);
    sum_columns<float>(launch, parts, blocks, grad_matrix, &grad_shift);
  });
}

}  // namespace

bool apply_wide(const Launcher& launch, const Tensor& x, const Tensor& matrix, const Tensor& shift, Tensor& z) {
  return with_strips<kMostOfApply>(launch, x, [&]<typename S>(const Strips& strips) {
    const int64_t bytes = shared_bytes<S>(1, kApplyWarps);
    const Apply arguments{strips, readable<float>(x), matrix.const_data_ptr<float>(), shift.const_data_ptr<float>(),
                          writable<float>(z)};
    launch(blocks_for(launch, strips, kApplyWarps, bytes), 32 * kApplyWarps, bytes, apply_kernel<S>, arguments);
  });
}

bool backward_wide(const Launcher& launch, const Tensor& grad, const Tensor& x, const Tensor& matrix, Tensor& grad_x,
                   Tensor& grad_matrix, Tensor& grad_shift) {
  return run_backward(launch, x, false, grad_matrix, grad_shift, [&](Backward& arguments) {
    arguments.grad = readable<float>(grad);
    arguments.data = readable<float>(x);
    arguments.matrix = matrix.const_data_ptr<float>();
    if (grad_x.numel() > 0) arguments.grad_x = writable<float>(grad_x);
  });
}

bool reversible_backward_wide(const Launcher& launch, const Tensor& grad, const Tensor& z, const Tensor& matrix,
                              const Tensor& inverse, const Tensor& inverse_shift, Tensor& x, Tensor& grad_x,
                              Tensor& grad_matrix, Tensor& grad_shift) {
  return run_backward(launch, z, true, grad_matrix, grad_shift, [&](Backward& arguments) {
    arguments.grad = readable<float>(grad);
    arguments.data = readable<float>(z);
    arguments.matrix = matrix.const_data_ptr<float>();
    arguments.inverse = inverse.const_data_ptr<float>();
    arguments.inverse_shift = inverse_shift.const_data_ptr<float>();
    arguments.x = writable<float>(x);
    arguments.grad_x = writable<float>(grad_x);
  });
}

}  // namespace glow_kernels
