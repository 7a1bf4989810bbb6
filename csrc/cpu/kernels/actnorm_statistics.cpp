// Statistics of a tile's channels; compiled once per instruction set.
#include "cpu/actnorm_statistics.h"

#include <algorithm>

#include "cpu/kernels/tile_access.h"

namespace glow_kernels::GLOW_KERNELS_ISA {
namespace {

template <typename T>
void forward(const Strided<const T>& tile, int64_t rows, int64_t columns, bool of_columns, double* means,
             double* deviations) {
  using A = compute_t<T>;
  A buffer[kTile];
  const A* values = load(tile, rows, columns, buffer);
  // Deviations from the first value, whose mean is that of a constant channel to the last bit.
  if (!of_columns) {
    for (int64_t row = 0; row < rows; ++row, values += columns) {
      const double first = values[0];
      double sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < columns; ++i) sum += values[i] - first;
      const double mean = first + sum / columns;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < columns; ++i) squares += (values[i] - mean) * (values[i] - mean);
      means[row] = mean;
      deviations[row] = squares;
    }
    return;
  }
  std::fill_n(means, columns, 0.0);
  std::fill_n(deviations, columns, 0.0);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < columns; ++i) means[i] += static_cast<double>(values[row * columns + i]) - values[i];
  }
  for (int64_t i = 0; i < columns; ++i) means[i] = values[i] + means[i] / rows;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < columns; ++i) {
      const double deviation = values[row * columns + i] - means[i];
      deviations[i] += deviation * deviation;
    }
  }
}

}  // namespace

template <typename T>
StatisticsKernels<T> statistics_kernels() {
  return {forward<T>};
}

template StatisticsKernels<float> statistics_kernels();
template StatisticsKernels<BFloat16> statistics_kernels();
template StatisticsKernels<Half> statistics_kernels();
template StatisticsKernels<double> statistics_kernels();

}  // namespace glow_kernels::GLOW_KERNELS_ISA
