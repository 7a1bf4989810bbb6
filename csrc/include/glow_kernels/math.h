// Elementary functions shared by host and device code.
//
// On the host the float versions are branch-free polynomials (Cephes, Moshier) that compilers vectorise; they are
// within 2 ulp. Devices and doubles use the library's own, but for the logarithm of a fraction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GLOW_KERNELS_INLINE __host__ __device__ __forceinline__
#else
#define GLOW_KERNELS_INLINE inline __attribute__((always_inline))
#endif

namespace glow_kernels {

#if !defined(__CUDA_ARCH__)
namespace detail {

GLOW_KERNELS_INLINE float float_from_bits(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

GLOW_KERNELS_INLINE int32_t bits_of_float(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// exp(x) = exp_polynomial(r) 2^k with k = x log2(e) rounded to an integer and r = x - k ln 2, for |r| <= ln(2) / 2.
// Adding kRounder rounds to an integer and leaves it in the low bits.
constexpr float kLog2E = 1.44269504088896341f, kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723212e-6f;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23

// Of a float or a vector of floats.
template <typename V>
GLOW_KERNELS_INLINE V exp_polynomial(V r) {
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}

}  // namespace detail
#endif

GLOW_KERNELS_INLINE double exponential(double x) { return std::exp(x); }
GLOW_KERNELS_INLINE double logarithm(double x) { return std::log(x); }
GLOW_KERNELS_INLINE double log1p_of_fraction(double x) { return std::log1p(x); }
GLOW_KERNELS_INLINE double over_one_to_two(double x, double w) { return x / w; }
GLOW_KERNELS_INLINE double hyperbolic_tangent(double x) { return std::tanh(x); }
GLOW_KERNELS_INLINE double arc_tangent(double x) { return std::atan(x); }

// exp(x); 0 and infinity beyond the range of float, NaN for NaN.
GLOW_KERNELS_INLINE float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  // Comparisons that NaN fails keep x, so that it comes through.
  const float bounded = x < -105.0f ? -105.0f : (x > 89.0f ? 89.0f : x);
  const float shifted = bounded * detail::kLog2E + detail::kRounder;
  const int32_t n = detail::bits_of_float(shifted) - 0x4B400000;
  const float k = shifted - detail::kRounder;
  const float p = detail::exp_polynomial((bounded - k * detail::kLn2High) - k * detail::kLn2Low);
  // Two factors, since 2^n itself may be subnormal or out of range.
  const int32_t half = n >> 1;
  const float low = detail::float_from_bits(static_cast<int32_t>(static_cast<uint32_t>(half + 127) << 23));
  const float high = detail::float_from_bits(static_cast<int32_t>(static_cast<uint32_t>(n - half + 127) << 23));
  return p * low * high;
#endif
}

// log(x) for x > 0 that is not subnormal; infinity for infinity, NaN for NaN.
GLOW_KERNELS_INLINE float logarithm(float x) {
#if defined(__CUDA_ARCH__)
  return logf(x);
#else
  const int32_t bits = detail::bits_of_float(x);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float mantissa = detail::float_from_bits(bits - static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23));
  const float f = mantissa - 1.0f;
  const float e = static_cast<float>(exponent);
  const float z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float y = p * f * z - e * 2.12194440e-4f - 0.5f * z;
  const float value = f + y + e * 0.693359375f;
  // The largest finite float compares below infinity; NaN fails the comparison and is returned as it is.
  return x <= 3.40282347e+38f ? value : x;
#endif
}

// log(1 + x) for 0 <= x <= 1.
GLOW_KERNELS_INLINE float log1p_of_fraction(float x) {
  // Least squares, reweighted until the relative error is level. Half the instructions of CUDA's log1pf.
  float p = -3.3183579798787832e-3f;
  p = p * x + 2.0204097032546997e-2f;
  p = p * x - 5.7663582265377045e-2f;
  p = p * x + 1.0680473595857620e-1f;
  p = p * x - 1.5355351567268372e-1f;
  p = p * x + 1.9695386290550232e-1f;
  p = p * x - 2.4958585202693939e-1f;
  p = p * x + 3.3330512046813965e-1f;
  p = p * x - 4.9999931454658508e-1f;
  return p * (x * x) + x;
}

// x / w for 1 <= w <= 2.
GLOW_KERNELS_INLINE float over_one_to_two(float x, float w) {
#if defined(__CUDA_ARCH__)
  return __fdividef(x, w);  // within 2 ulp here; the exact one has a branch to a function
#else
  return x / w;
#endif
}

GLOW_KERNELS_INLINE float hyperbolic_tangent(float x) {
#if defined(__CUDA_ARCH__)
  return tanhf(x);
#else
  const float magnitude = x < 0.0f ? -x : x;
  const float e = exponential(-2.0f * magnitude);
  const float large = (1.0f - e) / (1.0f + e);
  // The difference above cancels for small arguments.
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float small = p * z * x + x;
  return magnitude < 0.625f ? small : (x < 0.0f ? -large : large);
#endif
}

GLOW_KERNELS_INLINE float arc_tangent(float x) {
#if defined(__CUDA_ARCH__)
  return atanf(x);
#else
  const float magnitude = x < 0.0f ? -x : x;
  const bool large = magnitude > 2.41421356f, middle = magnitude > 0.414213562f;
  const float numerator = large ? -1.0f : (middle ? magnitude - 1.0f : magnitude);
  const float denominator = large ? magnitude : (middle ? magnitude + 1.0f : 1.0f);
  const float reduced = numerator / denominator, z = reduced * reduced;
  float p = 8.05374449538e-2f;
  p = p * z - 1.38776856032e-1f;
  p = p * z + 1.99777106478e-1f;
  p = p * z - 3.33329491539e-1f;
  const float base = large ? 1.57079632679f : (middle ? 0.785398163397f : 0.0f);
  const float value = base + (p * z * reduced + reduced);
  return x < 0.0f ? -value : value;
#endif
}

}  // namespace glow_kernels
