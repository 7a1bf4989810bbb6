// The linear map of actnorm_conv1x1 on tensor cores, alone or folded in the same launch. The mathematics is described
// in glow_kernels/ops/actnorm_conv1x1.py.
//
// Blocks are persistent, with their matrices and two strips of positions for every warp in shared memory. Warps take
// turns at the strips and do not wait for each other: while a warp works on one strip, its next is being loaded.
#include <algorithm>
#include <optional>

#include "cuda/actnorm_conv1x1_mma.h"
#include "cuda/actnorm_conv1x1_tile.h"
#include "cuda/actnorm_conv1x1_wide.h"
#include "cuda/launch.h"
#include "cuda/sums.h"

namespace glow_kernels {
namespace {

using namespace linear;  // NOLINT: the headers of the map are made for this

// With fewer channels the ordinary units keep up with the memory. Backward, more than 48 leave too little memory.
constexpr int64_t kMinChannels = 25, kMaxApplyChannels = 64, kMaxBackwardChannels = 48;
// Warps of a block, which has a multiprocessor to itself.
constexpr int kWarps = 8;

// The strips of a tensor with `positions` positions in total.
struct Strips {
  unsigned channels, count, positions, per_sample;

  __device__ Span span(unsigned strip) const {
    const unsigned first = strip * Strip<8>::kPositions, batch = first / per_sample, left = positions - first;
    return {batch, first - batch * per_sample, left < Strip<8>::kPositions ? left : Strip<8>::kPositions};
  }

  // Calls load(strip, turn) for the strips of this warp, and work(strip, turn) for each once it is loaded, while the
  // next is in flight; turns alternate between 0 and 1. Blocks differ by at most one strip. Between the first loads and
  // the first work all threads call start(), when at most the last two groups of copies are in flight. Each function is
  // called at a single place in the code: instructions come from memory too, and a warp has few strips.
  template <typename Load, typename Start, typename F>
  __device__ void for_each(unsigned block, unsigned blocks, const Load& load, const Start& start, const F& work) const {
    const unsigned step = kWarps * blocks;
    unsigned here = threadIdx.x / 32 * blocks + block, next = here;
#pragma unroll 1
    for (unsigned pass = 0; pass <= 2 || here < count; ++pass) {
      if (pass == 2) {
        wait_for_groups<2>();
        start();
        __syncthreads();
      }
      if (pass >= 2 && here < count) {
        wait_for_groups<1>();
        __syncwarp();
        work(here, pass % 2);
        __syncwarp();
        here += step;
      }
      if (next < count) load(next, pass % 2);
      commit_copies();
      next += step;
    }
  }
};

template <typename S, bool transposed>
__host__ __device__ Frame frame_of(const Strips& strips) {
  return {strips.channels, S::kSide, kMatrixRowStride<S, transposed>};
}

struct Apply {
  Strips strips;
  Positions<const float> x;
  const float *matrix = nullptr, *shift = nullptr;  // M and v, unless the kernel folds them
  Parameters<float> parameters = {};                // of the step, if the kernel folds
  float* log_det = nullptr;                         // of every sample; null unless the kernel folds
  Positions<float> z = {};
};

template <typename S>
__global__ void __launch_bounds__(kWarps * 32, 1) apply_kernel(const Apply arguments) {
  const Strips& strips = arguments.strips;
  GLOW_KERNELS_DYNAMIC_SHARED(double, scale);
  const unsigned folds = arguments.log_det == nullptr ? 0 : 1;
  if (blockIdx.x < folds) {
    write_log_det(arguments.parameters, strips.channels, scale, strips.positions / strips.per_sample, strips.per_sample,
                  arguments.log_det);
    return;
  }
  const Frame frame = frame_of<S, false>(strips);
  float* const matrix = reinterpret_cast<float*>(scale + 2 * S::kSide);
  float* const own = matrix + frame.size() + threadIdx.x / 32 * 2 * S::kSize;
  if (folds != 0) {
    start_fold(arguments.parameters, frame, matrix);
  } else {
    load_matrix(arguments.matrix, arguments.shift, frame, matrix);
    commit_copies();
  }
  strips.for_each(
      blockIdx.x - folds, gridDim.x - folds,
      [&](unsigned index, unsigned turn) {
        load_strip<S>(arguments.x, strips.channels, strips.span(index), own + turn * S::kSize);
      },
      [&] {
        if (folds != 0) fold_matrix(arguments.parameters, frame, scale, matrix);
      },
      [&](unsigned index, unsigned turn) {
        float* const strip = own + turn * S::kSize;
        typename S::Values total;
        multiply<S, false>(matrix, matrix + frame.shift(), strip, total);
        store_strip<S>(arguments.z, strips.channels, strips.span(index), total, strip);
      });
}

struct Backward {
  Strips strips;
  Positions<const float> grad = {}, data = {};  // g, and x (z in the reversible backward)
  const float* matrix = nullptr;                // M, unless the kernel folds it
  const float* inverse = nullptr;               // M^-1, and the shift of x = M^-1 z + shift; null unless reversible
  const float* inverse_shift = nullptr;
  Parameters<float> parameters = {};  // of the step, if the kernel folds M
  double* weight_inverse = nullptr;   // where W^-1 goes; null if it is not wanted
  Positions<float> x = {};            // written by the reversible backward only
  Positions<float> grad_x = {};       // M^T g; null if it is not wanted
  float* parts = nullptr;             // sum g x^T, transposed if the kernel folds, and sum g of every block
};

template <typename S>
__global__ void __launch_bounds__(kWarps * 32, 1) backward_kernel(const Backward arguments) {
  let_next_start();
  const Strips& strips = arguments.strips;
  GLOW_KERNELS_DYNAMIC_SHARED(double, scale);
  const unsigned others = arguments.weight_inverse == nullptr ? 0 : 1;
  if (blockIdx.x < others) {
    write_inverse(arguments.parameters, strips.channels, scale, arguments.weight_inverse);
    return;
  }
  const bool reversible = arguments.inverse != nullptr, folds = arguments.matrix == nullptr;
  const float* const no_shift = nullptr;
  const unsigned block = blockIdx.x - others;
  const Frame frame = frame_of<S, true>(strips), of_inverse = frame_of<S, false>(strips);
  float* const matrix = reinterpret_cast<float*>(scale + 2 * S::kSide);
  float* const inverse = matrix + frame.size();
  float* const all_strips = inverse + (reversible ? of_inverse.size() : 0);
  float* const own = all_strips + threadIdx.x / 32 * 4 * S::kSize;
  if (reversible) load_matrix(arguments.inverse, arguments.inverse_shift, of_inverse, inverse);
  load_matrix(folds ? arguments.parameters.weight : arguments.matrix, no_shift, frame, matrix);
  commit_copies();
  StripSums<S> sums;
  strips.for_each(
      block, gridDim.x - others,
      [&](unsigned index, unsigned turn) {
#pragma unroll 1
        for (unsigned input = 0; input < 2; ++input) {
          const Positions<const float> from = input == 0 ? arguments.data : arguments.grad;
          load_strip<S>(from, strips.channels, strips.span(index), own + (2 * turn + input) * S::kSize);
        }
      },
      [&] {
        if (folds) fold_matrix(arguments.parameters, frame, scale, matrix);
      },
      [&](unsigned index, unsigned turn) {
        const Span span = strips.span(index);
        float *const x = own + 2 * turn * S::kSize, *const g = x + S::kSize;
        typename S::Values total;
        if (reversible) {
          multiply<S, false>(inverse, inverse + of_inverse.shift(), x, total);
          __syncwarp();
          put_strip<S>(total, x);
          __syncwarp();
          store_strip<S>(arguments.x, strips.channels, span, total, x);
        }
        sums.add(g, x);
        if (arguments.grad_x.data != nullptr) {
          multiply<S, true>(matrix, no_shift, g, total);
          store_strip<S>(arguments.grad_x, strips.channels, span, total, g);
        }
      });
  __syncthreads();
  static_assert(StripSums<S>::kScratch <= 4 * S::kSize);
  sums.write(strips.channels, folds, all_strips,
             arguments.parts + int64_t{block} * strips.channels * (strips.channels + 1));
}

// Calls f.operator()<S>(strips) if these kernels are meant for x. Returns whether they ran: what f returns, or false.
template <int64_t max_channels, typename F>
bool with_strips(const Launcher& launch, const Tensor& x, const F& f) {
  const int64_t channels = x.size(1);
  if (x.scalar_type() != ScalarType::Float || channels < kMinChannels || channels > max_channels) return false;
  const Planes planes = planes_of(x);
  const int64_t positions = planes.batches * planes.positions;
  const int64_t count = (positions + Strip<8>::kPositions - 1) / Strip<8>::kPositions;
  // With fewer, some warps would have none.
  const int64_t least = kWarps * launch.multiprocessors();
  if (count < std::max<int64_t>(1, least) || positions >= int64_t{1} << 31) return false;
  const Strips strips{static_cast<unsigned>(channels), static_cast<unsigned>(count), static_cast<unsigned>(positions),
                      static_cast<unsigned>(planes.positions)};
  bool ran = false;
  if (channels <= 32) {
    ran = f.template operator()<Strip<32>>(strips);
  } else if (max_channels <= 48 || channels <= 48) {
    ran = f.template operator()<Strip<48>>(strips);
  } else if constexpr (max_channels > 48) {
    ran = f.template operator()<Strip<64>>(strips);
  }
  return ran;
}

// Shared memory of a block for scales, matrices, and `strips` strips for each of its warps.
template <typename S>
constexpr int64_t shared_bytes(int64_t of_matrices, int64_t strips) {
  return 2 * S::kSide * sizeof(double) +
         (of_matrices + kWarps * strips * S::kSize) * static_cast<int64_t>(sizeof(float));
}

// The number of blocks for strips that can be resident at the same time as `others`.
int64_t blocks_for(const Launcher& launch, const Strips& strips, int64_t bytes, int64_t others) {
  const int64_t resident = launch.resident_blocks(bytes, 1) - others;
  return std::min<int64_t>((strips.count + kWarps - 1) / kWarps, std::max<int64_t>(1, resident));
}

// Returns false if a block has too little shared memory: it has 99 KiB on sm_86, 89 and 120, and 163 on sm_80.
template <typename S>
bool run_apply(const Launcher& launch, const Apply& arguments) {
  const int64_t others = arguments.log_det == nullptr ? 0 : 1;
  const int64_t bytes = std::max(shared_bytes<S>(frame_of<S, false>(arguments.strips).size(), 2),
                                 others * Elimination::shared_bytes(arguments.strips.channels));
  if (bytes > launch.max_shared_bytes()) return false;
  launch(blocks_for(launch, arguments.strips, bytes, others) + others, 32 * kWarps, bytes, apply_kernel<S>, arguments);
  return true;
}

// Runs the kernel if a block has the shared memory, and returns the sums of its blocks. `fill` completes the arguments.
template <typename F>
std::optional<Tensor> run_backward(const Launcher& launch, const Tensor& like, const F& fill) {
  std::optional<Tensor> parts;
  with_strips<kMaxBackwardChannels>(launch, like, [&]<typename S>(const Strips& strips) {
    Backward arguments{strips};
    fill(arguments);
    const int64_t others = arguments.weight_inverse == nullptr ? 0 : 1;
    const int64_t of_inverse = arguments.inverse == nullptr ? 0 : frame_of<S, false>(strips).size();
    const int64_t bytes = std::max(shared_bytes<S>(frame_of<S, true>(strips).size() + of_inverse, 4),
                                   others * Elimination::shared_bytes(strips.channels));
    if (bytes > launch.max_shared_bytes()) return false;
    const int64_t blocks = blocks_for(launch, strips, bytes, others);
    parts = empty({blocks, strips.channels * (int64_t{strips.channels} + 1)}, ScalarType::Float, like);
    arguments.parts = parts->mutable_data_ptr<float>();
    launch(blocks + others, 32 * kWarps, bytes, backward_kernel<S>, arguments);
    return true;
  });
  return parts;
}

bool add_parts(const Launcher& launch, const std::optional<Tensor>& parts, Tensor& grad_matrix, Tensor& grad_shift) {
  if (parts) sum_columns<float>(launch, *parts, parts->size(0), grad_matrix, &grad_shift);
  return parts.has_value();
}

}  // namespace

bool apply_on_tensor_cores(const Launcher& launch, const Tensor& x, const Tensor& matrix, const Tensor& shift,
                           Tensor& z) {
  return with_strips<kMaxApplyChannels>(launch, x, [&]<typename S>(const Strips& strips) {
    Apply arguments{strips, readable<float>(x)};
    arguments.matrix = matrix.const_data_ptr<float>();
    arguments.shift = shift.const_data_ptr<float>();
    arguments.z = writable<float>(z);
    return run_apply<S>(launch, arguments);
  });
}

bool forward_on_tensor_cores(const Launcher& launch, const Tensor& x, const Parameters<float>& parameters, Tensor& z,
                             Tensor& log_det) {
  return with_strips<kMaxApplyChannels>(launch, x, [&]<typename S>(const Strips& strips) {
    Apply arguments{strips, readable<float>(x)};
    arguments.parameters = parameters;
    arguments.log_det = log_det.mutable_data_ptr<float>();
    arguments.z = writable<float>(z);
    return run_apply<S>(launch, arguments);
  });
}

bool backward_on_tensor_cores(const Launcher& launch, const Tensor& grad, const Tensor& x, const Tensor& matrix,
                              Tensor& grad_x, Tensor& grad_matrix, Tensor& grad_shift) {
  const std::optional<Tensor> parts = run_backward(launch, x, [&](Backward& arguments) {
    arguments.grad = readable<float>(grad);
    arguments.data = readable<float>(x);
    arguments.matrix = matrix.const_data_ptr<float>();
    if (grad_x.numel() > 0) arguments.grad_x = writable<float>(grad_x);
  });
  return add_parts(launch, parts, grad_matrix, grad_shift);
}

std::optional<Tensor> folding_backward_on_tensor_cores(const Launcher& launch, const Tensor& grad, const Tensor& x,
                                                       const Parameters<float>& parameters, double* weight_inverse,
                                                       Tensor& grad_x) {
  return run_backward(launch, x, [&](Backward& arguments) {
    arguments.grad = readable<float>(grad);
    arguments.data = readable<float>(x);
    arguments.parameters = parameters;
    arguments.weight_inverse = weight_inverse;
    if (grad_x.numel() > 0) arguments.grad_x = writable<float>(grad_x);
  });
}

bool reversible_backward_on_tensor_cores(const Launcher& launch, const Tensor& grad, const Tensor& z,
                                         const Tensor& matrix, const Tensor& inverse, const Tensor& inverse_shift,
                                         Tensor& x, Tensor& grad_x, Tensor& grad_matrix, Tensor& grad_shift) {
  const std::optional<Tensor> parts = run_backward(launch, z, [&](Backward& arguments) {
    arguments.grad = readable<float>(grad);
    arguments.data = readable<float>(z);
    arguments.matrix = matrix.const_data_ptr<float>();
    arguments.inverse = inverse.const_data_ptr<float>();
    arguments.inverse_shift = inverse_shift.const_data_ptr<float>();
    arguments.x = writable<float>(x);
    arguments.grad_x = writable<float>(grad_x);
  });
  return add_parts(launch, parts, grad_matrix, grad_shift);
}

}  // namespace glow_kernels
