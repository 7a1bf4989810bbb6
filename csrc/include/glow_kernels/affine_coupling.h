// Options of the affine coupling, as glow_kernels/ops/affine_coupling.py names them, and checks of its arguments.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "glow_kernels/coupling_options.h"
#include "glow_kernels/name.h"
#include "glow_kernels/tensors.h"

namespace glow_kernels {

// Where the raw scale and the shift of channel c are in h: at channel `first + step * c`.
struct CouplingLayout {
  int64_t scale_first, shift_first, step;
};

inline CouplingLayout parse_coupling_layout(const std::string& layout, int64_t channels) {
  if (layout == "chunk_scale_shift") return {0, channels, 1};
  if (layout == "chunk_shift_scale") return {channels, 0, 1};
  if (layout == "interleaved_scale_shift") return {0, 1, 2};
  STD_TORCH_CHECK(layout == "interleaved_shift_scale", "unknown layout ", layout);
  return {1, 0, 2};
}

inline ScaleKind parse_kind(const std::string& kind) {
  const char* names[] = {"sigmoid", "exp", "tanh", "atan", "softsign", "clip"};
  for (int index = 0; index < 6; ++index) {
    if (kind == names[index]) return static_cast<ScaleKind>(index);
  }
  STD_TORCH_CHECK(false, "unknown kind of scale map ", kind);
}

inline CouplingOrder parse_order(const std::string& order) {
  if (order == "shift_scale") return CouplingOrder::shift_scale;
  if (order == "scale_shift") return CouplingOrder::scale_shift;
  STD_TORCH_CHECK(order == "unshift_scale", "unknown order ", order);
  return CouplingOrder::unshift_scale;
}

inline CouplingOptions parse_options(const std::string& kind, const std::vector<double>& parameters,
                                     const std::string& order) {
  STD_TORCH_CHECK(parameters.size() == 6, "scale_parameters must have 6 elements, got ", parameters.size());
  return {parse_kind(kind),
          parse_order(order),
          {parameters[0], parameters[1], parameters[2], parameters[3], parameters[4], parameters[5]}};
}

inline void check_coupling(const Tensor& x, const Tensor& h, const std::optional<Tensor>& gain) {
  check_conditioning(x, h);
  const ScalarType compute_type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(!gain || (gain->dim() == 1 && gain->size(0) == x.size(1) && gain->scalar_type() == compute_type),
                  "log_scale_gain must have an element of the type of arithmetic for every channel of x");
}

}  // namespace glow_kernels
