#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"

namespace {

std::string native_isa() { return glow_kernels::isa_name(glow_kernels::isa()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glow_kernels, m) {
  m.def("native_isa() -> str");
  m.impl("native_isa", TORCH_BOX(&native_isa));
}
