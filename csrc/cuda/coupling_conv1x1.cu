// The coupling of a step and the linear map of the next on NVIDIA GPUs, for up to 64 channels. The mathematics is
// described in glow_kernels/ops/coupling_conv1x1.py.
//
// A block has a tile of positions of one sample in shared memory, as in actnorm_conv1x1.cu, and applies the coupling
// there before the product reads it. The backward has three tiles: z, which becomes x; the gradient g; and M^T g, which
// becomes the gradient of z.
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/actnorm_conv1x1_products.h"
#include "cuda/actnorm_conv1x1_tile.h"
#include "cuda/coupling_conv1x1_tile.h"
#include "cuda/coupling_scales.h"
#include "cuda/launch.h"
#include "cuda/sums.h"
#include "cuda/tile.h"

namespace glow_kernels {
namespace {

using namespace coupling;  // NOLINT: these headers are made for this
using namespace linear;    // NOLINT

// The backward's maximum threads per block, and its blocks per multiprocessor, which registers limit.
template <unsigned R>
constexpr int kBackwardThreads = R == kFewRows ? kThreads : kMaxThreads;
template <unsigned R>
constexpr int kBackwardBlocks = R == kFewRows ? 2 : 3;

// log s of a spot and its derivative with respect to u. The switch repeats that of affine_coupling.cu: with a function
// that both call, some kernels there spill registers.
template <typename A>
__device__ LogScales<A, kSpotSize> log_scales(const Options<A>& options, const A (&u)[kSpotSize]) {
  LogScales<A, kSpotSize> log_s;
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
  if (options.map.floor > A(0)) {
#pragma unroll
    for (int i = 0; i < kSpotSize; ++i) {
      const Floored<A> floored = with_floor(log_s.value[i], options.map.floor);
      log_s.value[i] = floored.log_scale;
      log_s.in_u[i] *= floored.share;
    }
  }
  return log_s;
}

// All matrices are C x C, row-major.
template <typename T, typename H, unsigned R>
struct Forward {
  using A = compute_t<T>;
  SampleWork<A, R> work;
  Options<A> options;
  Positions<const T> z;
  Conditioning<const H> h;
  const A *matrix, *shift;
  Positions<T> result;
  SampleSums<A> log_det;
};

template <typename T, typename H, unsigned R>
__global__ void __launch_bounds__(kThreads, R == kFewRows ? 3 : 2) forward_kernel(const Forward<T, H, R> arguments) {
  let_next_start();
  using A = compute_t<T>;
  using W = SampleWork<A, R>;
  const W& work = arguments.work;
  const Conditioning<const H>& h = arguments.h;
  GLOW_KERNELS_DYNAMIC_SHARED(A, x);
  A* const matrix = x + work.tile_size();
  const Span span = work.span(blockIdx.x);
  load_matrix(arguments.matrix, arguments.shift, work.frame(), matrix);
  load_tile(arguments.z, work, span, x);
  Reader<H> reader(h, span);
  wait_for_copies();
  __syncthreads();
  A total = 0;
  reader.for_each([&](const Spot& spot, const A(&u)[kSpotSize], const A(&t)[kSpotSize]) {
    const LogScales<A, kSpotSize> log_s = log_scales(arguments.options, u);
    A* const place = x + index_of(work, h, spot);
    auto data = read_spot(work, h, spot, place);
#pragma unroll
    for (int i = 0; i < kSpotSize; ++i) {
      if (i < spot.count) total += log_s.value[i];
      data.values[i] = mapped(arguments.options.shift, data.values[i], exponential(log_s.value[i]), t[i]);
    }
    write_spot(work, h, spot, data, place);
  });
  // After the barrier in this sum the tile is complete, too.
  arguments.log_det.write(span.batch, block_sum(total));
  typename W::Values values;
  multiply<false>(work, matrix, x, values);
  store_tile(arguments.result, work, span, values, x);
}

template <typename T, typename H, unsigned R>
struct Backward {
  using A = compute_t<T>;
  SampleWork<A, R> work;
  Options<A> options;
  unsigned tiles;
  Positions<const T> grad, z;
  Conditioning<const H> h;
  const A *matrix, *grad_log_det;
  Positions<T> grad_z;
  Pair<H> grad_h;
  A* parts;  // sum g x^T and sum g of every block
};

// A block processes every gridDim.x-th tile.
template <typename T, typename H, unsigned R>
__global__ void __launch_bounds__(kBackwardThreads<R>, 2) backward_kernel(const Backward<T, H, R> arguments) {
  let_next_start();
  using A = compute_t<T>;
  using W = SampleWork<A, R>;
  const W& work = arguments.work;
  const Conditioning<const H>& h = arguments.h;
  const Shift shift = arguments.options.shift;
  GLOW_KERNELS_DYNAMIC_SHARED(A, x);
  A *const g = x + work.tile_size(), *const dx = g + work.tile_size(), *const matrix = dx + work.tile_size();
  const A* const no_shift = nullptr;
  OuterSum<W> sums(work);
  load_matrix(arguments.matrix, no_shift, work.frame(), matrix);
  for (unsigned index = blockIdx.x; index < arguments.tiles; index += gridDim.x) {
    const Span span = work.span(index);
#pragma unroll 1  // the registers hold one tile in flight
    for (int input = 0; input < 2; ++input) {
      load_tile(input == 0 ? arguments.z : arguments.grad, work, span, input == 0 ? x : g);
    }
    Reader<H> reader(h, span);
    const A lambda = arguments.grad_log_det[span.batch];
    wait_for_copies();
    __syncthreads();
    typename W::Values values;
    multiply<true>(work, matrix, g, values);
    put_tile(work, values, dx);
    // The product leaves no registers for what was prefetched.
    if constexpr (!W::kSmall) reader = Reader<H>(h, span);
    __syncthreads();
    reader.for_each([&](const Spot& spot, A(&u)[kSpotSize], A(&t)[kSpotSize]) {
      const LogScales<A, kSpotSize> log_s = log_scales(arguments.options, u);
      const unsigned place = index_of(work, h, spot);
      auto data = read_spot(work, h, spot, x + place), in_data = read_spot(work, h, spot, dx + place);
#pragma unroll
      for (int i = 0; i < kSpotSize; ++i) {
        const A s = exponential(log_s.value[i]), in_result = in_data.values[i];
        data.values[i] = mapped(shift, data.values[i], s, t[i]);
        u[i] = grad_log_factor(shift, data.values[i], t[i], in_result, lambda) * log_s.in_u[i];
        in_data.values[i] = in_result * s;
        t[i] = grad_shift(shift, in_result, in_data.values[i]);
      }
      write_spot(work, h, spot, data, x + place);
      write_spot(work, h, spot, in_data, dx + place);
      store(arguments.grad_h, reader.tile(), spot, u, t);
    });
    __syncthreads();
    sums.add(work, g, x);
    write_tile(arguments.grad_z, work, span, dx);
    __syncthreads();
  }
  sums.write(work, x, arguments.parts + int64_t{blockIdx.x} * work.channels * (work.channels + 1));
}

// Checks the arguments, and returns the number of channels that are transformed.
int64_t check(const Tensor& z, const Tensor& h, const Tensor& matrix) {
  STD_TORCH_CHECK(z.dim() >= 2 && h.dim() == z.dim(), "z and h must be (B, C, *spatial)");
  const int64_t channels = z.size(1), transformed = h.size(1) / 2;
  STD_TORCH_CHECK(channels <= kMaxChannels<float>, "the native backend takes at most ", kMaxChannels<float>,
                  " channels on a GPU, got ", channels);
  STD_TORCH_CHECK(h.size(1) % 2 == 0 && transformed >= 1 && transformed < channels,
                  "h must have two channels for each that is transformed: some of those of z, not all");
  for (int64_t dimension = 0; dimension < z.dim(); ++dimension) {
    STD_TORCH_CHECK(dimension == 1 || h.size(dimension) == z.size(dimension),
                    "h must have the shape of z but for dim 1");
  }
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == channels && matrix.size(1) == channels,
                  "matrix must be (C, C)");
  return transformed;
}

// How threads traverse scales and shifts in the memory layout of `like`.
struct ScalesAndShifts {
  Tiling tiling;
  CouplingLayout layout;
  unsigned first, channels;

  ScalesAndShifts(const Tensor& like, int64_t all_channels, const std::string& layout_name)
      : tiling(half_of(planes_of(like))),
        layout(parse_coupling_layout(layout_name, like.size(1) / 2)),
        first(static_cast<unsigned>(all_channels - like.size(1) / 2)),
        channels(static_cast<unsigned>(like.size(1) / 2)) {}

  template <typename H>
  Conditioning<const H> of(const Tensor& h) const {
    return {readable_pair<kSpotSize, H>(h, tiling, layout.scale_first, layout.shift_first, layout.step), first,
            channels, tiling.channels_inside};
  }
  template <typename H>
  Pair<H> written(const Tensor& h) const {
    return writable_pair<kSpotSize, H>(h, tiling, layout.scale_first, layout.shift_first, layout.step);
  }

 private:
  static Planes half_of(Planes planes) {
    planes.channels /= 2;
    return planes;
  }
};

// Calls f.operator()<T, H, R>(work) with the types of z and h, and with few channels per thread if many would leave a
// multiprocessor fewer than two blocks, leave threads without positions, or not fit into shared memory.
template <typename F>
auto dispatch_work(const Launcher& launch, const Tensor& z, const Tensor& h, int64_t tile_count, const F& f) {
  return dispatch_single(z, h, [&]<typename T, typename H>() {
    using A = compute_t<T>;
    const int64_t transformed = h.size(1) / 2, multiprocessors = launch.multiprocessors();
    const SampleWork<A, kManyRows> large(z, transformed, tile_count, multiprocessors);
    const bool fits = large.shared_bytes(tile_count, 1) <= kMaxSharedBytes;
    if (fits && large.is_filled() && large.tiles() >= 2 * multiprocessors) {
      return f.template operator()<T, H, kManyRows>(large);
    }
    return f.template operator()<T, H, kFewRows>(SampleWork<A, kFewRows>(z, transformed, tile_count, multiprocessors));
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& z_any, const Tensor& h_any, const Tensor& matrix_any,
                                   const Tensor& shift_any, Name kind, std::vector<double> scale_parameters,
                                   Name layout, Name order) {
  check(z_any, h_any, matrix_any);
  const CouplingOptions options = parse_options(kind, scale_parameters, order);
  const Launcher launch(z_any);
  const Tensor z = with_planes(z_any), h = with_planes(h_any);
  const Tensor matrix = as_contiguous(matrix_any), shift = as_contiguous(shift_any);
  const ScalesAndShifts halves(h, z.size(1), layout);
  Tensor result = empty_output(z_any);
  return dispatch_work(
      launch, z, h, 1, [&]<typename T, typename H, unsigned R>(const SampleWork<compute_t<T>, R>& work) {
        using A = compute_t<T>;
        Forward<T, H, R> arguments{work,
                                   options_of<A>(options, false),
                                   readable<T>(z),
                                   halves.of<H>(h),
                                   matrix.const_data_ptr<A>(),
                                   shift.const_data_ptr<A>(),
                                   writable<T>(result),
                                   {}};
        Tensor log_det = sum_samples<A>(launch, z, work.in_sample, [&](const SampleSums<A>& sums) {
          arguments.log_det = sums;
          launch(work.tiles(), work.threads(), work.shared_bytes(1, 1), forward_kernel<T, H, R>, arguments);
        });
        return std::tuple<Tensor, Tensor>{result, log_det};
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_any, const Tensor& grad_log_det_any,
                                                    const Tensor& z_any, const Tensor& h_any, const Tensor& matrix_any,
                                                    Name kind, std::vector<double> scale_parameters, Name layout,
                                                    Name order) {
  check(z_any, h_any, matrix_any);
  const CouplingOptions options = parse_options(kind, scale_parameters, order);
  const Launcher launch(z_any);
  const Tensor grad = with_planes(grad_any), z = with_planes(z_any), h = with_planes(h_any);
  const Tensor grad_log_det = as_contiguous(grad_log_det_any), matrix = as_contiguous(matrix_any);
  Tensor grad_z = empty_output(z_any), grad_h = empty_output(h_any);
  Tensor grad_matrix = empty(matrix.sizes(), matrix.scalar_type(), z);
  Tensor grad_shift = empty_vector(z.size(1), matrix.scalar_type(), z);
  const ScalesAndShifts halves(grad_h, z.size(1), layout);
  dispatch_work(launch, z, h, 3, [&]<typename T, typename H, unsigned R>(const SampleWork<compute_t<T>, R>& work) {
    using A = compute_t<T>;
    const int64_t tiles = work.tiles(), columns = z.size(1) * (z.size(1) + 1);
    const int64_t bytes = std::max(work.shared_bytes(3, 1), OuterSum<SampleWork<A, R>>::scratch_bytes(work));
    STD_TORCH_CHECK(tiles < (int64_t{1} << 31), "the tensor is too large");
    const int64_t blocks = std::min(tiles, launch.resident_blocks(bytes, kBackwardBlocks<R>));
    const Tensor parts = empty_vector(blocks * columns, matrix.scalar_type(), z);
    const Backward<T, H, R> arguments{work,
                                      options_of<A>(options, false),
                                      static_cast<unsigned>(tiles),
                                      readable<T>(grad),
                                      readable<T>(z),
                                      halves.of<H>(h),
                                      matrix.const_data_ptr<A>(),
                                      grad_log_det.const_data_ptr<A>(),
                                      writable<T>(grad_z),
                                      halves.written<H>(grad_h),
                                      parts.mutable_data_ptr<A>()};
    launch(blocks, work.threads(), bytes, backward_kernel<T, H, R>, arguments);
    sum_columns<A>(launch, parts, blocks, grad_matrix, &grad_shift);
  });
  return {grad_z, grad_h, grad_matrix, grad_shift};
}

}  // namespace

GLOW_KERNELS_CUDA_LIBRARY(m) {
  m.impl("coupling_conv1x1_forward_native", TORCH_BOX(&forward));
  m.impl("coupling_conv1x1_backward_native", TORCH_BOX(&backward));
}

}  // namespace glow_kernels
