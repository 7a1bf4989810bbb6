// Bias and ReLU on NVIDIA GPUs. The mathematics is described in glow_kernels/ops/bias_relu.py.
//
// Each kernel reads and writes every element once. The backward computes its sums in the same pass: a thread has the
// same channels throughout, and accumulates over positions in registers. So does the copy that pads channels.
#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/sums.h"
#include "cuda/tile.h"
#include "glow_kernels/tensors.h"

namespace glow_kernels {
namespace {

// Resident blocks of the backward per multiprocessor: with 32 bytes in flight per thread, enough to hide the latency of
// memory.
constexpr int kBackwardBlocks = 6;

// T is the type of the data, H that of the bias.
template <typename T, typename H>
struct Forward {
  Tiling tiling;
  View<const T> x;
  View<const H> bias;
  View<T> y;
};

template <typename T, typename H>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Forward<T, H> views) {
  using A = compute_t<T>;
  constexpr int N = kVector<T, H>;
  const Tile tile = views.tiling[blockIdx.x];
  for_each_spot<N>(tile, [&](const Spot& spot) {
    const auto raw = fetch<N>(views.x, tile, spot);
    A bias[N], y[N];
    if (views.tiling.channels_inside) {
      load(views.bias, tile, spot, bias);
    } else {
      const A of_row = static_cast<A>(*views.bias.at(tile, spot, 0));
#pragma unroll
      for (int i = 0; i < N; ++i) bias[i] = of_row;
    }
    widen(raw, y);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A total = y[i] + bias[i];
      y[i] = total < A(0) ? A(0) : total;  // keeps NaN
    }
    store(views.y, tile, spot, y);
  });
}

// How the work of the backward is divided. A block has the channels of `width` neighbouring threads and one of `parts`
// parts of the rows, which are positions. If the positions are contiguous, it has a single channel, and a row is N
// positions. Its threads form `groups` groups, which take turns at the rows of all samples.
struct Partition {
  unsigned width, groups, column_blocks, rows, parts;
  unsigned batch_step, row_step;  // from a row of a group to its next

  // In `wanted` parts or, if that is less than 2, in the fewest with which no block has more turns than if there were
  // `blocks` of them.
  Partition(const Tiling& tiling, int vector, int64_t blocks, int64_t wanted) {
    const auto vectors = (tiling.inner + vector - 1) / vector;
    width = 1;
    while (tiling.channels_inside && width < 32 && width < vectors) width *= 2;
    groups = kThreads / width;
    column_blocks = tiling.channels_inside ? (vectors + width - 1) / width : tiling.outer;
    rows = tiling.channels_inside ? tiling.outer : vectors;
    const int64_t turns = (int64_t{tiling.batches} * rows + groups - 1) / groups;
    const int64_t most = std::max<int64_t>(1, blocks / std::max(1u, column_blocks)), each = (turns + most - 1) / most;
    parts = turns == 0 ? 1 : static_cast<unsigned>((turns + each - 1) / each);
    if (wanted > 1) parts = static_cast<unsigned>(wanted);
    batch_step = groups * parts / std::max(1u, rows);
    row_step = groups * parts % std::max(1u, rows);
  }
};

// What is done besides the sum over positions: ReLU's backward, nothing, or a copy to more channels in another type.
enum class Pass { kRelu, kSum, kPad };

template <typename T, typename H>
struct Backward {
  Tiling tiling;  // of what is written
  Partition partition;
  unsigned channels;      // of what is read
  View<const T> y, grad;  // y for ReLU
  View<H> result;         // null for a sum alone
  compute_t<T>* parts;    // (partition.parts, channels), the sums of the blocks; null if they are not wanted
};

template <Pass pass, typename T, typename H>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks) backward_kernel(const Backward<T, H> views) {
  let_next_start();
  using A = compute_t<T>;
  constexpr int N = kVector<T, H>;
  const Tiling& tiling = views.tiling;
  const Partition& partition = views.partition;
  const bool inside = tiling.channels_inside;
  const unsigned part = blockIdx.x / partition.column_blocks, block = blockIdx.x - part * partition.column_blocks;
  const unsigned group = threadIdx.x / partition.width, lane = threadIdx.x - group * partition.width;
  const unsigned channel = inside ? (block * partition.width + lane) * N : block;
  const unsigned channels = inside ? tiling.inner : tiling.outer;

  A total[N] = {};
  const unsigned start = part * partition.groups + group;
  unsigned batch = channel < channels && partition.rows > 0 ? start / partition.rows : tiling.batches;
  unsigned row = partition.rows > 0 ? start % partition.rows : 0;
  while (batch < tiling.batches) {
    const Tile sample{batch, 0, 0, tiling.outer, tiling.inner};
    Spot spot = inside ? Spot{row, channel, N} : Spot{channel, row * N, N};
    if (spot.column + N > tiling.inner) spot.count = static_cast<int>(tiling.inner - spot.column);
    A grad[N];
    if constexpr (pass == Pass::kRelu) {
      const auto raw_y = fetch<N>(views.y, sample, spot), raw_grad = fetch<N>(views.grad, sample, spot);
      A y[N];
      widen(raw_y, y);
      widen(raw_grad, grad);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (!(y[i] > A(0))) grad[i] = A(0);
      }
      store(views.result, sample, spot, grad);
    } else if constexpr (pass == Pass::kPad) {
      Spot from = spot;
      const int left = channel < views.channels ? static_cast<int>(views.channels - channel) : 0;
      if (inside ? left < from.count : left == 0) from.count = left;
      load(views.grad, sample, from, grad);
      store(views.result, sample, spot, grad);
    } else {
      load(views.grad, sample, spot, grad);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) total[i] += grad[i];
    batch += partition.batch_step;
    row += partition.row_step;
    if (row >= partition.rows) {
      row -= partition.rows;
      ++batch;
    }
  }

  if (pass == Pass::kPad && views.parts == nullptr) return;
  if (!inside) {
#pragma unroll
    for (int i = 1; i < N; ++i) total[0] += total[i];
    const A sum = block_sum(total[0]);
    if (threadIdx.x == 0 && channel < views.channels) views.parts[part * views.channels + channel] = sum;
    return;
  }
  GLOW_KERNELS_SHARED(A, sums, [N][kThreads]);
#pragma unroll
  for (int i = 0; i < N; ++i) sums[i][threadIdx.x] = total[i];
  for (unsigned half = partition.groups / 2; half > 0; half /= 2) {
    __syncthreads();
    if (group >= half) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i][threadIdx.x] += sums[i][threadIdx.x + half * partition.width];
  }
  if (group != 0) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (channel + i < views.channels) views.parts[part * views.channels + channel + i] = sums[i][threadIdx.x];
  }
}

Tensor forward(const Tensor& x_any, const Tensor& bias) {
  STD_TORCH_CHECK(x_any.dim() >= 2, "x must be (B, C, *spatial)");
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == x_any.size(1), "bias must be (C,)");
  const Launcher launch(x_any);
  const Tensor x = with_planes(x_any);
  Tensor y = empty_output(x_any);
  const Tiling tiling(planes_of(y));
  dispatch(x, bias, [&]<typename T, typename H>() {
    constexpr int N = kVector<T, H>;
    const Forward<T, H> views{tiling, readable<N, T>(x, tiling), per_channel<N, H>(bias, tiling),
                              writable<N, T>(y, tiling)};
    launch(tiling.size(), tiling.threads(N), 0, forward_kernel<T, H>, views);
  });
  return y;
}

// Returns the sums over all positions of what is read, (parts, C); with more than one part, those of the blocks.
template <Pass pass>
Tensor run_backward(const Launcher& launch, const Tensor& grad, const std::optional<Tensor>& y,
                    const std::optional<Tensor>& result, int64_t parts) {
  const Tensor& written = pass == Pass::kSum ? grad : *result;
  const Tiling tiling(planes_of(written));
  return dispatch(grad, written, [&]<typename T, typename H>() -> Tensor {
    using A = compute_t<T>;
    constexpr int N = kVector<T, H>;
    constexpr ScalarType type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    if constexpr (pass != Pass::kPad && !std::is_same_v<T, H>) {
      STD_TORCH_CHECK(false, "grad and y must be of one type");
    } else {
      const int64_t channels = grad.size(1), blocks = launch.resident_blocks(N * kThreads * sizeof(A), kBackwardBlocks);
      STD_TORCH_CHECK(parts * channels < int64_t{1} << 31, "parts are too many");
      const Partition partition(tiling, N, blocks, parts);
      Tensor sums = empty({parts, channels}, type, grad);
      std::optional<Tensor> more;
      if (parts == 1) more = empty({partition.parts, channels}, type, grad);
      const Backward<T, H> views{tiling,
                                 partition,
                                 static_cast<unsigned>(channels),
                                 readable<N, T>(y, tiling),
                                 readable<N, T>(grad, tiling),
                                 writable<N, H>(result, tiling),
                                 parts == 0 ? nullptr : (more ? *more : sums).mutable_data_ptr<A>()};
      launch(int64_t{partition.column_blocks} * partition.parts, backward_kernel<pass, T, H>, views);
      if (more) sum_columns<A>(launch, *more, partition.parts, sums);
      return sums;
    }
  });
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& y, int64_t parts) {
  STD_TORCH_CHECK(y.dim() >= 2 && grad.sizes().equals(y.sizes()) && grad.scalar_type() == y.scalar_type(),
                  "grad and y must be (B, C, *spatial), of one shape and type");
  STD_TORCH_CHECK(parts >= 1, "parts must be at least 1");
  const Launcher launch(y);
  Tensor grad_x = empty_output(y);
  Tensor sums = run_backward<Pass::kRelu>(launch, with_planes(grad), with_planes(y), grad_x, parts);
  return {grad_x, sums};
}

Tensor bias_backward(const Tensor& grad, int64_t parts) {
  STD_TORCH_CHECK(grad.dim() >= 2, "grad must be (B, C, *spatial)");
  STD_TORCH_CHECK(parts >= 1, "parts must be at least 1");
  return run_backward<Pass::kSum>(Launcher(grad), with_planes(grad), std::nullopt, std::nullopt, parts);
}

std::tuple<Tensor, Tensor> pad(const Tensor& x, int64_t channels, ScalarType dtype, bool channels_last, int64_t parts) {
  STD_TORCH_CHECK(x.dim() == 4 && channels >= x.size(1), "x must be (B, C, H, W) with no more channels than asked for");
  STD_TORCH_CHECK(parts >= 0, "parts must not be negative");
  const int64_t height = x.size(2), width = x.size(3);
  const int64_t sizes[] = {x.size(0), channels, height, width};
  const int64_t area = std::max<int64_t>(1, height) * std::max<int64_t>(1, width), row = std::max<int64_t>(1, width);
  const int64_t last[] = {area * channels, 1, row * channels, channels}, first[] = {channels * area, area, row, 1};
  Tensor padded = empty_strided(4, sizes, channels_last ? last : first, dtype, x);
  Tensor sums = run_backward<Pass::kPad>(Launcher(x), with_planes(x), std::nullopt, padded, parts);
  return {padded, sums};
}

}  // namespace

GLOW_KERNELS_CUDA_LIBRARY(m) {
  m.impl("bias_relu_forward_native", TORCH_BOX(&forward));
  m.impl("bias_relu_backward_native", TORCH_BOX(&backward));
  m.impl("bias_relu_bias_backward_native", TORCH_BOX(&bias_backward));
  m.impl("bias_relu_pad_native", TORCH_BOX(&pad));
}

}  // namespace glow_kernels
