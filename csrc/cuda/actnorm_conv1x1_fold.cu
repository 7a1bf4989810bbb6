// Folding ActNorm and the 1x1 convolution into one matrix on NVIDIA GPUs: one launch for all steps, in double; one
// block per matrix if its inverse is needed, otherwise several. The mathematics is described in
// glow_kernels/ops/actnorm_conv1x1.py.
#include <cmath>
#include <optional>
#include <tuple>

#include "cuda/launch.h"
#include "cuda/small_matrix.h"
#include "cuda/steps.h"
#include "glow_kernels/tensors.h"

namespace glow_kernels {
namespace {

// What the kernels of the folding read and write; not all of them use every member.
struct Fold {
  unsigned n;
  double* workspace;                              // of the elimination
  double* product;                                // n x n for every step
  Input log_scale, bias, weight, weight_log_det;  // the last is log|det W|, or null
  Input grad_matrix, grad_shift, grad_log_det;
  Output matrix, shift, log_det;
  Output grad_log_scale, grad_bias, grad_weight, grad_weight_log_det;
};

// Writes exp(sign * log_scale) to shared memory.
__device__ void exponentials(const Fold& fold, double sign, double* scale) {
  for (unsigned i = threadIdx.x; i < fold.n; i += blockDim.x) scale[i] = std::exp(sign * fold.log_scale(fold.n, i));
}

// log_det = sign * (sum log_scale + log|det W|), by one warp.
__device__ void write_log_det(const Fold& fold, const Elimination& elimination, double sign) {
  if (threadIdx.x >= 32 || blockIdx.y != 0) return;
  const double sum = sum_over(fold.n, [&](unsigned i) { return fold.log_scale(fold.n, i); });
  const double weight_log_det = fold.weight_log_det.data != nullptr ? fold.weight_log_det(1, 0) : elimination.log_det();
  if (threadIdx.x == 0) fold.log_det(1, 0, sign * (sum + weight_log_det));
}

__global__ void __launch_bounds__(kThreads, 1) fold_kernel(const Fold fold) {
  GLOW_KERNELS_DYNAMIC_SHARED(double, scale);
  const unsigned n = fold.n, square = n * n, lane = threadIdx.x % 32;
  Elimination elimination(n, scale + n, fold.workspace);
  exponentials(fold, 1, scale);
  __syncthreads();
  for_each_row(n, [&](unsigned i) {
    double sum = 0;
    along_row(
        n, [&](unsigned j) { return fold.weight(square, i * n + j) * scale[j]; },
        [&](unsigned j, double element) {
          fold.matrix(square, i * n + j, element);
          sum += element * fold.bias(n, j);
        });
    sum = warp_sum(sum);
    if (lane == 0) fold.shift(n, i, sum);
  });
  if (fold.weight_log_det.data == nullptr && blockIdx.y == 0) {
    elimination.run([&](unsigned i, unsigned j) { return fold.weight(square, i * n + j); }, true);
  }
  write_log_det(fold, elimination, 1);
}

__global__ void __launch_bounds__(kThreads, 1) fold_inverse_kernel(const Fold fold) {
  GLOW_KERNELS_DYNAMIC_SHARED(double, scale);
  const unsigned n = fold.n, square = n * n, lane = threadIdx.x % 32;
  Elimination elimination(n, scale + n, fold.workspace);
  exponentials(fold, -1, scale);
  elimination.run([&](unsigned i, unsigned j) { return fold.weight(square, i * n + j); }, false);
  for_each_row(n, [&](unsigned i) {
    along_row(
        n, [&](unsigned j) { return elimination.inverse(i, j) * scale[i]; },
        [&](unsigned j, double element) { fold.matrix(square, i * n + j, element); });
    if (lane == 0) fold.shift(n, i, -fold.bias(n, i));
  });
  write_log_det(fold, elimination, -1);
}

__global__ void __launch_bounds__(kThreads, 1) fold_backward_kernel(const Fold fold) {
  GLOW_KERNELS_DYNAMIC_SHARED(double, scale);
  const unsigned n = fold.n, square = n * n, lane = threadIdx.x % 32;
  const double in_log_det = fold.grad_log_det(1, 0);
  const bool has_log_det = fold.weight_log_det.data != nullptr;
  Elimination elimination(n, scale + n, fold.workspace);
  exponentials(fold, 1, scale);
  __syncthreads();
  // The gradient of M, with the part that comes from v = M b.
  const auto total = [&](unsigned i, unsigned j) {
    return fold.grad_matrix(square, i * n + j) + fold.grad_shift(n, i) * fold.bias(n, j);
  };
  // A lane has a column, and every warp adds some of its rows.
  GLOW_KERNELS_SHARED(double, sums, [2][kThreads]);
  for (unsigned first = blockIdx.y * 32; first < n; first += gridDim.y * 32) {
    const unsigned j = first + lane;
    double in_log_scale = 0, in_bias = 0;
#pragma unroll 4
    for (unsigned i = threadIdx.x / 32; j < n && i < n; i += blockDim.x / 32) {
      const double weight = fold.weight(square, i * n + j);
      in_log_scale += weight * total(i, j);
      in_bias += weight * fold.grad_shift(n, i);
    }
    sums[0][threadIdx.x] = in_log_scale;
    sums[1][threadIdx.x] = in_bias;
    __syncthreads();
    if (threadIdx.x < 32 && j < n) {
      for (unsigned of_warp = lane + 32; of_warp < blockDim.x; of_warp += 32) {
        in_log_scale += sums[0][of_warp];
        in_bias += sums[1][of_warp];
      }
      fold.grad_log_scale(n, j, scale[j] * in_log_scale + in_log_det);
      fold.grad_bias(n, j, scale[j] * in_bias);
    }
    __syncthreads();
  }
  if (!has_log_det) elimination.run([&](unsigned i, unsigned j) { return fold.weight(square, i * n + j); }, false);
  for_each_row(n, [&](unsigned i) {
    along_row(
        n,
        [&](unsigned j) { return total(i, j) * scale[j] + (has_log_det ? 0 : in_log_det * elimination.inverse(j, i)); },
        [&](unsigned j, double element) { fold.grad_weight(square, i * n + j, element); });
  });
  if (has_log_det && threadIdx.x == 0 && blockIdx.y == 0) fold.grad_weight_log_det(1, 0, in_log_det);
}

// With N = diag(exp(-log_scale)) W^-1: dW = -(N^T dN) W^-T - dlog_det W^-T.
__global__ void __launch_bounds__(kThreads, 1) fold_inverse_backward_kernel(const Fold fold) {
  GLOW_KERNELS_DYNAMIC_SHARED(double, shared);
  const unsigned n = fold.n, square = n * n;
  const double in_log_det = fold.grad_log_det(1, 0);
  const bool has_log_det = fold.weight_log_det.data != nullptr;
  double* const scale = shared + kProductSize;
  Elimination elimination(n, scale + n, fold.workspace);
  exponentials(fold, -1, scale);
  elimination.run([&](unsigned i, unsigned j) { return fold.weight(square, i * n + j); }, false);
  for_each_row(n, [&](unsigned i) {
    const double sum =
        sum_over(n, [&](unsigned j) { return fold.grad_matrix(square, i * n + j) * elimination.inverse(i, j); });
    if (threadIdx.x % 32 != 0) return;
    fold.grad_log_scale(n, i, -scale[i] * sum - in_log_det);
    fold.grad_bias(n, i, -fold.grad_shift(n, i));
  });
  double* const inner = fold.product + int64_t{blockIdx.x} * square;
  product(
      n, shared, [&](unsigned i, unsigned k) { return elimination.inverse(k, i) * scale[k]; },
      [&](unsigned k, unsigned j) { return fold.grad_matrix(square, k * n + j); },
      [&](unsigned i, unsigned j, double sum) { inner[i * n + j] = sum; });
  __syncthreads();
  product(
      n, shared, [&](unsigned i, unsigned k) { return inner[i * n + k]; },
      [&](unsigned k, unsigned j) { return elimination.inverse(j, k); },
      [&](unsigned i, unsigned j, double sum) {
        fold.grad_weight(square, i * n + j, -sum - (has_log_det ? 0 : in_log_det * elimination.inverse(j, i)));
      });
  if (has_log_det && threadIdx.x == 0) fold.grad_weight_log_det(1, 0, -in_log_det);
}

struct Assembly {
  unsigned n;
  Input permutation, lower, upper, log_diagonal, sign;
  Input grad_weight, grad_log_det;
  Output weight, log_det;
  Output grad_lower, grad_upper, grad_log_diagonal;

  static int64_t shared_size(int64_t n) { return kProductSize + Spans::size(n) + n; }

  // Writes s to shared memory.
  __device__ void write_diagonal(double* diagonal) const {
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) diagonal[i] = sign(n, i) * std::exp(log_diagonal(n, i));
  }
  // L with its unit diagonal, and U + diag(s), ignoring elements outside the triangles.
  __device__ double unit_lower(unsigned i, unsigned j) const {
    return i > j ? lower(int64_t{n} * n, i * n + j) : i == j ? 1.0 : 0.0;
  }
  __device__ double full_upper(unsigned i, unsigned j, const double* diagonal) const {
    return i < j ? upper(int64_t{n} * n, i * n + j) : i == j ? diagonal[i] : 0.0;
  }
};

// W = (P L) (U + diag(s)); a layer has a tile.
__global__ void __launch_bounds__(kThreads, 1) lu_weight_kernel(const Assembly lu) {
  GLOW_KERNELS_DYNAMIC_SHARED(double, shared);
  const unsigned n = lu.n, square = n * n;
  double* const diagonal = shared + kProductSize;
  const MatrixTile tile(n, blockIdx.y);
  Spans spans(n, diagonal + n);
  lu.write_diagonal(diagonal);
  lu.permutation.visit(square, [&](const auto* p) { spans.find_in_rows(p, tile.first_row, tile.end_row()); });
  product(
      tile, 0, tile.end_column(), shared,
      [&](unsigned i, unsigned k) {
        return spans.sum(i, [&](unsigned m) { return lu.permutation(square, i * n + m) * lu.unit_lower(m, k); });
      },
      [&](unsigned k, unsigned j) { return lu.full_upper(k, j, diagonal); },
      [&](unsigned i, unsigned j, double sum) { lu.weight(square, i * n + j, sum); });
  if (threadIdx.x >= 32 || blockIdx.y != 0) return;
  const double sum = sum_over(n, [&](unsigned i) { return lu.log_diagonal(n, i); });
  if (threadIdx.x == 0) lu.log_det(1, 0, sum);
}

// With A = P^T dW and the diagonal in U: the lower triangle of A U^T and the upper one of L^T A. A layer has a tile of
// both, one of which can be all zeros.
__global__ void __launch_bounds__(kThreads, 1) lu_weight_backward_kernel(const Assembly lu) {
  GLOW_KERNELS_DYNAMIC_SHARED(double, shared);
  const unsigned n = lu.n, square = n * n;
  double* const diagonal = shared + kProductSize;
  const MatrixTile tile(n, blockIdx.y);
  Spans spans(n, diagonal + n);
  lu.write_diagonal(diagonal);
  lu.permutation.visit(square, [&](const auto* p) { spans.find_in_columns(p); });
  const auto permuted = [&](unsigned i, unsigned j) {
    return spans.sum(i,
                     [&](unsigned m) { return lu.permutation(square, m * n + i) * lu.grad_weight(square, m * n + j); });
  };
  product(
      tile, tile.first_row < tile.first_column ? n : tile.first_column, n, shared, permuted,
      [&](unsigned k, unsigned j) { return lu.full_upper(j, k, diagonal); },
      [&](unsigned i, unsigned j, double sum) { lu.grad_lower(square, i * n + j, i > j ? sum : 0); });
  product(
      tile, tile.first_row > tile.first_column ? n : tile.first_row, n, shared,
      [&](unsigned i, unsigned k) { return lu.unit_lower(k, i); }, permuted,
      [&](unsigned i, unsigned j, double sum) {
        lu.grad_upper(square, i * n + j, i < j ? sum : 0);
        if (i == j) lu.grad_log_diagonal(n, i, sum * diagonal[i] + lu.grad_log_det(1, 0));
      });
}

std::tuple<Tensor, Tensor> lu_weight(const Tensor& permutation, const Tensor& lower, const Tensor& upper,
                                     const Tensor& log_diagonal, const Tensor& sign) {
  const Launcher launch(lower);
  Steps steps(lower);
  const int64_t n = steps.n();
  Tensor weight = steps.empty(lower.sizes()), log_det = steps.empty_scalars();
  Assembly lu{};
  lu.n = steps.n();
  lu.permutation = steps.input(permutation, n * n);
  lu.lower = steps.input(lower, n * n);
  lu.upper = steps.input(upper, n * n);
  lu.log_diagonal = steps.input(log_diagonal, n);
  lu.sign = steps.input(sign, n);
  lu.weight = steps.output(weight);
  lu.log_det = steps.output(log_det);
  steps.run(launch, lu_weight_kernel, lu, Assembly::shared_size(n), false, MatrixTile::count(lu.n));
  return {weight, log_det};
}

std::tuple<Tensor, Tensor, Tensor> lu_weight_backward(const Tensor& grad_weight, const Tensor& grad_log_det,
                                                      const Tensor& permutation, const Tensor& lower,
                                                      const Tensor& upper, const Tensor& log_diagonal,
                                                      const Tensor& sign) {
  const Launcher launch(lower);
  Steps steps(lower);
  const int64_t n = steps.n();
  Tensor grad_lower = steps.empty(lower.sizes()), grad_upper = steps.empty(upper.sizes());
  Tensor grad_log_diagonal = steps.empty(log_diagonal.sizes());
  Assembly lu{};
  lu.n = steps.n();
  lu.permutation = steps.input(permutation, n * n);
  lu.lower = steps.input(lower, n * n);
  lu.upper = steps.input(upper, n * n);
  lu.log_diagonal = steps.input(log_diagonal, n);
  lu.sign = steps.input(sign, n);
  lu.grad_weight = steps.input(grad_weight, n * n);
  lu.grad_log_det = steps.input(grad_log_det, 1);
  lu.grad_lower = steps.output(grad_lower);
  lu.grad_upper = steps.output(grad_upper);
  lu.grad_log_diagonal = steps.output(grad_log_diagonal);
  steps.run(launch, lu_weight_backward_kernel, lu, Assembly::shared_size(n), false, MatrixTile::count(lu.n));
  return {grad_lower, grad_upper, grad_log_diagonal};
}

// The number of blocks that fold a matrix if its inverse is not needed.
int64_t fold_layers(int64_t n) { return (n + 31) / 32; }

Fold fold_of(Steps& steps, const Tensor& log_scale, const Tensor& bias, const Tensor& weight,
             const std::optional<Tensor>& weight_log_det) {
  const int64_t n = steps.n();
  Fold fold{};
  fold.n = steps.n();
  fold.log_scale = steps.input(log_scale, n);
  fold.bias = steps.input(bias, n);
  fold.weight = steps.input(weight, n * n);
  if (weight_log_det) fold.weight_log_det = steps.input(*weight_log_det, 1);
  return fold;
}

template <bool inverse>
std::tuple<Tensor, Tensor, Tensor> fold(const Tensor& log_scale, const Tensor& bias, const Tensor& weight,
                                        std::optional<Tensor> weight_log_det) {
  const Launcher launch(weight);
  Steps steps(weight);
  Tensor matrix = steps.empty(weight.sizes()), shift = steps.empty(bias.sizes()), log_det = steps.empty_scalars();
  Fold fold = fold_of(steps, log_scale, bias, weight, weight_log_det);
  const bool eliminates = inverse || !weight_log_det;
  if (eliminates) fold.workspace = steps.workspace();
  fold.matrix = steps.output(matrix);
  fold.shift = steps.output(shift);
  fold.log_det = steps.output(log_det);
  steps.run(launch, inverse ? fold_inverse_kernel : fold_kernel, fold, steps.n(), eliminates,
            inverse ? 1 : fold_layers(steps.n()));
  if (inverse) {
    if (weight.scalar_type() == ScalarType::Double) {
      check_invertible<double>(matrix, steps.n());
    } else {
      check_invertible<float>(matrix, steps.n());
    }
  }
  return {matrix, shift, log_det};
}

template <bool inverse>
std::tuple<Tensor, Tensor, Tensor, Tensor> fold_backward(const Tensor& grad_matrix, const Tensor& grad_shift,
                                                         const Tensor& grad_log_det, const Tensor& log_scale,
                                                         const Tensor& bias, const Tensor& weight,
                                                         std::optional<Tensor> weight_log_det) {
  const Launcher launch(weight);
  Steps steps(weight);
  const int64_t n = steps.n();
  Tensor grad_log_scale = steps.empty(log_scale.sizes()), grad_bias = steps.empty(bias.sizes());
  Tensor grad_weight = steps.empty(weight.sizes());
  Tensor grad_weight_log_det =
      weight_log_det ? steps.empty(weight_log_det->sizes()) : empty_vector(0, weight.scalar_type(), weight);
  Fold fold = fold_of(steps, log_scale, bias, weight, weight_log_det);
  const bool eliminates = inverse || !weight_log_det;
  if (eliminates) fold.workspace = steps.workspace();
  if (inverse) fold.product = steps.allocate_matrices();
  fold.grad_matrix = steps.input(grad_matrix, n * n);
  fold.grad_shift = steps.input(grad_shift, n);
  fold.grad_log_det = steps.input(grad_log_det, 1);
  fold.grad_log_scale = steps.output(grad_log_scale);
  fold.grad_bias = steps.output(grad_bias);
  fold.grad_weight = steps.output(grad_weight);
  if (weight_log_det) fold.grad_weight_log_det = steps.output(grad_weight_log_det);
  steps.run(launch, inverse ? fold_inverse_backward_kernel : fold_backward_kernel, fold,
            n + (inverse ? kProductSize : 0), eliminates, eliminates ? 1 : fold_layers(n));
  return {grad_log_scale, grad_bias, grad_weight, grad_weight_log_det};
}

}  // namespace

GLOW_KERNELS_CUDA_LIBRARY(m) {
  m.impl("actnorm_conv1x1_lu_weight_native", TORCH_BOX(&lu_weight));
  m.impl("actnorm_conv1x1_lu_weight_backward_native", TORCH_BOX(&lu_weight_backward));
  m.impl("actnorm_conv1x1_fold_native", TORCH_BOX(&fold<false>));
  m.impl("actnorm_conv1x1_fold_backward_native", TORCH_BOX(&fold_backward<false>));
  m.impl("actnorm_conv1x1_fold_inverse_native", TORCH_BOX(&fold<true>));
  m.impl("actnorm_conv1x1_fold_inverse_backward_native", TORCH_BOX(&fold_backward<true>));
}

}  // namespace glow_kernels
