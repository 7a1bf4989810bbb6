// Elementary functions shared by host and device code.
//
// On the host they are branch-free polynomials that compilers vectorise, within 2 ulp: the float logarithm and tanh are
// from Cephes (Moshier), the others from the Remez algorithm. Devices use CUDA's functions, except for the float
// log1p_of_fraction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define GLOW_KERNELS_INLINE __host__ __device__ __forceinline__
#else
#define GLOW_KERNELS_INLINE inline __attribute__((always_inline))
#endif

namespace glow_kernels {
namespace detail {

// c_0 + c_1 x + c_2 x^2 + ..., where x is a number or a vector of numbers.
template <typename V, typename A, typename... More>
GLOW_KERNELS_INLINE V polynomial(V x, A c, More... more) {
  if constexpr (sizeof...(more) == 0) {
    return V{} + c;
  } else {
    return polynomial(x, more...) * x + c;
  }
}

#if !defined(__CUDA_ARCH__)
// The bit layout of a type, ln 2 in two parts, the first with few bits, and bounds beyond which exp is 0 or infinity.
template <typename A>
struct Format;
template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr Bits kBias = 127, kSqrtHalf = 0x3F3504F3;
  static constexpr float kRounder = 12582912.0f, kLog2E = 1.44269504088896341f;  // 1.5 * 2^23
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723212e-6f;
  static constexpr float kMinExpArgument = -105.0f, kMaxExpArgument = 89.0f;
};
template <>
struct Format<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr Bits kBias = 1023, kSqrtHalf = 0x3FE6A09E667F3BCD;
  static constexpr double kRounder = 6755399441055744.0, kLog2E = 1.44269504088896341;  // 1.5 * 2^52
  static constexpr double kLn2High = 0.693147180559663, kLn2Low = 2.8235290563031577e-13;
  static constexpr double kMinExpArgument = -746.0, kMaxExpArgument = 710.0;
};

template <typename A>
using Bits = typename Format<A>::Bits;

template <typename A>
GLOW_KERNELS_INLINE A from_bits(Bits<A> bits) {
  A value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename A>
GLOW_KERNELS_INLINE Bits<A> to_bits(A value) {
  Bits<A> bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// exp(r) for |r| <= ln(2) / 2, where r is a number or a vector of numbers of type A.
template <typename A, typename V>
GLOW_KERNELS_INLINE V exp_polynomial(V r) {
  if constexpr (std::is_same_v<A, float>) {
    return polynomial(r, 1.0f, 1.0f, 4.9999993444e-1f, 1.6666520574e-1f, 4.1668388715e-2f, 8.3687239316e-3f,
                      1.3814584931e-3f);
  } else {
    return polynomial(r, 1.0, 1.0, 0.500000000000001, 0.16666666666666413, 0.041666666666530856, 0.008333333333494146,
                      0.0013888888943465443, 0.00019841269506819392, 2.4801493254804594e-05, 2.755758644911569e-06,
                      2.763019693695828e-07, 2.4999967909410755e-08);
  }
}

// log(1 + f) + e ln 2 for sqrt(1/2) <= 1 + f <= sqrt(2) and an integer e.
GLOW_KERNELS_INLINE float log_near_one(float f, float e) {
  const float z = f * f;
  const float p =
      polynomial(f, 3.3333331174e-1f, -2.4999993993e-1f, 2.0000714765e-1f, -1.6668057665e-1f, 1.4249322787e-1f,
                 -1.2420140846e-1f, 1.1676998740e-1f, -1.1514610310e-1f, 7.0376836292e-2f);
  const float y = p * f * z - e * 2.12194440e-4f - 0.5f * z;
  return f + y + e * 0.693359375f;
}

GLOW_KERNELS_INLINE double log_near_one(double f, double e) {
  // log(1 + f) = 2 atanh(s) = f - s (f - r) with r = 2 atanh(s) / s - 2. To subtract s f as f^2 / 2 - s f^2 / 2 limits
  // the rounding error of the division to the small second term.
  const double s = f / (f + 2.0), z = s * s, half = 0.5 * f * f;
  const double r = z * polynomial(z, 0.6666666666666734, 0.39999999999415575, 0.28571428742417665, 0.2222219855243068,
                                  0.18183566149816868, 0.1531398765283611, 0.14796722088247835);
  return e * Format<double>::kLn2High - ((half - (s * (half + r) + e * Format<double>::kLn2Low)) - f);
}

// (tanh(x) / x - 1) / z with z = x^2, for |x| <= 0.625.
GLOW_KERNELS_INLINE float tanh_polynomial(float z) {
  return polynomial(z, -3.33332819422e-1f, 1.33314422036e-1f, -5.37397155531e-2f, 2.06390887954e-2f,
                    -5.70498872745e-3f);
}

GLOW_KERNELS_INLINE double tanh_polynomial(double z) {
  return polynomial(z, -0.3333333333333288, 0.13333333333265446, -0.053968253932673814, 0.021869487605554447,
                    -0.008863221359053862, 0.0035919918489360383, -0.0014549717373665855, 0.0005863561850110265,
                    -0.0002286400246916942, 7.72262399894021e-05, -1.6110732349905833e-05);
}

// (atan(x) / x - 1) / z with z = x^2, for |x| <= 1.
GLOW_KERNELS_INLINE float atan_polynomial(float z) {
  return polynomial(z, -0.33333302823972377f, 0.19998663502382047f, -0.1426548369360642f, 0.10958726574007586f,
                    -0.08422610551344273f, 0.058285717984251126f, -0.03150446709940495f, 0.01108964519468905f,
                    -0.0018326650861471754f);
}

GLOW_KERNELS_INLINE double atan_polynomial(double z) {
  return polynomial(z, -0.33333333333332177, 0.19999999999795198, -0.14285714273224848, 0.1111111072536649,
                    -0.09090901937397758, 0.07692219967668827, -0.06665909969623464, 0.058775628628637375,
                    -0.05240214003003066, 0.04676817557256532, -0.040990736514462424, 0.03417904856874603,
                    -0.025974546728527555, 0.017127421596533632, -0.009297410376550012, 0.003917628767474447,
                    -0.001187072929270456, 0.0002282638069256376, -2.0808757115752536e-05);
}
#endif

}  // namespace detail

#if defined(__CUDA_ARCH__)

template <typename A>
GLOW_KERNELS_INLINE A exponential(A x) {
  return std::exp(x);
}

template <typename A>
GLOW_KERNELS_INLINE A logarithm(A x) {
  return std::log(x);
}

template <typename A>
GLOW_KERNELS_INLINE A hyperbolic_tangent(A x) {
  return std::tanh(x);
}

template <typename A>
GLOW_KERNELS_INLINE A arc_tangent(A x) {
  return std::atan(x);
}

GLOW_KERNELS_INLINE double log1p_of_fraction(double x) { return std::log1p(x); }
GLOW_KERNELS_INLINE double fast_divide(double x, double w) { return x / w; }
// Within 2 ulp for w in [1, 2]; the exact division has a branch to a function.
GLOW_KERNELS_INLINE float fast_divide(float x, float w) { return __fdividef(x, w); }

#else

// exp(x); 0 and infinity beyond the range of A, NaN for NaN.
template <typename A>
GLOW_KERNELS_INLINE A exponential(A x) {
  using F = detail::Format<A>;
  // NaN fails both comparisons and so propagates.
  const A bounded = x < F::kMinExpArgument ? F::kMinExpArgument : (x > F::kMaxExpArgument ? F::kMaxExpArgument : x);
  // bounded = k ln 2 + r with an integer k and |r| <= ln(2) / 2. Adding kRounder rounds to an integer and leaves it in
  // the low bits.
  const A shifted = bounded * F::kLog2E + F::kRounder, k = shifted - F::kRounder;
  const A r = (bounded - k * F::kLn2High) - k * F::kLn2Low;
  // Two factors, since 2^k itself may be subnormal or out of range.
  const detail::Bits<A> biased = detail::to_bits(shifted) - (detail::to_bits(F::kRounder) - 2 * F::kBias);
  const A low = detail::from_bits<A>(biased / 2 << F::kMantissaBits);
  const A high = detail::from_bits<A>((biased - biased / 2) << F::kMantissaBits);
  return detail::exp_polynomial<A>(r) * low * high;
}

// log(x) for x > 0 that is not subnormal; infinity for infinity, NaN for NaN.
template <typename A>
GLOW_KERNELS_INLINE A logarithm(A x) {
  using F = detail::Format<A>;
  constexpr detail::Bits<A> kOne = F::kBias << F::kMantissaBits;
  // x = m 2^e with sqrt(1/2) <= m < sqrt(2); e + kBias are the high bits of `scaled`.
  const detail::Bits<A> bits = detail::to_bits(x), scaled = bits + (kOne - F::kSqrtHalf);
  const detail::Bits<A> exponent = scaled >> F::kMantissaBits;
  const A m = detail::from_bits<A>(bits - (exponent << F::kMantissaBits) + kOne);
  // Converts the exponent as the low bits of kRounder, which works on every instruction set.
  const A e = detail::from_bits<A>(detail::to_bits(F::kRounder) + exponent) - (F::kRounder + A(F::kBias));
  // Infinity and NaN fail the comparison and are returned as they are.
  return x < A(INFINITY) ? detail::log_near_one(m - A(1), e) : x;
}

template <typename A>
GLOW_KERNELS_INLINE A hyperbolic_tangent(A x) {
  const A magnitude = x < A(0) ? -x : x;
  const A e = exponential(A(-2) * magnitude);
  // Cancels for small arguments, for which the polynomial is taken.
  const A large = A(1) - A(2) * e / (A(1) + e);
  const A z = x * x, small = detail::tanh_polynomial(z) * z * x + x;
  return magnitude < A(0.625) ? small : (x < A(0) ? -large : large);
}

template <typename A>
GLOW_KERNELS_INLINE A arc_tangent(A x) {
  const A magnitude = x < A(0) ? -x : x;
  const bool large = magnitude > A(1);
  const A t = large ? A(-1) / magnitude : magnitude, z = t * t;
  const A value = (large ? A(1.57079632679489662) : A(0)) + (detail::atan_polynomial(z) * z * t + t);
  return x < A(0) ? -value : value;
}

GLOW_KERNELS_INLINE double log1p_of_fraction(double x) {
  const bool large = x > 0.41421356;
  return detail::log_near_one(large ? 0.5 * (x - 1.0) : x, large ? 1.0 : 0.0);
}

template <typename A>
GLOW_KERNELS_INLINE A fast_divide(A x, A w) {
  return x / w;
}

#endif

// log(1 + x) for 0 <= x <= 1.
GLOW_KERNELS_INLINE float log1p_of_fraction(float x) {
  // Fitted by least squares, reweighted until the relative error is even. Half the instructions of CUDA's log1pf.
  const float p = detail::polynomial(x, -4.9999931454658508e-1f, 3.3330512046813965e-1f, -2.4958585202693939e-1f,
                                     1.9695386290550232e-1f, -1.5355351567268372e-1f, 1.0680473595857620e-1f,
                                     -5.7663582265377045e-2f, 2.0204097032546997e-2f, -3.3183579798787832e-3f);
  return p * (x * x) + x;
}

}  // namespace glow_kernels
