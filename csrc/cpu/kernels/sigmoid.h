// The parts of a sigmoid 1 / w with w = 1 + exp(-v), and the sum of log w; compiled once per instruction set.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu/kernels/pair.h"
#include "cpu/tile.h"
#include "glow_kernels/math.h"

namespace glow_kernels::GLOW_KERNELS_ISA {

#if defined(__AVX512F__)
constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
inline __attribute__((always_inline)) Vector<float> rounded(const Vector<float>& x) {
  return _mm512_maskz_roundscale_ps(0xFFFF, x, kRounding);
}
inline __attribute__((always_inline)) Vector<double> rounded(const Vector<double>& x) {
  return _mm512_maskz_roundscale_pd(0xFF, x, kRounding);
}

inline __attribute__((always_inline)) Vector<float> estimated_reciprocal(const Vector<float>& x) {
  return _mm512_maskz_rcp14_ps(0xFFFF, x);
}
inline __attribute__((always_inline)) Vector<double> estimated_reciprocal(const Vector<double>& x) {
  return _mm512_maskz_rcp14_pd(0xFF, x);
}

// x 2^k for any k; underflows to 0 and overflows to infinity.
inline __attribute__((always_inline)) Vector<float> scaled(const Vector<float>& x, const Vector<float>& k) {
  return _mm512_maskz_scalef_ps(0xFFFF, x, k);
}
inline __attribute__((always_inline)) Vector<double> scaled(const Vector<double>& x, const Vector<double>& k) {
  return _mm512_maskz_scalef_pd(0xFF, x, k);
}
#endif

// Up to this |v|, exp(-v) is in the normal range of A.
template <typename A>
constexpr A kLimit = std::is_same_v<A, float> ? 87 : 708;

// e = exp(-v). Where v is below -kLimit, e is wrong, and SigmoidSums detects that by the size of 1 + e.
template <typename A, typename V>
inline __attribute__((always_inline)) V exp_of_minus(const V& v) {
  using F = detail::Format<A>;
#if defined(__AVX512F__)
  const V k = each([](const Vector<A>& x) __attribute__((always_inline)) { return rounded(x); }, v * -F::kLog2E);
  const V p = detail::exp_polynomial<A>((-v - k * F::kLn2High) - k * F::kLn2Low);
  return each([](const Vector<A>& p, const Vector<A>& k) __attribute__((always_inline)) { return scaled(p, k); }, p, k);
#else
  // NaN fails the comparisons and so propagates.
  constexpr A kLowerBound = -kLimit<A> - A(1);
  const V bounded = each([](const Vector<A>& v)
                             __attribute__((always_inline)) { return v < kLowerBound ? Vector<A>{} + kLowerBound : v; },
                         v);
  const V shifted = bounded * -F::kLog2E + F::kRounder, k = shifted - F::kRounder;
  const V p = detail::exp_polynomial<A>((-bounded - k * F::kLn2High) - k * F::kLn2Low);
  return each(
      [](const Vector<A>& v, const Vector<A>& p, const Vector<A>& shifted) __attribute__((always_inline)) {
        const auto power = (bits_as<detail::Bits<A>>(shifted) << F::kMantissaBits) + (F::kBias << F::kMantissaBits);
        return v > kLimit<A> ? Vector<A>{} : p * bits_as<A>(power);
      },
      v, p, shifted);
#endif
}

// 1 / x to within 2 ulp, for x whose reciprocal is normal.
template <typename A, typename V>
inline __attribute__((always_inline)) V reciprocal(const V& x) {
#if defined(__AVX512F__)
  // An estimate of 14 bits, refined by Newton's method, takes half as long as a division.
  const V first = each([](const Vector<A>& x) __attribute__((always_inline)) { return estimated_reciprocal(x); }, x);
  const V second = first + first * (A(1) - x * first);
  if constexpr (std::is_same_v<A, float>) return second;
  return second + second * (A(1) - x * second);
#else
  return each([](const Vector<A>& x) __attribute__((always_inline)) { return A(1) / x; }, x);
#endif
}

// The sum of log w, where w = m 2^k with m in [1, 2): lane by lane, the m of a tile are multiplied and the k added, so
// that a whole tile takes one logarithm.
template <typename A>
class SigmoidSums {
  using F = detail::Format<A>;
  using Bits = detail::Bits<A>;

 public:
  inline __attribute__((always_inline)) void add(const Vector<A>& w) {
    check(w);
    const Vector<Bits> bits = bits_as<Bits>(w);
    mantissas_ *= mantissas_of(bits);
    exponents_ += bits >> F::kMantissaBits;
    if (++factors_ % kMaxFactors == 0) normalize();
  }

  // Adds the product. If it is in range so are its factors, since each is at least 1.
  template <int count>
  inline __attribute__((always_inline)) void add(const Pair<A, count>& w) {
    add(w.low * w.high);
  }

  // Takes w into account for out_of_range() only.
  inline __attribute__((always_inline)) void check(const Vector<A>& w) {
    const Vector<Bits> bits = bits_as<Bits>(w);
    highest_ = bits > highest_ ? bits : highest_;
  }

  template <int count>
  inline __attribute__((always_inline)) void check(const Pair<A, count>& w) {
    check(w.low);
    check(w.high);
  }

  // Whether a w, or the product of those that were added together, was NaN or too large for a normal reciprocal.
  bool out_of_range() const {
    Bits highest = 0;
    for (int64_t lane = 0; lane < kLanes<A>; ++lane) highest = std::max<Bits>(highest, highest_[lane]);
    return highest > (2 * F::kBias - 2) << F::kMantissaBits;
  }

  // The sum of log w over all lanes.
  double total() {
    normalize();
    Bits exponent = -F::kBias * static_cast<Bits>(factors_ * kLanes<A>);
    for (int64_t lane = 0; lane < kLanes<A>; ++lane) exponent += exponents_[lane];
    const A product = product_of<kLanes<A> / 2>(mantissas_, std::make_integer_sequence<int64_t, kLanes<A>>());
    // ln 2 in two parts, so that little is rounded before the last addition.
    using D = detail::Format<double>;
    return exponent * D::kLn2High + (exponent * D::kLn2Low + std::log(double{product}));
  }

 private:
  static constexpr int64_t kMaxFactors = 64;  // each below 2, so that an A holds their product

  static inline __attribute__((always_inline)) Vector<A> mantissas_of(Vector<Bits> bits) {
    constexpr Bits kOne = F::kBias << F::kMantissaBits, kMantissa = (Bits{1} << F::kMantissaBits) - 1;
    return bits_as<A>((bits & kMantissa) | kOne);
  }

  void normalize() {
    const Vector<Bits> bits = bits_as<Bits>(mantissas_);
    mantissas_ = mantissas_of(bits);
    exponents_ += (bits >> F::kMantissaBits) - F::kBias;
  }

  // The product of 2 * half lanes, which the other lanes repeat.
  template <int64_t half, int64_t... lane>
  static A product_of(const Vector<A>& values, std::integer_sequence<int64_t, lane...> lanes) {
    if constexpr (half == 0) {
      return values[0];
    } else {
      return product_of<half / 2>(values * __builtin_shufflevector(values, values, (lane ^ half)...), lanes);
    }
  }

  Vector<A> mantissas_ = Vector<A>{} + A(1);
  Vector<Bits> exponents_ = {};  // biased, summed modulo 2^32 or 2^64
  Vector<Bits> highest_ = {};    // the largest bits of a w; bits are ordered like w, with NaN above all
  int64_t factors_ = 0;          // the number of factors per lane
};

}  // namespace glow_kernels::GLOW_KERNELS_ISA
