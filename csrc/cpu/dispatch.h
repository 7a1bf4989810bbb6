// Selects the kernels for the processor, and turns tensors into their arguments.
#pragma once

#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/tiling.h"
#include "glow_kernels/tensors.h"

// GLOW_KERNELS_RETURN_TABLE(table<T...>()) returns the table of kernels for the instruction set in use.
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

// The strided memory of a tensor; `data` is null if there is no tensor.
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

// Sums the values of each sample's tiles, in a fixed order, into a tensor (B,).
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
