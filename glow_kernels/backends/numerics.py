"""Numerical conventions that every backend shares: accumulation types, memory formats, autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def compute_dtype(x: Tensor) -> torch.dtype:
    """Type of arithmetic and of log-determinants: float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """Type of C x C work (folding, inverses): float64 wherever the device supports it."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of ``x`` (B, C, *spatial) are adjacent in memory."""
    return not x.is_contiguous() and x.dim() in (4, 5) and x.shape[1] > 1 and x.stride(1) == 1


def output_format(x: Tensor) -> torch.memory_format:
    """Memory format of every output that has the shape of ``x``: channels last if ``x`` is, else contiguous."""
    if not is_channels_last(x):
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def empty_filters(weight: Tensor, count: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised filters (count, channels, *kernel) in the memory format of ``weight`` (O, I, *kernel)."""
    shape = (count, channels, *weight.shape[2:])
    return torch.empty(shape, dtype=dtype, device=weight.device, memory_format=output_format(weight))


def empty_padded(x: Tensor, channels: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Uninitialised data (B, channels, H, W) for ``x`` (B, C, H, W)."""
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((len(x), channels, *x.shape[2:]), dtype=dtype, device=x.device, memory_format=format_)


def unpack_scale_filters_args(
    function: str, args: tuple[Any, ...]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], tuple[torch.dtype, torch.dtype] | None]:
    """The tensors in a call of a function of ``scale_filters``: lists of gradients, weights, biases and log_scales.

    The last result holds the types of the weights and of the scaled weights; it is None if the types of other tensors
    do not match these.
    """
    if function == "forward":
        args = (*([arg] for arg in args[:4]), args[4])
    elif function == "backward":
        args = ([args[0], args[1]], *([arg] for arg in args[2:]))
    grads, weights, biases, log_scales = args[:4] if function.startswith("backward") else ([], *args[:3])
    dtype, scaled = weights[0].dtype, grads[0].dtype if grads else args[4]
    for index, grad in enumerate(grads):
        in_parts = index % 2 == 1 and grad.dim() == 2
        if (in_parts or grad.dtype != scaled) and (index % 2 == 0 or grad.dtype != compute_dtype(weights[0])):
            return grads, weights, biases, log_scales, None
    for tensor in (*weights, *biases, *log_scales):
        if tensor.dtype != dtype:
            return grads, weights, biases, log_scales, None
    return grads, weights, biases, log_scales, (dtype, scaled)


def is_autocast_enabled(device: str) -> bool:
    """Whether autocast is on for this type of device; never for meta, for which PyTorch would raise an error."""
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` with autocast off on the device of its first argument.

    The flow itself is never computed in half precision: a bfloat16 1x1 convolution raises the reconstruction error from
    1e-6 to 2e-2.
    """

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        device = args[0].device.type  # type: ignore[attr-defined]
        if not is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return guarded
