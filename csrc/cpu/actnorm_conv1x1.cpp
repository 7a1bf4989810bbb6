// The linear map of actnorm_conv1x1 on the CPU. The mathematics stands in glow_kernels/ops/actnorm_conv1x1.py, the
// arithmetic in cpu/kernels/actnorm_conv1x1.cpp.
#include "cpu/actnorm_conv1x1.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/dispatch.h"

namespace glow_kernels {
namespace {

// The sums over positions are cut into this many parts, whatever the number of threads, and the parts are added in
// order: so the result does not depend on the number of threads.
constexpr int64_t kParts = 64;
// Fewer tiles of few channels would cost more to add than to compute.
constexpr int64_t kTilesPerPart = 4;
constexpr int64_t kFewChannels = 48;

template <typename T>
LinearKernels<T> kernels() {
  GLOW_KERNELS_RETURN_TABLE(linear_kernels<T>());
}

void check(const Tensor& x, const Tensor& matrix) {
  STD_TORCH_CHECK(x.dim() >= 2, "x must be (B, C, *spatial)");
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(channels <= kMaxChannels, "the native backend takes at most ", kMaxChannels, " channels, got ",
                  channels);
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == channels && matrix.size(1) == channels,
                  "matrix must be (C, C)");
}

template <typename T>
Positions<T> positions(const Tensor& x, T* data) {
  return {data, planes_of(x)};
}

// Positions that a thread gets at least.
int64_t grain(int64_t channels) { return std::max<int64_t>(kPositions, 16384 / channels); }

Tensor apply(const Tensor& x_any, const Tensor& matrix_any, const Tensor& shift_any) {
  check(x_any, matrix_any);
  const Tensor x = with_planes(x_any);
  const Tensor matrix = as_contiguous(matrix_any), shift = as_contiguous(shift_any);
  Tensor z = empty_output(x_any);
  return dispatch(x, [&]<typename T>() {
    using A = compute_t<T>;
    const auto kernel = kernels<T>().apply;
    const auto source = positions(x, x.const_data_ptr<T>());
    const auto target = positions(z, z.mutable_data_ptr<T>());
    const A *matrix_data = matrix.const_data_ptr<A>(), *shift_data = shift.const_data_ptr<A>();
    const int64_t total = source.planes.batches * source.planes.positions;
    const int64_t tiles = (total + kPositions - 1) / kPositions;
    const int64_t tile_grain = std::max<int64_t>(1, grain(x.size(1)) / kPositions);
    torch::stable::parallel_for(0, tiles, tile_grain, [&](int64_t begin, int64_t end) {
      kernel(source, matrix_data, shift_data, target, begin * kPositions, std::min(end * kPositions, total));
    });
    return z;
  });
}

template <typename A>
void add_parts(const std::vector<A>& parts, int64_t count, int64_t size, A* target) {
  for (int64_t i = 0; i < size; ++i) {
    double total = 0;
    for (int64_t part = 0; part < count; ++part) total += parts[part * size + i];
    target[i] = static_cast<A>(total);
  }
}

// Runs the kernel over all positions and writes the sums.
template <typename T>
void run_backward(const LinearBackward<T>& arguments, compute_t<T>* grad_matrix, compute_t<T>* grad_shift) {
  using A = compute_t<T>;
  const auto kernel = kernels<T>().backward;
  const Planes& planes = arguments.grad.planes;
  const int64_t channels = planes.channels, total = planes.batches * planes.positions;
  const int64_t tiles = (total + kPositions - 1) / kPositions;
  const int64_t fewest = channels <= kFewChannels ? kTilesPerPart : 1;
  const int64_t part_size = std::max(fewest, (tiles + kParts - 1) / kParts) * kPositions;
  const int64_t parts = (total + part_size - 1) / part_size;
  std::vector<A> matrices(parts * channels * channels), shifts(parts * channels);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      kernel(arguments, part * part_size, std::min((part + 1) * part_size, total),
             matrices.data() + part * channels * channels, shifts.data() + part * channels);
    }
  });
  add_parts(matrices, parts, channels * channels, grad_matrix);
  add_parts(shifts, parts, channels, grad_shift);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& matrix_any,
                                            bool needs_grad_x) {
  check(x_any, matrix_any);
  const Tensor grad = with_planes(grad_any), x = with_planes(x_any), matrix = as_contiguous(matrix_any);
  Tensor grad_x = needs_grad_x ? empty_output(x_any) : empty_vector(0, x.scalar_type(), x);
  Tensor grad_matrix = torch::stable::empty(matrix.sizes(), matrix.scalar_type(), std::nullopt, x.device());
  Tensor grad_shift = empty_vector(x.size(1), matrix.scalar_type(), x);
  return dispatch(x, [&]<typename T>() -> std::tuple<Tensor, Tensor, Tensor> {
    using A = compute_t<T>;
    LinearBackward<T> arguments{};
    arguments.grad = positions(grad, grad.const_data_ptr<T>());
    arguments.data = positions(x, x.const_data_ptr<T>());
    arguments.matrix = matrix.const_data_ptr<A>();
    if (needs_grad_x) arguments.grad_x = positions(grad_x, grad_x.mutable_data_ptr<T>());
    run_backward(arguments, grad_matrix.mutable_data_ptr<A>(), grad_shift.mutable_data_ptr<A>());
    return {grad_x, grad_matrix, grad_shift};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> reversible_backward(const Tensor& grad_any, const Tensor& z_any,
                                                               const Tensor& matrix_any, const Tensor& inverse_any,
                                                               const Tensor& inverse_shift_any) {
  check(z_any, matrix_any);
  check(z_any, inverse_any);
  const Tensor grad = with_planes(grad_any), z = with_planes(z_any), matrix = as_contiguous(matrix_any);
  const Tensor inverse = as_contiguous(inverse_any), inverse_shift = as_contiguous(inverse_shift_any);
  Tensor x = empty_output(z_any), grad_x = empty_output(z_any);
  Tensor grad_matrix = torch::stable::empty(matrix.sizes(), matrix.scalar_type(), std::nullopt, z.device());
  Tensor grad_shift = empty_vector(z.size(1), matrix.scalar_type(), z);
  return dispatch(z, [&]<typename T>() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using A = compute_t<T>;
    run_backward<T>({positions(grad, grad.const_data_ptr<T>()), positions(z, z.const_data_ptr<T>()),
                     matrix.const_data_ptr<A>(), inverse.const_data_ptr<A>(), inverse_shift.const_data_ptr<A>(),
                     positions(x, x.mutable_data_ptr<T>()), positions(grad_x, grad_x.mutable_data_ptr<T>())},
                    grad_matrix.mutable_data_ptr<A>(), grad_shift.mutable_data_ptr<A>());
    return {x, grad_x, grad_matrix, grad_shift};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(glow_kernels, CPU, m) {
  m.impl("actnorm_conv1x1_apply_native", TORCH_BOX(&apply));
  m.impl("actnorm_conv1x1_apply_backward_native", TORCH_BOX(&backward));
  m.impl("actnorm_conv1x1_apply_reversible_backward_native", TORCH_BOX(&reversible_backward));
}

}  // namespace glow_kernels
