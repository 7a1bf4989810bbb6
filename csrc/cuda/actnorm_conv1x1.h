// What the kernels of the linear map share, whether it is folded beforehand or in the same launch.
#pragma once

#include <tuple>

#include "cuda/actnorm_conv1x1_products.h"
#include "cuda/actnorm_conv1x1_tile.h"
#include "cuda/launch.h"

namespace glow_kernels::linear {

template <typename T, unsigned R>
struct Backward {
  using A = compute_t<T>;
  Work<A, R> work;
  unsigned tiles = 0;
  Positions<const T> grad = {}, data = {};  // g, and x (z in the reversible backward)
  const A* matrix = nullptr;                // M, unless the kernel folds it
  const A* inverse = nullptr;               // M^-1, and the shift of x = M^-1 z + shift; null unless reversible
  const A* inverse_shift = nullptr;
  Positions<T> x = {};       // written by the reversible backward only
  Positions<T> grad_x = {};  // M^T g; null if it is not wanted
  A* parts = nullptr;        // sum g x^T and sum g of every block
};

// Processes the tiles from `first` on, every `step`-th. Tiles of g and x, M and its inverse are in shared memory; for
// large tensors M and its inverse take turns at one place.
template <typename T, unsigned R, typename A = compute_t<T>>
__device__ void backward_tiles(const Backward<T, R>& arguments, bool reversible, unsigned first, unsigned step, A* x,
                               A* g, A* matrix, A* inverse, OuterSum<Work<A, R>>& sums) {
  using W = Work<A, R>;
  const W& work = arguments.work;
  const A* const no_shift = nullptr;
  for (unsigned index = first; index < arguments.tiles; index += step) {
    const Span span = work.span(index);
#pragma unroll 1  // the registers hold one tile in flight
    for (int input = 0; input < 2; ++input) {
      const Positions<const T> from = input == 0 ? arguments.data : arguments.grad;
      load_tile(from, work, span, input == 0 ? x : g);
    }
    if (!W::kSmall && reversible) load_matrix(arguments.inverse, arguments.inverse_shift, work.frame(), inverse);
    wait_for_copies();
    __syncthreads();
    if (reversible) {
      typename W::Values total;
      multiply<false>(work, inverse, x, total);
      __syncthreads();
      put_tile(work, total, x);
      if (!W::kSmall) load_matrix(arguments.matrix, no_shift, work.frame(), matrix);
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
}

inline void check_data(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "x must be (B, C, *spatial)");
  const int64_t channels = x.size(1);
  const int64_t most = x.scalar_type() == ScalarType::Double ? kMaxChannels<double> : kMaxChannels<float>;
  STD_TORCH_CHECK(channels >= 1 && channels <= most, "the native backend takes 1 to ", most,
                  " channels of this type on a GPU, got ", channels);
}

template <typename W>
unsigned tile_count(const W& work) {
  STD_TORCH_CHECK(work.tiles() < (int64_t{1} << 31), "the tensor is too large");
  return static_cast<unsigned>(work.tiles());
}

// Calls f(work), with few channels per thread if many would leave a multiprocessor fewer than two blocks.
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

// Returns, computed from z: x = M^-1 z + shift, M^T g, sum g x^T and sum g.
std::tuple<Tensor, Tensor, Tensor, Tensor> reversible_backward(const Tensor& grad, const Tensor& z,
                                                               const Tensor& matrix, const Tensor& inverse,
                                                               const Tensor& inverse_shift);

}  // namespace glow_kernels::linear
