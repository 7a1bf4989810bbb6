// The scale maps of the affine coupling: log s = phi(u) and its derivative. The table of kinds is in the docstring of
// ScaleMap in glow_kernels/ops/affine_coupling.py.
#pragma once

#include "glow_kernels/math.h"

namespace glow_kernels {

enum class ScaleKind { sigmoid, exp, tanh, atan, softsign, clip };

template <typename A>
struct ScaleParameters {
  A slope, offset, gain, floor, low, high;
};

template <typename A>
struct LogScale {
  A value;       // log s
  A derivative;  // of log s with respect to u
};

namespace detail {

// f(v) of the scale exp(gain * f(v)), and its derivative.
template <ScaleKind kind, typename A>
GLOW_KERNELS_INLINE void bound(A v, const ScaleParameters<A>& map, A& value, A& derivative) {
  if constexpr (kind == ScaleKind::tanh) {
    value = hyperbolic_tangent(v);
    // 1 - tanh^2 would cancel where tanh saturates.
    const A e = exponential(v < A(0) ? A(2) * v : A(-2) * v);
    derivative = A(4) * e / ((A(1) + e) * (A(1) + e));
  } else if constexpr (kind == ScaleKind::atan) {
    value = arc_tangent(v);
    derivative = A(1) / (A(1) + v * v);
  } else if constexpr (kind == ScaleKind::softsign) {
    const A denominator = A(1) + (v < A(0) ? -v : v);
    value = v / denominator;
    derivative = A(1) / (denominator * denominator);
  } else if constexpr (kind == ScaleKind::clip) {
    value = v < map.low ? map.low : (v > map.high ? map.high : v);
    derivative = v < map.low || v > map.high ? A(0) : A(1);
  } else {
    value = v;
    derivative = A(1);
  }
}

}  // namespace detail

// log s = phi(u) without the floor; `log_gain` is log(map.gain), which a sigmoid needs.
template <ScaleKind kind, typename A>
GLOW_KERNELS_INLINE LogScale<A> log_scale(A u, const ScaleParameters<A>& map, A log_gain) {
  const A v = map.slope * u + map.offset;
  if constexpr (kind == ScaleKind::sigmoid) {
    // exp(-|v|) never overflows, and log(1 + exp(-|v|)) loses no accuracy where sigmoid(v) is close to 0 or 1.
    const A e = exponential(v < A(0) ? v : -v);
    return {(v < A(0) ? v : A(0)) - log1p_of_fraction(e) + log_gain,
            map.slope * fast_divide(v < A(0) ? A(1) : e, A(1) + e)};
  } else {
    A value, derivative;
    detail::bound<kind>(v, map, value, derivative);
    return {map.gain * value, map.gain * map.slope * derivative};
  }
}

template <typename A>
struct Floored {
  A scale, log_scale;  // s + floor and its logarithm
  A share;             // s / (s + floor), the derivative of that logarithm with respect to log s
};

// If the scale overflows, the floor is negligible.
template <typename A>
GLOW_KERNELS_INLINE Floored<A> with_floor(A log_s, A floor) {
  const A s = exponential(log_s), scale = s + floor;
  const bool overflows = scale == A(INFINITY);
  return {scale, overflows ? log_s : logarithm(scale), overflows ? A(1) : s / scale};
}

}  // namespace glow_kernels
