// The linear map of actnorm_conv1x1 on tensor cores, for large float32 tensors of many channels, for which the ordinary
// units do not keep up with the memory.
#pragma once

#include <optional>

#include "cuda/actnorm_conv1x1_parameters.h"
#include "cuda/launch.h"
#include "glow_kernels/tensors.h"

namespace glow_kernels {

// For such a tensor, if a block has the shared memory, these compute what the operators of actnorm_conv1x1.cu do and
// return true; otherwise they return false. Tensors must have planes, and matrices must be contiguous.
bool apply_on_tensor_cores(const Launcher& launch, const Tensor& x, const Tensor& matrix, const Tensor& shift,
                           Tensor& z);

// grad_x has no elements if it is not wanted.
bool backward_on_tensor_cores(const Launcher& launch, const Tensor& grad, const Tensor& x, const Tensor& matrix,
                              Tensor& grad_x, Tensor& grad_matrix, Tensor& grad_shift);

bool reversible_backward_on_tensor_cores(const Launcher& launch, const Tensor& grad, const Tensor& z,
                                         const Tensor& matrix, const Tensor& inverse, const Tensor& inverse_shift,
                                         Tensor& x, Tensor& grad_x, Tensor& grad_matrix, Tensor& grad_shift);

// The same from the parameters of a step, as actnorm_conv1x1_step.cu does it.
bool forward_on_tensor_cores(const Launcher& launch, const Tensor& x, const linear::Parameters<float>& parameters,
                             Tensor& z, Tensor& log_det);

// Returns (sum g x^T)^T and sum g of every block, a row (C + 1, C) for each. `weight_inverse` is where W^-1 goes, or
// null.
std::optional<Tensor> folding_backward_on_tensor_cores(const Launcher& launch, const Tensor& grad, const Tensor& x,
                                                       const linear::Parameters<float>& parameters,
                                                       double* weight_inverse, Tensor& grad_x);

}  // namespace glow_kernels
