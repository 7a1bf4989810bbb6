// Tiles of the affine coupling; compiled once per instruction set. The mathematics stands in
// glow_kernels/ops/affine_coupling.py.
#include "cpu/affine_coupling.h"

#include "cpu/kernels/tile_access.h"

namespace glow_kernels::GLOW_KERNELS_ISA {
namespace {

// What a pass over the scales produces beside the sum of log s: s, or 1/s for the inverse.
enum class Factor { scale, reciprocal };

// log(1 + exp(-v)) by way of w = 1 + exp(-v) = m 2^k with m in [1, 2): the m of a tile are multiplied and the k added
// up, lane by lane, so that a whole tile takes one logarithm. No product overflows: a lane has kTile / kLanes < 128
// factors below 2, and all of them are kTile < 1024 such factors in a double.
template <Factor factor, bool with_derivative>
double sigmoid_scales(const ScaleParameters<float>& map, int64_t count, const float* __restrict u,
                      float* __restrict factors, float* __restrict derivatives) {
  constexpr int64_t kLanes = 16;
  // Beyond, exp(-v) leaves the range of float; there log s = v to the last bit.
  constexpr float kLimit = 87.0f;
  float products[kLanes], lowest[kLanes];
  int32_t exponents[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) products[lane] = 1.0f, lowest[lane] = 0.0f, exponents[lane] = 0;
  const float inverse_gain = 1.0f / map.gain;
  const auto element = [&](int64_t i, int64_t lane) __attribute__((always_inline)) {
    const float v = map.slope * u[i] + map.offset;
    const float bounded = v < -kLimit ? -kLimit : v;
    const float e = exponential(-bounded);
    const float w = 1.0f + e;
    const int32_t bits = detail::bits_of_float(w);
    const int32_t exponent = (bits >> 23) - 127;
    const float mantissa = detail::float_from_bits((bits & 0x007FFFFF) | 0x3F800000);
    products[lane] *= mantissa;
    exponents[lane] += exponent;
    lowest[lane] = v < lowest[lane] ? v : lowest[lane];
    // 1 / m by Newton's method from a linear start with an error of 1/17: cheaper than a division.
    float reciprocal = 1.41176471f - 0.470588235f * mantissa;
    reciprocal = reciprocal * (2.0f - mantissa * reciprocal);
    reciprocal = reciprocal * (2.0f - mantissa * reciprocal);
    reciprocal = reciprocal + reciprocal * (1.0f - mantissa * reciprocal);
    const float s = reciprocal * detail::float_from_bits((127 - exponent) << 23);
    factors[i] = factor == Factor::scale ? map.gain * s : inverse_gain * w;
    if constexpr (with_derivative) derivatives[i] = map.slope * (e * s);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) element(i + lane, lane);
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) element(i, lane);
  double product = 1.0;
  int64_t exponent = 0;
  float minimum = 0.0f;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    product *= products[lane];
    exponent += exponents[lane];
    minimum = lowest[lane] < minimum ? lowest[lane] : minimum;
  }
  double total = -(exponent * 0.693147180559945309 + std::log(product));
  for (i = 0; minimum < -kLimit && i < count; ++i) {
    const float v = map.slope * u[i] + map.offset;
    if (v >= -kLimit) continue;
    total += v + kLimit;
    factors[i] = factor == Factor::scale ? map.gain * exponential(v) : inverse_gain * exponential(-v);
  }
  return total + count * std::log(static_cast<double>(map.gain));
}

// Where the scales of a tile go. The derivatives are those of log s, in u and in the learned gain.
template <typename A>
struct Scales {
  A* __restrict factors;
  A* __restrict in_u;
  A* __restrict in_gain;
};

template <ScaleKind kind, bool has_floor, bool has_gain, Factor factor, bool with_derivative, typename A>
double general_scales(const ScaleParameters<A>& map, int64_t count, const A* __restrict u, const A* __restrict gain,
                      const Scales<A>& scales) {
  const A log_gain = kind == ScaleKind::sigmoid ? std::log(map.gain) : A(0);
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) {
    LogScale<A> log_s = log_scale<kind>(u[i], map, log_gain);
    A in_gain = log_s.value;
    if constexpr (has_gain) {
      log_s.value *= gain[i];
      log_s.derivative *= gain[i];
    }
    if constexpr (has_floor) {
      const A s = exponential(log_s.value), floored = s + map.floor, share = s / floored;
      total += logarithm(floored);
      scales.factors[i] = factor == Factor::scale ? floored : A(1) / floored;
      log_s.derivative *= share;
      in_gain *= share;
    } else {
      total += log_s.value;
      scales.factors[i] = exponential(factor == Factor::scale ? log_s.value : -log_s.value);
    }
    if constexpr (with_derivative) {
      scales.in_u[i] = log_s.derivative;
      if constexpr (has_gain) scales.in_gain[i] = in_gain;
    }
  }
  return total;
}

template <Factor factor, bool with_derivative, ScaleKind kind, typename A>
double scales_of_kind(const ScaleParameters<A>& map, int64_t count, const A* u, const A* gain,
                      const Scales<A>& scales) {
  const bool has_floor = map.floor > A(0);
  if constexpr (kind != ScaleKind::sigmoid) {
    if (gain != nullptr && has_floor) {
      return general_scales<kind, true, true, factor, with_derivative>(map, count, u, gain, scales);
    }
    if (gain != nullptr) return general_scales<kind, false, true, factor, with_derivative>(map, count, u, gain, scales);
  }
  if (has_floor) return general_scales<kind, true, false, factor, with_derivative>(map, count, u, gain, scales);
  if constexpr (kind == ScaleKind::sigmoid && std::is_same_v<A, float>) {
    return sigmoid_scales<factor, with_derivative>(map, count, u, scales.factors, scales.in_u);
  } else {
    return general_scales<kind, false, false, factor, with_derivative>(map, count, u, gain, scales);
  }
}

template <typename A>
struct alignas(64) Buffer {
  A values[kTile];
};

// Evaluates the scale map of a tile: s (or 1/s) and, if asked for, the derivatives. Returns the sum of log s.
template <Factor factor, bool with_derivative, typename T, typename H, typename A>
double evaluate(const CouplingTile<T, H>& tile, const CouplingOptions& options, const Scales<A>& scales) {
  const ScaleParameters<double>& d = options.map;
  const ScaleParameters<A> map{A(d.slope), A(d.offset), A(d.gain), A(d.floor), A(d.low), A(d.high)};
  const int64_t count = tile.rows * tile.columns;
  Buffer<A> u_buffer, gain_buffer;
  const A* u = load(tile.u, tile.rows, tile.columns, u_buffer.values);
  const A* gain = tile.gain.data ? load(tile.gain, tile.rows, tile.columns, gain_buffer.values) : nullptr;
  switch (options.kind) {
    case ScaleKind::sigmoid:
      return scales_of_kind<factor, with_derivative, ScaleKind::sigmoid>(map, count, u, gain, scales);
    case ScaleKind::exp:
      return scales_of_kind<factor, with_derivative, ScaleKind::exp>(map, count, u, gain, scales);
    case ScaleKind::tanh:
      return scales_of_kind<factor, with_derivative, ScaleKind::tanh>(map, count, u, gain, scales);
    case ScaleKind::atan:
      return scales_of_kind<factor, with_derivative, ScaleKind::atan>(map, count, u, gain, scales);
    case ScaleKind::softsign:
      return scales_of_kind<factor, with_derivative, ScaleKind::softsign>(map, count, u, gain, scales);
    default:
      return scales_of_kind<factor, with_derivative, ScaleKind::clip>(map, count, u, gain, scales);
  }
}

// Calls f with the order as a constant.
template <typename F>
inline void with_order(CouplingOrder order, const F& f) {
  switch (order) {
    case CouplingOrder::shift_scale:
      return f(std::integral_constant<CouplingOrder, CouplingOrder::shift_scale>{});
    case CouplingOrder::scale_shift:
      return f(std::integral_constant<CouplingOrder, CouplingOrder::scale_shift>{});
    default:
      return f(std::integral_constant<CouplingOrder, CouplingOrder::unshift_scale>{});
  }
}

// x to y.
template <CouplingOrder order, typename A>
inline A transformed(A x, A s, A t) {
  if (order == CouplingOrder::scale_shift) return x * s + t;
  return (order == CouplingOrder::shift_scale ? x + t : x - t) * s;
}

// y to x; r = 1 / s.
template <CouplingOrder order, typename A>
inline A restored(A y, A r, A t) {
  if (order == CouplingOrder::scale_shift) return (y - t) * r;
  return order == CouplingOrder::shift_scale ? y * r - t : y * r + t;
}

template <typename T, typename H, bool is_inverse>
double transform(const CouplingTile<T, H>& tile, const CouplingOptions& options) {
  using A = compute_t<T>;
  const int64_t rows = tile.rows, columns = tile.columns, count = rows * columns;
  Buffer<A> factor_buffer, t_buffer, data_buffer, result_buffer;
  const A* factor = factor_buffer.values;
  const double total = evaluate<is_inverse ? Factor::reciprocal : Factor::scale, false>(
      tile, options, Scales<A>{factor_buffer.values, nullptr, nullptr});
  const A* data = load(tile.data, rows, columns, data_buffer.values);
  const A* t = load(tile.t, rows, columns, t_buffer.values);
  A* __restrict result = destination(tile.result, rows, columns, result_buffer.values);
  with_order(options.order, [&](auto order) {
    for (int64_t i = 0; i < count; ++i) {
      result[i] = is_inverse ? restored<order()>(data[i], factor[i], t[i]) : transformed<order()>(data[i], factor[i], t[i]);
    }
  });
  store(result, rows, columns, tile.result);
  return is_inverse ? -total : total;
}

enum class Gradient { of_forward, of_inverse, reversible };

// With dL/dresult and the result of a direction: the gradients in its data, in log s, hence in u and the gain, and in t.
template <typename T, typename H, Gradient gradient>
double differentiate(const CouplingTile<T, H>& tile, const CouplingOptions& options) {
  using A = compute_t<T>;
  constexpr bool of_inverse = gradient == Gradient::of_inverse;
  const int64_t rows = tile.rows, columns = tile.columns, count = rows * columns;
  const A lambda = static_cast<A>(tile.grad_log_det);
  Buffer<A> factors, in_u, in_gain, t_buffer, data_buffer, grad_buffer, grad_data_buffer, du_buffer, dt_buffer, x_buffer;
  const A *factor = factors.values, *derivative = in_u.values;
  evaluate<of_inverse ? Factor::reciprocal : Factor::scale, true>(tile, options,
                                                                 Scales<A>{factors.values, in_u.values, in_gain.values});
  const A* data = load(tile.data, rows, columns, data_buffer.values);
  const A* t = load(tile.t, rows, columns, t_buffer.values);
  const A* g = load(tile.grad, rows, columns, grad_buffer.values);
  A* __restrict grad_data = destination(tile.grad_data, rows, columns, grad_data_buffer.values);
  A* __restrict du = destination(tile.grad_u, rows, columns, du_buffer.values);
  A* __restrict dt = destination(tile.grad_t, rows, columns, dt_buffer.values);
  with_order(options.order, [&](auto order_constant) {
    constexpr CouplingOrder order = decltype(order_constant)::value;
    constexpr bool shift_last = order == CouplingOrder::scale_shift;
    constexpr A sign = order == CouplingOrder::unshift_scale ? A(-1) : A(1);
    if (tile.grad_gain != nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        const A scaled = of_inverse ? (shift_last ? data[i] : data[i] + sign * t[i]) : (shift_last ? data[i] - t[i] : data[i]);
        tile.grad_gain[i] = (of_inverse ? -1 : 1) * (g[i] * scaled + lambda) * in_gain.values[i];
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const A scaled = of_inverse ? (shift_last ? data[i] : data[i] + sign * t[i]) : (shift_last ? data[i] - t[i] : data[i]);
      const A in_log_s = g[i] * scaled + lambda, in_data = g[i] * factor[i];
      du[i] = of_inverse ? -derivative[i] * in_log_s : derivative[i] * in_log_s;
      dt[i] = of_inverse ? (shift_last ? -in_data : -sign * g[i]) : (shift_last ? g[i] : sign * in_data);
      grad_data[i] = in_data;
    }
    if constexpr (gradient == Gradient::reversible) {
      A* __restrict x = destination(tile.result, rows, columns, x_buffer.values);
      for (int64_t i = 0; i < count; ++i) x[i] = restored<order>(data[i], A(1) / factor[i], t[i]);
      store(x, rows, columns, tile.result);
    }
  });
  store(grad_data, rows, columns, tile.grad_data);
  store(du, rows, columns, tile.grad_u);
  store(dt, rows, columns, tile.grad_t);
  return 0;
}

}  // namespace

template <typename T, typename H>
CouplingKernels<T, H> coupling_kernels() {
  return {transform<T, H, false>, transform<T, H, true>, differentiate<T, H, Gradient::of_forward>,
          differentiate<T, H, Gradient::of_inverse>, differentiate<T, H, Gradient::reversible>};
}

template CouplingKernels<float, float> coupling_kernels();
template CouplingKernels<float, BFloat16> coupling_kernels();
template CouplingKernels<float, Half> coupling_kernels();
template CouplingKernels<BFloat16, BFloat16> coupling_kernels();
template CouplingKernels<Half, Half> coupling_kernels();
template CouplingKernels<double, double> coupling_kernels();

}  // namespace glow_kernels::GLOW_KERNELS_ISA
