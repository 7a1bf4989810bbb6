// Tiles of the affine coupling; compiled once per instruction set. The mathematics stands in
// glow_kernels/ops/affine_coupling.py.
#include "cpu/affine_coupling.h"

#include "cpu/kernels/tile_access.h"
#include "cpu/kernels/vector.h"
#include "glow_kernels/coupling_formulas.h"

namespace glow_kernels::GLOW_KERNELS_ISA {
namespace {

// What a pass over the scales produces beside the sum of log s: s, or 1/s for the inverse.
enum class Factor { scale, reciprocal };

// For a sum of log w with w = 1 + exp(-v) = m 2^k and m in [1, 2): the m of a tile are multiplied and the k added up,
// lane by lane, so that a whole tile takes one logarithm.
struct SigmoidSums {
  Vector<float> mantissas = Vector<float>{} + 1.0f;
  Vector<int32_t> exponents = {};
  Vector<uint32_t> highest = {};  // of the bits of w, which are in the order of w, with NaN above all
};

// Beyond, exp(-v) leaves the range of float; there log s = v to the last bit.
constexpr float kLimit = 87.0f;

// s = sigmoid(v) = 1 / w, with w = 1 + e and e = exp(-v).
struct Sigmoid {
  Vector<float> w, s, e;
};

inline __attribute__((always_inline)) Sigmoid sigmoid(Vector<float> v) {
  // Comparisons that NaN fails keep v, so that it comes through.
  const Vector<float> bounded = v < -kLimit ? Vector<float>{} - kLimit : v;
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits, as in exponential().
  const Vector<float> shifted = bounded * -1.44269504088896341f + 12582912.0f;
  const Vector<float> k = shifted - 12582912.0f;
  const Vector<float> r = (-bounded - k * 0.693145751953125f) - k * 1.42860682030941723212e-6f;
  Vector<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const Vector<float> scaled = p * bits_as<float>((bits_as<int32_t>(shifted) << 23) + 0x3F800000);
  const Vector<float> e = v > kLimit ? Vector<float>{} : scaled;
  const Vector<float> w = e + 1.0f;
  return {w, reciprocal(w), e};
}

inline __attribute__((always_inline)) void add(SigmoidSums& sums, Vector<float> w) {
  const Vector<int32_t> bits = bits_as<int32_t>(w);
  sums.mantissas *= bits_as<float>((bits & 0x007FFFFF) | 0x3F800000);
  sums.exponents += bits >> 23;
  const Vector<uint32_t> order = bits_as<uint32_t>(w);
  sums.highest = order > sums.highest ? order : sums.highest;
}

// The sum of log w over all lanes of so many vectors. No product overflows: a lane has kTile / kLanes factors below 2,
// and all lanes kTile of them, which a double takes.
static_assert(kTile / kLanes<float> <= 128 && kTile < 1024);
double total(const SigmoidSums& sums, int64_t vectors) {
  constexpr int64_t lanes = kLanes<float>;
  double product = 1.0;
  int64_t exponent = -127 * vectors * lanes;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    product *= sums.mantissas[lane];
    exponent += sums.exponents[lane];
  }
  return exponent * 0.693147180559945309 + std::log(product);
}

template <Factor factor, bool with_derivative>
double sigmoid_scales(const ScaleParameters<float>& map, int64_t count, const float* __restrict u,
                      float* __restrict factors, float* __restrict derivatives) {
  constexpr int64_t lanes = kLanes<float>;
  const float inverse_gain = 1.0f / map.gain;
  SigmoidSums sums;
  const auto vector = [&](const float* from, float* to, float* to_derivative) __attribute__((always_inline)) {
    const Sigmoid sigmoid_v = sigmoid(vector_at(from) * map.slope + map.offset);
    vector_at(to) = factor == Factor::scale ? map.gain * sigmoid_v.s : inverse_gain * sigmoid_v.w;
    if constexpr (with_derivative) vector_at(to_derivative) = map.slope * (sigmoid_v.e * sigmoid_v.s);
    return sigmoid_v.w;
  };
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) add(sums, vector(u + i, factors + i, derivatives + i));
  int64_t vectors = i / lanes;
  if (i < count) {
    // The rest in a vector of its own, whose other lanes have w = 1.
    float rest[3][lanes] = {};
    std::memcpy(rest[0], u + i, (count - i) * sizeof(float));
    Vector<float> w = vector(rest[0], rest[1], rest[2]);
    for (int64_t lane = count - i; lane < lanes; ++lane) w[lane] = 1.0f;
    add(sums, w);
    ++vectors;
    std::memcpy(factors + i, rest[1], (count - i) * sizeof(float));
    if constexpr (with_derivative) std::memcpy(derivatives + i, rest[2], (count - i) * sizeof(float));
  }
  double result = -total(sums, vectors);
  bool out_of_range = false;
  for (int64_t lane = 0; lane < lanes; ++lane) out_of_range |= sums.highest[lane] > 0x7E000000;  // about exp(87)
  for (i = 0; out_of_range && i < count; ++i) {
    const float v = map.slope * u[i] + map.offset;
    if (v >= -kLimit) continue;
    result += v + kLimit;  // NaN too
    factors[i] = factor == Factor::scale ? map.gain * exponential(v) : inverse_gain * exponential(-v);
    if constexpr (with_derivative) derivatives[i] = v < -kLimit ? map.slope : v;
  }
  return result + count * std::log(static_cast<double>(map.gain));
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

template <CouplingOrder order, bool is_inverse, typename A>
void combine(int64_t count, const A* data, const A* factor, const A* t, A* result) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    result[i] = mapped(shift_of(order, is_inverse), data[i], factor[i], t[i]);
  }
}

template <typename T, typename H, bool is_inverse>
double transform(const CouplingTile<T, H>& tile, const CouplingOptions& options) {
  using A = compute_t<T>;
  const int64_t rows = tile.rows, columns = tile.columns;
  Buffer<A> factor, t_buffer, data_buffer, result_buffer;
  const double total = evaluate<is_inverse ? Factor::reciprocal : Factor::scale, false>(
      tile, options, Scales<A>{factor.values, nullptr, nullptr});
  const A* data = load(tile.data, rows, columns, data_buffer.values);
  const A* t = load(tile.t, rows, columns, t_buffer.values);
  A* result = destination(tile.result, rows, columns, result_buffer.values);
  with_order(options.order,
             [&](auto order) { combine<order(), is_inverse>(rows * columns, data, factor.values, t, result); });
  store(result, rows, columns, tile.result);
  return is_inverse ? -total : total;
}

enum class Gradient { of_forward, of_inverse, reversible };

// What a tile's gradients are made of, and where they go; grad_gain and x may be null.
template <typename A>
struct Gradients {
  A lambda;
  const A *data, *t, *g, *factor, *in_u, *in_gain;
  A *grad_data, *grad_u, *grad_t, *grad_gain, *x;
};

template <CouplingOrder order, Gradient gradient, typename A>
void combine(int64_t count, const Gradients<A>& values) {
  constexpr bool of_inverse = gradient == Gradient::of_inverse;
  constexpr Shift shift = shift_of(order, of_inverse), back = shift_of(order, true);
  const auto in_log_s = [&](int64_t i) __attribute__((always_inline)) {
    const A in_log_factor = grad_log_factor(shift, values.data[i], values.t[i], values.g[i], values.lambda);
    return of_inverse ? -in_log_factor : in_log_factor;
  };
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A g = values.g[i], in_data = g * values.factor[i], in_u = in_log_s(i) * values.in_u[i];
    values.grad_u[i] = in_u;
    values.grad_t[i] = grad_shift(shift, g, in_data);
    values.grad_data[i] = in_data;
  }
  if constexpr (gradient == Gradient::reversible) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      values.x[i] = mapped(back, values.data[i], A(1) / values.factor[i], values.t[i]);
    }
  }
  if (values.grad_gain == nullptr) return;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) values.grad_gain[i] = in_log_s(i) * values.in_gain[i];
}

// With dL/dresult and the result of a direction: the gradients in its data, in log s, hence in u and the gain, and in
// t.
template <typename T, typename H, Gradient gradient>
double differentiate(const CouplingTile<T, H>& tile, const CouplingOptions& options) {
  using A = compute_t<T>;
  constexpr Factor kFactor = gradient == Gradient::of_inverse ? Factor::reciprocal : Factor::scale;
  const int64_t rows = tile.rows, columns = tile.columns;
  Buffer<A> factor, in_u, in_gain, t, data, g, grad_data, grad_u, grad_t, x;
  evaluate<kFactor, true>(tile, options, Scales<A>{factor.values, in_u.values, in_gain.values});
  const Gradients<A> values{
      static_cast<A>(tile.grad_log_det),
      load(tile.data, rows, columns, data.values),
      load(tile.t, rows, columns, t.values),
      load(tile.grad, rows, columns, g.values),
      factor.values,
      in_u.values,
      in_gain.values,
      destination(tile.grad_data, rows, columns, grad_data.values),
      destination(tile.grad_u, rows, columns, grad_u.values),
      destination(tile.grad_t, rows, columns, grad_t.values),
      tile.grad_gain,
      gradient == Gradient::reversible ? destination(tile.result, rows, columns, x.values) : nullptr};
  with_order(options.order, [&](auto order) { combine<order(), gradient>(rows * columns, values); });
  store(values.grad_data, rows, columns, tile.grad_data);
  store(values.grad_u, rows, columns, tile.grad_u);
  store(values.grad_t, rows, columns, tile.grad_t);
  if constexpr (gradient == Gradient::reversible) store(values.x, rows, columns, tile.result);
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
