// The linear map of actnorm_conv1x1 on the CPU, folded beforehand or in the same call. The mathematics is described in
// glow_kernels/ops/actnorm_conv1x1.py, the arithmetic is in cpu/kernels.
#include "cpu/actnorm_conv1x1.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <tuple>
#include <vector>

#include "cpu/kept_buffer.h"
#include "cpu/steps.h"

namespace glow_kernels {
namespace {

// The sums over positions are split into at most this many parts, and the parts are added in order, so the result does
// not depend on the number of threads.
constexpr int64_t kParts = 64;
// Positions are distributed in multiples of this, which is a whole number of vectors in every instruction set.
constexpr int64_t kUnit = 64;

template <typename T>
LinearKernels<T> kernels() {
  GLOW_KERNELS_RETURN_TABLE(linear_kernels<T>());
}

void check_data(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "x must be (B, C, *spatial)");
  STD_TORCH_CHECK(x.size(1) >= 1 && x.size(1) <= kMaxChannels, "the native backend takes 1 to ", kMaxChannels,
                  " channels, got ", x.size(1));
}

void check(const Tensor& x, const Tensor& matrix) {
  check_data(x);
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == channels && matrix.size(1) == channels,
                  "matrix must be (C, C)");
}

// Samples of a single position are treated as positions of one sample, so that tiles can be read and written in place.
template <typename T>
Positions<T> positions(const Tensor& x, T* data) {
  const Planes p = planes_of(x);
  if (p.positions > 1) return {data, p};
  return {data, {1, p.channels, p.batches * p.positions, 0, p.channel_stride, p.batch_stride}};
}

// P, the number of positions.
double positions_of(const Tensor& x) { return static_cast<double>(planes_of(x).positions); }

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Work on the matrices that runs concurrently with the work on the data; empty if there is none.
using ConcurrentWork = std::function<void()>;

// Whether such work, of the order of n^3, is worth a thread of its own.
bool is_worth_a_thread(int64_t n) { return n >= 64; }

template <typename A>
bool is_finite(const A* values, int64_t size) {
  A zero = 0;
#pragma omp simd reduction(+ : zero)
  for (int64_t i = 0; i < size; ++i) zero += values[i] * A(0);
  return zero == A(0);
}

// Calls `concurrent_work`, and `task` with every index below `count`, each on the first thread that is free.
template <typename F>
void for_each_task(const ConcurrentWork& concurrent_work, int64_t count, const F& task) {
  const int64_t first = concurrent_work ? 1 : 0, end = first + count, threads = torch::stable::get_num_threads();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(end, threads), 1, [&](int64_t, int64_t) {
    for (int64_t index; (index = next++) < end;) index < first ? concurrent_work() : task(index - first);
  });
}

// z = M x + v.
template <typename T>
void run_apply(const Tensor& x, const compute_t<T>* matrix, const compute_t<T>* shift, Tensor& z,
               const ConcurrentWork& concurrent_work = {}) {
  const auto kernel = kernels<T>().apply;
  const auto source = positions(x, x.const_data_ptr<T>());
  const auto target = positions(z, z.mutable_data_ptr<T>());
  const int64_t total = source.planes.batches * source.planes.positions;
  if (concurrent_work) {
    // Few tasks, since each one pads the matrix again.
    constexpr int64_t kTasks = 16, kMinUnits = 2;
    const int64_t size = std::max(kMinUnits * kUnit, divide_up(total, kTasks * kUnit) * kUnit);
    for_each_task(concurrent_work, divide_up(total, size), [&](int64_t index) {
      kernel(source, matrix, shift, target, index * size, std::min((index + 1) * size, total));
    });
    return;
  }
  // Minimum number of units per thread: fewer would cost more to distribute than to compute.
  const int64_t grain = std::max<int64_t>(1, 16384 / (x.size(1) * kUnit));
  torch::stable::parallel_for(0, divide_up(total, kUnit), grain, [&](int64_t begin, int64_t end) {
    kernel(source, matrix, shift, target, begin * kUnit, std::min(end * kUnit, total));
  });
}

Tensor apply(const Tensor& x_any, const Tensor& matrix_any, const Tensor& shift_any) {
  check(x_any, matrix_any);
  const Tensor x = with_planes(x_any);
  const Tensor matrix = as_contiguous(matrix_any), shift = as_contiguous(shift_any);
  Tensor z = empty_output(x_any);
  dispatch(x, [&]<typename T>() {
    using A = compute_t<T>;
    run_apply<T>(x, matrix.const_data_ptr<A>(), shift.const_data_ptr<A>(), z);
  });
  return z;
}

// Adds in double, some elements of all parts at a time.
template <typename A>
void add_parts(const std::vector<A>& parts, int64_t count, int64_t size, A* target) {
  constexpr int64_t kBlockSize = 64;
  for (int64_t first = 0; first < size; first += kBlockSize) {
    const int64_t width = std::min(kBlockSize, size - first);
    double totals[kBlockSize] = {};
    for (int64_t part = 0; part < count; ++part) {
      const A* values = parts.data() + part * size + first;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) totals[i] += values[i];
    }
    std::copy_n(totals, width, target + first);
  }
}

// Positions per part: those of a tile, fewer if that makes two parts that are each worth a thread, more if there would
// otherwise be over kParts parts.
int64_t part_size(int64_t channels, int64_t total) {
  constexpr int64_t kWorthAThread = 1 << 20;  // multiply-adds
  const auto share = [](int64_t all, int64_t parts) { return divide_up(all, parts * kUnit) * kUnit; };
  const int64_t least = std::max(share(total, 2), share(kWorthAThread, channels * channels));
  return std::max(share(total, kParts), std::min(summed_positions(channels), least));
}

// Runs the kernel over all positions and writes the sums.
template <typename T>
void run_backward(const LinearBackward<T>& arguments, compute_t<T>* grad_matrix, compute_t<T>* grad_shift,
                  const ConcurrentWork& concurrent_work = {}) {
  using A = compute_t<T>;
  const auto kernel = kernels<T>().backward;
  const Planes& planes = arguments.grad.planes;
  const int64_t channels = planes.channels, total = planes.batches * planes.positions;
  const int64_t size = part_size(channels, total), parts = divide_up(total, size);
  std::vector<A> matrices(parts * channels * channels), shifts(parts * channels);
  for_each_task(concurrent_work, parts, [&](int64_t part) {
    kernel(arguments, part * size, std::min((part + 1) * size, total), matrices.data() + part * channels * channels,
           shifts.data() + part * channels);
  });
  add_parts(matrices, parts, channels * channels, grad_matrix);
  add_parts(shifts, parts, channels, grad_shift);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& matrix_any,
                                            bool needs_grad_x) {
  check(x_any, matrix_any);
  const Tensor grad = with_planes(grad_any), x = with_planes(x_any), matrix = as_contiguous(matrix_any);
  Tensor grad_x = needs_grad_x ? empty_output(x_any) : empty_vector(0, x.scalar_type(), x);
  Tensor grad_matrix = empty_contiguous(matrix);
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
  Tensor grad_matrix = empty_contiguous(matrix);
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

// Room for a folded step, its inverse and the sums of its backward, in memory that the thread keeps.
template <typename A>
struct FoldedStep {
  Folded<A> map, inverse, sums;

  explicit FoldedStep(int64_t n) {
    static thread_local KeptBuffer<A> buffer;
    A* data = buffer.reserve(3 * n * (n + 1));
    for (Folded<A>* each : {&map, &inverse, &sums}) {
      *each = {data, data + n * n};
      data += n * (n + 1);
    }
  }
};

// Computes x -> z or, for the inverse, z -> x, and the log-determinant.
template <bool is_inverse>
std::tuple<Tensor, Tensor> transform(const Tensor& x_any, const Tensor& log_scale, const Tensor& bias,
                                     const Tensor& weight, std::optional<Tensor> weight_log_det) {
  check_data(x_any);
  const int64_t n = x_any.size(1), batches = x_any.size(0);
  const Tensor x = with_planes(x_any);
  Tensor z = empty_output(x_any);
  return dispatch(x, [&]<typename T>() -> std::tuple<Tensor, Tensor> {
    using A = compute_t<T>;
    const InputParameters<A> parameters(log_scale, bias, weight, weight_log_det, 1, n);
    const FoldKernels<A> folding = fold_kernels<A>();
    const FoldedStep<A> folded(n);
    double log_det;
    const auto compute_log_det = [&] { log_det = folding.fold_log_det(n, parameters.step()); };
    ConcurrentWork concurrent_work;
    if constexpr (is_inverse) {
      log_det = folding.fold_inverse(n, parameters.step(), folded.map);
      check_invertible(!std::isnan(*folded.map.matrix), n);
    } else {
      folding.fold(n, parameters.step(), folded.map);
      if (is_worth_a_thread(n) && !weight_log_det) {
        concurrent_work = compute_log_det;
      } else {
        compute_log_det();
      }
    }
    run_apply<T>(x, folded.map.matrix, folded.map.shift, z, concurrent_work);
    Tensor log_dets = empty_vector(batches, kScalarType<A>, x);
    std::fill_n(log_dets.mutable_data_ptr<A>(), batches, static_cast<A>(log_det) * positions_of(x));
    return {z, log_dets};
  });
}

// The gradient of the log-determinant per position: P times that of log_det, summed over the samples.
template <typename A>
double total_gradient(const Tensor& grad_log_det, const Tensor& x) {
  const Tensor contiguous = as_contiguous(grad_log_det);
  STD_TORCH_CHECK(contiguous.numel() == x.size(0), "grad_log_det must be (B,)");
  const A* data = contiguous.const_data_ptr<A>();
  double total = 0;
  for (int64_t batch = 0; batch < x.size(0); ++batch) total += data[batch];
  return total * positions_of(x);
}

// Computes the gradients of transform's arguments from its input and the gradients of its results.
template <bool is_inverse>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> transform_backward(
    const Tensor& grad_any, const Tensor& grad_log_det, const Tensor& x_any, const Tensor& log_scale,
    const Tensor& bias, const Tensor& weight, std::optional<Tensor> weight_log_det, bool needs_grad_x) {
  check_data(x_any);
  const int64_t n = x_any.size(1);
  const Tensor grad = with_planes(grad_any), x = with_planes(x_any);
  Tensor grad_x = needs_grad_x ? empty_output(x_any) : empty_vector(0, x.scalar_type(), x);
  ParameterGradients grads(log_scale, bias, weight, weight_log_det);
  dispatch(x, [&]<typename T>() {
    using A = compute_t<T>;
    const InputParameters<A> parameters(log_scale, bias, weight, weight_log_det, 1, n);
    const FoldKernels<A> folding = fold_kernels<A>();
    const FoldedStep<A> folded(n);
    const A* inverse = nullptr;
    ConcurrentWork concurrent_work;
    if constexpr (is_inverse) {
      folding.fold_inverse(n, parameters.step(), folded.map);
      inverse = folded.map.matrix;
    } else {
      folding.fold(n, parameters.step(), folded.map);
      if (is_worth_a_thread(n) && !weight_log_det) {
        inverse = folded.inverse.matrix;
        concurrent_work = [&] { folding.fold_inverse(n, parameters.step(), folded.inverse); };
      }
    }
    LinearBackward<T> arguments{};
    arguments.grad = positions(grad, grad.const_data_ptr<T>());
    arguments.data = positions(x, x.const_data_ptr<T>());
    arguments.matrix = folded.map.matrix;
    if (needs_grad_x) arguments.grad_x = positions(grad_x, grad_x.mutable_data_ptr<T>());
    run_backward(arguments, folded.sums.matrix, folded.sums.shift, concurrent_work);
    // M^-1 may be out of the range of A even if W^-1 is not.
    if (concurrent_work && !is_finite(inverse, n * n)) inverse = nullptr;
    const auto kernel = is_inverse ? folding.fold_inverse_backward : folding.fold_backward;
    kernel(n, {folded.sums.matrix, folded.sums.shift}, total_gradient<A>(grad_log_det, x), parameters.step(), inverse,
           grads.step<A>());
  });
  return {grad_x, grads.log_scale, grads.bias, grads.weight, grads.weight_log_det};
}

// Computes the input x and all gradients from the output z.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> transform_reversible_backward(
    const Tensor& grad_any, const Tensor& grad_log_det, const Tensor& z_any, const Tensor& log_scale,
    const Tensor& bias, const Tensor& weight, std::optional<Tensor> weight_log_det) {
  check_data(z_any);
  const int64_t n = z_any.size(1);
  const Tensor grad = with_planes(grad_any), z = with_planes(z_any);
  Tensor x = empty_output(z_any), grad_x = empty_output(z_any);
  ParameterGradients grads(log_scale, bias, weight, weight_log_det);
  dispatch(z, [&]<typename T>() {
    using A = compute_t<T>;
    const InputParameters<A> parameters(log_scale, bias, weight, weight_log_det, 1, n);
    const FoldKernels<A> folding = fold_kernels<A>();
    const FoldedStep<A> folded(n);
    folding.fold(n, parameters.step(), folded.map);
    folding.fold_inverse(n, parameters.step(), folded.inverse);
    check_invertible(!std::isnan(*folded.inverse.matrix), n);
    run_backward<T>({positions(grad, grad.const_data_ptr<T>()), positions(z, z.const_data_ptr<T>()), folded.map.matrix,
                     folded.inverse.matrix, folded.inverse.shift, positions(x, x.mutable_data_ptr<T>()),
                     positions(grad_x, grad_x.mutable_data_ptr<T>())},
                    folded.sums.matrix, folded.sums.shift);
    folding.fold_backward(n, {folded.sums.matrix, folded.sums.shift}, total_gradient<A>(grad_log_det, z),
                          parameters.step(), folded.inverse.matrix, grads.step<A>());
  });
  return {x, grad_x, grads.log_scale, grads.bias, grads.weight, grads.weight_log_det};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(glow_kernels, CPU, m) {
  m.impl("actnorm_conv1x1_apply_native", TORCH_BOX(&apply));
  m.impl("actnorm_conv1x1_apply_backward_native", TORCH_BOX(&backward));
  m.impl("actnorm_conv1x1_apply_reversible_backward_native", TORCH_BOX(&reversible_backward));
  m.impl("actnorm_conv1x1_forward_native", TORCH_BOX(&transform<false>));
  m.impl("actnorm_conv1x1_inverse_native", TORCH_BOX(&transform<true>));
  m.impl("actnorm_conv1x1_backward_native", TORCH_BOX(&transform_backward<false>));
  m.impl("actnorm_conv1x1_inverse_backward_native", TORCH_BOX(&transform_backward<true>));
  m.impl("actnorm_conv1x1_reversible_backward_native", TORCH_BOX(&transform_reversible_backward));
}

}  // namespace glow_kernels
