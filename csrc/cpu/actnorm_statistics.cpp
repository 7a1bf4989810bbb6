// Mean and variance of every channel on the CPU, computed per tile and combined as in Chan, Golub and LeVeque,
// "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
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

// Statistics per channel of the elements seen so far.
struct Statistics {
  std::vector<double> counts, means, deviations;

  explicit Statistics(int64_t channels) : counts(channels), means(channels), deviations(channels) {}

  // Adds the statistics of `count` elements of each channel from `first` on. These channels must have equal counts.
  void add(int64_t first, int64_t channels, double count, const double* other_means, const double* other_deviations) {
    const double before = counts[first], share = count / (before + count);
    for (int64_t i = 0; i < channels; ++i) {
      const double difference = other_means[i] - means[first + i];
      means[first + i] += difference * share;
      deviations[first + i] += other_deviations[i] + difference * difference * before * share;
      counts[first + i] = before + count;
    }
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
    const Tiling tiling(data.planes, kTile);
    const int64_t per_tile = tiling.channels_per_tile();
    std::vector<double> means(tiling.size() * per_tile), deviations(tiling.size() * per_tile);
    torch::stable::parallel_for(0, tiling.size(), kTilesPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const Tile tile = tiling[index];
        kernel(tiling.at(tile, data.data, data.planes), tile.rows, tile.columns, tiling.channels_inside(),
               &means[index * per_tile], &deviations[index * per_tile]);
      }
    });
    Statistics totals(channels);
    for (int64_t index = 0; index < tiling.size(); ++index) {
      const Tile tile = tiling[index];
      const double count = static_cast<double>(tile.rows * tile.columns / tiling.channels(tile));
      totals.add(tiling.first_channel(tile), tiling.channels(tile), count, &means[index * per_tile],
                 &deviations[index * per_tile]);
    }
    A *mean_data = mean.mutable_data_ptr<A>(), *variance_data = variance.mutable_data_ptr<A>();
    for (int64_t channel = 0; channel < channels; ++channel) {
      const double nothing = std::numeric_limits<double>::quiet_NaN(), count = totals.counts[channel];
      mean_data[channel] = static_cast<A>(count > 0 ? totals.means[channel] : nothing);
      variance_data[channel] = static_cast<A>(totals.deviations[channel] / count);
    }
  });
  return {mean, variance};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(glow_kernels, CPU, m) { m.impl("actnorm_statistics_forward_native", TORCH_BOX(&forward)); }

}  // namespace glow_kernels
