// The linear map of actnorm_conv1x1 on the matrix units: large float32 tensors of many channels, which are more
// arithmetic than the ordinary units do while the memory delivers.
#pragma once

#include "cuda/launch.h"
#include "glow_kernels/tensors.h"

namespace glow_kernels {

// Where a tensor is one of those, these compute what the operators of actnorm_conv1x1.cu do, of tensors that have
// planes and contiguous matrices, and return true.
bool apply_wide(const Launcher& launch, const Tensor& x, const Tensor& matrix, const Tensor& shift, Tensor& z);

// grad_x may have no elements, for none.
bool backward_wide(const Launcher& launch, const Tensor& grad, const Tensor& x, const Tensor& matrix, Tensor& grad_x,
                   Tensor& grad_matrix, Tensor& grad_shift);

bool reversible_backward_wide(const Launcher& launch, const Tensor& grad, const Tensor& z, const Tensor& matrix,
                              const Tensor& inverse, const Tensor& inverse_shift, Tensor& x, Tensor& grad_x,
                              Tensor& grad_matrix, Tensor& grad_shift);

}  // namespace glow_kernels
