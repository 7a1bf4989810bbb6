// The linear map of actnorm_conv1x1 on NVIDIA GPUs, for up to 64 channels. The mathematics stands in
// glow_kernels/ops/actnorm_conv1x1.py.
//
// A block has a tile of positions in shared memory, a row for each channel, and a matrix. A thread of a product takes
// R channels of V neighbouring positions, 16 bytes: V V multiply-adds for each 16 bytes of the matrix that it reads,
// and R V for each of the tile. A thread of the gradient of the matrix takes 6 by 6 elements and adds over positions,
// in registers from tile to tile.
#include <algorithm>
#include <tuple>

#include "cuda/actnorm_conv1x1_tile.h"
#include "cuda/launch.h"
#include "cuda/sums.h"

namespace glow_kernels {
namespace {

using namespace linear;  // NOLINT: what the tile header is for

// M x + v of a tile, or M^T x, with the matrix and the shift in shared memory.
template <bool transposed, unsigned R, typename A>
__device__ void multiply(const Work<A, R>& work, const A* matrix, const A* tile, typename Work<A, R>::Values& total) {
  constexpr unsigned V = Work<A, R>::V;
  using Vector = detail::Registers<A, V>;
  if (!work.has_row()) return;
  const unsigned row = work.row();
#pragma unroll
  for (unsigned i = 0; i < R; ++i) {
    const A start = transposed ? A(0) : matrix[work.side * work.side + row + i];
#pragma unroll
    for (unsigned v = 0; v < V; ++v) total[i][v] = start;
  }
  const A* x = tile + work.at(0, work.column());
  const A* factors = matrix + (transposed ? row : row * work.side);
#pragma unroll 1
  for (unsigned k = 0; k < work.channels; k += V) {
    Vector values[V];
#pragma unroll
    for (unsigned j = 0; j < V; ++j) detail::copy<V>(values[j].values, x + j * work.kStride);
#pragma unroll
    for (unsigned i = 0; i < R; ++i) {
      // V factors: of one channel of the result, or transposed of V of them and one of x.
      const unsigned first = i % (R / V) * V, j = i / (R / V);
      Vector m;
      detail::copy<V>(m.values, factors + (transposed ? j * work.side + first : i * work.side));
#pragma unroll
      for (unsigned a = 0; a < V; ++a) {
#pragma unroll
        for (unsigned v = 0; v < V; ++v) {
          if constexpr (transposed) {
            total[first + a][v] += m.values[a] * values[j].values[v];
          } else {
            total[i][v] += m.values[a] * values[a].values[v];
          }
        }
      }
    }
    x += V * work.kStride;
    factors += transposed ? V * work.side : V;
  }
}

// Elements (i + e, j + f) of sum g x^T, and of sum g, that a thread adds over some positions of its tiles.
template <typename W>
class OuterSum {
  using A = typename W::A;

 public:
  __device__ explicit OuterSum(const W& work) : cells_(cells(work)), splits_(splits(work, blockDim.x)) {
    const unsigned cell = threadIdx.x % cells_;
    split_ = threadIdx.x / cells_;
    i_ = cell % (work.side / kEdge) * kEdge;
    j_ = cell / (work.side / kEdge) * kEdge;
  }

  // Bytes that write() needs.
  static int64_t scratch_bytes(const W& work) {
    return int64_t{splits(work, work.threads())} * work.channels * (work.channels + 1) * sizeof(A);
  }

  __device__ void add(const W& work, const A* g, const A* x) {
    constexpr unsigned V = W::V;
    using Vector = detail::Registers<A, V>;
    if (split_ >= splits_) return;
#pragma unroll 1
    for (unsigned column = split_ * V; column < work.positions(); column += splits_ * V) {
      const A *const rows = g + work.at(i_, column), *const columns = x + work.at(j_, column);
      Vector left[kEdge];
#pragma unroll
      for (unsigned e = 0; e < kEdge; ++e) detail::copy<V>(left[e].values, rows + e * W::kStride);
#pragma unroll
      for (unsigned f = 0; f < kEdge; ++f) {
        Vector right;
        detail::copy<V>(right.values, columns + f * W::kStride);
#pragma unroll
        for (unsigned e = 0; e < kEdge; ++e) {
#pragma unroll
          for (unsigned v = 0; v < V; ++v) matrix_[e][f] += left[e].values[v] * right.values[v];
        }
      }
      if (j_ == 0) {
#pragma unroll
        for (unsigned e = 0; e < kEdge; ++e) {
#pragma unroll
          for (unsigned v = 0; v < V; ++v) shift_[e] += left[e].values[v];
        }
      }
    }
  }

  // Adds what the threads have and writes it to `parts`: C x C, then C. Nobody else may use `scratch`, shared memory.
  __device__ void write(const W& work, A* scratch, A* parts) const {
    const unsigned channels = work.channels, size = channels * (channels + 1);
    if (split_ < splits_) {
      A* const own = scratch + split_ * size;
#pragma unroll
      for (unsigned e = 0; e < kEdge; ++e) {
        if (i_ + e >= channels) continue;
        if (j_ == 0) own[channels * channels + i_ + e] = shift_[e];
#pragma unroll
        for (unsigned f = 0; f < kEdge; ++f) {
          if (j_ + f < channels) own[(i_ + e) * channels + j_ + f] = matrix_[e][f];
        }
      }
    }
    __syncthreads();
    for (unsigned index = threadIdx.x; index < size; index += blockDim.x) {
      A sum = 0;
      for (unsigned split = 0; split < splits_; ++split) sum += scratch[split * size + index];
      parts[index] = sum;
    }
  }

 private:
  static constexpr unsigned kEdge = kManyRows / 2;
  static __host__ __device__ unsigned cells(const W& work) { return work.side / kEdge * (work.side / kEdge); }
  // Threads that share the positions for the same elements.
  static __host__ __device__ unsigned splits(const W& work, unsigned threads) {
    const unsigned all = threads / cells(work), most = work.positions() / W::V;
    return all < most ? all : most;
  }

  unsigned cells_, splits_, split_, i_, j_;
  A matrix_[kEdge][kEdge] = {}, shift_[kEdge] = {};
};

// All matrices are C x C, row by row.
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
  load_matrix(arguments.matrix, arguments.shift, work, matrix);
  load_tile(arguments.x, work, span, x);
  wait_for_copies();
  __syncthreads();
  multiply<false>(work, matrix, x, total);
  store_tile(arguments.z, work, span, total, x);
}

template <typename T, unsigned R>
struct Backward {
  using A = compute_t<T>;
  Work<A, R> work;
  unsigned tiles = 0;
  Positions<const T> grad = {}, data = {};  // g, and x, or z for the reversible backward
  const A* matrix = nullptr;                // M
  const A* inverse = nullptr;               // M^-1, and the shift of x = M^-1 z + shift; null unless reversible
  const A* inverse_shift = nullptr;
  Positions<T> x = {};       // of the reversible backward
  Positions<T> grad_x = {};  // M^T g; null if it is not wanted
  A* parts = nullptr;        // sum g x^T and sum g of every block
};

// Every gridDim.x-th tile. Of large tensors, M and its inverse take turns in shared memory.
template <typename T, unsigned R>
__global__ void __launch_bounds__(kMaxThreads, sizeof(compute_t<T>) == 8 ? 1 : 2)
    backward_kernel(const Backward<T, R> arguments) {
  using A = compute_t<T>;
  using W = Work<A, R>;
  const W& work = arguments.work;
  GLOW_KERNELS_DYNAMIC_SHARED(A, x);
  A *const g = x + work.tile_size(), *const matrix = g + work.tile_size();
  A* const inverse = W::kSmall ? matrix + work.matrix_size() : matrix;
  const bool reversible = arguments.inverse != nullptr;
  const A* const no_shift = nullptr;
  OuterSum<W> sums(work);
  if (W::kSmall || !reversible) load_matrix(arguments.matrix, no_shift, work, matrix);
  if (W::kSmall && reversible) load_matrix(arguments.inverse, arguments.inverse_shift, work, inverse);
  for (unsigned index = blockIdx.x; index < arguments.tiles; index += gridDim.x) {
    const Span span = work.span(index);
#pragma unroll 1  // the registers hold one tile on its way
    for (int input = 0; input < 2; ++input) {
      const Positions<const T> from = input == 0 ? arguments.data : arguments.grad;
      load_tile(from, work, span, input == 0 ? x : g);
    }
    if (!W::kSmall && reversible) load_matrix(arguments.inverse, arguments.inverse_shift, work, inverse);
    wait_for_copies();
    __syncthreads();
    if (reversible) {
      typename W::Values total;
      multiply<false>(work, inverse, x, total);
      __syncthreads();
      put_tile(work, total, x);
      if (!W::kSmall) load_matrix(arguments.matrix, no_shift, work, matrix);
      store_tile(arguments.x, work, span, total, x);
      wait_for_copies();
      __syncthreads();
    }
    sums.add(work, g, x);
    if (arguments.grad_x.data != nullptr) {
      typename W::Values total;
      multiply<true>(work, matrix, g, total);
      store_tile(arguments.grad_x, work, span, total, g);
    }
    __syncthreads();
  }
  sums.write(work, x, arguments.parts + int64_t{blockIdx.x} * work.channels * (work.channels + 1));
}

void check(const Tensor& x, const Tensor& matrix) {
  STD_TORCH_CHECK(x.dim() >= 2, "x must be (B, C, *spatial)");
  const int64_t channels = x.size(1);
  const int64_t most = x.scalar_type() == ScalarType::Double ? kMaxChannels<double> : kMaxChannels<float>;
  STD_TORCH_CHECK(channels >= 1 && channels <= most, "the native backend takes 1 to ", most,
                  " channels of this type on a GPU, got ", channels);
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == channels && matrix.size(1) == channels,
                  "matrix must be (C, C)");
}

// Calls f(work): with few channels a thread where many would leave a multiprocessor less than two blocks.
template <typename A, typename F>
void with_work(const Launcher& launch, const Tensor& x, const F& f) {
  const int64_t multiprocessors = launch.multiprocessors();
  const Work<A, kManyRows> large(x, multiprocessors);
  if (large.tiles() < 2 * multiprocessors) {
    f(Work<A, kFewRows>(x, multiprocessors));
  } else {
    f(large);
  }
}

Tensor apply(const Tensor& x_any, const Tensor& matrix_any, const Tensor& shift_any) {
  check(x_any, matrix_any);
  const Launcher launch(x_any);
  const Tensor x = with_planes(x_any), matrix = as_contiguous(matrix_any), shift = as_contiguous(shift_any);
  Tensor z = empty_output(x_any);
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
    STD_TORCH_CHECK(tiles < (int64_t{1} << 31), "the tensor is too large");
    const int64_t blocks = std::min(tiles, launch.resident_blocks(bytes, 3));
    Tensor parts = empty_vector(blocks * channels * (channels + 1), grad_matrix.scalar_type(), like);
    Backward<T, R> arguments{work};
    arguments.tiles = static_cast<unsigned>(tiles);
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

std::tuple<Tensor, Tensor, Tensor, Tensor> reversible_backward(const Tensor& grad_any, const Tensor& z_any,
                                                               const Tensor& matrix_any, const Tensor& inverse_any,
                                                               const Tensor& inverse_shift_any) {
  check(z_any, matrix_any);
  check(z_any, inverse_any);
  const Launcher launch(z_any);
  const Tensor grad = with_planes(grad_any), z = with_planes(z_any), matrix = as_contiguous(matrix_any);
  const Tensor inverse = as_contiguous(inverse_any), inverse_shift = as_contiguous(inverse_shift_any);
  Tensor x = empty_output(z_any), grad_x = empty_output(z_any);
  Tensor grad_matrix = torch::stable::empty(matrix.sizes(), matrix.scalar_type(), std::nullopt, z.device());
  Tensor grad_shift = empty_vector(z.size(1), matrix.scalar_type(), z);
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

}  // namespace

GLOW_KERNELS_CUDA_LIBRARY(m) {
  m.impl("actnorm_conv1x1_apply_native", TORCH_BOX(&apply));
  m.impl("actnorm_conv1x1_apply_backward_native", TORCH_BOX(&backward));
  m.impl("actnorm_conv1x1_apply_reversible_backward_native", TORCH_BOX(&reversible_backward));
}

}  // namespace glow_kernels
