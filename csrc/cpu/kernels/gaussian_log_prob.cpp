// Tiles of the diagonal Gaussian; compiled once per instruction set. The mathematics is described in
// glow_kernels/ops/gaussian_log_prob.py.
#include "cpu/gaussian_log_prob.h"

#include "cpu/kernels/tile_access.h"
#include "glow_kernels/math.h"

namespace glow_kernels::GLOW_KERNELS_ISA {
namespace {

template <typename T, typename H>
double forward(const GaussianTile<T, H>& tile) {
  using A = compute_t<T>;
  const int64_t rows = tile.rows, columns = tile.columns, count = rows * columns;
  TileBuffer<A> z_buffer, mean_buffer, log_sd_buffer;
  const A* z = load(tile.data, rows, columns, z_buffer.values);
  const A* mean = load(tile.mean, rows, columns, mean_buffer.values);
  const A* log_sd = load(tile.log_sd, rows, columns, log_sd_buffer.values);
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) {
    const A standardized = (z[i] - mean[i]) * exponential(-log_sd[i]);
    total += log_sd[i] + A(0.5) * standardized * standardized;
  }
  return -(count * 0.918938533204672742 + static_cast<double>(total));  // log(2 pi) / 2
}

enum class Map { sample, standardize };

template <typename T, typename H, Map map>
double transform(const GaussianTile<T, H>& tile) {
  using A = compute_t<T>;
  const int64_t rows = tile.rows, columns = tile.columns, count = rows * columns;
  TileBuffer<A> data_buffer, mean_buffer, log_sd_buffer, result_buffer;
  const A* data = load(tile.data, rows, columns, data_buffer.values);
  const A* mean = load(tile.mean, rows, columns, mean_buffer.values);
  const A* log_sd = load(tile.log_sd, rows, columns, log_sd_buffer.values);
  A* result = destination(tile.result, rows, columns, result_buffer.values);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    result[i] =
        map == Map::sample ? mean[i] + exponential(log_sd[i]) * data[i] : (data[i] - mean[i]) * exponential(-log_sd[i]);
  }
  store(result, rows, columns, tile.result);
  return 0;
}

enum class Gradient { of_log_prob, of_sample, of_standardize };

template <typename T, typename H, Gradient gradient>
double differentiate(const GaussianTile<T, H>& tile) {
  using A = compute_t<T>;
  constexpr bool of_log_prob = gradient == Gradient::of_log_prob;
  const int64_t rows = tile.rows, columns = tile.columns, count = rows * columns;
  const A weight = static_cast<A>(tile.grad_log_prob);
  TileBuffer<A> data_buffer, mean_buffer, log_sd_buffer, grad_buffer, result_buffer, grad_mean_buffer,
      grad_log_sd_buffer;
  const A* data = load(tile.data, rows, columns, data_buffer.values);
  const A* log_sd = load(tile.log_sd, rows, columns, log_sd_buffer.values);
  // `tile.result` takes the gradient of the data. Only of_log_prob needs the mean; only the others read `tile.grad`.
  const A* mean = of_log_prob ? load(tile.mean, rows, columns, mean_buffer.values) : data;
  const A* g = of_log_prob ? data : load(tile.grad, rows, columns, grad_buffer.values);
  A* grad_data = destination(tile.result, rows, columns, result_buffer.values);
  A* grad_mean = destination(tile.grad_mean, rows, columns, grad_mean_buffer.values);
  A* grad_log_sd = destination(tile.grad_log_sd, rows, columns, grad_log_sd_buffer.values);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A factor = exponential(gradient == Gradient::of_sample ? log_sd[i] : -log_sd[i]);
    if constexpr (of_log_prob) {
      const A standardized = (data[i] - mean[i]) * factor, in_mean = weight * standardized * factor;
      grad_data[i] = -in_mean;
      grad_mean[i] = in_mean;
      grad_log_sd[i] = weight * (standardized * standardized - A(1));
    } else {
      const A in_data = g[i] * factor;
      grad_log_sd[i] = gradient == Gradient::of_sample ? in_data * data[i] : -g[i] * data[i];
      grad_mean[i] = gradient == Gradient::of_sample ? g[i] : -in_data;
      grad_data[i] = in_data;
    }
  }
  store(grad_data, rows, columns, tile.result);
  store(grad_mean, rows, columns, tile.grad_mean);
  store(grad_log_sd, rows, columns, tile.grad_log_sd);
  return 0;
}

}  // namespace

template <typename T, typename H>
GaussianKernels<T, H> gaussian_kernels() {
  return {forward<T, H>,
          differentiate<T, H, Gradient::of_log_prob>,
          transform<T, H, Map::sample>,
          differentiate<T, H, Gradient::of_sample>,
          transform<T, H, Map::standardize>,
          differentiate<T, H, Gradient::of_standardize>};
}

template GaussianKernels<float, float> gaussian_kernels();
template GaussianKernels<float, BFloat16> gaussian_kernels();
template GaussianKernels<float, Half> gaussian_kernels();
template GaussianKernels<BFloat16, BFloat16> gaussian_kernels();
template GaussianKernels<Half, Half> gaussian_kernels();
template GaussianKernels<double, double> gaussian_kernels();

}  // namespace glow_kernels::GLOW_KERNELS_ISA
