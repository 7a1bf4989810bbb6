// The statistics of ActNorm's initialisation on the CPU: the kernel that every instruction-set variant provides.
#pragma once

#include "cpu/tile.h"

namespace glow_kernels {

template <typename T>
struct StatisticsKernels {
  // The mean, and the sum of squared deviations from it, of every row of a tile, or of every column if `of_columns`.
  void (*forward)(const Strided<const T>& tile, int64_t rows, int64_t columns, bool of_columns, double* means,
                  double* deviations);
};

namespace baseline {
template <typename T>
StatisticsKernels<T> statistics_kernels();
}
namespace avx2 {
template <typename T>
StatisticsKernels<T> statistics_kernels();
}
namespace avx512 {
template <typename T>
StatisticsKernels<T> statistics_kernels();
}

}  // namespace glow_kernels
