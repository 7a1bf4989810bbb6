// Vector registers as values, by the vector extensions that GCC and Clang share; compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
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

// The bits of a vector as those of another type.
template <typename To, typename From>
inline Vector<To> bits_as(const From& value) {
  static_assert(sizeof(From) == kVectorBytes);
  Vector<To> result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// 1 / x to within 2 ulp, for x whose reciprocal is normal.
inline Vector<float> reciprocal(Vector<float> x) {
#if defined(__AVX512F__)
  // An estimate of 14 bits and a step of Newton's method take half as long as a division.
  const Vector<float> estimate = _mm512_maskz_rcp14_ps(0xFFFF, x);
  return estimate + estimate * (1.0f - x * estimate);
#else
  return 1.0f / x;
#endif
}

// The sum of the lanes, by halves.
template <typename A, int64_t bytes = kVectorBytes>
inline A sum_lanes(const A* lanes) {
  if constexpr (bytes == sizeof(A)) {
    return *lanes;
  } else {
    typedef A Half __attribute__((vector_size(bytes / 2)));
    Half halves[2];
    std::memcpy(halves, lanes, bytes);
    const Half total = halves[0] + halves[1];
    return sum_lanes<A, bytes / 2>(reinterpret_cast<const A*>(&total));
  }
}

}  // namespace glow_kernels::GLOW_KERNELS_ISA
