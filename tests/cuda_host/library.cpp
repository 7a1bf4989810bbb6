#include <torch/csrc/stable/library.h>

#include <string>

namespace {

// Tells `glow-kernels info` and tests that the native backend is csrc/cuda on the CPU.
std::string native_isa() { return "cuda host shim"; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glow_kernels, m) {
  m.def("native_isa() -> str");
  m.impl("native_isa", TORCH_BOX(&native_isa));
}
