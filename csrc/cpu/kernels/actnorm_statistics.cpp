// Statistics of a tile's channels; compiled once per instruction set.
#include "cpu/actnorm_statistics.h"

#include <algorithm>

#include "cpu/kernels/tile_access.h"
#include "cpu/kernels/vector.h"

namespace glow_kernels::GLOW_KERNELS_ISA {
namespace {

// As many elements as a vector of doubles has, as doubles.
template <typename A>
inline Vector<double> wide_at(const A* values) {
  typedef A Narrow __attribute__((vector_size(kLanes<double> * sizeof(A)), aligned(alignof(A)), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(values), Vector<double>);
}

// sums[r] = the sum of f(r, elements of row r) for `rows` rows at once, since a short row takes longer to add up than
// to read.
template <int rows, typename A, typename F>
inline void sum_rows(const A* values, int64_t columns, const F& f, double* sums) {
  Vector<double> totals[rows] = {};
  int64_t i = 0;
  for (; i + kLanes<double> <= columns; i += kLanes<double>) {
    for (int r = 0; r < rows; ++r) totals[r] += f(r, wide_at(values + r * columns + i));
  }
  sum_lanes<rows>(totals, sums);
  for (; i < columns; ++i) {
    for (int r = 0; r < rows; ++r) sums[r] += f(r, static_cast<double>(values[r * columns + i]));
  }
}

template <int rows, typename A>
inline void statistics_of_rows(const A* values, int64_t columns, double* means, double* deviations) {
  // Deviations from the first value, whose mean is that of a constant channel to the last bit.
  double first[rows];
  for (int r = 0; r < rows; ++r) first[r] = values[r * columns];
  sum_rows<rows>(values, columns, [&](int r, auto value) { return value - first[r]; }, means);
  for (int r = 0; r < rows; ++r) means[r] = first[r] + means[r] / columns;
  const auto squared = [&](int r, auto value) { return (value - means[r]) * (value - means[r]); };
  sum_rows<rows>(values, columns, squared, deviations);
}

template <typename T>
void forward(const Strided<const T>& tile, int64_t rows, int64_t columns, bool of_columns, double* means,
             double* deviations) {
  using A = compute_t<T>;
  A buffer[kTile];
  const A* values = load(tile, rows, columns, buffer);
  if (!of_columns) {
    constexpr int kRowsAtOnce = 8;
    int64_t row = 0;
    for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) {
      statistics_of_rows<kRowsAtOnce>(values + row * columns, columns, means + row, deviations + row);
    }
    for (; row < rows; ++row) statistics_of_rows<1>(values + row * columns, columns, means + row, deviations + row);
    return;
  }
  // Deviations from the first value, as above.
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
