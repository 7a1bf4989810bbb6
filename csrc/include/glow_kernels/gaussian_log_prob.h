// Options of the diagonal Gaussian, as glow_kernels/ops/gaussian_log_prob.py names them.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>

#include "glow_kernels/name.h"

namespace glow_kernels {

// Where the mean and the log standard deviation of channel c are in h: at channel `first + step * c`.
struct GaussianLayout {
  int64_t mean_first, log_sd_first, step;
};

inline GaussianLayout parse_gaussian_layout(const std::string& layout, int64_t channels) {
  if (layout == "chunk_mean_log_sd") return {0, channels, 1};
  STD_TORCH_CHECK(layout == "interleaved_mean_log_sd", "unknown layout ", layout);
  return {0, 1, 2};
}

}  // namespace glow_kernels
