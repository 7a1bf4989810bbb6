// Replaces CUDA's own header, so that the files of csrc/cuda compile as C++ and their kernels run on the CPU.
//
// A block's threads are fibres of one thread of the CPU. Each runs until it waits for others, at __syncthreads() or at
// a shuffle or vote of its warp; which runs next is decided by the schedule, which GLOW_KERNELS_SCHEDULE seeds. So if a
// barrier is missing, a thread can read what another has not written yet. Shared memory is NaN until it is written. A
// deadlock is an error that says which threads wait where.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
using dim3 = uint3;
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

// Those of the running fibre.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_host {

// Runs `thread` once for every thread of every block of every layer. Throws if threads of a block wait for ever.
void launch(unsigned blocks, unsigned layers, unsigned threads, size_t shared_bytes,
            const std::function<void()>& thread);

// GLOW_KERNELS_MULTIPROCESSORS, or 1 if that is not set. With 0, which no device has, no tensor counts as small.
int multiprocessors();
// GLOW_KERNELS_SHARED_BYTES, or what sm_90 has if that is not set.
int max_shared_bytes();

// Memory that the threads of a block share: an array of this size for every `key`, which lives until the block ends.
void* shared_memory(const void* key, size_t bytes);
void* dynamic_shared();

struct Place {
  const char* file;
  int line;
};

void barrier(Place place);

enum class Exchange { shuffle, vote, barrier };

// Waits until all lanes of `mask` have called it with the same `exchange` and `mask`. Returns the value of lane
// `source` of a shuffle, or for a vote a bit for every lane whose value was not 0.
uint64_t exchange(Place place, Exchange exchange, unsigned mask, uint64_t value, unsigned source);

template <typename T>
T shuffle(Place place, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(place, Exchange::shuffle, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned lane() { return threadIdx.x % 32; }

// mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32: c += a b, where every lane of a warp passes its fragments.
void multiply_add(Place place, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

}  // namespace cuda_host

#define CUDA_HOST_PLACE (::cuda_host::Place{__FILE__, __LINE__})
#define CUDA_HOST_SHARED(type, name, dimensions) \
  static const char name##_key = 0;              \
  typedef type name##_array dimensions;          \
  name##_array& name = *static_cast<name##_array*>(::cuda_host::shared_memory(&name##_key, sizeof(name##_array)))

#define __syncthreads() ::cuda_host::barrier(CUDA_HOST_PLACE)
#define __syncwarp(...) ::cuda_host::sync_warp(CUDA_HOST_PLACE __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(mask, value, source) ::cuda_host::shuffle(CUDA_HOST_PLACE, mask, value, (source) % 32u)
#define __shfl_xor_sync(mask, value, distance) \
  ::cuda_host::shuffle(CUDA_HOST_PLACE, mask, value, ::cuda_host::lane() ^ static_cast<unsigned>(distance))
// A lane whose source is beyond the end of the warp keeps its own value.
#define __shfl_down_sync(mask, value, distance) \
  ::cuda_host::shuffle(CUDA_HOST_PLACE, mask, value, ::cuda_host::down(static_cast<unsigned>(distance)))
#define __shfl_up_sync(mask, value, distance) \
  ::cuda_host::shuffle(CUDA_HOST_PLACE, mask, value, ::cuda_host::up(static_cast<unsigned>(distance)))
#define __ballot_sync(mask, predicate) ::cuda_host::vote(CUDA_HOST_PLACE, mask, predicate)
#define __any_sync(mask, predicate) (::cuda_host::vote(CUDA_HOST_PLACE, mask, predicate) != 0)
#define __all_sync(mask, predicate) (::cuda_host::vote(CUDA_HOST_PLACE, mask, predicate) == (mask))
#define __reduce_max_sync(mask, value) \
  ::cuda_host::reduce(CUDA_HOST_PLACE, mask, value, [](unsigned a, unsigned b) { return a > b ? a : b; })
#define __reduce_min_sync(mask, value) \
  ::cuda_host::reduce(CUDA_HOST_PLACE, mask, value, [](unsigned a, unsigned b) { return a < b ? a : b; })

// These need no locks: one thread runs at a time, until it waits.
inline unsigned atomicMin(unsigned* at, unsigned value) { return std::exchange(*at, std::min(*at, value)); }
inline unsigned atomicMax(unsigned* at, unsigned value) { return std::exchange(*at, std::max(*at, value)); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline long long __double_as_longlong(double value) {
  long long bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

namespace cuda_host {

inline unsigned down(unsigned distance) { return lane() + distance < 32 ? lane() + distance : lane(); }
inline unsigned up(unsigned distance) { return lane() >= distance ? lane() - distance : lane(); }
inline unsigned vote(Place place, unsigned mask, bool predicate) {
  return static_cast<unsigned>(exchange(place, Exchange::vote, mask, predicate, lane()));
}
// Works for a mask of all lanes only; with fewer it waits for ever.
template <typename F>
unsigned reduce(Place place, unsigned mask, unsigned value, const F& of_two) {
  for (unsigned distance = 16; distance > 0; distance /= 2) {
    value = of_two(value, shuffle(place, mask, value, lane() ^ distance));
  }
  return value;
}
inline void sync_warp(Place place, unsigned mask = 0xffffffffu) { exchange(place, Exchange::barrier, mask, 0, lane()); }

}  // namespace cuda_host
