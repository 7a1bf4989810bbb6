// Mean and variance of every channel on NVIDIA GPUs: those of what the threads have seen, combined as in Chan, Golub
// and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979. In double, since it
// runs once in the life of a model.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "cuda/launch.h"
#include "cuda/sums.h"
#include "glow_kernels/tensors.h"

namespace glow_kernels {
namespace {

// Elements that a thread looks at, and blocks of the whole launch, at least and at most.
constexpr int64_t kElements = 16, kBlocks = 1024;

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

// Combines those of `groups` x `width` threads, group after group, over the groups; the result is with group 0.
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

// How the work is cut: a block looks at `width` neighbouring channels and at one of `parts` parts of the positions of
// all samples. Its threads are `groups` groups that share the positions, with one thread for every channel.
struct Cut {
  int64_t channels, width, groups, parts;

  explicit Cut(const Planes& planes) : channels(planes.channels) {
    const bool channels_inside = planes.positions == 1 || planes.position_stride != 1;
    width = channels_inside ? std::clamp<int64_t>(channels, 1, kThreads) : 1;
    groups = kThreads / width;
    const int64_t per_block = groups * kElements, total = planes.batches * planes.positions;
    const int64_t most = std::clamp<int64_t>(kBlocks / std::max<int64_t>(1, across()), 1, kThreads);
    parts = std::clamp<int64_t>((total + per_block - 1) / per_block, 1, most);
  }
  __host__ __device__ int64_t across() const { return (channels + width - 1) / width; }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) parts_kernel(const T* x, Planes planes, Cut cut, Statistics* parts) {
  const int64_t part = blockIdx.x / cut.across(), first_channel = blockIdx.x % cut.across() * cut.width;
  const int64_t group = threadIdx.x / cut.width, channel = first_channel + threadIdx.x % cut.width;
  const int64_t stride = cut.groups * cut.parts, start = part * cut.groups + group;
  Statistics mine{0, 0, 0};
  if (group < cut.groups && channel < cut.channels && start < planes.batches * planes.positions) {
    const T* data = x + channel * planes.channel_stride;
    int64_t batch = start / planes.positions, position = start % planes.positions;
    const int64_t batches = stride / planes.positions, positions = stride % planes.positions;
    // Deviations from the first element, which is never further from the mean than the root of all squares together:
    // so the difference below loses little.
    const double first = static_cast<double>(data[batch * planes.batch_stride + position * planes.position_stride]);
    double sum = 0, squares = 0;
    while (batch < planes.batches) {
      const T value = data[batch * planes.batch_stride + position * planes.position_stride];
      const double deviation = static_cast<double>(value) - first;
      sum += deviation;
      squares += deviation * deviation;
      mine.count += 1;
      batch += batches;
      position += positions;
      if (position >= planes.positions) {
        position -= planes.positions;
        ++batch;
      }
    }
    const double deviations = squares - sum * (sum / mine.count);
    mine.mean = first + sum / mine.count;
    mine.deviations = deviations < 0 ? 0 : deviations;  // NaN stays
  }
  mine = combine(mine, static_cast<int>(cut.groups), static_cast<int>(cut.width));
  if (group == 0 && channel < cut.channels) parts[channel * cut.parts + part] = mine;
}

template <typename A>
__global__ void __launch_bounds__(kThreads) total_kernel(const Statistics* parts, int count, A* mean, A* variance) {
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
  const Cut cut(planes);
  const Tensor memory = empty_parts(3 * planes.channels * cut.parts, x);
  auto* parts = reinterpret_cast<Statistics*>(memory.mutable_data_ptr<double>());
  dispatch(x, [&]<typename T>() {
    using A = compute_t<T>;
    launch(cut.across() * cut.parts, parts_kernel<T>, x.const_data_ptr<T>(), planes, cut, parts);
    launch(planes.channels, total_kernel<A>, parts, static_cast<int>(cut.parts), mean.mutable_data_ptr<A>(),
           variance.mutable_data_ptr<A>());
  });
  return {mean, variance};
}

}  // namespace

GLOW_KERNELS_CUDA_LIBRARY(m) { m.impl("actnorm_statistics_forward_native", TORCH_BOX(&forward)); }

}  // namespace glow_kernels
