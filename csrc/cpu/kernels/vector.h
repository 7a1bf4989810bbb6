// Vector registers as values, by the vector extensions that GCC and Clang share; compiled once per instruction set.
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
  // Aligned as an element, since tensors begin anywhere.
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

// How results are written: streamed stores, of whole aligned vectors, do not read the cache lines that they overwrite,
// which pays for tensors that no cache holds.
enum class Stores { cached, streamed };

template <Stores stores, typename A>
inline __attribute__((always_inline)) void put(A* data, Vector<A> value) {
#if defined(__AVX512F__)
  if constexpr (stores == Stores::streamed) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(data), reinterpret_cast<const __m512i&>(value));
    return;
  }
#elif defined(__AVX__)
  if constexpr (stores == Stores::streamed) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(data), reinterpret_cast<const __m256i&>(value));
    return;
  }
#endif
  vector_at(data) = value;
}

// Calls f with the stores as a constant.
template <typename F>
inline void with_stores(bool streamed, const F& f) {
  if (streamed) {
    f(std::integral_constant<Stores, Stores::streamed>{});
    // Before another thread may read.
#if defined(__AVX__)
    _mm_sfence();
#endif
  } else {
    f(std::integral_constant<Stores, Stores::cached>{});
  }
}

// The bits of a vector as those of another type.
template <typename To, typename From>
inline Vector<To> bits_as(const From& value) {
  static_assert(sizeof(From) == kVectorBytes);
  Vector<To> result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// Of two vectors whose lanes are cut into blocks of `width` summands: the blocks of both, halved by adding their
// halves.
template <typename A, int64_t width, int64_t... lane>
inline __attribute__((always_inline)) Vector<A> add_halves(const Vector<A>& a, const Vector<A>& b,
                                                           std::integer_sequence<int64_t, lane...>) {
  constexpr int64_t half = width / 2;
  return __builtin_shufflevector(a, b, (lane / half * width + lane % half)...) +
         __builtin_shufflevector(a, b, (lane / half * width + lane % half + half)...);
}

// Of two vectors: lanes from `first` on, alternating.
template <int64_t first, typename V, int64_t... lane>
inline __attribute__((always_inline)) V interleaved(const V& a, const V& b, std::integer_sequence<int64_t, lane...>) {
  return __builtin_shufflevector(a, b, (first + lane / 2 + lane % 2 * int64_t{sizeof...(lane)})...);
}

// Transposes a block of as many vectors as each has lanes. A step rotates the bits of an element's place, those of its
// vector and then those of its lane, by one; as many steps as a lane has bits exchange the two.
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

// sums[i] = the sum of the lanes of totals[i], i < count. Lanes are added by halves: of several vectors at once, so
// that no lane is idle. `vectors` and `width` say how far that has come.
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
