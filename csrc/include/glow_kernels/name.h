// A string argument of an operator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <cstdint>
#include <string>

namespace glow_kernels {

// The name of an option. It has its own type because torch's conversion to std::string, as seen in 2.11 and 2.13, leaks
// a string at every call: only a few bytes, but between large tensors they keep the C library from reusing memory.
struct Name : std::string {
  using std::string::string;
};

}  // namespace glow_kernels

// Takes ownership of the handle, as torch's conversions do.
template <>
struct torch::stable::detail::ToImpl<glow_kernels::Name> {
  static glow_kernels::Name call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    std::size_t length;
    const char* characters;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &characters));
    glow_kernels::Name name(characters, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return name;
  }
};
