"""The second stage of every reduction: sums of partial results in a fixed order, without atomics."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from glow_kernels.backends.triton.device_functions import kernel
from glow_kernels.backends.triton.launch import launch


def sum_partial(partial: Tensor, dimension: int) -> Tensor:
    """Sum of partial results, a contiguous matrix, over dimension 0 or 1."""
    if partial.shape[dimension] == 1:
        return partial.view(-1)
    total = torch.empty(partial.shape[1 - dimension], dtype=partial.dtype, device=partial.device)
    # A tile has at least 8 results, which fill a sector of memory. With many numbers to add, it has no more, so that it
    # holds more numbers and a program waits for memory fewer times; with few numbers, it has more results instead.
    block_n, block_r = (128, 8) if partial.shape[dimension] > 16 else (16, 64)
    launch(
        _sum_kernel,
        -(-total.numel() // block_r),
        partial,
        *(partial, partial.stride(dimension), partial.stride(1 - dimension), total),
        *(partial.shape[dimension], total.numel()),
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        num_warps=4,
    )
    return total


@kernel
def _sum_kernel(
    partial_ptr, stride_n, stride_r, total_ptr, n: tl.int32, results: tl.int32,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Reads every partial result once, writes every sum once."""
    columns = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_R), partial_ptr.dtype.element_ty)
    for first in range(0, n, BLOCK_N):
        at = (first + rows)[:, None] * stride_n + columns[None, :] * stride_r
        total += tl.load(partial_ptr + at, (first + rows < n)[:, None] & (columns < results)[None, :], other=0.0)
    tl.store(total_ptr + columns, tl.sum(total, 0), columns < results)
