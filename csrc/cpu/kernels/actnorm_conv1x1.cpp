// The linear map of actnorm_conv1x1, a tile of positions at a time; compiled once per instruction set.
#include "cpu/actnorm_conv1x1.h"

#include <optional>

#include "cpu/kernels/linear_tiles.h"

namespace glow_kernels::GLOW_KERNELS_ISA {
namespace {

// Whether the channels of a tensor are contiguous, or there is no tensor.
template <typename T>
bool channels_inside(const Positions<T>& x) {
  return x.data == nullptr || (x.planes.channel_stride == 1 && x.planes.channels > 1 && x.planes.position_stride != 1);
}

template <typename Layout, typename T>
void apply_as(Positions<const T> x, const compute_t<T>* matrix, const compute_t<T>* shift, Positions<T> z,
              int64_t begin, int64_t end) {
  using A = compute_t<T>;
  const int64_t channels = x.planes.channels;
  static thread_local KeptBuffer<A> buffers[3];
  const PaddedMatrix<A> map(buffers[0], Rows<const A>{matrix, channels}, true, shift, channels);
  const int64_t tile_positions = summed_positions(channels);
  PositionsBuffer<A> x_buffer(buffers[1], channels, tile_positions), z_buffer(buffers[2], channels, tile_positions);
  const bool streamed = is_streamed(z);
  for (int64_t start = begin; start < end; start += tile_positions) {
    const int64_t stop = std::min(start + tile_positions, end);
    const auto inputs = Layout::template load<Read::factors>(x, start, stop, x_buffer);
    const auto outputs = Layout::destination(z, start, stop, z_buffer);
    with_stores(streamed && outputs.data != z_buffer.values, [&](auto stores) {
      Layout::template multiply_tile<stores()>(map, inputs, outputs, channels, stop - start);
    });
    Layout::store(outputs, z, start, stop, z_buffer);
  }
}

template <typename T>
void apply(Positions<const T> x, const compute_t<T>* matrix, const compute_t<T>* shift, Positions<T> z, int64_t begin,
           int64_t end) {
  if (channels_inside(x) && channels_inside(z)) return apply_as<Interleaved>(x, matrix, shift, z, begin, end);
  return apply_as<Planar>(x, matrix, shift, z, begin, end);
}

template <typename Layout, typename T>
void backward_as(const LinearBackward<T>& arguments, int64_t begin, int64_t end, compute_t<T>* grad_matrix,
                 compute_t<T>* grad_shift) {
  using A = compute_t<T>;
  const int64_t channels = arguments.grad.planes.channels;
  static thread_local KeptBuffer<A> buffers[5];
  const PaddedMatrix<A> matrix(buffers[0], Rows<const A>{arguments.matrix, channels}, false, nullptr, channels);
  std::optional<PaddedMatrix<A>> inverse;
  if (arguments.inverse) {
    inverse.emplace(buffers[1], Rows<const A>{arguments.inverse, channels}, true, arguments.inverse_shift, channels);
  }
  const int64_t tile_positions = summed_positions(channels);
  PositionsBuffer<A> g_buffer(buffers[2], channels, tile_positions), data_buffer(buffers[3], channels, tile_positions),
      result_buffer(buffers[4], channels, tile_positions);
  const bool streamed = is_streamed(arguments.grad_x);
  for (int64_t start = begin; start < end; start += tile_positions) {
    const int64_t stop = std::min(start + tile_positions, end), count = stop - start;
    const auto g = Layout::template load<Read::vectors>(arguments.grad, start, stop, g_buffer);
    auto x = Layout::template load<Read::vectors>(arguments.data, start, stop, data_buffer);
    if (inverse) {
      const auto restored = Layout::destination(arguments.x, start, stop, result_buffer);
      // Not streamed, since the sums read it.
      Layout::template multiply_tile<Stores::cached>(*inverse, x, restored, channels, count);
      Layout::store(restored, arguments.x, start, stop, result_buffer);
      x = restored.as_const();
    }
    Layout::accumulate(g, x, grad_matrix, grad_shift, channels, count);
    if (arguments.grad_x.data == nullptr) continue;
    const auto grad_x = Layout::destination(arguments.grad_x, start, stop, result_buffer);
    with_stores(streamed && grad_x.data != result_buffer.values,
                [&](auto stores) { Layout::template multiply_tile<stores()>(matrix, g, grad_x, channels, count); });
    Layout::store(grad_x, arguments.grad_x, start, stop, result_buffer);
  }
}

template <typename T>
void backward(const LinearBackward<T>& arguments, int64_t begin, int64_t end, compute_t<T>* grad_matrix,
              compute_t<T>* grad_shift) {
  if (channels_inside(arguments.grad) && channels_inside(arguments.data) && channels_inside(arguments.x) &&
      channels_inside(arguments.grad_x)) {
    return backward_as<Interleaved>(arguments, begin, end, grad_matrix, grad_shift);
  }
  return backward_as<Planar>(arguments, begin, end, grad_matrix, grad_shift);
}

}  // namespace

template <typename T>
LinearKernels<T> linear_kernels() {
  return {apply<T>, backward<T>};
}

template LinearKernels<float> linear_kernels();
template LinearKernels<BFloat16> linear_kernels();
template LinearKernels<Half> linear_kernels();
template LinearKernels<double> linear_kernels();

}  // namespace glow_kernels::GLOW_KERNELS_ISA
