// The affine coupling of one element. Both directions are the same map: with f = s from x to y and f = 1 / s from y to
// x, the result is (data + t) f, (data - t) f, data f + t or data f - t, and its log-determinant is the sum of log f.
// The formulas are in glow_kernels/ops/affine_coupling.py.
#pragma once

#include "glow_kernels/coupling_options.h"

namespace glow_kernels {

// Whether the shift is added before the multiplication, and with which sign.
struct Shift {
  bool first;
  int sign;
};

constexpr Shift shift_of(CouplingOrder order, bool inverse) {
  const Shift forward{order != CouplingOrder::scale_shift, order == CouplingOrder::unshift_scale ? -1 : 1};
  return inverse ? Shift{!forward.first, -forward.sign} : forward;
}

// V is a number or, on the host, a vector of numbers, which can be multiplied by a float.
template <typename V>
GLOW_KERNELS_INLINE V mapped(Shift shift, V data, V factor, V t) {
  const V signed_t = static_cast<float>(shift.sign) * t;
  return shift.first ? (data + signed_t) * factor : data * factor + signed_t;
}

// The gradient with respect to log f, given the result, its gradient g, and the gradient lambda of the log-determinant.
template <typename V, typename A>
GLOW_KERNELS_INLINE V grad_log_factor(Shift shift, V result, V t, V g, A lambda) {
  return g * (shift.first ? result : result - static_cast<float>(shift.sign) * t) + lambda;
}

// The gradient with respect to t; that with respect to the data is g f.
template <typename V>
GLOW_KERNELS_INLINE V grad_shift(Shift shift, V g, V grad_data) {
  return static_cast<float>(shift.sign) * (shift.first ? grad_data : g);
}

}  // namespace glow_kernels
