// Tensors as operators receive and create them, on any device: (B, C, *spatial) as batches of C x P planes, and types.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "glow_kernels/types.h"

namespace glow_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The planes of x, or nothing if its spatial dimensions do not collapse into one.
inline std::optional<Planes> try_planes(const Tensor& x) {
  Planes planes{x.size(0), x.size(1), 1, x.stride(0), x.stride(1), 1};
  // The strides of an empty tensor are meaningless.
  const bool empty = x.numel() == 0;
  for (int64_t dimension = x.dim() - 1; dimension >= 2; --dimension) {
    const int64_t size = x.size(dimension);
    if (size == 1) continue;
    if (planes.positions == 1) {
      planes.position_stride = x.stride(dimension);
    } else if (!empty && x.stride(dimension) != planes.position_stride * planes.positions) {
      return std::nullopt;
    }
    planes.positions *= size;
  }
  return planes;
}

// x itself or, if its positions do not have a single stride, a contiguous copy.
inline Tensor with_planes(const Tensor& x) { return try_planes(x) ? x : torch::stable::contiguous(x); }

inline Planes planes_of(const Tensor& x) { return *try_planes(x); }

// x itself or, if it is not contiguous, a contiguous copy. Checking first is cheaper than a call that does nothing.
inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// An uninitialised tensor, by torch's C interface: torch::stable::empty looks its operator up by name at every call and
// takes several times as long.
inline Tensor empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides, ScalarType type,
                            const Tensor& like) {
  const torch::stable::Device device = like.device();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, sizes, strides, static_cast<int32_t>(type),
                                                  static_cast<int32_t>(device.type()), device.index(), &handle));
  return Tensor(handle);
}

// An uninitialised contiguous tensor of these sizes on the device of `like`.
inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t dimension = sizes.size(); dimension-- > 0;) {
    strides[dimension] = stride;
    stride *= std::max<int64_t>(sizes[dimension], 1);
  }
  return empty_strided(sizes.size(), sizes.data(), strides.data(), type, like);
}

// An uninitialised contiguous tensor of the sizes and the type of x.
inline Tensor empty_contiguous(const Tensor& x) { return empty(x.sizes(), x.scalar_type(), x); }

inline Tensor empty_vector(int64_t size, ScalarType type, const Tensor& like) { return empty({size}, type, like); }

// Whether results with the shape of x are channels last, and not contiguous, by the rule of output_format in
// glow_kernels/backends/numerics.py.
inline bool is_channels_last(const Tensor& x) {
  return x.dim() >= 4 && x.size(1) > 1 && x.stride(1) == 1 && !x.is_contiguous();
}

// An uninitialised tensor of these sizes, in the memory format of results with the shape of x.
inline Tensor empty_output(const Tensor& x, ScalarType type, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  if (!is_channels_last(x)) return empty(sizes, type, x);
  std::vector<int64_t> strides(sizes.size());
  strides[1] = 1;
  int64_t stride = sizes[1];
  for (size_t dimension = sizes.size(); --dimension >= 2;) {
    strides[dimension] = stride;
    stride *= sizes[dimension];
  }
  strides[0] = stride;
  return empty_strided(sizes.size(), sizes.data(), strides.data(), type, x);
}

inline Tensor empty_output(const Tensor& x, ScalarType type) { return empty_output(x, type, x.sizes()); }

inline Tensor empty_output(const Tensor& x) { return empty_output(x, x.scalar_type()); }

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

// Calls f.operator()<T, H>() with the types of x and h, which are not double.
template <typename F>
auto dispatch_single(const Tensor& x, const Tensor& h, const F& f) {
  const ScalarType type = x.scalar_type(), h_type = h.scalar_type();
  if (type == ScalarType::Float && h_type == ScalarType::Float) return f.template operator()<float, float>();
  if (type == ScalarType::Float && h_type == ScalarType::BFloat16) return f.template operator()<float, BFloat16>();
  if (type == ScalarType::Float && h_type == ScalarType::Half) return f.template operator()<float, Half>();
  if (type == ScalarType::BFloat16 && h_type == type) return f.template operator()<BFloat16, BFloat16>();
  STD_TORCH_CHECK(type == ScalarType::Half && h_type == type, "unsupported types of x and h");
  return f.template operator()<Half, Half>();
}

// Calls f.operator()<T, H>() with the types of x and h.
template <typename F>
auto dispatch(const Tensor& x, const Tensor& h, const F& f) {
  const bool twice = x.scalar_type() == ScalarType::Double && h.scalar_type() == ScalarType::Double;
  return twice ? f.template operator()<double, double>() : dispatch_single(x, h, f);
}

// Checks that h is (B, 2 C, *spatial) for this x.
inline void check_conditioning(const Tensor& x, const Tensor& h) {
  STD_TORCH_CHECK(x.dim() >= 2 && h.dim() == x.dim() && h.size(1) == 2 * x.size(1),
                  "h must have twice the channels of x");
  for (int64_t dimension = 0; dimension < x.dim(); ++dimension) {
    STD_TORCH_CHECK(dimension == 1 || h.size(dimension) == x.size(dimension),
                    "h must have the shape of x but for dim 1");
  }
}

}  // namespace glow_kernels
