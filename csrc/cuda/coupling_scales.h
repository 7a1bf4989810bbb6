// The options and the scales of the affine coupling, as its kernels use them.
#pragma once

#include <cmath>

#include "cuda/launch.h"
#include "glow_kernels/affine_coupling.h"
#include "glow_kernels/coupling_formulas.h"

namespace glow_kernels::coupling {

// CouplingOptions in the type of arithmetic.
template <typename A>
struct Options {
  ScaleKind kind;
  ScaleParameters<A> map;
  A log_gain;
  A direction;        // 1 from x to y, where log f = log s, or -1
  Shift shift, back;  // of the direction, and of the reversible backward
};

template <typename A>
Options<A> options_of(const CouplingOptions& options, bool inverse) {
  const ScaleParameters<double>& map = options.map;
  return {options.kind,
          {A(map.slope), A(map.offset), A(map.gain), A(map.floor), A(map.low), A(map.high)},
          options.kind == ScaleKind::sigmoid ? A(std::log(map.gain)) : A(0),
          A(inverse ? -1 : 1),
          shift_of(options.order, inverse),
          shift_of(options.order, true)};
}

// log s of N elements and its derivative with respect to u.
template <typename A, int N>
struct LogScales {
  A value[N], in_u[N];
};

template <ScaleKind kind, int N, typename A>
__device__ void map_scales(const Options<A>& options, const A (&u)[N], LogScales<A, N>& log_s) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const LogScale<A> of_element = log_scale<kind>(u[i], options.map, options.log_gain);
    log_s.value[i] = of_element.value;
    log_s.in_u[i] = of_element.derivative;
  }
}

}  // namespace glow_kernels::coupling
