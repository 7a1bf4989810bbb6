// Tiles of the affine coupling; compiled once per instruction set. The mathematics stands in
// glow_kernels/ops/affine_coupling.py.
#include "cpu/affine_coupling.h"

#include "cpu/kernels/tile_access.h"

namespace glow_kernels::GLOW_KERNELS_ISA {
namespace {

// What a pass over the scales produces beside the sum of log s: s, or 1/s for the inverse.
enum class Factor { scale, reciprocal };

// log(1 + exp(-v)) by way of w = 1 + exp(-v) = m 2^k with m in [1, 2): the m of a tile are multiplied and the k added
// up, lane by lane, so that a whole tile takes one logarithm a lane. No product overflows: a lane has at most kTile /
// kLanes < 128 factors below 2.
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
  double total = 0;
  float minimum = 0.0f;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    total -= exponents[lane] * 0.693147180559945309 + std::log(static_cast<double>(products[lane]));
    minimum = lowest[lane] < minimum ? lowest[lane] : minimum;
  }
  for (i = 0; minimum < -kLimit && i < count; ++i) {
    const float v = map.slope * u[i] + map.offset;
    if (v >= -kLimit) continue;
    total += v + kLimit;
    factors[i] = factor == Factor::scale ? map.gain * exponential(v) : inverse_gain * exponential(-v);
  }
  return total + count * std::log(static_cast<double>(map.gain));
}

template <ScaleKind kind, bool has_floor, Factor factor, bool with_derivative, typename A>
double general_scales(const ScaleParameters<A>& map, int64_t count, const A* __restrict u, A* __restrict factors,
                      A* __restrict derivatives) {
  const A log_gain = kind == ScaleKind::sigmoid ? std::log(map.gain) : A(0);
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) {
    LogScale<A> log_s = log_scale<kind>(u[i], map, log_gain);
    if constexpr (has_floor) {
      const A s = exponential(log_s.value), floored = s + map.floor;
      total += logarithm(floored);
      factors[i] = factor == Factor::scale ? floored : A(1) / floored;
      log_s.derivative *= s / floored;
    } else {
      total += log_s.value;
      factors[i] = exponential(factor == Factor::scale ? log_s.value : -log_s.value);
    }
    if constexpr (with_derivative) derivatives[i] = log_s.derivative;
  }
  return total;
}

template <Factor factor, bool with_derivative, ScaleKind kind, typename A>
double scales_of_kind(const ScaleParameters<A>& map, int64_t count, const A* u, A* factors, A* derivatives) {
  if (map.floor > A(0)) return general_scales<kind, true, factor, with_derivative>(map, count, u, factors, derivatives);
  if constexpr (kind == ScaleKind::sigmoid && std::is_same_v<A, float>) {
    return sigmoid_scales<factor, with_derivative>(map, count, u, factors, derivatives);
  } else {
    return general_scales<kind, false, factor, with_derivative>(map, count, u, factors, derivatives);
  }
}

// Writes s (or 1/s) and, if asked for, phi'(u); returns the sum of log s.
template <Factor factor, bool with_derivative, typename A>
double scales(const CouplingOptions& options, int64_t count, const A* u, A* factors, A* derivatives) {
  const ScaleParameters<double>& d = options.map;
  const ScaleParameters<A> map{A(d.slope), A(d.offset), A(d.gain), A(d.floor), A(d.low), A(d.high)};
  switch (options.kind) {
    case ScaleKind::sigmoid:
      return scales_of_kind<factor, with_derivative, ScaleKind::sigmoid>(map, count, u, factors, derivatives);
    case ScaleKind::exp:
      return scales_of_kind<factor, with_derivative, ScaleKind::exp>(map, count, u, factors, derivatives);
    case ScaleKind::tanh:
      return scales_of_kind<factor, with_derivative, ScaleKind::tanh>(map, count, u, factors, derivatives);
    case ScaleKind::atan:
      return scales_of_kind<factor, with_derivative, ScaleKind::atan>(map, count, u, factors, derivatives);
    case ScaleKind::softsign:
      return scales_of_kind<factor, with_derivative, ScaleKind::softsign>(map, count, u, factors, derivatives);
    default:
      return scales_of_kind<factor, with_derivative, ScaleKind::clip>(map, count, u, factors, derivatives);
  }
}

template <typename A>
struct alignas(64) Buffer {
  A values[kTile];
};

template <typename T, typename H>
double forward(Strided<const T> x, Strided<const H> u, Strided<const H> t, Strided<T> y, int64_t rows, int64_t columns,
               const CouplingOptions& options) {
  using A = compute_t<T>;
  const int64_t count = rows * columns;
  Buffer<A> scale, u_buffer, t_buffer, x_buffer, y_buffer;
  const double total = scales<Factor::scale, false>(options, count, load(u, rows, columns, u_buffer.values),
                                                    scale.values, static_cast<A*>(nullptr));
  const A *value = load(x, rows, columns, x_buffer.values), *shift = load(t, rows, columns, t_buffer.values);
  A* __restrict result = destination(y, rows, y_buffer.values);
  switch (options.order) {
    case CouplingOrder::shift_scale:
      for (int64_t i = 0; i < count; ++i) result[i] = (value[i] + shift[i]) * scale.values[i];
      break;
    case CouplingOrder::scale_shift:
      for (int64_t i = 0; i < count; ++i) result[i] = value[i] * scale.values[i] + shift[i];
      break;
    case CouplingOrder::unshift_scale:
      for (int64_t i = 0; i < count; ++i) result[i] = (value[i] - shift[i]) * scale.values[i];
      break;
  }
  store(result, rows, columns, y);
  return total;
}

template <typename T, typename H>
double inverse(Strided<const T> y, Strided<const H> u, Strided<const H> t, Strided<T> x, int64_t rows, int64_t columns,
               const CouplingOptions& options) {
  using A = compute_t<T>;
  const int64_t count = rows * columns;
  Buffer<A> reciprocal, u_buffer, t_buffer, y_buffer, x_buffer;
  const double total = scales<Factor::reciprocal, false>(options, count, load(u, rows, columns, u_buffer.values),
                                                         reciprocal.values, static_cast<A*>(nullptr));
  const A *value = load(y, rows, columns, y_buffer.values), *shift = load(t, rows, columns, t_buffer.values);
  A* __restrict result = destination(x, rows, x_buffer.values);
  switch (options.order) {
    case CouplingOrder::shift_scale:
      for (int64_t i = 0; i < count; ++i) result[i] = value[i] * reciprocal.values[i] - shift[i];
      break;
    case CouplingOrder::scale_shift:
      for (int64_t i = 0; i < count; ++i) result[i] = (value[i] - shift[i]) * reciprocal.values[i];
      break;
    case CouplingOrder::unshift_scale:
      for (int64_t i = 0; i < count; ++i) result[i] = value[i] * reciprocal.values[i] + shift[i];
      break;
  }
  store(result, rows, columns, x);
  return -total;
}

template <typename T, typename H>
void backward(Strided<const T> grad, double grad_log_det, Strided<const T> y, Strided<const H> u, Strided<const H> t,
              Strided<T> grad_x, Strided<H> grad_u, Strided<H> grad_t, int64_t rows, int64_t columns,
              const CouplingOptions& options) {
  using A = compute_t<T>;
  const int64_t count = rows * columns;
  const A lambda = static_cast<A>(grad_log_det);
  Buffer<A> scale, derivative, u_buffer, t_buffer, y_buffer, grad_buffer, dx_buffer, du_buffer, dt_buffer;
  scales<Factor::scale, true>(options, count, load(u, rows, columns, u_buffer.values), scale.values, derivative.values);
  const A *value = load(y, rows, columns, y_buffer.values), *shift = load(t, rows, columns, t_buffer.values);
  const A* g = load(grad, rows, columns, grad_buffer.values);
  A* __restrict dx = destination(grad_x, rows, dx_buffer.values);
  A* __restrict du = destination(grad_u, rows, du_buffer.values);
  A* __restrict dt = destination(grad_t, rows, dt_buffer.values);
  switch (options.order) {
    case CouplingOrder::shift_scale:
      for (int64_t i = 0; i < count; ++i) {
        du[i] = derivative.values[i] * (g[i] * value[i] + lambda);
        dt[i] = dx[i] = g[i] * scale.values[i];
      }
      break;
    case CouplingOrder::scale_shift:
      for (int64_t i = 0; i < count; ++i) {
        du[i] = derivative.values[i] * (g[i] * (value[i] - shift[i]) + lambda);
        dx[i] = g[i] * scale.values[i];
        dt[i] = g[i];
      }
      break;
    case CouplingOrder::unshift_scale:
      for (int64_t i = 0; i < count; ++i) {
        du[i] = derivative.values[i] * (g[i] * value[i] + lambda);
        dx[i] = g[i] * scale.values[i];
        dt[i] = -dx[i];
      }
      break;
  }
  store(dx, rows, columns, grad_x);
  store(du, rows, columns, grad_u);
  store(dt, rows, columns, grad_t);
}

template <typename T, typename H>
void inverse_backward(Strided<const T> grad, double grad_log_det, Strided<const T> x, Strided<const H> u,
                      Strided<const H> t, Strided<T> grad_y, Strided<H> grad_u, Strided<H> grad_t, int64_t rows,
                      int64_t columns, const CouplingOptions& options) {
  using A = compute_t<T>;
  const int64_t count = rows * columns;
  const A lambda = static_cast<A>(grad_log_det);
  Buffer<A> reciprocal, derivative, u_buffer, t_buffer, x_buffer, grad_buffer, dy_buffer, du_buffer, dt_buffer;
  scales<Factor::reciprocal, true>(options, count, load(u, rows, columns, u_buffer.values), reciprocal.values,
                                   derivative.values);
  const A *value = load(x, rows, columns, x_buffer.values), *shift = load(t, rows, columns, t_buffer.values);
  const A* g = load(grad, rows, columns, grad_buffer.values);
  A* __restrict dy = destination(grad_y, rows, dy_buffer.values);
  A* __restrict du = destination(grad_u, rows, du_buffer.values);
  A* __restrict dt = destination(grad_t, rows, dt_buffer.values);
  switch (options.order) {
    case CouplingOrder::shift_scale:
      for (int64_t i = 0; i < count; ++i) {
        du[i] = -derivative.values[i] * (g[i] * (value[i] + shift[i]) + lambda);
        dy[i] = g[i] * reciprocal.values[i];
        dt[i] = -g[i];
      }
      break;
    case CouplingOrder::scale_shift:
      for (int64_t i = 0; i < count; ++i) {
        du[i] = -derivative.values[i] * (g[i] * value[i] + lambda);
        dy[i] = g[i] * reciprocal.values[i];
        dt[i] = -dy[i];
      }
      break;
    case CouplingOrder::unshift_scale:
      for (int64_t i = 0; i < count; ++i) {
        du[i] = -derivative.values[i] * (g[i] * (value[i] - shift[i]) + lambda);
        dy[i] = g[i] * reciprocal.values[i];
        dt[i] = g[i];
      }
      break;
  }
  store(dy, rows, columns, grad_y);
  store(du, rows, columns, grad_u);
  store(dt, rows, columns, grad_t);
}

}  // namespace

template <typename T, typename H>
CouplingKernels<T, H> coupling_kernels() {
  return {forward<T, H>, inverse<T, H>, backward<T, H>, inverse_backward<T, H>};
}

template CouplingKernels<float, float> coupling_kernels();
template CouplingKernels<float, BFloat16> coupling_kernels();
template CouplingKernels<float, Half> coupling_kernels();
template CouplingKernels<BFloat16, BFloat16> coupling_kernels();
template CouplingKernels<Half, Half> coupling_kernels();
template CouplingKernels<double, double> coupling_kernels();

}  // namespace glow_kernels::GLOW_KERNELS_ISA
