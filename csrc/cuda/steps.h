// The parameters of many steps in one call, float or double. All C x C work is in double, by a block for every step or
// by as many as there are layers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda/launch.h"
#include "cuda/small_matrix.h"
#include "glow_kernels/tensors.h"

namespace glow_kernels {

// More channels are left to the reference; support.py has the same limit.
constexpr int64_t kMaxFoldChannels = 384;

// For the tests on the CPU. On a GPU the check would wait for the device; callers get an inverse that is not finite.
template <typename A>
void check_invertible(const Tensor& inverse, int64_t n) {
  if (!inverse.is_cpu()) return;
  const A* const data = inverse.const_data_ptr<A>();
  const bool finite = std::all_of(data, data + inverse.numel(), [](A value) { return std::isfinite(value); });
  STD_TORCH_CHECK(finite, "weight must be invertible, got a singular (", n, ", ", n,
                  ") matrix, or parameters that are not finite");
}

// Parameters or gradients of all steps, float or double; all threads take the same branch on the type.
struct Input {
  const void* data = nullptr;
  bool is_double = false;

  // An element of the step of this block; a step has `size` elements.
  __device__ double operator()(int64_t size, int64_t index) const {
    index += blockIdx.x * size;
    return is_double ? static_cast<const double*>(data)[index]
                     : static_cast<double>(static_cast<const float*>(data)[index]);
  }

  // Calls f with a pointer to the elements of that step, for many loads in flight: the conversion above waits for each.
  template <typename F>
  __device__ void visit(int64_t size, const F& f) const {
    if (is_double) {
      f(static_cast<const double*>(data) + blockIdx.x * size);
    } else {
      f(static_cast<const float*>(data) + blockIdx.x * size);
    }
  }
};

struct Output {
  void* data = nullptr;
  bool is_double = false;

  __device__ void operator()(int64_t size, int64_t index, double value) const {
    index += blockIdx.x * size;
    if (is_double) {
      static_cast<double*>(data)[index] = value;
    } else {
      static_cast<float*>(data)[index] = static_cast<float>(value);
    }
  }
};

// The matrices (*K, C, C) of a call; keeps contiguous versions of its tensors alive.
class Steps {
 public:
  explicit Steps(const Tensor& matrix) : matrix_(matrix), count_(1), n_(matrix.size(-1)) {
    STD_TORCH_CHECK(matrix.dim() >= 2 && matrix.size(-2) == n_, "weight must be (*K, C, C)");
    STD_TORCH_CHECK(n_ >= 1 && n_ <= kMaxFoldChannels, "the native backend folds 1 to ", kMaxFoldChannels,
                    " channels on a GPU, got ", n_);
    const ScalarType type = matrix.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "parameters must be float32 or float64");
    for (int64_t dimension = 0; dimension < matrix.dim() - 2; ++dimension) count_ *= matrix.size(dimension);
  }

  unsigned n() const { return static_cast<unsigned>(n_); }

  // A tensor with `size` elements for every step.
  Input input(const Tensor& tensor, int64_t size) {
    STD_TORCH_CHECK(tensor.numel() == count_ * size && tensor.scalar_type() == matrix_.scalar_type(),
                    "the sizes or the types of the parameters do not agree");
    kept_.push_back(as_contiguous(tensor));
    return {kept_.back().const_data_ptr(), is_double()};
  }
  Output output(Tensor& tensor) const { return {tensor.mutable_data_ptr(), is_double()}; }
  Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes) const {
    return torch::stable::empty(sizes, matrix_.scalar_type(), std::nullopt, matrix_.device());
  }
  Tensor empty_scalars() const {
    const auto sizes = matrix_.sizes();
    return empty(std::vector<int64_t>(sizes.begin(), sizes.end() - 2));
  }
  // Memory for a double matrix per step.
  double* allocate_matrices() {
    kept_.push_back(empty_parts(count_ * n_ * n_, matrix_));
    return kept_.back().mutable_data_ptr<double>();
  }
  double* workspace() { return Elimination::fits(n_) ? nullptr : allocate_matrices(); }

  // Runs a kernel with this many doubles of shared memory, and what an elimination needs if it `eliminates`. Every step
  // has a block in each layer.
  template <typename A>
  void run(const Launcher& launch, void (*kernel)(A), const A& arguments, int64_t doubles, bool eliminates,
           int64_t layers = 1) const {
    const int64_t bytes = doubles * 8 + (eliminates ? Elimination::shared_bytes(n_) : 0);
    launch.layered(layers, count_, matrix_threads(n_), bytes, kernel, arguments);
  }

 private:
  bool is_double() const { return matrix_.scalar_type() == ScalarType::Double; }

  const Tensor& matrix_;
  int64_t count_, n_;
  std::vector<Tensor> kept_;
};

}  // namespace glow_kernels
