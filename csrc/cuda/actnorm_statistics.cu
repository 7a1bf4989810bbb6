// Mean and variance of every channel on NVIDIA GPUs, computed per thread and combined as in Chan, Golub and LeVeque,
// "Updating formulae and a pairwise algorithm for computing sample variances", 1979. In double, since it runs only once
// per model.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "cuda/launch.h"
#include "cuda/sums.h"
#include "cuda/tile.h"
#include "glow_kernels/tensors.h"

namespace glow_kernels {
namespace {

// Rows per thread, unless that takes more than kBlocks blocks.
constexpr int64_t kSteps = 16, kBlocks = 1024;
// Elements that a thread loads at a time if they are contiguous.
constexpr int kElementsPerLoad = 4;

// Statistics of some elements of a channel.
struct Statistics {
  double count, mean, deviations;

  __device__ void add(const Statistics& other) {
    if (other.count == 0) return;
    const double total = count + other.count, share = other.count / total, difference = other.mean - mean;
    mean += difference * share;
    deviations += other.deviations + difference * difference * count * share;
    count = total;
  }
};

// Combines the statistics of `groups` x `width` threads, in that order, over the groups; group 0 has the result.
__device__ Statistics combine(const Statistics& mine, int groups, int width) {
  GLOW_KERNELS_SHARED(Statistics, all, [kThreads]);
  const int thread = static_cast<int>(threadIdx.x);
  all[thread] = mine;
  __syncthreads();
  for (int left = groups; left > 1;) {
    const int half = (left + 1) / 2;
    if (thread < (left - half) * width) all[thread].add(all[thread + half * width]);
    __syncthreads();
    left = half;
  }
  return all[thread];
}

// What is contiguous in memory and loaded at a time: a single element, positions of a channel, or channels.
enum class Contiguous { none, positions, channels };

// How the work is divided. A block has `width` neighbouring columns, each a channel or kElementsPerLoad contiguous
// ones, and one of `parts` parts of the rows of all samples, each a position or kElementsPerLoad contiguous ones. Its
// threads form `groups` groups that share the rows, with one thread for every column.
struct Partition {
  Contiguous contiguous;
  unsigned width, groups, parts, column_blocks;  // `column_blocks` blocks cover the columns
  unsigned columns, rows;
  int64_t batches_per_step;  // from one row of a thread to its next
  unsigned rows_per_step;

  Partition(const Planes& planes, const void* data, int64_t element_size) : contiguous(Contiguous::none) {
    const bool channels_inside = planes.positions == 1 || planes.position_stride != 1;
    const int64_t inner_stride = channels_inside ? planes.channel_stride : planes.position_stride;
    const int64_t outer_stride = channels_inside ? planes.position_stride : planes.channel_stride;
    const int64_t inner = channels_inside ? planes.channels : planes.positions;
    const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
    if (inner_stride == 1 && address % std::min<int64_t>(16, kElementsPerLoad * element_size) == 0 &&
        inner % kElementsPerLoad == 0 && outer_stride % kElementsPerLoad == 0 &&
        planes.batch_stride % kElementsPerLoad == 0) {
      contiguous = channels_inside ? Contiguous::channels : Contiguous::positions;
    }
    constexpr int64_t limit = int64_t{1} << 31;
    STD_TORCH_CHECK(planes.channels < limit && planes.positions < limit, "the tensor is too large");
    columns = static_cast<unsigned>(planes.channels) / (contiguous == Contiguous::channels ? kElementsPerLoad : 1);
    rows = static_cast<unsigned>(planes.positions) / (contiguous == Contiguous::positions ? kElementsPerLoad : 1);
    width = channels_inside ? std::clamp<unsigned>(columns, 1, kThreads) : 1;
    groups = kThreads / width;
    column_blocks = (columns + width - 1) / width;
    const int64_t per_block = groups * kSteps, total = planes.batches * rows;
    const int64_t most = std::clamp<int64_t>(kBlocks / std::max(1u, column_blocks), 1, kThreads);
    parts = static_cast<unsigned>(std::clamp<int64_t>((total + per_block - 1) / per_block, 1, most));
    batches_per_step = rows == 0 ? 0 : groups * parts / rows;
    rows_per_step = rows == 0 ? 0 : groups * parts % rows;
  }
};

template <typename T, Contiguous contiguous>
__global__ void __launch_bounds__(kThreads)
    parts_kernel(const T* x, Planes planes, Partition partition, Statistics* parts) {
  constexpr int elements = contiguous == Contiguous::none ? 1 : kElementsPerLoad;
  constexpr int channels = contiguous == Contiguous::channels ? elements : 1, positions = elements / channels;
  let_next_start();
  const unsigned part = blockIdx.x / partition.column_blocks, group = threadIdx.x / partition.width;
  const unsigned column = blockIdx.x % partition.column_blocks * partition.width + threadIdx.x % partition.width;
  int64_t seen = 0;
  // Deviations from the first element. As its own deviation from the mean is part of the sum of squares, the difference
  // below loses little.
  double first[channels]{}, sums[channels]{}, squares[channels]{};
  if (group < partition.groups && column < partition.columns && partition.rows > 0) {
    const unsigned start = part * partition.groups + group;
    int64_t batch = start / partition.rows;
    unsigned row = start % partition.rows;
    const int64_t row_stride = positions * planes.position_stride;
    const T* at = x + int64_t{column} * channels * planes.channel_stride + batch * planes.batch_stride;
    while (batch < planes.batches) {
      detail::Registers<T, elements> values;
      detail::copy<elements>(values.values, at + row * row_stride);
#pragma unroll
      for (int i = 0; i < elements; ++i) {
        const int channel = i % channels;
        const double value = static_cast<double>(values.values[i]);
        if (seen == 0 && i < channels) first[channel] = value;
        const double deviation = value - first[channel];
        sums[channel] += deviation;
        squares[channel] += deviation * deviation;
      }
      ++seen;
      batch += partition.batches_per_step;
      at += partition.batches_per_step * planes.batch_stride;
      row += partition.rows_per_step;
      if (row >= partition.rows) {
        row -= partition.rows;
        ++batch;
        at += planes.batch_stride;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < channels; ++i) {
    const double count = static_cast<double>(seen * positions);
    Statistics mine{0, 0, 0};
    if (seen > 0) {
      const double deviations = squares[i] - sums[i] * (sums[i] / count);
      mine = {count, first[i] + sums[i] / count, deviations < 0 ? 0 : deviations};  // keeps NaN
    }
    mine = combine(mine, static_cast<int>(partition.groups), static_cast<int>(partition.width));
    if (group == 0 && column < partition.columns)
      parts[(int64_t{column} * channels + i) * partition.parts + part] = mine;
  }
}

template <typename A>
__global__ void __launch_bounds__(kThreads) total_kernel(const Statistics* parts, int count, A* mean, A* variance) {
  wait_for_previous();
  Statistics mine{0, 0, 0};
  if (static_cast<int>(threadIdx.x) < count) mine = parts[int64_t{blockIdx.x} * count + threadIdx.x];
  mine = combine(mine, count, 1);
  if (threadIdx.x == 0) {
    mean[blockIdx.x] = static_cast<A>(mine.count > 0 ? mine.mean : NAN);
    variance[blockIdx.x] = static_cast<A>(mine.count > 0 ? mine.deviations / mine.count : NAN);
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_any) {
  STD_TORCH_CHECK(x_any.dim() >= 2, "x must be (B, C, *spatial)");
  const Launcher launch(x_any);
  const Tensor x = with_planes(x_any);
  const Planes planes = planes_of(x);
  const ScalarType type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor mean = empty_vector(planes.channels, type, x), variance = empty_vector(planes.channels, type, x);
  const Partition partition(planes, x.const_data_ptr(), x.element_size());
  const Tensor memory = empty_parts(3 * planes.channels * partition.parts, x);
  auto* parts = reinterpret_cast<Statistics*>(memory.mutable_data_ptr<double>());
  dispatch(x, [&]<typename T>() {
    using A = compute_t<T>;
    const auto kernel = partition.contiguous == Contiguous::channels    ? parts_kernel<T, Contiguous::channels>
                        : partition.contiguous == Contiguous::positions ? parts_kernel<T, Contiguous::positions>
                                                                        : parts_kernel<T, Contiguous::none>;
    launch(int64_t{partition.column_blocks} * partition.parts, kernel, x.const_data_ptr<T>(), planes, partition, parts);
    launch.next(planes.channels, kThreads, 0, total_kernel<A>, parts, static_cast<int>(partition.parts),
                mean.mutable_data_ptr<A>(), variance.mutable_data_ptr<A>());
  });
  return {mean, variance};
}

}  // namespace

GLOW_KERNELS_CUDA_LIBRARY(m) { m.impl("actnorm_statistics_forward_native", TORCH_BOX(&forward)); }

}  // namespace glow_kernels
