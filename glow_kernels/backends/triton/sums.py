"""The second stage of every reduction: sums of partial results in a fixed order, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glow_kernels.backends.triton.launch import launch, power_of_two


def sum_rows(partial: Tensor) -> Tensor:
    """Sums (rows,) of contiguous partial results (rows, n), n at least 1."""
    rows, n = partial.shape
    if n == 1:
        return partial.view(rows)
    total = torch.empty(rows, dtype=partial.dtype, device=partial.device)
    block = min(power_of_two(n), 1024)
    launch(_sum_rows_kernel, rows, partial, partial, total, n, BLOCK=block, num_warps=max(1, min(4, block // 64)))
    return total


@triton.jit
def _sum_rows_kernel(partial_ptr, total_ptr, n, BLOCK: tl.constexpr):
    """Reads every partial result once, writes one sum per program."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    start = partial_ptr + row.to(tl.int64) * n
    total = tl.zeros((BLOCK,), partial_ptr.dtype.element_ty)
    for first in range(0, n, BLOCK):
        total += tl.load(start + first + columns, first + columns < n, other=0.0)
    tl.store(total_ptr + row, tl.sum(total))
