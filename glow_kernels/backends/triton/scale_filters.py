"""Triton kernels of ``scale_filters``; the mathematics stands in ``glow_kernels.ops.scale_filters``.

A filter lies in one piece of memory, in either memory format; a program covers a part of one, or all of it where it is
summed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format
from glow_kernels.backends.triton.device_functions import ARITHMETIC, exp, kernel, store
from glow_kernels.backends.triton.launch import launch


def forward(
    weight: Tensor, bias: Tensor, log_scale: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``exp(factor * log_scale)`` times weight and bias."""
    format_ = output_format(weight)
    scaled = torch.empty_like(weight, dtype=dtype, memory_format=format_)
    scaled_bias = weight.new_empty(weight.shape[0], dtype=dtype)
    filters, size = weight.shape[0], weight[:1].numel()
    if filters == 0:
        return scaled, scaled_bias
    options = _options(weight, factor)
    parts = max(1, -(-size // options["BLOCK"]))
    tensors = (weight.contiguous(memory_format=format_), bias.contiguous(), log_scale.contiguous())
    launch(_scale_kernel, filters * parts, weight, *tensors, scaled, scaled_bias, size, parts, **options)
    return scaled, scaled_bias


def backward(
    grad_weight: Tensor, grad_bias: Tensor, weight: Tensor, bias: Tensor, log_scale: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` in weight, bias and log_scale."""
    format_, compute = output_format(weight), compute_dtype(weight)
    result = torch.empty_like(weight, memory_format=format_)
    vectors = [weight.new_empty(weight.shape[0], dtype=compute) for _ in range(2)]
    filters, size = weight.shape[0], weight[:1].numel()
    if filters == 0:
        return result, vectors[0], vectors[1]
    grads = (grad_weight.contiguous(memory_format=format_), grad_bias.contiguous())
    tensors = (weight.contiguous(memory_format=format_), bias.contiguous(), log_scale.contiguous())
    args = (*grads, *tensors, result, *vectors, size)
    launch(_scale_backward_kernel, filters, weight, *args, **_options(weight, factor))
    return result, vectors[0], vectors[1]


def _options(weight: Tensor, factor: float) -> dict[str, Any]:
    # One warp for a filter of up to 28 channels and 3x3 positions, as the first convolutions have them.
    block = 256 if weight[:1].numel() <= 256 else 1024
    return {"FACTOR": factor, "DTYPE": ARITHMETIC[compute_dtype(weight)], "BLOCK": block, "num_warps": block // 256}


@kernel
def _scale_kernel(
    weight_ptr, bias_ptr, log_scale_ptr, scaled_ptr, scaled_bias_ptr, size: tl.int32, parts: tl.int32,
    FACTOR: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of a filter, and its bias with the first."""
    index = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    scale = exp(tl.load(log_scale_ptr + index).to(DTYPE) * FACTOR)
    at = part * BLOCK + tl.arange(0, BLOCK)
    start = index.to(tl.int64) * size
    weight = tl.load(weight_ptr + start + at, at < size, other=0.0).to(DTYPE)
    store(scaled_ptr + start + at, weight * scale, at < size)
    bias = tl.load(bias_ptr + index).to(DTYPE)
    store(scaled_bias_ptr + index, bias * scale, part == 0)


@kernel
def _scale_backward_kernel(
    grad_weight_ptr, grad_bias_ptr, weight_ptr, bias_ptr, log_scale_ptr,
    result_ptr, result_bias_ptr, result_log_scale_ptr, size: tl.int32,
    FACTOR: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A filter: reads it and its gradient once, writes the gradient once."""
    index = tl.program_id(0)
    scale = exp(tl.load(log_scale_ptr + index).to(DTYPE) * FACTOR)
    start = index.to(tl.int64) * size
    total = tl.zeros((BLOCK,), DTYPE)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        grad = tl.load(grad_weight_ptr + start + at, at < size, other=0.0).to(DTYPE) * scale
        weight = tl.load(weight_ptr + start + at, at < size, other=0.0).to(DTYPE)
        total += grad * weight
        store(result_ptr + start + at, grad, at < size)
    grad_bias = tl.load(grad_bias_ptr + index).to(DTYPE) * scale
    bias = tl.load(bias_ptr + index).to(DTYPE)
    tl.store(result_bias_ptr + index, grad_bias)
    tl.store(result_log_scale_ptr + index, FACTOR * (tl.sum(total) + grad_bias * bias))
