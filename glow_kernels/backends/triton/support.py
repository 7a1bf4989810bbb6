"""Which arguments the Triton kernels take; a function for every operator. Importing this loads no Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype
from glow_kernels.backends.triton import INTERPRETED

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Channels of a matrix that a program inverts in its registers.
MAX_CHANNELS_OF_A_PROGRAM = 64


def actnorm_conv1x1(function: str, *args: Any) -> bool:
    """Any number of channels; the folding of many is left to the reference, which calls the library."""
    tensors = [tensor for tensor in args if isinstance(tensor, Tensor)]
    if not _on_device(*tensors):
        return False
    if function.startswith("apply"):
        x, matrix = args[1:3] if function.endswith("backward") else args[:2]
        return bool(matrix.dtype == compute_dtype(x))
    # The inverse of the reference waits for the device to say that a matrix is singular.
    return function == "fold_inverse" or tensors[0].shape[-1] <= MAX_CHANNELS_OF_A_PROGRAM


def affine_coupling(function: str, *args: Any) -> bool:
    """Every option."""
    return _on_device(*(tensor for tensor in args if isinstance(tensor, Tensor)))


def gaussian_log_prob(function: str, *args: Any) -> bool:
    """Both layouts."""
    return _on_device(*(tensor for tensor in args if isinstance(tensor, Tensor)))


def actnorm_statistics(function: str, x: Tensor) -> bool:
    """Every shape."""
    return _on_device(x)


def bias_relu(function: str, *args: Tensor) -> bool:
    """Every shape."""
    return _on_device(*args)


def scale_filters(function: str, *args: Any) -> bool:
    """Every shape."""
    return _on_device(*(tensor for tensor in args if isinstance(tensor, Tensor)))


def _on_device(*tensors: Tensor) -> bool:
    return all(
        tensor.dtype in _TYPES
        and tensor.layout == torch.strided
        and (tensor.device.type == "cuda" or (INTERPRETED and tensor.device.type == "cpu"))
        for tensor in tensors
    )
