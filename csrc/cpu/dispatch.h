// From the types of tensors and the processor to the kernels that are made for them.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/planes.h"

// Returns a table of kernels, table<T...>(), of the instruction set in use.
#if defined(GLOW_KERNELS_HAS_AVX512)
#define GLOW_KERNELS_IF_AVX512(...) \
  if (isa() == Isa::avx512) return avx512::__VA_ARGS__;
#else
#define GLOW_KERNELS_IF_AVX512(...)
#endif
#if defined(GLOW_KERNELS_HAS_AVX2)
#define GLOW_KERNELS_IF_AVX2(...) \
  if (isa() == Isa::avx2) return avx2::__VA_ARGS__;
#else
#define GLOW_KERNELS_IF_AVX2(...)
#endif
#define GLOW_KERNELS_RETURN_TABLE(...) \
  GLOW_KERNELS_IF_AVX512(__VA_ARGS__)  \
  GLOW_KERNELS_IF_AVX2(__VA_ARGS__)    \
  return baseline::__VA_ARGS__

namespace glow_kernels {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Calls f.operator()<T>() with the type of x.
template <typename F>
auto dispatch(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::BFloat16:
      return f.template operator()<BFloat16>();
    case ScalarType::Half:
      return f.template operator()<Half>();
    default:
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, "unsupported type of x");
      return f.template operator()<double>();
  }
}

// Calls f.operator()<T, H>() with the types of x and h.
template <typename F>
auto dispatch(const Tensor& x, const Tensor& h, const F& f) {
  const ScalarType type = x.scalar_type(), h_type = h.scalar_type();
  if (type == ScalarType::Float && h_type == ScalarType::Float) return f.template operator()<float, float>();
  if (type == ScalarType::Float && h_type == ScalarType::BFloat16) return f.template operator()<float, BFloat16>();
  if (type == ScalarType::Float && h_type == ScalarType::Half) return f.template operator()<float, Half>();
  if (type == ScalarType::BFloat16 && h_type == type) return f.template operator()<BFloat16, BFloat16>();
  if (type == ScalarType::Half && h_type == type) return f.template operator()<Half, Half>();
  STD_TORCH_CHECK(type == ScalarType::Double && h_type == type, "unsupported types of x and h");
  return f.template operator()<double, double>();
}

// h must be (B, 2 C, *spatial) for this x.
inline void check_conditioning(const Tensor& x, const Tensor& h) {
  STD_TORCH_CHECK(x.dim() >= 2 && h.dim() == x.dim() && h.size(1) == 2 * x.size(1),
                  "h must have twice the channels of x");
  for (int64_t dimension = 0; dimension < x.dim(); ++dimension) {
    STD_TORCH_CHECK(dimension == 1 || h.size(dimension) == x.size(dimension),
                    "h must have the shape of x but for dim 1");
  }
}

// Strided memory of a tensor; null for none.
template <typename T>
struct Plane {
  T* data = nullptr;
  Planes planes{};
};

template <typename T>
Plane<const T> readable(const Tensor& x) {
  return {x.const_data_ptr<T>(), planes_of(x)};
}

template <typename T>
Plane<const T> readable(const std::optional<Tensor>& x) {
  return x ? readable<T>(*x) : Plane<const T>{};
}

template <typename T>
Plane<T> writable(const std::optional<Tensor>& x) {
  return x ? Plane<T>{x->mutable_data_ptr<T>(), planes_of(*x)} : Plane<T>{};
}

// A value (B,) per sample from those of its tiles, which are added in a fixed order.
template <typename A>
Tensor sum_per_sample(const std::vector<double>& values, const Tiling& tiling, int64_t batches, const Tensor& x) {
  Tensor sums = empty_vector(batches, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float, x);
  A* data = sums.mutable_data_ptr<A>();
  const int64_t per_sample = tiling.per_sample();
  for (int64_t batch = 0; batch < batches; ++batch) {
    double total = 0;
    for (int64_t tile = 0; tile < per_sample; ++tile) total += values[batch * per_sample + tile];
    data[batch] = static_cast<A>(total);
  }
  return sums;
}

}  // namespace glow_kernels
