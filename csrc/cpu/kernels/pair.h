// Several vectors that are computed together; compiled once per instruction set.
#pragma once

#include "cpu/kernels/vector.h"

namespace glow_kernels::GLOW_KERNELS_ISA {

template <typename A, int count>
struct Pair;

template <typename A, int count>
struct VectorsOf {
  using type = Pair<A, count>;
};
template <typename A>
struct VectorsOf<A, 1> {
  using type = Vector<A>;
};

// A power-of-two number of vectors, as a value. A processor's reorder buffer holds little more than the long dependency
// chain of one exponential, so chains only run in parallel if the program itself interleaves them.
template <typename A, int count>
using Vectors = typename VectorsOf<A, count>::type;

template <typename A, int count>
struct Pair {
  using Half = Vectors<A, count / 2>;
  Half low = {}, high = {};

  Pair() = default;
  inline __attribute__((always_inline)) Pair(const Half& low, const Half& high) : low(low), high(high) {}
  // Copies member by member, since GCC keeps in memory what is copied as a whole.
  inline __attribute__((always_inline)) Pair(const Pair& other) : low(other.low), high(other.high) {}
  inline __attribute__((always_inline)) Pair& operator=(const Pair& other) {
    low = other.low;
    high = other.high;
    return *this;
  }
};

// Applies f to each vector.
template <typename F, typename V, typename... More>
inline __attribute__((always_inline)) V each(const F& f, const V& first, const More&... more) {
  return f(first, more...);
}

template <typename F, typename A, int count, typename... More>
inline __attribute__((always_inline)) Pair<A, count> each(const F& f, const Pair<A, count>& first,
                                                          const More&... more) {
  return {each(f, first.low, more.low...), each(f, first.high, more.high...)};
}

template <typename A, int count>
inline __attribute__((always_inline)) Pair<A, count> operator-(const Pair<A, count>& a) {
  return {-a.low, -a.high};
}

// Operators of two pairs, or of a pair and a number.
#define GLOW_KERNELS_PAIR_OPERATOR(op)                                                                                 \
  template <typename A, int count>                                                                                     \
  inline __attribute__((always_inline)) Pair<A, count> operator op(const Pair<A, count>& a, const Pair<A, count>& b) { \
    return {a.low op b.low, a.high op b.high};                                                                         \
  }                                                                                                                    \
  template <typename A, int count, typename Number, std::enable_if_t<std::is_arithmetic_v<Number>, int> = 0>           \
  inline __attribute__((always_inline)) Pair<A, count> operator op(const Pair<A, count>& a, Number b) {                \
    return {a.low op b, a.high op b};                                                                                  \
  }                                                                                                                    \
  template <typename A, int count, typename Number, std::enable_if_t<std::is_arithmetic_v<Number>, int> = 0>           \
  inline __attribute__((always_inline)) Pair<A, count> operator op(Number a, const Pair<A, count>& b) {                \
    return {a op b.low, a op b.high};                                                                                  \
  }
GLOW_KERNELS_PAIR_OPERATOR(+)
GLOW_KERNELS_PAIR_OPERATOR(-)
GLOW_KERNELS_PAIR_OPERATOR(*)
#undef GLOW_KERNELS_PAIR_OPERATOR

// `count` vectors that are `step` elements apart in memory.
template <int count, typename A>
inline __attribute__((always_inline)) Vectors<A, count> vectors_at(const A* data, int64_t step) {
  if constexpr (count == 1) {
    return vector_at(data);
  } else {
    return {vectors_at<count / 2>(data, step), vectors_at<count / 2>(data + count / 2 * step, step)};
  }
}

template <Stores stores, typename A>
inline __attribute__((always_inline)) void put(A* data, int64_t, const Vector<A>& value) {
  put<stores>(data, value);
}

template <Stores stores, typename A, int count>
inline __attribute__((always_inline)) void put(A* data, int64_t step, const Pair<A, count>& values) {
  put<stores>(data, step, values.low);
  put<stores>(data + count / 2 * step, step, values.high);
}

}  // namespace glow_kernels::GLOW_KERNELS_ISA
