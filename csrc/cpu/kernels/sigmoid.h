// The sigmoid and the sum of its logarithms, a vector at a time; compiled once per instruction set.
#pragma once

#include <cmath>

#include "cpu/kernels/vector.h"
#include "cpu/tile.h"
#include "glow_kernels/math.h"

namespace glow_kernels::GLOW_KERNELS_ISA {

// s = sigmoid(v) = 1 / w, with w = 1 + e and e = exp(-v).
struct Sigmoid {
  Vector<float> w, s, e;
};

// Beyond, exp(-v) and 1 / w leave the range of float: out_of_range() tells, and nothing here is right then.
constexpr float kLimit = 87.0f;

inline __attribute__((always_inline)) Sigmoid sigmoid(Vector<float> v) {
#if defined(__AVX512F__)
  // scalef takes any exponent: 0 beyond the range of float on one side, infinity on the other.
  const Vector<float> k =
      _mm512_maskz_roundscale_ps(0xFFFF, v * -detail::kLog2E, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vector<float> r = (-v - k * detail::kLn2High) - k * detail::kLn2Low;
  const Vector<float> e = _mm512_maskz_scalef_ps(0xFFFF, detail::exp_polynomial(r), k);
#else
  // Comparisons that NaN fails keep v, so that it comes through.
  const Vector<float> above = v < -kLimit - 1.0f ? Vector<float>{} - kLimit - 1.0f : v;
  const Vector<float> bounded = above > kLimit ? Vector<float>{} + kLimit : above;
  const Vector<float> shifted = bounded * -detail::kLog2E + detail::kRounder;
  const Vector<float> k = shifted - detail::kRounder;
  const Vector<float> r = (-bounded - k * detail::kLn2High) - k * detail::kLn2Low;
  const Vector<float> e = detail::exp_polynomial(r) * bits_as<float>((bits_as<int32_t>(shifted) << 23) + 0x3F800000);
#endif
  const Vector<float> w = e + 1.0f;
  return {w, reciprocal(w), e};
}

// For a sum of log w with w = m 2^k and m in [1, 2): the m of a tile are multiplied and the k added up, lane by lane,
// so that a whole tile takes one logarithm.
class SigmoidSums {
 public:
  void add(Vector<float> w) {
    const Vector<int32_t> bits = bits_as<int32_t>(w);
    mantissas_ *= bits_as<float>((bits & 0x007FFFFF) | 0x3F800000);
    exponents_ += bits >> 23;
    const Vector<uint32_t> order = bits_as<uint32_t>(w);
    highest_ = order > highest_ ? order : highest_;
    if (++vectors_ % kMostFactors == 0) normalize();
  }

  // Whether a v was below -kLimit or NaN.
  bool out_of_range() const {
    uint32_t highest = 0;
    for (int64_t lane = 0; lane < kLanes<float>; ++lane) highest = std::max<uint32_t>(highest, highest_[lane]);
    return highest > 0x7E000000;  // about exp(87)
  }

  // The sum of log w over all lanes of all vectors.
  double total() const {
    constexpr int64_t lanes = kLanes<float>;
    double products[lanes];
    int32_t exponent = static_cast<int32_t>(-127 * vectors_ * lanes);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      products[lane] = mantissas_[lane];
      exponent += exponents_[lane];
    }
    for (int64_t half = lanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) products[lane] *= products[lane + half];
    }
    return exponent * 0.693147180559945309 + std::log(products[0]);
  }

 private:
  // Factors below 2 whose product neither a float nor, times those of all other lanes, a double may overflow.
  static constexpr int64_t kMostFactors = std::min<int64_t>(64, 1023 / kLanes<float>);

  void normalize() {
    const Vector<int32_t> bits = bits_as<int32_t>(mantissas_);
    mantissas_ = bits_as<float>((bits & 0x007FFFFF) | 0x3F800000);
    exponents_ += (bits >> 23) - 127;
  }

  Vector<float> mantissas_ = Vector<float>{} + 1.0f;
  Vector<int32_t> exponents_ = {};
  Vector<uint32_t> highest_ = {};  // of the bits of w, which are in the order of w, with NaN above all
  int64_t vectors_ = 0;
};

}  // namespace glow_kernels::GLOW_KERNELS_ISA
