// The whole of actnorm_conv1x1 in one call on NVIDIA GPUs, for as many channels as the linear map takes: one launch
// forward, two backward. The mathematics is described in glow_kernels/ops/actnorm_conv1x1.py.
//
// Every block of the map folds M for itself. None of them waits for what needs an elimination, log|det W| or W^-1:
// block 0, which starts first, computes that and nothing else.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "cuda/actnorm_conv1x1.h"
#include "cuda/actnorm_conv1x1_parameters.h"
#include "cuda/actnorm_conv1x1_wide.h"
#include "cuda/launch.h"
#include "cuda/steps.h"
#include "cuda/sums.h"

namespace glow_kernels {
namespace {

using namespace linear;  // NOLINT: the headers of the map are made for this

template <typename T, unsigned R>
struct Forward {
  using A = compute_t<T>;
  Work<A, R> work;
  Parameters<A> parameters;
  Positions<const T> x;
  Positions<T> z;
  A* log_det;
};

template <typename T, unsigned R>
__global__ void __launch_bounds__(R == kFewRows ? kMaxThreads : 256, R == kFewRows ? 4 : 2)
    forward_kernel(const Forward<T, R> arguments) {
  using A = compute_t<T>;
  const Work<A, R>& work = arguments.work;
  GLOW_KERNELS_DYNAMIC_SHARED(A, x);
  if (blockIdx.x == 0) {
    write_log_det(arguments.parameters, work.channels, reinterpret_cast<double*>(x), work.batches, work.per_sample,
                  arguments.log_det);
    return;
  }
  A* const matrix = x + work.tile_size();
  const Span span = work.span(blockIdx.x - 1);
  typename Work<A, R>::Values total;
  start_fold(arguments.parameters, work.frame(), matrix);
  load_tile(arguments.x, work, span, x);
  wait_for_copies<1>();  // the tile may still be in flight
  fold_matrix(arguments.parameters, work.frame(), reinterpret_cast<double*>(matrix + work.matrix_size()), matrix);
  wait_for_copies();
  __syncthreads();
  multiply<false>(work, matrix, x, total);
  store_tile(arguments.z, work, span, total, x);
}

// The backward of the map, and W^-1 if that is wanted.
template <typename T, unsigned R>
__global__ void __launch_bounds__(kMaxThreads, sizeof(compute_t<T>) == 8 ? 1 : 2)
    folding_backward_kernel(const Backward<T, R> arguments, const Parameters<compute_t<T>> parameters,
                            double* inverse) {
  using A = compute_t<T>;
  let_next_start();
  const Work<A, R>& work = arguments.work;
  GLOW_KERNELS_DYNAMIC_SHARED(A, x);
  const unsigned others = inverse == nullptr ? 0 : 1;
  if (blockIdx.x < others) {
    write_inverse(parameters, work.channels, reinterpret_cast<double*>(x), inverse);
    return;
  }
  A *const g = x + work.tile_size(), *const matrix = g + work.tile_size();
  OuterSum<Work<A, R>> sums(work);
  start_fold(parameters, work.frame(), matrix);
  wait_for_copies();
  fold_matrix(parameters, work.frame(), reinterpret_cast<double*>(matrix + work.matrix_size()), matrix);
  const unsigned index = blockIdx.x - others;
  backward_tiles(arguments, false, index, gridDim.x - others, x, g, matrix, matrix, sums);
  sums.write(work, x, arguments.parts + int64_t{index} * work.channels * (work.channels + 1), true);
}

// The arguments of the kernel that computes the gradients of the parameters from the sums over positions.
template <typename A>
struct Finish {
  unsigned n, parts;
  unsigned width;                                  // threads in a row, for the 2 n sums that a block needs
  const A *matrices, *shifts;                      // sum g x^T and sum g, each in `parts` parts
  int64_t row_stride, column_stride, part_stride;  // strides of the rows and columns of a matrix, and of the parts
  Parameters<A> parameters;
  const double* inverse;  // W^-1; null if log|det W| was given
  const A* grad_log_det;  // (B,)
  int64_t batches, positions;
  A *grad_log_scale, *grad_bias, *grad_weight, *grad_weight_log_det;
};

// Sums column j of the matrices, and the shifts: every row of `width` threads writes its sum over some parts to `sums`.
template <typename A>
__device__ void add_parts(const Finish<A>& finish, unsigned j, double* sums) {
  const unsigned n = finish.n, i = threadIdx.x % finish.width, rows = blockDim.x / finish.width;
  double total = 0;
  if (i < 2 * n) {
    const A* const from =
        i < n ? finish.matrices + i * finish.row_stride + j * finish.column_stride : finish.shifts + (i - n);
#pragma unroll 8
    for (unsigned part = threadIdx.x / finish.width; part < finish.parts; part += rows) {
      total += static_cast<double>(from[part * finish.part_stride]);
    }
  }
  sums[threadIdx.x] = total;
}

// A block for every column of W, whose first warp completes the sums.
template <typename A>
__global__ void __launch_bounds__(1024) finish_kernel(const Finish<A> finish) {
  GLOW_KERNELS_DYNAMIC_SHARED(double, sums);
  const unsigned n = finish.n, j = blockIdx.x;
  const Parameters<A>& parameters = finish.parameters;
  double of_samples = 0;
#pragma unroll 4
  for (int64_t batch = threadIdx.x; batch < finish.batches; batch += blockDim.x) {
    of_samples += static_cast<double>(finish.grad_log_det[batch]);
  }
  wait_for_previous();  // for parts and inverse
  add_parts(finish, j, sums);
  of_samples = block_sum(of_samples);  // with a barrier, after which `sums` is complete
  if (threadIdx.x >= 32) return;
  const double in_log_det = __shfl_sync(kWholeWarp, of_samples, 0) * static_cast<double>(finish.positions);
  const double scale = std::exp(static_cast<double>(parameters.log_scale[j])), bias = parameters.bias[j];
  double in_log_scale = 0, in_bias = 0;
  for (unsigned i = threadIdx.x; i < n; i += 32) {
    double in_matrix = 0, in_shift = 0;
    for (unsigned first = 0; first < blockDim.x; first += finish.width) {
      in_matrix += sums[first + i];
      in_shift += sums[first + n + i];
    }
    in_matrix += in_shift * bias;  // since v = M b
    const double weight = parameters.weight[i * n + j];
    in_log_scale += weight * in_matrix;
    in_bias += weight * in_shift;
    const double of_log_det = finish.inverse == nullptr ? 0 : in_log_det * finish.inverse[j * n + i];
    finish.grad_weight[i * n + j] = static_cast<A>(in_matrix * scale + of_log_det);
  }
  in_log_scale = warp_sum(in_log_scale);
  in_bias = warp_sum(in_bias);
  if (threadIdx.x != 0) return;
  finish.grad_log_scale[j] = static_cast<A>(scale * in_log_scale + in_log_det);
  finish.grad_bias[j] = static_cast<A>(scale * in_bias);
  if (j == 0 && parameters.weight_log_det != nullptr) *finish.grad_weight_log_det = static_cast<A>(in_log_det);
}

// What the reversible backward needs before it starts.
template <typename A>
struct Inversion {
  unsigned n;
  Parameters<A> parameters;
  double* weight_inverse;               // W^-1
  A *matrix, *inverse, *inverse_shift;  // M, M^-1 and -b
};

template <typename A>
__global__ void __launch_bounds__(kThreads, 1) inversion_kernel(const Inversion<A> arguments) {
  GLOW_KERNELS_DYNAMIC_SHARED(double, shared);
  const unsigned n = arguments.n;
  const Parameters<A>& parameters = arguments.parameters;
  write_inverse(parameters, n, shared, arguments.weight_inverse);
  for_each_row(n, [&](unsigned i) {  // a warp reads only rows that it wrote itself
    const double shrink = std::exp(-static_cast<double>(parameters.log_scale[i]));
    for (unsigned j = threadIdx.x % 32; j < n; j += 32) {
      const unsigned at = i * n + j;
      const double scale = std::exp(static_cast<double>(parameters.log_scale[j]));
      arguments.matrix[at] = static_cast<A>(static_cast<double>(parameters.weight[at]) * scale);
      arguments.inverse[at] = static_cast<A>(arguments.weight_inverse[at] * shrink);
    }
    if (threadIdx.x % 32 == 0) arguments.inverse_shift[i] = -parameters.bias[i];
  });
}

// The parameters of the step that is applied to x, as contiguous tensors, and memory for their gradients.
class StepTensors {
 public:
  StepTensors(const Tensor& x, const Tensor& log_scale, const Tensor& bias, const Tensor& weight,
              const std::optional<Tensor>& weight_log_det)
      : x_(x),
        type_(x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        log_scale_(checked(log_scale, n())),
        bias_(checked(bias, n())),
        weight_(checked(weight, n() * n())) {
    if (weight_log_det) weight_log_det_ = checked(*weight_log_det, 1);
  }

  int64_t n() const { return x_.size(1); }
  ScalarType type() const { return type_; }
  bool has_weight_log_det() const { return weight_log_det_.has_value(); }
  template <typename A>
  Parameters<A> parameters() const {
    return {log_scale_.const_data_ptr<A>(), bias_.const_data_ptr<A>(), weight_.const_data_ptr<A>(),
            weight_log_det_ ? weight_log_det_->const_data_ptr<A>() : nullptr};
  }
  Tensor empty_matrix() const { return empty({n(), n()}, type_, x_); }
  Tensor empty_channels() const { return empty_vector(n(), type_, x_); }
  // The last is empty if log|det W| was not given.
  std::tuple<Tensor, Tensor, Tensor, Tensor> empty_gradients() const {
    return {empty_channels(), empty_channels(), empty_matrix(),
            weight_log_det_ ? empty_contiguous(*weight_log_det_) : empty_vector(0, type_, x_)};
  }

 private:
  Tensor checked(const Tensor& tensor, int64_t size) const {
    STD_TORCH_CHECK(tensor.numel() == size && tensor.scalar_type() == type_,
                    "the sizes or the types of the parameters do not agree");
    return as_contiguous(tensor);
  }

  const Tensor& x_;
  ScalarType type_;
  Tensor log_scale_, bias_, weight_;
  std::optional<Tensor> weight_log_det_;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor> forward(const Tensor& x_any, const Tensor& log_scale, const Tensor& bias,
                                   const Tensor& weight, std::optional<Tensor> weight_log_det) {
  check_data(x_any);
  const Launcher launch(x_any);
  const Tensor x = with_planes(x_any);
  const StepTensors step(x, log_scale, bias, weight, weight_log_det);
  Tensor z = empty_output(x_any), log_det = empty_vector(x.size(0), step.type(), x);
  dispatch(x, [&]<typename T>() {
    using A = compute_t<T>;
    if constexpr (std::is_same_v<T, float>) {
      if (forward_on_tensor_cores(launch, x, step.parameters<A>(), z, log_det)) return;
    }
    with_work<A>(launch, x, [&]<unsigned R>(const Work<A, R>& work) {
      const Forward<T, R> arguments{work, step.parameters<A>(), readable<T>(x), writable<T>(z),
                                    log_det.mutable_data_ptr<A>()};
      const int64_t of_map = work.shared_bytes(1, 1) + fold_bytes(step.n());
      const int64_t bytes = std::max(of_map, step.has_weight_log_det() ? 0 : Elimination::shared_bytes(step.n()));
      launch(work.tiles() + 1, work.threads(), bytes, forward_kernel<T, R>, arguments);
    });
  });
  return {z, log_det};
}

// Completes `finish` and launches its kernel. `grad_log_det` must have been made contiguous before the previous launch:
// the kernel reads it before it waits for that launch.
template <typename A>
void run_finish(const Launcher& launch, const Tensor& x, const StepTensors& step, const Tensor& grad_log_det,
                Finish<A> finish, Gradients& grads) {
  STD_TORCH_CHECK(grad_log_det.numel() == x.size(0), "grad_log_det must be (B,)");
  auto& [log_scale, bias, weight, weight_log_det] = grads;
  finish.n = static_cast<unsigned>(step.n());
  finish.width = (2 * finish.n + 31) / 32 * 32;
  finish.parameters = step.parameters<A>();
  finish.grad_log_det = grad_log_det.const_data_ptr<A>();
  finish.batches = x.size(0);
  finish.positions = planes_of(x).positions;
  finish.grad_log_scale = log_scale.mutable_data_ptr<A>();
  finish.grad_bias = bias.mutable_data_ptr<A>();
  finish.grad_weight = weight.mutable_data_ptr<A>();
  if (step.has_weight_log_det()) finish.grad_weight_log_det = weight_log_det.mutable_data_ptr<A>();
  // Rows of threads, each with several loads in flight.
  const unsigned rows = std::clamp(finish.parts / 4, 1u, 1024 / finish.width), threads = rows * finish.width;
  launch.next(step.n(), static_cast<int>(threads), int64_t{threads} * 8, finish_kernel<A>, finish);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_any, const Tensor& grad_log_det_any,
                                                            const Tensor& x_any, const Tensor& log_scale,
                                                            const Tensor& bias, const Tensor& weight,
                                                            std::optional<Tensor> weight_log_det, bool needs_grad_x) {
  check_data(x_any);
  const Launcher launch(x_any);
  const Tensor grad = with_planes(grad_any), x = with_planes(x_any), grad_log_det = as_contiguous(grad_log_det_any);
  const StepTensors step(x, log_scale, bias, weight, weight_log_det);
  const int64_t n = step.n(), others = step.has_weight_log_det() ? 0 : 1;
  Tensor grad_x = needs_grad_x ? empty_output(x_any) : empty_vector(0, x.scalar_type(), x);
  Gradients grads = step.empty_gradients();
  Tensor inverse = empty_parts(others * n * n, x);
  double* const inverse_data = others == 0 ? nullptr : inverse.mutable_data_ptr<double>();
  dispatch(x, [&]<typename T>() {
    using A = compute_t<T>;
    const auto finish_parts = [&](const Tensor& parts) {
      Finish<A> finish{};
      finish.parts = static_cast<unsigned>(parts.size(0));
      finish.matrices = parts.const_data_ptr<A>();
      finish.shifts = finish.matrices + n * n;
      finish.row_stride = 1;  // transposed, so that a block reads contiguous elements
      finish.column_stride = n;
      finish.part_stride = n * (n + 1);
      finish.inverse = inverse_data;
      run_finish(launch, x, step, grad_log_det, finish, grads);
    };
    if constexpr (std::is_same_v<T, float>) {
      const auto parts = folding_backward_on_tensor_cores(launch, grad, x, step.parameters<A>(), inverse_data, grad_x);
      if (parts) return finish_parts(*parts);
    }
    with_work<A>(launch, x, [&]<unsigned R>(const Work<A, R>& work) {
      const int64_t of_map =
          std::max(work.shared_bytes(2, 1) + fold_bytes(n), OuterSum<Work<A, R>>::scratch_bytes(work));
      const int64_t bytes = std::max(of_map, others * Elimination::shared_bytes(n));
      // No more blocks than are resident at the same time, so that none starts after the others.
      const int64_t blocks = std::min(work.tiles(), std::max<int64_t>(1, launch.resident_blocks(bytes, 3) - others));
      Tensor parts = empty({blocks, n * (n + 1)}, step.type(), x);
      Backward<T, R> arguments{work};
      arguments.tiles = tile_count(work);
      arguments.grad = readable<T>(grad);
      arguments.data = readable<T>(x);
      if (needs_grad_x) arguments.grad_x = writable<T>(grad_x);
      arguments.parts = parts.mutable_data_ptr<A>();
      launch(blocks + others, work.threads(), bytes, folding_backward_kernel<T, R>, arguments, step.parameters<A>(),
             inverse_data);
      finish_parts(parts);
    });
  });
  const auto& [in_log_scale, in_bias, in_weight, in_weight_log_det] = grads;
  return {grad_x, in_log_scale, in_bias, in_weight, in_weight_log_det};
}

// Here nothing overlaps with the elimination: x = M^-1 z waits for it.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> reversible_backward_of_step(
    const Tensor& grad, const Tensor& grad_log_det_any, const Tensor& z_any, const Tensor& log_scale,
    const Tensor& bias, const Tensor& weight, std::optional<Tensor> weight_log_det) {
  check_data(z_any);
  const Launcher launch(z_any);
  const Tensor z = with_planes(z_any), grad_log_det = as_contiguous(grad_log_det_any);
  const StepTensors step(z, log_scale, bias, weight, weight_log_det);
  const int64_t n = step.n();
  Tensor matrix = step.empty_matrix(), inverse = step.empty_matrix(), inverse_shift = step.empty_channels();
  Tensor weight_inverse = empty_parts(n * n, z);
  Gradients grads = step.empty_gradients();
  const auto with_arithmetic = [&]<typename A>() -> std::tuple<Tensor, Tensor> {
    const Inversion<A> arguments{
        static_cast<unsigned>(n),     step.parameters<A>(),          weight_inverse.mutable_data_ptr<double>(),
        matrix.mutable_data_ptr<A>(), inverse.mutable_data_ptr<A>(), inverse_shift.mutable_data_ptr<A>()};
    launch(1, matrix_threads(n), Elimination::shared_bytes(n), inversion_kernel<A>, arguments);
    check_invertible<A>(inverse, n);
    auto [x, grad_x, in_matrix, in_shift] = reversible_backward(grad, z_any, matrix, inverse, inverse_shift);
    Finish<A> finish{};
    finish.parts = 1;
    finish.matrices = in_matrix.template const_data_ptr<A>();
    finish.shifts = in_shift.template const_data_ptr<A>();
    finish.row_stride = n;
    finish.column_stride = 1;
    if (!step.has_weight_log_det()) finish.inverse = weight_inverse.const_data_ptr<double>();
    run_finish(launch, z, step, grad_log_det, finish, grads);
    return {x, grad_x};
  };
  const auto [x, grad_x] = step.type() == ScalarType::Double ? with_arithmetic.template operator()<double>()
                                                             : with_arithmetic.template operator()<float>();
  const auto& [in_log_scale, in_bias, in_weight, in_weight_log_det] = grads;
  return {x, grad_x, in_log_scale, in_bias, in_weight, in_weight_log_det};
}

}  // namespace

GLOW_KERNELS_CUDA_LIBRARY(m) {
  m.impl("actnorm_conv1x1_forward_native", TORCH_BOX(&forward));
  m.impl("actnorm_conv1x1_backward_native", TORCH_BOX(&backward));
  m.impl("actnorm_conv1x1_reversible_backward_native", TORCH_BOX(&reversible_backward_of_step));
}

}  // namespace glow_kernels
