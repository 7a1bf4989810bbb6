"""Which arguments the Triton kernels support; one function per operator. Importing this loads no Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, unpack_scale_filters_args
from glow_kernels.backends.triton import INTERPRETED, version

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Types of the data and of h: the same, or those of a network under autocast.
_PAIRS = {(dtype, dtype) for dtype in _TYPES} | {(torch.float32, torch.bfloat16), (torch.float32, torch.float16)}
# Most channels of a matrix that a program inverts in registers.
MAX_CHANNELS_PER_PROGRAM = 64
# Most channels that a program couples, mixes and sums in registers; with more, the products are limited by arithmetic.
_MAX_CHANNELS_ACROSS_STEPS = 48
# Most elements of the data for which the operator across steps is faster than two, because it saves launches. On an
# H100 a forward and backward of 200,000 elements takes 20 us instead of 21, but one of 6 million 300 instead of 190.
_MAX_ELEMENTS_ACROSS_STEPS = 2**20
# Limit of what kernels count in 32 bits; addresses have 64.
_MAX_COUNT = 2**30
# The first Triton version that multiplies float64 matrices.
_MULTIPLIES_FLOAT64 = (3, 5)


def actnorm_conv1x1(function: str, *args: Any) -> bool:
    """Any number of channels except 0; folding many channels is left to the reference, which calls a library."""
    tensors = [tensor for tensor in args if isinstance(tensor, Tensor)]
    if not _on_device(*tensors):
        return False
    if function.startswith("apply"):
        x, matrix = args[1:3] if function.endswith("backward") else args[:2]
        if x.dtype == torch.float64 and version() < _MULTIPLIES_FLOAT64:
            return False
        return x.shape[1] > 0 and matrix.dtype == compute_dtype(x) and _countable(x)
    # Always take fold_inverse: the reference waits for the device to check for singular matrices.
    channels = tensors[0].shape[-1]
    return channels > 0 and (function == "fold_inverse" or channels <= MAX_CHANNELS_PER_PROGRAM)


def affine_coupling(function: str, *args: Any) -> bool:
    """Every option."""
    tensors = [tensor for tensor in args if isinstance(tensor, Tensor)]
    x, h = tensors[2:4] if function.endswith("backward") else tensors[:2]
    return _on_device(*tensors) and (x.dtype, h.dtype) in _PAIRS and _countable(h)


def coupling_conv1x1(function: str, *args: Any) -> bool:
    """Every option for up to 48 channels of float32 data, with h in float32 or bfloat16.

    Registers hold neither more channels nor float64, which is not meant for speed. Two operators are faster for data of
    many elements.
    """
    tensors = [tensor for tensor in args if isinstance(tensor, Tensor)]
    z, h, matrix = tensors[2:5] if function == "backward" else tensors[:3]
    return (
        _on_device(*tensors)
        and z.dtype == matrix.dtype == torch.float32
        and h.dtype in (torch.float32, torch.bfloat16)
        and z.shape[1] <= _MAX_CHANNELS_ACROSS_STEPS
        and z.numel() <= _MAX_ELEMENTS_ACROSS_STEPS
    )


def gaussian_log_prob(function: str, *args: Any) -> bool:
    """Both layouts."""
    tensors = [tensor for tensor in args if isinstance(tensor, Tensor)]
    x, h = tensors[1:3] if function.endswith("backward") else tensors[:2]
    return _on_device(*tensors) and (x.dtype, h.dtype) in _PAIRS and _countable(h)


def actnorm_statistics(function: str, x: Tensor) -> bool:
    """Every shape."""
    return _on_device(x) and _countable(x)


def bias_relu(function: str, *args: Any) -> bool:
    """Every shape."""
    if function == "bias_backward":
        return _on_device(args[0]) and _countable(args[0])
    if function == "pad":
        return _on_device(args[0]) and _countable(args[0]) and (args[0].dtype, args[2]) in _PAIRS
    x = args[1] if function == "backward" else args[0]
    bias_or_grad = args[0] if function == "backward" else args[1]
    return _on_device(*args[:2]) and (x.dtype, bias_or_grad.dtype) in _PAIRS and _countable(x)


def scale_filters(function: str, *args: Any) -> bool:
    """Every shape; biases and log_scales must have the type of the weights."""
    grads, weights, biases, log_scales, types = unpack_scale_filters_args(function, args)
    return (
        types in _PAIRS
        and _on_device(*grads, *weights, *biases, *log_scales)
        and all(_countable(weight) for weight in weights)
    )


def _countable(x: Tensor) -> bool:
    """Whether 32 bits can count the elements of a sample, and the positions of all samples."""
    samples, channels = x.shape[:2]
    return x.numel() < _MAX_COUNT * max(1, min(samples, channels))


def _on_device(*tensors: Tensor) -> bool:
    return all(
        tensor.dtype in _TYPES
        and tensor.layout == torch.strided
        and (tensor.device.type == "cuda" or (INTERPRETED and tensor.device.type == "cpu"))
        for tensor in tensors
    )
