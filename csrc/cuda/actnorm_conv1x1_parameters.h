// What the kernels of the linear map compute from the parameters of a step: M and v, which every block computes for
// itself, and what needs an elimination, by one block that the others do not wait for. All C x C work is in double.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/actnorm_conv1x1_tile.h"
#include "cuda/small_matrix.h"

namespace glow_kernels::linear {

template <typename A>
struct Parameters {
  const A *log_scale, *bias, *weight;
  const A* weight_log_det;  // log|det W|, or null
};

// Bytes of shared memory that fold_matrix() needs.
inline int64_t fold_bytes(int64_t channels) { return 2 * 8 * channels; }

// Starts to copy W to where M will be; these copies are a group.
template <typename A>
__device__ void start_fold(const Parameters<A>& parameters, const Frame& frame, A* matrix) {
  const A* const no_shift = nullptr;
  load_matrix(parameters.weight, no_shift, frame, matrix);
  commit_copies();
}

// Turns W, once its copies have been waited for, into M in place and writes v after it, by exactly the operations of
// fold_kernel. All threads must call it, with a barrier before other threads read what it writes.
template <typename A>
__device__ void fold_matrix(const Parameters<A>& parameters, const Frame& frame, double* scale, A* matrix) {
  const unsigned n = frame.channels;
  A* const shift = matrix + frame.shift();
  double* const bias = scale + n;
  for (unsigned j = threadIdx.x; j < n; j += blockDim.x) {
    scale[j] = std::exp(static_cast<double>(parameters.log_scale[j]));
    bias[j] = parameters.bias[j];
  }
  for (unsigned i = n + threadIdx.x; i < frame.side; i += blockDim.x) shift[i] = 0;
  __syncthreads();
  for_each_row(n, [&](unsigned i) {
    A* const row = matrix + i * frame.row_stride;
    const double sum = sum_over(n, [&](unsigned j) {
      const double element = static_cast<double>(row[j]) * scale[j];
      row[j] = static_cast<A>(element);
      return element * bias[j];
    });
    if (threadIdx.x % 32 == 0) shift[i] = static_cast<A>(sum);
  });
}

static_assert(kMaxChannels<float> <= WarpElimination::kMaxSize);

// Writes log_det of every sample. By one block.
template <typename A>
__device__ void write_log_det(const Parameters<A>& parameters, unsigned n, double* shared, int64_t batches,
                              int64_t positions, A* log_det) {
  Elimination elimination(n, shared, nullptr);
  if (parameters.weight_log_det == nullptr) {
    elimination.run_small([&](unsigned i, unsigned j) { return static_cast<double>(parameters.weight[i * n + j]); },
                          true);
  }
  const double scales = sum_over(n, [&](unsigned i) { return static_cast<double>(parameters.log_scale[i]); });
  const double weight_log_det =
      parameters.weight_log_det != nullptr ? static_cast<double>(*parameters.weight_log_det) : elimination.log_det();
  const auto of_position = static_cast<A>(scales + weight_log_det);
  const auto of_sample = static_cast<A>(static_cast<double>(of_position) * static_cast<double>(positions));
  for (int64_t batch = threadIdx.x; batch < batches; batch += blockDim.x) log_det[batch] = of_sample;
}

// Writes W^-1, n x n. By one block.
template <typename A>
__device__ void write_inverse(const Parameters<A>& parameters, unsigned n, double* shared, double* inverse) {
  Elimination elimination(n, shared, nullptr);
  elimination.run_small([&](unsigned i, unsigned j) { return static_cast<double>(parameters.weight[i * n + j]); },
                        false);
  for_each_row(n, [&](unsigned i) {
    for (unsigned j = threadIdx.x % 32; j < n; j += 32) inverse[i * n + j] = elimination.inverse(i, j);
  });
}

}  // namespace glow_kernels::linear
