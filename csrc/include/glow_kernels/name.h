// A string among the arguments of an operator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <cstdint>
#include <string>

namespace glow_kernels {

// The name of an option. A type of its own, since the conversion to std::string in torch's headers, as seen in 2.11 and
// 2.13, allocates one that nobody frees: some bytes for every call, and between large tensors they keep the C library
// from reusing the memory of those.
struct Name : std::string {
  using std::string::string;
};

}  // namespace glow_kernels

// Takes over the handle, as the conversions of torch do.
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
