// Vector registers as values, by the vector extensions of GCC and Clang; compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace glow_kernels::GLOW_KERNELS_ISA {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

template <typename A>
constexpr int64_t kLanes = kVectorBytes / sizeof(A);

template <typename A>
struct VectorOf {
  // Aligned like an element, since tensors need not be aligned to vectors.
  typedef A type __attribute__((vector_size(kVectorBytes), aligned(alignof(A)), may_alias));
};

template <typename A>
using Vector = typename VectorOf<A>::type;

template <typename A>
inline const Vector<A>& vector_at(const A* data) {
  return *reinterpret_cast<const Vector<A>*>(data);
}

template <typename A>
inline Vector<A>& vector_at(A* data) {
  return *reinterpret_cast<Vector<A>*>(data);
}

// How results are written. Streamed (non-temporal) stores, which need aligned vectors, do not read the cache lines that
// they overwrite; that pays for tensors larger than the caches.
enum class Stores { cached, streamed };

template <Stores stores, typename A>
inline __attribute__((always_inline)) void put(A* data, Vector<A> value) {
#if defined(__AVX512F__)
  if constexpr (stores == Stores::streamed) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(data), reinterpret_cast<__m512i>(value));
    return;
  }
#elif defined(__AVX__)
  if constexpr (stores == Stores::streamed) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(data), reinterpret_cast<__m256i>(value));
    return;
  }
#endif
  vector_at(data) = value;
}

// Calls f with the stores as a compile-time constant.
template <typename F>
inline void with_stores(bool streamed, const F& f) {
  if (streamed) {
    f(std::integral_constant<Stores, Stores::streamed>{});
    // Streamed stores must be visible before another thread may read.
#if defined(__AVX__)
    _mm_sfence();
#endif
  } else {
    f(std::integral_constant<Stores, Stores::cached>{});
  }
}

// The bits of a vector, reinterpreted as another type.
template <typename To, typename From>
inline Vector<To> bits_as(const From& value) {
  static_assert(sizeof(From) == kVectorBytes);
  Vector<To> result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// For two vectors whose lanes form blocks of `width` summands: adds the halves of each block, and returns the blocks of
// both vectors, half as wide.
template <typename A, int64_t width, int64_t... lane>
inline __attribute__((always_inline)) Vector<A> add_halves(const Vector<A>& a, const Vector<A>& b,
                                                           std::integer_sequence<int64_t, lane...>) {
  constexpr int64_t half = width / 2;
  return __builtin_shufflevector(a, b, (lane / half * width + lane % half)...) +
         __builtin_shufflevector(a, b, (lane / half * width + lane % half + half)...);
}

// The lanes of two vectors from `first` on, alternating.
template <int64_t first, typename V, int64_t... lane>
inline __attribute__((always_inline)) V interleaved(const V& a, const V& b, std::integer_sequence<int64_t, lane...>) {
  return __builtin_shufflevector(a, b, (first + lane / 2 + lane % 2 * int64_t{sizeof...(lane)})...);
}

// Transposes a block of as many vectors as each has lanes. A step rotates the bits of an element's index (the bits of
// its vector, then those of its lane) by one; after as many steps as a lane index has bits, the two are exchanged.
template <typename A>
inline __attribute__((always_inline)) void transpose_block(Vector<A> (&block)[kLanes<A>]) {
  constexpr int64_t half = kLanes<A> / 2;
  constexpr std::make_integer_sequence<int64_t, kLanes<A>> lanes;
  for (int64_t step = 1; step < kLanes<A>; step *= 2) {
    Vector<A> next[kLanes<A>];
    for (int64_t i = 0; i < half; ++i) {
      next[2 * i] = interleaved<0>(block[i], block[i + half], lanes);
      next[2 * i + 1] = interleaved<half>(block[i], block[i + half], lanes);
    }
    std::copy_n(next, kLanes<A>, block);
  }
}

// sums[i] = the sum of the lanes of totals[i], i < count. Halves are added, those of several vectors at once so that no
// lane is idle. `vectors` and `width` are the state of the recursion.
template <int count, typename A, int vectors = count, int64_t width = kLanes<A>>
inline __attribute__((always_inline)) void sum_lanes(const Vector<A>* totals, A* sums) {
  if constexpr (width == 1) {
    std::memcpy(sums, totals, count * sizeof(A));
  } else {
    constexpr int next = (vectors + 1) / 2;
    Vector<A> halved[next];
    for (int i = 0; i < next; ++i) {
      const Vector<A>& second = totals[std::min(2 * i + 1, vectors - 1)];
      halved[i] = add_halves<A, width>(totals[2 * i], second, std::make_integer_sequence<int64_t, kLanes<A>>());
    }
    sum_lanes<count, A, next, width / 2>(halved, sums);
  }
}

}  // namespace glow_kernels::GLOW_KERNELS_ISA
