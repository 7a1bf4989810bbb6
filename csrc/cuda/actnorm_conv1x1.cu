// The linear map of actnorm_conv1x1 on NVIDIA GPUs, for up to 64 channels. The mathematics is described in
// glow_kernels/ops/actnorm_conv1x1.py.
//
// A block has a tile of positions in shared memory, with a row for each channel, and a matrix.
#include <algorithm>
#include <tuple>

#include "cuda/actnorm_conv1x1.h"
#include "cuda/actnorm_conv1x1_wide.h"
#include "cuda/launch.h"
#include "cuda/sums.h"

namespace glow_kernels {
namespace {

using namespace linear;  // NOLINT: the headers of the map are made for this

// All matrices are C x C, row-major.
template <typename T, unsigned R>
struct Apply {
  using A = compute_t<T>;
  Work<A, R> work;
  Positions<const T> x;
  const A *matrix, *shift;
  Positions<T> z;
};

template <typename T, unsigned R>
__global__ void __launch_bounds__(R == kFewRows ? kMaxThreads : 256, R == kFewRows ? 4 : 2)
    apply_kernel(const Apply<T, R> arguments) {
  using A = compute_t<T>;
  const Work<A, R>& work = arguments.work;
  GLOW_KERNELS_DYNAMIC_SHARED(A, x);
  A* const matrix = x + work.tile_size();
  const Span span = work.span(blockIdx.x);
  typename Work<A, R>::Values total;
  load_matrix(arguments.matrix, arguments.shift, work.frame(), matrix);
  load_tile(arguments.x, work, span, x);
  wait_for_copies();
  __syncthreads();
  multiply<false>(work, matrix, x, total);
  store_tile(arguments.z, work, span, total, x);
}

template <typename T, unsigned R>
__global__ void __launch_bounds__(kMaxThreads, sizeof(compute_t<T>) == 8 ? 1 : 2)
    backward_kernel(const Backward<T, R> arguments) {
  using A = compute_t<T>;
  using W = Work<A, R>;
  let_next_start();
  const W& work = arguments.work;
  GLOW_KERNELS_DYNAMIC_SHARED(A, x);
  A *const g = x + work.tile_size(), *const matrix = g + work.tile_size();
  A* const inverse = W::kSmall ? matrix + work.matrix_size() : matrix;
  const bool reversible = arguments.inverse != nullptr;
  const A* const no_shift = nullptr;
  OuterSum<W> sums(work);
  if (W::kSmall || !reversible) load_matrix(arguments.matrix, no_shift, work.frame(), matrix);
  if (W::kSmall && reversible) load_matrix(arguments.inverse, arguments.inverse_shift, work.frame(), inverse);
  backward_tiles(arguments, reversible, blockIdx.x, gridDim.x, x, g, matrix, inverse, sums);
  sums.write(work, x, arguments.parts + int64_t{blockIdx.x} * work.channels * (work.channels + 1));
}

void check(const Tensor& x, const Tensor& matrix) {
  check_data(x);
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == channels && matrix.size(1) == channels,
                  "matrix must be (C, C)");
}

Tensor apply(const Tensor& x_any, const Tensor& matrix_any, const Tensor& shift_any) {
  check(x_any, matrix_any);
  const Launcher launch(x_any);
  const Tensor x = with_planes(x_any), matrix = as_contiguous(matrix_any), shift = as_contiguous(shift_any);
  Tensor z = empty_output(x_any);
  if (apply_on_tensor_cores(launch, x, matrix, shift, z)) return z;
  dispatch(x, [&]<typename T>() {
    using A = compute_t<T>;
    with_work<A>(launch, x, [&]<unsigned R>(const Work<A, R>& work) {
      const Apply<T, R> arguments{work, readable<T>(x), matrix.const_data_ptr<A>(), shift.const_data_ptr<A>(),
                                  writable<T>(z)};
      launch(work.tiles(), work.threads(), work.shared_bytes(1, 1), apply_kernel<T, R>, arguments);
    });
  });
  return z;
}

// Runs the kernel over all tiles and adds the sums of its blocks. `fill` completes the arguments.
template <typename T, typename F>
void run_backward(const Launcher& launch, const Tensor& like, Tensor& grad_matrix, Tensor& grad_shift, const F& fill) {
  using A = compute_t<T>;
  with_work<A>(launch, like, [&]<unsigned R>(const Work<A, R>& work) {
    using W = Work<A, R>;
    const int64_t tiles = work.tiles(), channels = work.channels;
    const int64_t bytes = std::max(work.shared_bytes(2, W::kSmall ? 2 : 1), OuterSum<W>::scratch_bytes(work));
    const int64_t blocks = std::min(tiles, launch.resident_blocks(bytes, 3));
    Tensor parts = empty_vector(blocks * channels * (channels + 1), grad_matrix.scalar_type(), like);
    Backward<T, R> arguments{work};
    arguments.tiles = tile_count(work);
    arguments.parts = parts.mutable_data_ptr<A>();
    fill(arguments);
    launch(blocks, work.threads(), bytes, backward_kernel<T, R>, arguments);
    sum_columns<A>(launch, parts, blocks, grad_matrix, &grad_shift);
  });
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& matrix_any,
                                            bool needs_grad_x) {
  check(x_any, matrix_any);
  const Launcher launch(x_any);
  const Tensor grad = with_planes(grad_any), x = with_planes(x_any), matrix = as_contiguous(matrix_any);
  Tensor grad_x = needs_grad_x ? empty_output(x_any) : empty_vector(0, x.scalar_type(), x);
  Tensor grad_matrix = torch::stable::empty(matrix.sizes(), matrix.scalar_type(), std::nullopt, x.device());
  Tensor grad_shift = empty_vector(x.size(1), matrix.scalar_type(), x);
  if (backward_on_tensor_cores(launch, grad, x, matrix, grad_x, grad_matrix, grad_shift))
    return {grad_x, grad_matrix, grad_shift};
  dispatch(x, [&]<typename T>() {
    using A = compute_t<T>;
    run_backward<T>(launch, x, grad_matrix, grad_shift, [&](auto& arguments) {
      arguments.grad = readable<T>(grad);
      arguments.data = readable<T>(x);
      arguments.matrix = matrix.const_data_ptr<A>();
      if (needs_grad_x) arguments.grad_x = writable<T>(grad_x);
    });
  });
  return {grad_x, grad_matrix, grad_shift};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> linear::reversible_backward(const Tensor& grad_any, const Tensor& z_any,
                                                                       const Tensor& matrix_any,
                                                                       const Tensor& inverse_any,
                                                                       const Tensor& inverse_shift_any) {
  check(z_any, matrix_any);
  check(z_any, inverse_any);
  const Launcher launch(z_any);
  const Tensor grad = with_planes(grad_any), z = with_planes(z_any), matrix = as_contiguous(matrix_any);
  const Tensor inverse = as_contiguous(inverse_any), inverse_shift = as_contiguous(inverse_shift_any);
  Tensor x = empty_output(z_any), grad_x = empty_output(z_any);
  Tensor grad_matrix = torch::stable::empty(matrix.sizes(), matrix.scalar_type(), std::nullopt, z.device());
  Tensor grad_shift = empty_vector(z.size(1), matrix.scalar_type(), z);
  if (reversible_backward_on_tensor_cores(launch, grad, z, matrix, inverse, inverse_shift, x, grad_x, grad_matrix,
                                          grad_shift)) {
    return {x, grad_x, grad_matrix, grad_shift};
  }
  dispatch(z, [&]<typename T>() {
    using A = compute_t<T>;
    run_backward<T>(launch, z, grad_matrix, grad_shift, [&](auto& arguments) {
      arguments.grad = readable<T>(grad);
      arguments.data = readable<T>(z);
      arguments.matrix = matrix.const_data_ptr<A>();
      arguments.inverse = inverse.const_data_ptr<A>();
      arguments.inverse_shift = inverse_shift.const_data_ptr<A>();
      arguments.x = writable<T>(x);
      arguments.grad_x = writable<T>(grad_x);
    });
  });
  return {x, grad_x, grad_matrix, grad_shift};
}

GLOW_KERNELS_CUDA_LIBRARY(m) {
  m.impl("actnorm_conv1x1_apply_native", TORCH_BOX(&apply));
  m.impl("actnorm_conv1x1_apply_backward_native", TORCH_BOX(&backward));
  m.impl("actnorm_conv1x1_apply_reversible_backward_native", TORCH_BOX(&linear::reversible_backward));
}

}  // namespace glow_kernels
