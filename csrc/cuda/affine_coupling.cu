// The affine coupling on NVIDIA GPUs. The mathematics is described in glow_kernels/ops/affine_coupling.py.
//
// Direction, kind, order and layout are the same for all threads, so they are branches of only two kernels: one maps,
// the other computes gradients. Each reads and writes every element once, and has a variant for an h whose memory
// layout is not that of the data.
#include <tuple>
#include <vector>

#include "cuda/coupling_scales.h"
#include "cuda/launch.h"
#include "cuda/pair_exchange.h"
#include "cuda/sums.h"
#include "cuda/tile.h"
#include "glow_kernels/coupling_formulas.h"

namespace glow_kernels {
namespace {

using namespace coupling;  // NOLINT: coupling_scales.h is made for this

// Maximum number of threads of a block that maps N columns at a time.
template <int N>
constexpr int kMapThreads = N == 1 ? kMaxThreadsPerBlock : kThreads;
// Minimum number of resident blocks per multiprocessor: as many as leave a thread the registers for its elements of h.
template <typename H, int N>
constexpr int kMapBlocks = N == 1                      ? 1
                           : std::is_same_v<H, double> ? 3
                                                       : 4;
template <typename H, int N>
constexpr int kGradientBlocks = N == 1 || std::is_same_v<H, float> ? 4 : 3;
// The same for the gradients with an h of another layout, of which a thread holds less at a time.
template <int N>
constexpr int kExchangedBlocks = N == 4 ? 4 : 3;

// What a kernel reads and writes; T is the type of the data, H that of h.
template <typename T, typename H>
struct Views {
  using A = compute_t<T>;
  Tiling tiling;
  Options<A> options;
  View<const T> data;  // x or y
  Pair<const H> h;     // raw scale and shift
  View<const A> gain;
  View<const T> grad;  // of the result
  const A* grad_log_det;
  View<T> result;  // of a map, or x for the reversible backward
  View<T> grad_data;
  Pair<H> grad_h;
  SampleSums<A> log_det;
  double* grad_gain;  // (C, samples * tiles of positions): the contributions of tiles; null for none
};

// Writes the derivatives with respect to the learned gain to `in_gain`, unless that is null or there is no gain. It is
// in shared memory, so that kernels without a gain need no registers for it.
template <int N, typename T, typename H, typename A>
__device__ LogScales<A, N> log_scales(const Views<T, H>& views, const Tile& tile, const Spot& spot, const A (&u)[N],
                                      A* in_gain) {
  const Options<A>& options = views.options;
  LogScales<A, N> log_s;
  switch (options.kind) {
    case ScaleKind::sigmoid:
      map_scales<ScaleKind::sigmoid>(options, u, log_s);
      break;
    case ScaleKind::exp:
      map_scales<ScaleKind::exp>(options, u, log_s);
      break;
    case ScaleKind::tanh:
      map_scales<ScaleKind::tanh>(options, u, log_s);
      break;
    case ScaleKind::atan:
      map_scales<ScaleKind::atan>(options, u, log_s);
      break;
    case ScaleKind::softsign:
      map_scales<ScaleKind::softsign>(options, u, log_s);
      break;
    case ScaleKind::clip:
      map_scales<ScaleKind::clip>(options, u, log_s);
  }
  if (views.gain.data != nullptr) {
    A gain[N];
    load(views.gain, tile, spot, gain);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (in_gain != nullptr && i < spot.count) in_gain[i] = log_s.value[i];
      log_s.value[i] *= gain[i];
      log_s.in_u[i] *= gain[i];
    }
  }
  if (options.map.floor > A(0)) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Floored<A> floored = with_floor(log_s.value[i], options.map.floor);
      log_s.value[i] = floored.log_scale;
      log_s.in_u[i] *= floored.share;
      if (in_gain != nullptr && i < spot.count) in_gain[i] *= floored.share;
    }
  }
  return log_s;
}

// Writes the result at a spot, and adds log f to `total`.
template <int N, typename T, typename H, typename A>
__device__ void transform(const Views<T, H>& views, const Tile& tile, const Spot& spot,
                          const detail::Registers<T, N>& raw_data, const A (&u)[N], const A (&t)[N], A& total) {
  const LogScales<A, N> log_s = log_scales(views, tile, spot, u, static_cast<A*>(nullptr));
  A data[N];
  widen(raw_data, data);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const A log_factor = views.options.direction * log_s.value[i];
    if (i < spot.count) total += log_factor;
    data[i] = mapped(views.options.shift, data[i], exponential(log_factor), t[i]);
  }
  store(views.result, tile, spot, data);
}

template <int N, typename T, typename H>
__global__ void __launch_bounds__(kMapThreads<N>, kMapBlocks<H, N>) transform_kernel(const Views<T, H> views) {
  let_next_start();
  using A = compute_t<T>;
  const Tile tile = views.tiling[blockIdx.x];
  A total = 0;
  for_each_spot<N>(tile, [&](const Spot& spot) {
    const auto raw_data = fetch<N>(views.data, tile, spot);
    A u[N], t[N];
    load(views.h, tile, spot, u, t);
    transform(views, tile, spot, raw_data, u, t, total);
  });
  views.log_det.write(tile.batch, block_sum(total));
}

// The same with h exchanged through shared memory.
template <int N, typename T, typename H>
__global__ void __launch_bounds__(kThreads, kMapBlocks<H, N>)
    exchanged_transform_kernel(const Views<T, H> views, const PairExchange exchange, const PairRows<const H> h) {
  let_next_start();
  using A = compute_t<T>;
  GLOW_KERNELS_DYNAMIC_SHARED(H, pairs);
  const Tile tile = views.tiling[blockIdx.x];
  const Spot spot = exchange.spot<N>(tile);
  const auto raw_data = fetch<N>(views.data, tile, spot);
  load_pairs(exchange, h, tile, pairs);
  __syncthreads();
  A total = 0;
  if (spot.count > 0) {
    A u[N], t[N];
    load(exchange, pairs, tile, spot, u, t);
    transform(views, tile, spot, raw_data, u, t, total);
  }
  views.log_det.write(tile.batch, block_sum(total));
}

// Writes a tile's contribution to each of its channels: the sums over positions of `values`, rows x columns in shared
// memory. A channel is summed by a warp or, if there are many, by a thread.
template <typename A>
__device__ void sum_channels(const Tiling& tiling, const Tile& tile, unsigned threads, const A* values, double* parts) {
  const bool inside = tiling.channels_inside;
  const unsigned channels = inside ? tile.columns : tile.rows, positions = inside ? tile.rows : tile.columns;
  const unsigned channel_stride = inside ? 1 : tile.columns, position_stride = inside ? tile.columns : 1;
  // The tiles that share these channels are numbered sample after sample.
  const unsigned in_sample = blockIdx.x % tiling.per_sample;
  const unsigned tiles = inside ? tiling.row_tiles : tiling.column_tiles;
  const unsigned index = inside ? in_sample / tiling.column_tiles : in_sample % tiling.column_tiles;
  const int64_t per_channel = int64_t{tiling.batches} * tiles;
  parts += (inside ? tile.column : tile.row) * per_channel + tile.batch * tiles + index;

  const unsigned lanes = channels < threads ? 32 : 1, lane = threadIdx.x % lanes;
  for (unsigned channel = threadIdx.x / lanes; channel < channels; channel += threads / lanes) {
    A total = 0;
    for (unsigned position = lane; position < positions; position += lanes) {
      total += values[channel * channel_stride + position * position_stride];
    }
    if (lanes > 1) total = warp_sum(total);
    if (lane == 0) parts[channel * per_channel] = total;
  }
}

// Writes the gradient of the data at a spot and, if there is a result to write, x; u and t become their gradients.
template <int N, typename T, typename H, typename A>
__device__ void differentiate(const Views<T, H>& views, const Tile& tile, const Spot& spot,
                              const detail::Registers<T, N>& raw_data, const detail::Registers<T, N>& raw_grad,
                              A lambda, A (&u)[N], A (&t)[N], A* grad_gain) {
  const Shift shift = views.options.shift, back = views.options.back;
  const A direction = views.options.direction;
  A* const in_gain = views.grad_gain ? grad_gain + spot.row * tile.columns + spot.column : nullptr;
  const LogScales<A, N> log_s = log_scales(views, tile, spot, u, in_gain);
  A data[N], grad[N];
  widen(raw_data, data);
  widen(raw_grad, grad);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const A in_log_s = direction * grad_log_factor(shift, data[i], t[i], grad[i], lambda);
    u[i] = in_log_s * log_s.in_u[i];
    if (in_gain != nullptr && i < spot.count) in_gain[i] *= in_log_s;
  }
  if (views.result.data != nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) data[i] = mapped(back, data[i], exponential(-log_s.value[i]), t[i]);
    store(views.result, tile, spot, data);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    data[i] = grad[i] * exponential(direction * log_s.value[i]);
    t[i] = grad_shift(shift, grad[i], data[i]);
  }
  store(views.grad_data, tile, spot, data);
}

template <int N, typename T, typename H>
__global__ void __launch_bounds__(kThreads, kGradientBlocks<H, N>) gradient_kernel(const Views<T, H> views) {
  let_next_start();
  using A = compute_t<T>;
  GLOW_KERNELS_DYNAMIC_SHARED(A, grad_gain);  // of every element of the tile
  const Tile tile = views.tiling[blockIdx.x];
  const A lambda = views.grad_log_det[tile.batch];
  for_each_spot<N>(tile, [&](const Spot& spot) {
    const auto raw_data = fetch<N>(views.data, tile, spot), raw_grad = fetch<N>(views.grad, tile, spot);
    A u[N], t[N];
    load(views.h, tile, spot, u, t);
    differentiate(views, tile, spot, raw_data, raw_grad, lambda, u, t, grad_gain);
    store(views.grad_h, tile, spot, u, t);
  });
  if (views.grad_gain == nullptr) return;
  __syncthreads();
  sum_channels(views.tiling, tile, kThreads, grad_gain, views.grad_gain);
}

// The same with h and its gradient exchanged through shared memory, of which they take the first `gain_at` elements.
template <int N, typename T, typename H>
__global__ void __launch_bounds__(kThreads, kExchangedBlocks<N>)
    exchanged_gradient_kernel(const Views<T, H> views, const PairExchange exchange, const PairRows<const H> h,
                              const PairRows<H> grad_h, unsigned gain_at) {
  let_next_start();
  using A = compute_t<T>;
  GLOW_KERNELS_DYNAMIC_SHARED(H, pairs);
  A* const grad_gain = reinterpret_cast<A*>(pairs + gain_at);
  const Tile tile = views.tiling[blockIdx.x];
  const Spot spot = exchange.spot<N>(tile);
  const auto raw_data = fetch<N>(views.data, tile, spot), raw_grad = fetch<N>(views.grad, tile, spot);
  const A lambda = views.grad_log_det[tile.batch];
  load_pairs(exchange, h, tile, pairs);
  __syncthreads();
  if (spot.count > 0) {
    A u[N], t[N];
    load(exchange, pairs, tile, spot, u, t);
    differentiate(views, tile, spot, raw_data, raw_grad, lambda, u, t, grad_gain);
    store(exchange, pairs, tile, spot, u, t);  // no other thread reads this pair before the barrier
  }
  __syncthreads();
  store_pairs(exchange, grad_h, tile, pairs);
  if (views.grad_gain != nullptr) sum_channels(views.tiling, tile, blockDim.x, grad_gain, views.grad_gain);
}

struct Arguments {
  Tensor data, h;
  std::optional<Tensor> gain, grad = {}, grad_log_det = {}, result = {}, grad_data = {}, grad_h = {};
};

template <int N, typename T, typename H>
Views<T, H> views_of(const Arguments& arguments, const Tiling& tiling, const Options<compute_t<T>>& options,
                     const CouplingLayout& layout) {
  using A = compute_t<T>;
  const auto& lambda = arguments.grad_log_det;
  return {tiling,
          options,
          readable<N, T>(arguments.data, tiling),
          readable_pair<N, H>(arguments.h, tiling, layout.scale_first, layout.shift_first, layout.step),
          per_channel<N, A>(arguments.gain, tiling),
          readable<N, T>(arguments.grad, tiling),
          lambda ? lambda->const_data_ptr<A>() : nullptr,
          writable<N, T>(arguments.result, tiling),
          writable<N, T>(arguments.grad_data, tiling),
          writable_pair<N, H>(arguments.grad_h, tiling, layout.scale_first, layout.shift_first, layout.step),
          {},
          nullptr};
}

// Calls f.operator()<T, H, N, exchanged>() with the types of x and h and the columns that a thread takes at a time.
template <typename F>
auto dispatch_vectors(const Tensor& x, const Tensor& h, bool few, bool exchanged, const F& f) {
  return dispatch(x, h, [&]<typename T, typename H>() {
    if (exchanged) return f.template operator()<T, H, kVector<T>, true>();
    if (few) return f.template operator()<T, H, 1, false>();
    return f.template operator()<T, H, kVector<T, H>, false>();
  });
}

template <bool is_inverse>
std::tuple<Tensor, Tensor> transform(const Tensor& x, const Tensor& h, std::optional<Tensor> log_scale_gain, Name kind,
                                     std::vector<double> scale_parameters, Name layout, Name order) {
  check_coupling(x, h, log_scale_gain);
  const CouplingOptions options = parse_options(kind, scale_parameters, order);
  const CouplingLayout channels = parse_coupling_layout(layout, x.size(1));
  const Launcher launch(x);
  Tensor y = empty_output(x);
  Arguments arguments{with_planes(x), with_planes(h), log_scale_gain};
  arguments.result = y;
  const Planes planes = planes_of(y);
  const bool few = has_few_elements(launch, x), exchange = is_exchanged(launch, y, arguments.h);
  return dispatch_vectors(
      x, h, few, exchange, [&]<typename T, typename H, int N, bool exchanged>() -> std::tuple<Tensor, Tensor> {
        using A = compute_t<T>;
        const Tiling tiling = exchanged ? exchange_tiling(planes, N)
                                        : Tiling(planes, /*whole_samples=*/true, few ? kTileOfFew : kSmallTile);
        Views<T, H> views = views_of<N, T, H>(arguments, tiling, options_of<A>(options, is_inverse), channels);
        Tensor log_det = sum_samples<A>(launch, x, tiling.per_sample, [&](const SampleSums<A>& sums) {
          views.log_det = sums;
          if constexpr (exchanged) {
            const PairExchange how(tiling, channels, N);
            launch(tiling.size(), how.threads(tiling), exchanged_elements<H>(tiling) * sizeof(H),
                   exchanged_transform_kernel<N, T, H>, views, how,
                   how.rows_of(arguments.h.const_data_ptr<H>(), planes_of(arguments.h), tiling));
          } else {
            launch(tiling.size(), tiling.threads(N), 0, transform_kernel<N, T, H>, views);
          }
        });
        return {y, log_det};
      });
}

// Launches the kernel of the gradients, with shared memory for those of the gain if they are wanted.
template <int N, bool exchanged, typename T, typename H>
void launch_gradients(const Launcher& launch, const Views<T, H>& views, const Arguments& arguments,
                      const CouplingLayout& channels) {
  const Tiling& tiling = views.tiling;
  const int64_t of_gain = views.grad_gain ? int64_t{tiling.rows} * tiling.columns * sizeof(compute_t<T>) : 0;
  if constexpr (exchanged) {
    const PairExchange how(tiling, channels, N);
    const int64_t elements = exchanged_elements<H>(tiling);
    const Tensor& h = arguments.h;
    const Tensor& grad_h = *arguments.grad_h;
    launch(tiling.size(), how.threads(tiling), elements * sizeof(H) + of_gain, exchanged_gradient_kernel<N, T, H>,
           views, how, how.rows_of(h.const_data_ptr<H>(), planes_of(h), tiling),
           how.rows_of(grad_h.mutable_data_ptr<H>(), planes_of(grad_h), tiling), static_cast<unsigned>(elements));
  } else {
    launch(tiling.size(), kThreads, of_gain, gradient_kernel<N, T, H>, views);
  }
}

enum class Direction { backward, inverse_backward, reversible_backward, in_place_backward };

// In place is safe: a thread reads a spot before it writes there, and no other thread accesses that spot.
template <Direction direction>
auto gradients(const Tensor& grad, const Tensor& grad_log_det, const Tensor& y, const Tensor& h,
               std::optional<Tensor> log_scale_gain, Name kind, std::vector<double> scale_parameters, Name layout,
               Name order) {
  check_coupling(y, h, log_scale_gain);
  const CouplingOptions options = parse_options(kind, scale_parameters, order);
  const CouplingLayout channels = parse_coupling_layout(layout, y.size(1));
  const Launcher launch(y);
  constexpr bool in_place = direction == Direction::in_place_backward;
  STD_TORCH_CHECK(!in_place || (try_planes(y) && try_planes(grad) && grad.scalar_type() == y.scalar_type()),
                  "y and grad must be of one type, with positions at one stride, to be overwritten");
  Tensor grad_x = in_place ? grad : empty_output(y), grad_h = empty_output(h);
  Tensor grad_gain = empty_vector(log_scale_gain ? y.size(1) : 0, grad_log_det.scalar_type(), y);
  Arguments arguments{with_planes(y), with_planes(h), log_scale_gain, with_planes(grad), as_contiguous(grad_log_det)};
  arguments.grad_data = grad_x;
  arguments.grad_h = grad_h;
  if constexpr (direction == Direction::reversible_backward) arguments.result = empty_output(y);
  if constexpr (in_place) arguments.result = y;
  const Planes planes = planes_of(grad_x);
  const bool few = has_few_elements(launch, y);
  const bool exchange = is_exchanged(launch, grad_x, arguments.h) && is_exchanged(launch, grad_x, grad_h);
  dispatch_vectors(y, h, few, exchange, [&]<typename T, typename H, int N, bool exchanged>() {
    using A = compute_t<T>;
    constexpr bool is_inverse = direction == Direction::inverse_backward;
    const Tiling tiling =
        exchanged ? exchange_tiling(planes, N) : Tiling(planes, /*whole_samples=*/false, few ? kTileOfFew : kSmallTile);
    Views<T, H> views = views_of<N, T, H>(arguments, tiling, options_of<A>(options, is_inverse), channels);
    if (!log_scale_gain) return launch_gradients<N, exchanged>(launch, views, arguments, channels);
    const Tensor parts = empty_parts(y.size(1) * tiling.per_channel(), y);
    views.grad_gain = parts.mutable_data_ptr<double>();
    launch_gradients<N, exchanged>(launch, views, arguments, channels);
    sum_rows(launch, parts, y.size(1), tiling.per_channel(), grad_gain.mutable_data_ptr<A>());
  });
  if constexpr (direction == Direction::reversible_backward) {
    return std::tuple<Tensor, Tensor, Tensor, Tensor>{*arguments.result, grad_x, grad_h, grad_gain};
  } else {
    return std::tuple<Tensor, Tensor, Tensor>{grad_x, grad_h, grad_gain};
  }
}

Tensor in_place_backward(const Tensor& grad, const Tensor& grad_log_det, const Tensor& y, const Tensor& h, Name kind,
                         std::vector<double> scale_parameters, Name layout, Name order) {
  return std::get<1>(gradients<Direction::in_place_backward>(grad, grad_log_det, y, h, std::nullopt, kind,
                                                             std::move(scale_parameters), layout, order));
}

}  // namespace

GLOW_KERNELS_CUDA_LIBRARY(m) {
  m.impl("affine_coupling_forward_native", TORCH_BOX(&transform<false>));
  m.impl("affine_coupling_inverse_native", TORCH_BOX(&transform<true>));
  m.impl("affine_coupling_backward_native", TORCH_BOX(&gradients<Direction::backward>));
  m.impl("affine_coupling_inverse_backward_native", TORCH_BOX(&gradients<Direction::inverse_backward>));
  m.impl("affine_coupling_reversible_backward_native", TORCH_BOX(&gradients<Direction::reversible_backward>));
  m.impl("affine_coupling_in_place_backward_native", TORCH_BOX(&in_place_backward));
}

}  // namespace glow_kernels
