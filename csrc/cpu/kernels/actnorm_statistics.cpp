// Statistics of a tile's channels; compiled once per instruction set.
#include "cpu/actnorm_statistics.h"

#include <algorithm>

#include "cpu/kernels/tile_access.h"
#include "cpu/kernels/vector.h"

namespace glow_kernels::GLOW_KERNELS_ISA {
namespace {

// As many elements as a vector of doubles has lanes, converted to double.
template <typename A>
inline Vector<double> doubles_at(const A* values) {
  typedef A Narrow __attribute__((vector_size(kLanes<double> * sizeof(A)), aligned(alignof(A)), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(values), Vector<double>);
}

// The mean of `count` elements and the sum of squared deviations from it, from the sums of d and d^2, where d is the
// deviation from the first element. As that is one of the elements, sum d^2 is at most count + 1 times the result, so
// in double the cancellation is harmless. A constant channel has exactly its value as the mean, and deviations of 0.
inline void finish(double first, int64_t count, double* mean, double* deviations) {
  const double mean_of_d = *mean / count;
  *deviations -= *mean * mean_of_d;
  *mean = first + mean_of_d;
}

// Statistics of `rows` rows at once, since reducing the lanes of a short row takes longer than reading it.
template <int rows, typename A>
inline void statistics_of_rows(const A* values, int64_t columns, double* means, double* deviations) {
  Vector<double> sums[rows] = {}, squares[rows] = {};
  int64_t i = 0;
  for (; i + kLanes<double> <= columns; i += kLanes<double>) {
    for (int r = 0; r < rows; ++r) {
      const A* row = values + r * columns;
      const Vector<double> d = doubles_at(row + i) - static_cast<double>(*row);
      sums[r] += d;
      squares[r] += d * d;
    }
  }
  sum_lanes<rows>(sums, means);
  sum_lanes<rows>(squares, deviations);
  for (int r = 0; r < rows; ++r) {
    const A* row = values + r * columns;
    for (int64_t j = i; j < columns; ++j) {
      const double d = static_cast<double>(row[j]) - *row;
      means[r] += d;
      deviations[r] += d * d;
    }
    finish(*row, columns, means + r, deviations + r);
  }
}

template <typename T>
void forward(const Strided<const T>& tile, int64_t rows, int64_t columns, bool of_columns, double* means,
             double* deviations) {
  using A = compute_t<T>;
  A buffer[kTile];
  const A* values = load(tile, rows, columns, buffer);
  if (!of_columns) {
    constexpr int kRowsAtOnce = 4;
    int64_t row = 0;
    for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) {
      statistics_of_rows<kRowsAtOnce>(values + row * columns, columns, means + row, deviations + row);
    }
    for (; row < rows; ++row) statistics_of_rows<1>(values + row * columns, columns, means + row, deviations + row);
    return;
  }
  std::fill_n(means, columns, 0.0);
  std::fill_n(deviations, columns, 0.0);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < columns; ++i) {
      const double d = static_cast<double>(values[row * columns + i]) - values[i];
      means[i] += d;
      deviations[i] += d * d;
    }
  }
  for (int64_t i = 0; i < columns; ++i) finish(values[i], rows, means + i, deviations + i);
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
