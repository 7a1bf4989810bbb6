// Tiles of the affine coupling; compiled once per instruction set. The mathematics is described in
// glow_kernels/ops/affine_coupling.py.
#include "cpu/affine_coupling.h"

#include "cpu/kernels/coupling_runs.h"
#include "cpu/kernels/sigmoid.h"
#include "cpu/kernels/vector.h"
#include "glow_kernels/coupling_formulas.h"

namespace glow_kernels::GLOW_KERNELS_ISA {
namespace {

// What a pass over the scales produces besides the sum of log s: s, or 1/s for the inverse.
enum class Factor { scale, reciprocal };

// Where the scales of a tile go, and the derivatives of log s with respect to u and to the learned gain.
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
      const Floored<A> floored = with_floor(log_s.value, map.floor);
      total += floored.log_scale;
      scales.factors[i] = factor == Factor::scale ? floored.scale : A(1) / floored.scale;
      log_s.derivative *= floored.share;
      in_gain *= floored.share;
    } else {
      total += log_s.value;
      if constexpr (kind != ScaleKind::sigmoid) {
        scales.factors[i] = exponential(factor == Factor::scale ? log_s.value : -log_s.value);
      } else {
        // Not from log s, whose rounding error matters where it is large.
        const A v = map.slope * u[i] + map.offset, e = exponential(factor == Factor::scale && v < A(0) ? v : -v);
        const A s = map.gain * (v < A(0) ? e : A(1)) / (A(1) + e);
        scales.factors[i] = factor == Factor::scale ? s : (A(1) + e) / map.gain;
      }
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
  return general_scales<kind, false, false, factor, with_derivative>(map, count, u, gain, scales);
}

// Evaluates the scale map: s (or 1/s) and, if `with_derivative`, the derivatives. Returns the sum of log s.
template <Factor factor, bool with_derivative, typename A>
double evaluate(const CouplingOptions& options, int64_t count, const A* u, const A* gain, const Scales<A>& scales) {
  const ScaleParameters<double>& d = options.map;
  const ScaleParameters<A> map{A(d.slope), A(d.offset), A(d.gain), A(d.floor), A(d.low), A(d.high)};
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

// Calls f with the order as a compile-time constant.
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

// Results of an element, or of a vector of elements; those that a direction does not have are not set.
template <typename V>
struct Results {
  V result, grad_data, grad_t, in_log_s;
};

// For a gradient, `data` is the result of the direction and `g` is dL/dresult; computed are the gradients of the
// direction's input, of t, and of log s, from which those of u and the gain follow. `factor` is 1 / s for an inverse,
// otherwise s, and `reciprocal` is 1 / s for the reversible backward.
template <Direction direction, CouplingOrder order, typename V, typename A>
inline __attribute__((always_inline)) Results<V> results_of(V data, V t, V g, A lambda, V factor, V reciprocal) {
  constexpr Shift shift = shift_of(order, is_inverse(direction)), back = shift_of(order, true);
  Results<V> results;
  if constexpr (direction == Direction::reversible_backward) {
    results.result = mapped(back, data, reciprocal, t);
  } else if constexpr (has_result(direction)) {
    results.result = mapped(shift, data, factor, t);
  }
  if constexpr (is_gradient(direction)) {
    results.grad_data = g * factor;
    results.grad_t = grad_shift(shift, g, results.grad_data);
    const V in_log_factor = grad_log_factor(shift, data, t, g, lambda);
    results.in_log_s = is_inverse(direction) ? -in_log_factor : in_log_factor;
  }
  return results;
}

template <Direction direction, CouplingOrder order, typename A>
void combine(int64_t count, const Run<A>& run, const Scales<A>& scales) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A factor = scales.factors[i];
    const A reciprocal = direction == Direction::reversible_backward ? A(1) / factor : factor;
    const A g = is_gradient(direction) ? run.g[i] : A(0);
    const Results<A> results = results_of<direction, order>(run.data[i], run.t[i], g, run.lambda, factor, reciprocal);
    if constexpr (has_result(direction)) run.result[i] = results.result;
    if constexpr (is_gradient(direction)) {
      run.grad_data[i] = results.grad_data;
      run.grad_t[i] = results.grad_t;
      run.grad_u[i] = results.in_log_s * scales.in_u[i];
      if (run.grad_gain) run.grad_gain[i] = results.in_log_s * scales.in_gain[i];
    }
  }
}

// Computes a run with any scale map. Returns the sum of log s.
template <Direction direction, typename A>
double compute(const CouplingOptions& options, int64_t count, const Run<A>& run) {
  constexpr Factor factor = is_inverse(direction) ? Factor::reciprocal : Factor::scale;
  TileBuffer<A> factors, in_u, in_gain;
  const Scales<A> scales{factors.values, in_u.values, in_gain.values};
  const double total = evaluate<factor, is_gradient(direction)>(options, count, run.u, run.gain, scales);
  with_order(options.order, [&](auto order) { combine<direction, order()>(count, run, scales); });
  return total;
}

// The coupling with a sigmoid without a floor, s = gain / w with w = 1 + exp(-v), one or several vectors at a time.
template <Direction direction, CouplingOrder order, Stores stores, typename A>
class SigmoidCoupling {
 public:
  explicit SigmoidCoupling(const ScaleParameters<double>& map)
      : slope_(map.slope), offset_(map.offset), gain_(map.gain), inverse_gain_(A(1) / gain_) {}

  // Computes `count` vectors from `run` on, `step` apart. Returns w.
  template <int count>
  inline __attribute__((always_inline)) Vectors<A, count> compute(const Run<A>& run, const Strides& step) const {
    using V = Vectors<A, count>;
    const V v = vectors_at<count>(run.u, step.u) * slope_ + offset_;
    const V e = exp_of_minus<A>(v), w = e + A(1), s = reciprocal<A>(w);
    const V scale = s * gain_, inverse_scale = w * inverse_gain_;
    const V data = vectors_at<count>(run.data, step.data), t = vectors_at<count>(run.t, step.t);
    const V g = is_gradient(direction) ? vectors_at<count>(run.g, step.g) : V{};
    const auto results = results_of<direction, order>(data, t, g, run.lambda,
                                                      is_inverse(direction) ? inverse_scale : scale, inverse_scale);
    if constexpr (has_result(direction)) put<stores>(run.result, step.result, results.result);
    if constexpr (is_gradient(direction)) {
      put<stores>(run.grad_data, step.grad_data, results.grad_data);
      put<stores>(run.grad_t, step.grad_t, results.grad_t);
      put<stores>(run.grad_u, step.grad_u, V(results.in_log_s * (slope_ * (e * s))));
    }
    return w;
  }

  // Computes a tail of less than a vector. Returns w, with 1 in the lanes that have no element.
  inline __attribute__((always_inline)) Vector<A> compute_tail(const Run<A>& run, int64_t count) const {
    constexpr int64_t lanes = kLanes<A>;
    A from[4][lanes] = {}, to[4][lanes];
    const A* sources[] = {run.data, run.u, run.t, run.g};
    for (int index = 0; index < (is_gradient(direction) ? 4 : 3); ++index) {
      std::memcpy(from[index], sources[index], count * sizeof(A));
    }
    Vector<A> w =
        compute<1>({from[0], from[1], from[2], nullptr, from[3], run.lambda, to[0], to[1], to[2], to[3], nullptr}, {});
    A* targets[] = {run.result, run.grad_data, run.grad_u, run.grad_t};
    for (int index = has_result(direction) ? 0 : 1; index < (is_gradient(direction) ? 4 : 1); ++index) {
      std::memcpy(targets[index], to[index], count * sizeof(A));
    }
    for (int64_t lane = count; lane < lanes; ++lane) w[lane] = 1;
    return w;
  }

 private:
  A slope_, offset_, gain_, inverse_gain_;
};

// Computes all runs with such a sigmoid in one pass. For a gradient, the result only tells whether w was out of range.
template <Direction direction, CouplingOrder order, Stores stores, typename A>
SigmoidSums<A> compute_sigmoid(const ScaleParameters<double>& map, Runs<A> runs) {
  constexpr int64_t lanes = kLanes<A>;
#if defined(__SANITIZE_ADDRESS__)
  // More, with every access checked, would take minutes to compile.
  constexpr int vectors_at_once = is_gradient(direction) ? 1 : 2;
#else
  // As many interleaved vectors as fit into the registers.
  constexpr int vectors_at_once = is_gradient(direction) ? 2 : 4;
#endif
  const SigmoidCoupling<direction, order, stores, A> coupling(map);
  // The vector type may alias anything, so only objects whose address does not escape stay in registers. That is why a
  // copy of the sums is returned.
  SigmoidSums<A> sums;
  const auto add = [&](const auto& w) __attribute__((always_inline)) {
    if constexpr (is_gradient(direction)) {
      sums.check(w);
    } else {
      sums.add(w);
    }
  };
  Strides step = runs.vector_step();
  if (runs.count == lanes) {
    // Rows of one vector become one run, whose vectors are a row stride apart.
    step = runs.stride;
    runs.count = runs.rows * lanes;
    runs.rows = 1;
  }
  runs.for_each([&](Run<A> run) __attribute__((always_inline)) {
    int64_t vectors = runs.count / lanes;
    for (; vectors >= vectors_at_once; vectors -= vectors_at_once) {
      add(coupling.template compute<vectors_at_once>(run, step));
      run.advance(step, vectors_at_once);
    }
    for (; vectors > 0; --vectors) {
      add(coupling.template compute<1>(run, step));
      run.advance(step);
    }
    if (runs.count % lanes > 0) add(coupling.compute_tail(run, runs.count % lanes));
  });
  const SigmoidSums<A> returned = sums;
  return returned;
}

template <typename T, typename H, Direction direction>
double compute_tile(const CouplingTile<T, H>& tile, const CouplingOptions& options) {
  using A = compute_t<T>;
  TileRuns<T, H, direction> members(tile);
  const Runs<A> runs = members.runs();
  double total = 0;
  bool is_done = false;
  if (options.kind == ScaleKind::sigmoid && options.map.floor == 0) {
    SigmoidSums<A> sums;
    with_order(options.order, [&](auto order) {
      with_stores(tile.streamed && members.is_aligned(),
                  [&](auto stores) { sums = compute_sigmoid<direction, order(), stores()>(options.map, runs); });
    });
    is_done = !sums.out_of_range();
    if constexpr (!is_gradient(direction)) {
      const double gain = options.map.gain;
      total = -sums.total() + (gain == 1 ? 0.0 : tile.rows * tile.columns * std::log(gain));
    }
  }
  if (!is_done) {
    total = 0;
    runs.for_each([&](const Run<A>& run) { total += compute<direction>(options, runs.count, run); });
  }
  members.store();
  return direction == Direction::inverse ? -total : total;
}

}  // namespace

template <typename T, typename H>
CouplingKernels<T, H> coupling_kernels() {
  return {compute_tile<T, H, Direction::forward>, compute_tile<T, H, Direction::inverse>,
          compute_tile<T, H, Direction::backward>, compute_tile<T, H, Direction::inverse_backward>,
          compute_tile<T, H, Direction::reversible_backward>};
}

template CouplingKernels<float, float> coupling_kernels();
template CouplingKernels<float, BFloat16> coupling_kernels();
template CouplingKernels<float, Half> coupling_kernels();
template CouplingKernels<BFloat16, BFloat16> coupling_kernels();
template CouplingKernels<Half, Half> coupling_kernels();
template CouplingKernels<double, double> coupling_kernels();

}  // namespace glow_kernels::GLOW_KERNELS_ISA
