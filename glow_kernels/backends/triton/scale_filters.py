"""Triton kernels of ``scale_filters``; the mathematics is in ``glow_kernels.ops.scale_filters``.

In either memory format, each filter is contiguous, and the filters of a convolution follow one another. The three
convolutions of a coupling network take one launch. Padding with zeros for more channels follows every row of a filter:
in channels last a row is the channels of one position, otherwise it is the whole filter.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, empty_filters, is_channels_last, output_format
from glow_kernels.backends.triton.device_functions import ARITHMETIC, exp, kernel, store
from glow_kernels.backends.triton.launch import launch

# BLOCK: elements that a program scales. In backward, a program sums FILTERS filters of up to NARROW elements at a time,
# or one larger filter in pieces of WIDE elements.
BLOCK = tl.constexpr(1024)
FILTERS = tl.constexpr(8)
NARROW = tl.constexpr(512)
WIDE = tl.constexpr(4096)
# Partial sums of the gradient of a bias that are added at a time.
PARTS = tl.constexpr(64)


def forward(
    weight: Tensor, bias: Tensor, log_scale: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``exp(factor * log_scale)`` times weight and bias."""
    scaled_weight, scaled_bias = forward_all([weight], [bias], [log_scale], [factor], dtype, [*weight.shape[:2]])
    return scaled_weight, scaled_bias


def forward_all(
    weights: list[Tensor],
    biases: list[Tensor],
    log_scales: list[Tensor],
    factors: list[float],
    dtype: torch.dtype,
    sizes: list[int],
) -> list[Tensor]:
    """``forward`` of several convolutions, padded with zeros to ``sizes``, two numbers for each."""
    results: list[Tensor] = []
    calls = []
    for weight, bias, log_scale, factor, count, channels in zip(
        weights, biases, log_scales, factors, sizes[::2], sizes[1::2], strict=True
    ):
        scaled = empty_filters(weight, count, channels, dtype)
        results += [scaled, weight.new_empty(count, dtype=dtype)]
        dense = weight.contiguous(memory_format=output_format(weight))
        programs = -(-max(count, scaled.numel()) // BLOCK.value)
        tensors = (dense, bias.contiguous(), log_scale.contiguous(), *results[-2:])
        calls.append((programs, *tensors, len(weight), count, *_rows(weight, scaled), factor))
    _launch(_scale_kernel, _scale_three_kernel, calls, weights[0], num_warps=4)
    return results


def backward(
    grad_weight: Tensor, grad_bias: Tensor, weight: Tensor, bias: Tensor, log_scale: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` in weight, bias and log_scale."""
    grads = backward_all([grad_weight, grad_bias], [weight], [bias], [log_scale], [factor])
    return grads[0], grads[1], grads[2]


def backward_all(
    grads: list[Tensor], weights: list[Tensor], biases: list[Tensor], log_scales: list[Tensor], factors: list[float]
) -> list[Tensor]:
    """``backward`` of several convolutions."""
    results: list[Tensor] = []
    calls = []
    for grad_weight, grad_bias, weight, bias, log_scale, factor in zip(
        grads[::2], grads[1::2], weights, biases, log_scales, factors, strict=True
    ):
        format_, count = output_format(weight), weight.shape[0]
        rows = _rows(weight, grad_weight)
        vectors = [weight.new_empty(count, dtype=compute_dtype(weight)) for _ in range(2)]
        results += [torch.empty_like(weight, memory_format=format_), *vectors]
        of_forward = (weight.contiguous(memory_format=format_), bias.contiguous(), log_scale.contiguous())
        # A training step has summed it in the type of arithmetic already; other types would need more kernel variants.
        of_bias = grad_bias.to(compute_dtype(weight)).contiguous()
        tensors = (grad_weight.contiguous(memory_format=format_), of_bias, *of_forward, *results[-3:])
        filters = FILTERS.value if rows[0] <= NARROW.value else 1
        parts = grad_bias.shape[0] if grad_bias.dim() == 2 else 1
        calls.append((-(-count // filters), *tensors, parts, grad_bias.shape[-1], count, *rows, factor))
    options = {"num_warps": 8, "ALL_REGISTERS": True}
    _launch(_scale_backward_kernel, _scale_backward_three_kernel, calls, weights[0], **options)
    return results


def _rows(weight: Tensor, padded: Tensor) -> tuple[int, int, int, int]:
    """Sizes of a filter and of its rows, and the same for the padded filters, which may have zeros after each row."""
    size, padded_size = weight[:1].numel(), padded[:1].numel()
    by_position = is_channels_last(weight)
    row, padded_row = (weight.shape[1], padded.shape[1]) if by_position else (size, padded_size)
    return size, row, padded_size, padded_row


def _launch(one: Any, three: Any, calls: list[tuple[Any, ...]], like: Tensor, **options: int) -> None:
    """Launch a kernel for every three convolutions; ``calls`` has the number of programs and the arguments of each."""
    for first in range(0, len(calls), 3):
        group = calls[first : first + 3]
        programs = sum(call[0] for call in group)
        if len(group) > 1:  # fill up the group with its first call and 0 programs
            group += [(0, *group[0][1:])] * (3 - len(group))
        if programs > 0:
            args = itertools.chain.from_iterable(group)
            dtype = ARITHMETIC[compute_dtype(like)]
            launch(one if len(group) == 1 else three, programs, like, *args, DTYPE=dtype, **options)


@triton.jit
def _scale(
    program, weight_ptr, bias_ptr, log_scale_ptr, scaled_ptr, scaled_bias_ptr, count, padded_count, size, row,
    padded_size, padded_row, factor, DTYPE: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of the concatenated results, and as many biases."""
    factor = tl.full((), factor, DTYPE)
    start = program.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    at = start + lane
    bias = tl.load(bias_ptr + at, at < count, other=0.0).to(DTYPE)
    log_scale = tl.load(log_scale_ptr + at, at < count, other=0.0).to(DTYPE)
    store(scaled_bias_ptr + at, bias * exp(log_scale * factor), at < padded_count)
    # 64 bits only for the first filter: every element divides, which is slow in 64 bits.
    width = tl.maximum(padded_size, 1)
    first = start // width
    in_filters = (start - first * width).to(tl.int32) + lane
    index = in_filters // width
    in_filter = in_filters - index * width
    in_rows = in_filter // tl.maximum(padded_row, 1)
    column = in_filter - in_rows * padded_row
    index = first + index
    inside = (index < count) & (column < row)
    log_scale = tl.load(log_scale_ptr + index, inside, other=0.0).to(DTYPE)
    weight = tl.load(weight_ptr + (index * size + (in_rows * row + column)), inside, other=0.0).to(DTYPE)
    store(scaled_ptr + at, weight * exp(log_scale * factor), at < padded_size.to(tl.int64) * padded_count)


@triton.jit
def _sum(
    program, grad_ptr, grad_bias_ptr, weight_ptr, bias_ptr, log_scale_ptr, result_ptr, result_bias_ptr,
    result_log_scale_ptr, parts, padded_count, count, size, row, padded_size, padded_row, factor, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over ROWS filters: reads them and their gradients once, writes the gradients once."""
    factor = tl.full((), factor, DTYPE)
    rows = program * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    scale = exp(tl.load(log_scale_ptr + rows, inside, other=0.0).to(DTYPE) * factor)
    bias = tl.load(bias_ptr + rows, inside, other=0.0).to(DTYPE)
    in_parts = tl.zeros((PARTS, ROWS), DTYPE)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = part.to(tl.int64)[:, None] * padded_count + rows[None, :]
        in_parts += tl.load(grad_bias_ptr + at, (part < parts)[:, None] & inside[None, :], other=0.0).to(DTYPE)
    grad_bias = tl.sum(in_parts, 0) * scale
    total = tl.zeros((ROWS, COLUMNS), DTYPE)
    for first in range(0, size, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (columns < size)[None, :]
        at = rows.to(tl.int64)[:, None] * size + columns[None, :]
        # The rows of the gradients may have another length.
        in_filter = columns + columns // tl.maximum(row, 1) * (padded_row - row)
        grad_at = rows.to(tl.int64)[:, None] * padded_size + in_filter[None, :]
        grad = tl.load(grad_ptr + grad_at, mask, other=0.0).to(DTYPE) * scale[:, None]
        weight = tl.load(weight_ptr + at, mask, other=0.0).to(DTYPE)
        total += grad * weight
        store(result_ptr + at, grad, mask)
    tl.store(result_bias_ptr + rows, grad_bias, inside)
    tl.store(result_log_scale_ptr + rows, factor * (tl.sum(total, 1) + grad_bias * bias), inside)


@triton.jit
def _scale_backward(
    program, grad_ptr, grad_bias_ptr, weight_ptr, bias_ptr, log_scale_ptr, result_ptr, result_bias_ptr,
    result_log_scale_ptr, parts, padded_count, count, size, row, padded_size, padded_row, factor, DTYPE: tl.constexpr,
):  # fmt: skip
    """Backward of FILTERS small filters, or of one large filter."""
    if size <= NARROW:
        _sum(
            program, grad_ptr, grad_bias_ptr, weight_ptr, bias_ptr, log_scale_ptr, result_ptr, result_bias_ptr,
            result_log_scale_ptr, parts, padded_count, count, size, row, padded_size, padded_row, factor, DTYPE,
            FILTERS, NARROW,
        )  # fmt: skip
    else:
        _sum(
            program, grad_ptr, grad_bias_ptr, weight_ptr, bias_ptr, log_scale_ptr, result_ptr, result_bias_ptr,
            result_log_scale_ptr, parts, padded_count, count, size, row, padded_size, padded_row, factor, DTYPE,
            1, WIDE,
        )  # fmt: skip


@kernel
def _scale_kernel(
    programs: tl.int32, weight_ptr, bias_ptr, log_scale_ptr, scaled_ptr, scaled_bias_ptr, count: tl.int32,
    padded_count: tl.int32, size: tl.int32, row: tl.int32, padded_size: tl.int32, padded_row: tl.int32,
    factor: tl.float64, DTYPE: tl.constexpr,
):  # fmt: skip
    """One convolution."""
    _scale(
        tl.program_id(0), weight_ptr, bias_ptr, log_scale_ptr, scaled_ptr, scaled_bias_ptr, count, padded_count, size,
        row, padded_size, padded_row, factor, DTYPE,
    )  # fmt: skip


@kernel
def _scale_three_kernel(
    programs_0: tl.int32, weight_0_ptr, bias_0_ptr, log_scale_0_ptr, scaled_0_ptr, scaled_bias_0_ptr,
    count_0: tl.int32, padded_count_0: tl.int32, size_0: tl.int32, row_0: tl.int32,
    padded_size_0: tl.int32, padded_row_0: tl.int32, factor_0: tl.float64,
    programs_1: tl.int32, weight_1_ptr, bias_1_ptr, log_scale_1_ptr, scaled_1_ptr, scaled_bias_1_ptr,
    count_1: tl.int32, padded_count_1: tl.int32, size_1: tl.int32, row_1: tl.int32,
    padded_size_1: tl.int32, padded_row_1: tl.int32, factor_1: tl.float64,
    programs_2: tl.int32, weight_2_ptr, bias_2_ptr, log_scale_2_ptr, scaled_2_ptr, scaled_bias_2_ptr,
    count_2: tl.int32, padded_count_2: tl.int32, size_2: tl.int32, row_2: tl.int32,
    padded_size_2: tl.int32, padded_row_2: tl.int32, factor_2: tl.float64,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Three convolutions."""
    program = tl.program_id(0)
    if program < programs_0:
        _scale(
            program, weight_0_ptr, bias_0_ptr, log_scale_0_ptr, scaled_0_ptr,
            scaled_bias_0_ptr, count_0, padded_count_0, size_0, row_0, padded_size_0, padded_row_0, factor_0,
            DTYPE,
        )  # fmt: skip
    elif program < programs_0 + programs_1:
        _scale(
            program - programs_0, weight_1_ptr, bias_1_ptr, log_scale_1_ptr, scaled_1_ptr,
            scaled_bias_1_ptr, count_1, padded_count_1, size_1, row_1, padded_size_1, padded_row_1, factor_1,
            DTYPE,
        )  # fmt: skip
    else:
        _scale(
            program - programs_0 - programs_1, weight_2_ptr, bias_2_ptr, log_scale_2_ptr, scaled_2_ptr,
            scaled_bias_2_ptr, count_2, padded_count_2, size_2, row_2, padded_size_2, padded_row_2, factor_2,
            DTYPE,
        )  # fmt: skip


@kernel
def _scale_backward_kernel(
    programs: tl.int32, grad_ptr, grad_bias_ptr, weight_ptr, bias_ptr, log_scale_ptr, result_ptr, result_bias_ptr,
    result_log_scale_ptr, parts: tl.int32, padded_count: tl.int32, count: tl.int32, size: tl.int32, row: tl.int32,
    padded_size: tl.int32, padded_row: tl.int32, factor: tl.float64, DTYPE: tl.constexpr,
):  # fmt: skip
    """One convolution."""
    _scale_backward(
        tl.program_id(0), grad_ptr, grad_bias_ptr, weight_ptr, bias_ptr, log_scale_ptr, result_ptr, result_bias_ptr,
        result_log_scale_ptr, parts, padded_count, count, size, row, padded_size, padded_row, factor, DTYPE,
    )  # fmt: skip


@kernel
def _scale_backward_three_kernel(
    programs_0: tl.int32, grad_0_ptr, grad_bias_0_ptr, weight_0_ptr, bias_0_ptr, log_scale_0_ptr,
    result_0_ptr, result_bias_0_ptr, result_log_scale_0_ptr,
    parts_0: tl.int32, padded_count_0: tl.int32, count_0: tl.int32, size_0: tl.int32, row_0: tl.int32,
    padded_size_0: tl.int32, padded_row_0: tl.int32, factor_0: tl.float64,
    programs_1: tl.int32, grad_1_ptr, grad_bias_1_ptr, weight_1_ptr, bias_1_ptr, log_scale_1_ptr,
    result_1_ptr, result_bias_1_ptr, result_log_scale_1_ptr,
    parts_1: tl.int32, padded_count_1: tl.int32, count_1: tl.int32, size_1: tl.int32, row_1: tl.int32,
    padded_size_1: tl.int32, padded_row_1: tl.int32, factor_1: tl.float64,
    programs_2: tl.int32, grad_2_ptr, grad_bias_2_ptr, weight_2_ptr, bias_2_ptr, log_scale_2_ptr,
    result_2_ptr, result_bias_2_ptr, result_log_scale_2_ptr,
    parts_2: tl.int32, padded_count_2: tl.int32, count_2: tl.int32, size_2: tl.int32, row_2: tl.int32,
    padded_size_2: tl.int32, padded_row_2: tl.int32, factor_2: tl.float64,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Three convolutions."""
    program = tl.program_id(0)
    if program < programs_0:
        _scale_backward(
            program, grad_0_ptr, grad_bias_0_ptr, weight_0_ptr, bias_0_ptr, log_scale_0_ptr,
            result_0_ptr, result_bias_0_ptr, result_log_scale_0_ptr,
            parts_0, padded_count_0, count_0, size_0, row_0, padded_size_0, padded_row_0,
            factor_0, DTYPE,
        )  # fmt: skip
    elif program < programs_0 + programs_1:
        _scale_backward(
            program - programs_0, grad_1_ptr, grad_bias_1_ptr, weight_1_ptr, bias_1_ptr, log_scale_1_ptr,
            result_1_ptr, result_bias_1_ptr, result_log_scale_1_ptr,
            parts_1, padded_count_1, count_1, size_1, row_1, padded_size_1, padded_row_1,
            factor_1, DTYPE,
        )  # fmt: skip
    else:
        _scale_backward(
            program - programs_0 - programs_1, grad_2_ptr, grad_bias_2_ptr, weight_2_ptr, bias_2_ptr, log_scale_2_ptr,
            result_2_ptr, result_bias_2_ptr, result_log_scale_2_ptr,
            parts_2, padded_count_2, count_2, size_2, row_2, padded_size_2, padded_row_2,
            factor_2, DTYPE,
        )  # fmt: skip
