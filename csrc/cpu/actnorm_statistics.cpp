// Mean and variance of every channel on the CPU: those of tiles, combined as in Chan, Golub and LeVeque, "Updating
// formulae and a pairwise algorithm for computing sample variances", 1979.
#include "cpu/actnorm_statistics.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"

namespace glow_kernels {
namespace {

template <typename T>
StatisticsKernels<T> kernels() {
  GLOW_KERNELS_RETURN_TABLE(statistics_kernels<T>());
}

// Statistics of the elements of a channel that were seen so far.
struct Statistics {
  double count = 0, mean = 0, deviations = 0;

  void add(double other_count, double other_mean, double other_deviations) {
    const double total = count + other_count, difference = other_mean - mean;
    mean += difference * other_count / total;
    deviations += other_deviations + difference * difference * count * other_count / total;
    count = total;
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x_any) {
  STD_TORCH_CHECK(x_any.dim() >= 2, "x must be (B, C, *spatial)");
  const Tensor x = with_planes(x_any);
  const int64_t channels = x.size(1);
  const ScalarType type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor mean = empty_vector(channels, type, x), variance = empty_vector(channels, type, x);
  dispatch(x, [&]<typename T>() {
    using A = compute_t<T>;
    const auto kernel = kernels<T>().forward;
    const auto data = readable<T>(x);
    const Tiling tiling(data.planes);
    const int64_t per_tile = tiling.channels_per_tile();
    std::vector<double> means(tiling.size() * per_tile), deviations(tiling.size() * per_tile);
    torch::stable::parallel_for(0, tiling.size(), kTilesPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const Tile tile = tiling[index];
        kernel(tiling.at(tile, data.data, data.planes), tile.rows, tile.columns, tiling.channels_inside(),
               &means[index * per_tile], &deviations[index * per_tile]);
      }
    });
    std::vector<Statistics> totals(channels);
    for (int64_t index = 0; index < tiling.size(); ++index) {
      const Tile tile = tiling[index];
      const double count = static_cast<double>(tile.rows * tile.columns / tiling.channels(tile));
      for (int64_t i = 0; i < tiling.channels(tile); ++i) {
        const int64_t at = index * per_tile + i;
        totals[tiling.first_channel(tile) + i].add(count, means[at], deviations[at]);
      }
    }
    A *mean_data = mean.mutable_data_ptr<A>(), *variance_data = variance.mutable_data_ptr<A>();
    for (int64_t channel = 0; channel < channels; ++channel) {
      const Statistics& total = totals[channel];
      const double nothing = std::numeric_limits<double>::quiet_NaN();
      mean_data[channel] = static_cast<A>(total.count > 0 ? total.mean : nothing);
      variance_data[channel] = static_cast<A>(total.deviations / total.count);
    }
  });
  return {mean, variance};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(glow_kernels, CPU, m) { m.impl("actnorm_statistics_forward_native", TORCH_BOX(&forward)); }

}  // namespace glow_kernels
