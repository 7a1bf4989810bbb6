// The sigmoid and the sum of its logarithms, a vector at a time; compiled once per instruction set.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu/kernels/vector.h"
#include "cpu/tile.h"
#include "glow_kernels/math.h"

namespace glow_kernels::GLOW_KERNELS_ISA {

// s = sigmoid(v) = 1 / w, with w = 1 + e and e = exp(-v).
template <typename A>
struct Sigmoid {
  Vector<A> w, s, e;
};

// Beyond, exp(-v) and 1 / w leave the range of A: out_of_range() tells, and nothing here is right then.
template <typename A>
constexpr A kLimit = std::is_same_v<A, float> ? 87 : 708;

template <typename A>
inline __attribute__((always_inline)) Sigmoid<A> sigmoid(Vector<A> v) {
  using F = detail::Format<A>;
#if defined(__AVX512F__)
  // scalef takes any exponent: 0 beyond the range of A on one side, infinity on the other.
  constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  Vector<A> k = v * -F::kLog2E, e;
  if constexpr (std::is_same_v<A, float>) {
    k = _mm512_maskz_roundscale_ps(0xFFFF, k, kRounding);
  } else {
    k = _mm512_maskz_roundscale_pd(0xFF, k, kRounding);
  }
  const Vector<A> p = detail::exp_polynomial<A>((-v - k * F::kLn2High) - k * F::kLn2Low);
  if constexpr (std::is_same_v<A, float>) {
    e = _mm512_maskz_scalef_ps(0xFFFF, p, k);
  } else {
    e = _mm512_maskz_scalef_pd(0xFF, p, k);
  }
#else
  // Comparisons that NaN fails keep v, so that it comes through.
  const Vector<A> bounded = v < -kLimit<A> - A(1) ? Vector<A>{} - kLimit<A> - A(1) : v;
  const Vector<A> shifted = bounded * -F::kLog2E + F::kRounder;
  const Vector<A> k = shifted - F::kRounder;
  const Vector<A> r = (-bounded - k * F::kLn2High) - k * F::kLn2Low;
  const auto power = (bits_as<detail::Bits<A>>(shifted) << F::kMantissaBits) + (F::kBias << F::kMantissaBits);
  const Vector<A> e = v > kLimit<A> ? Vector<A>{} : detail::exp_polynomial<A>(r) * bits_as<A>(power);
#endif
  const Vector<A> w = e + A(1);
  return {w, reciprocal<A>(w), e};
}

// For a sum of log w with w = m 2^k and m in [1, 2): the m of a tile are multiplied and the k added up, lane by lane,
// so that a whole tile takes one logarithm.
template <typename A>
class SigmoidSums {
  using F = detail::Format<A>;
  using Bits = detail::Bits<A>;

 public:
  void add(Vector<A> w) {
    const Vector<Bits> bits = bits_as<Bits>(w);
    mantissas_ *= mantissas_of(bits);
    exponents_ += bits >> F::kMantissaBits;
    highest_ = bits > highest_ ? bits : highest_;
    if (++vectors_ % kMostFactors == 0) normalize();
  }

  // Whether a v was below -kLimit or NaN.
  bool out_of_range() const {
    Bits highest = 0;
    for (int64_t lane = 0; lane < kLanes<A>; ++lane) highest = std::max<Bits>(highest, highest_[lane]);
    return highest > (2 * F::kBias - 2) << F::kMantissaBits;  // about exp(kLimit)
  }

  // The sum of log w over all lanes of all vectors.
  double total() const {
    constexpr int64_t lanes = kLanes<A>;
    double products[lanes];
    int64_t exponent = -static_cast<int64_t>(F::kBias) * vectors_ * lanes;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      products[lane] = mantissas_[lane];
      exponent += static_cast<std::make_signed_t<Bits>>(exponents_[lane]);
    }
    for (int64_t half = lanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) products[lane] *= products[lane + half];
    }
    return exponent * 0.693147180559945309 + std::log(products[0]);
  }

 private:
  // Factors below 2 whose product neither an A nor, times those of all other lanes, a double may overflow.
  static constexpr int64_t kMostFactors = std::min<int64_t>(64, 1023 / kLanes<A>);

  static inline __attribute__((always_inline)) Vector<A> mantissas_of(Vector<Bits> bits) {
    constexpr Bits kOne = F::kBias << F::kMantissaBits, kMantissa = (Bits{1} << F::kMantissaBits) - 1;
    return bits_as<A>((bits & kMantissa) | kOne);
  }

  void normalize() {
    const Vector<Bits> bits = bits_as<Bits>(mantissas_);
    mantissas_ = mantissas_of(bits);
    exponents_ += (bits >> F::kMantissaBits) - F::kBias;
  }

  Vector<A> mantissas_ = Vector<A>{} + A(1);
  Vector<Bits> exponents_ = {};  // their sums modulo 2^32 or 2^64
  Vector<Bits> highest_ = {};    // of the bits of w, which are in the order of w, with NaN above all
  int64_t vectors_ = 0;
};

}  // namespace glow_kernels::GLOW_KERNELS_ISA
