// Options of the affine coupling as kernels take them.
#pragma once

#include "glow_kernels/scale_map.h"

namespace glow_kernels {

enum class CouplingOrder { shift_scale, scale_shift, unshift_scale };

struct CouplingOptions {
  ScaleKind kind;
  CouplingOrder order;
  ScaleParameters<double> map;
};

}  // namespace glow_kernels
