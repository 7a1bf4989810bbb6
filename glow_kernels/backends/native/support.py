"""Which arguments the shared libraries support; one function per operator."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.native import cuda, isa
from glow_kernels.backends.numerics import compute_dtype, output_format, unpack_scale_filters_args

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Types of x and of h; in mixed precision x is normally float32 and h in half precision.
_TYPES_WITH_H = {
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
}
_TYPES_OF_FILTERS = {(torch.float32, torch.float32), (torch.float64, torch.float64)}
# kMaxChannels in csrc/cpu/actnorm_conv1x1_fold.h: larger matrices are left to BLAS and LAPACK.
_MAX_CHANNELS = 512
# kMaxFoldChannels and kMaxChannels in csrc/cuda; more channels in double do not fit into shared memory.
_MAX_FOLD_CHANNELS_ON_GPU = 384
_MAX_CHANNELS_ON_GPU = {torch.float64: 60}
# Functions of actnorm_conv1x1 that fold and apply in one call, and the index of the data among their arguments.
_IN_ONE_CALL = {"forward": 0, "inverse": 0, "backward": 2, "inverse_backward": 2, "reversible_backward": 2}


def affine_coupling(function: str, *args: Any) -> bool:
    """Everything except many short vectors."""
    x, h = args[2:4] if function.endswith("backward") else args[:2]
    return _has_tiles(x) and (x.dtype, h.dtype) in _TYPES_WITH_H and _takes("affine_coupling", function, x, h)


def actnorm_conv1x1(function: str, *args: Any) -> bool:
    """Everything except products of large or empty matrices.

    On a GPU, matrices of more than 64 channels are large: there the map is limited by arithmetic, at which cuBLAS is
    best, and reading the data only once no longer matters. Folding is supported for every size that occurs in flows.
    """
    if function in _IN_ONE_CALL:
        first = _IN_ONE_CALL[function]
        tensors = [tensor for tensor in args[first : first + 5] if tensor is not None]
        return _has_kernels_of_map(tensors[0]) and _takes("actnorm_conv1x1", function, *tensors)
    if function.startswith("apply"):
        x, matrix = args[1:3] if function.endswith("backward") else args[:2]
        fits = _has_kernels_of_map(x) and matrix.dtype == compute_dtype(x)
        return fits and _takes("actnorm_conv1x1", function, x, matrix)
    first = args[0]
    most = _MAX_FOLD_CHANNELS_ON_GPU if _runs_cuda_code(first) else _MAX_CHANNELS
    if first.dtype not in (torch.float32, torch.float64) or not 0 < first.shape[-1] <= most:
        return False
    tensors = [tensor for tensor in args if tensor is not None]
    for tensor in tensors:
        if tensor.dtype != first.dtype:
            return False
    return _takes("actnorm_conv1x1", function, *tensors)


def _has_kernels_of_map(x: Tensor) -> bool:
    """Whether the kernels of the linear map support the type and the number of channels of ``x``."""
    most = _MAX_CHANNELS_ON_GPU.get(x.dtype, 64) if _runs_cuda_code(x) else _MAX_CHANNELS
    return x.dtype in _TYPES and 0 < x.shape[1] <= most


def coupling_conv1x1(function: str, *args: Any) -> bool:
    """On CUDA only, for as many channels as the kernels of the linear map, and not in float64."""
    z, h, matrix = args[2:5] if function == "backward" else args[:3]
    types = (z.dtype, h.dtype)
    fits = types in _TYPES_WITH_H and z.dtype != torch.float64 and matrix.dtype == torch.float32 and z.shape[1] <= 64
    return fits and _takes("coupling_conv1x1", function, z, h, matrix)


def gaussian_log_prob(function: str, *args: Any) -> bool:
    """Everything except many short vectors."""
    z, h = args[1:3] if function.endswith("backward") else args[:2]
    return _has_tiles(z) and (z.dtype, h.dtype) in _TYPES_WITH_H and _takes("gaussian_log_prob", function, z, h)


def _has_tiles(x: Tensor) -> bool:
    """Whether ``x`` is not many short vectors; on the CPU each would be a tile, up to 20 times slower than PyTorch.

    While compiling, the number of vectors is not read, since a program may be compiled for any number.
    """
    short = x.dim() == 2 and x.shape[1] < 16 and (torch.compiler.is_compiling() or x.shape[0] >= 512)
    return not short or _runs_cuda_code(x)


def actnorm_statistics(function: str, x: Tensor) -> bool:
    """Every shape."""
    return x.dtype in _TYPES and _takes("actnorm_statistics", function, x)


def bias_relu(function: str, *args: Any) -> bool:
    """On CUDA only."""
    if function == "bias_backward":
        return args[0].dtype in _TYPES and _takes("bias_relu", function, args[0])
    if function == "pad":
        return (args[0].dtype, args[2]) in _TYPES_WITH_H and _takes("bias_relu", function, args[0])
    x, other = args[1::-1] if function == "backward" else args
    types = (x.dtype, other.dtype)
    fits = x.dtype in _TYPES and other.dtype == x.dtype if function == "backward" else types in _TYPES_WITH_H
    return fits and _takes("bias_relu", function, x, other)


def scale_filters(function: str, *args: Any) -> bool:
    """Dense filters with gradients in the same memory format; on the CPU no conversions, padding or partial sums."""
    grads, weights, biases, log_scales, types = unpack_scale_filters_args(function, args)
    if not _runs_cuda_code(weights[0]) and (types not in _TYPES_OF_FILTERS or _is_padded(function, args, grads)):
        return False
    if types not in _TYPES_WITH_H:
        return False
    for index, weight in enumerate(weights):
        format_ = output_format(weight)
        for tensor in (weight, *grads[2 * index : 2 * index + 1]):
            if not tensor.is_contiguous(memory_format=format_):
                return False
    return _takes("scale_filters", function, *grads, *weights, *biases, *log_scales)


def _is_padded(function: str, args: tuple[Any, ...], grads: list[Tensor]) -> bool:
    """Whether filters of ``scale_filters`` are padded with zeros, or the gradient of a bias is in partial sums."""
    if function == "forward_all":
        own = [size for weight in args[0] for size in weight.shape[:2]]
        return bool(own != args[5])
    if function == "backward_all":
        # Padding adds elements to a weight; partial sums add a dimension to a bias.
        for grad, of_bias, weight in zip(grads[::2], grads[1::2], args[1], strict=True):
            if grad.numel() != weight.numel() or of_bias.dim() != 1:
                return True
    return False


def _takes(module: str, function: str, *tensors: Tensor) -> bool:
    """Whether all are strided tensors, all on the CPU or all on a supported GPU, and the library has the operator."""
    # A plain loop: this runs at every call, and a generator would cost more than all the checks.
    on_cpu, strided = tensors[0].is_cpu, torch.strided
    for tensor in tensors:
        if tensor.is_cpu != on_cpu or tensor.layout is not strided:
            return False
    if on_cpu:
        return _has_kernel(module, function, "CPU")
    return tensors[0].is_cuda and cuda.takes(tensors[0].get_device()) and _has_kernel(module, function, "CUDA")


def _runs_cuda_code(x: Tensor) -> bool:
    """Whether code of csrc/cuda computes this: on a GPU, or on the CPU in the tests of tests/cuda_host."""
    return not x.is_cpu or _is_host_shim()


def _is_host_shim() -> bool:
    return isa() == "cuda host shim"


def _has_kernel(module: str, function: str, key: str) -> bool:
    """Whether the loaded library has a kernel of the operator for this dispatch key."""
    return _registered(module, function, key)


# Constants, which torch.compile need not trace. It would trace cached functions regardless of the attribute, hence the
# wrappers.
_is_host_shim._dynamo_marked_constant = True  # type: ignore[attr-defined]
_has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _registered(module: str, function: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"glow_kernels::{module}_{function}_native", key)
