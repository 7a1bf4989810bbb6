"""Triton's ``actnorm_conv1x1``; the mathematics is in ``glow_kernels.ops.actnorm_conv1x1``.

Folding is in ``folding.py``; this file is the pass over the data. With up to 64 channels, a program holds all channels
of a tile of positions, so each kernel reads and writes every element once:

===========================  =============  ==============
kernel                       reads          writes
===========================  =============  ==============
apply                        x              z
backward                     g, x           dx
sums                         g, x
reversible backward          g, z           x, dx
===========================  =============  ==============

as well as the matrices, and one partial sum of ``dM`` and ``dv`` per program. With more than 32 channels the sums fill
the registers, so ``x``, ``dx`` and the sums take one launch each. With more than 64 channels the matrix products are
limited by arithmetic: they run in blocks of 64 channels, which read the tiles of the input again from the cache.
float64 uses these kernels too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.numerics import output_format
from glow_kernels.backends.triton.folding import (
    fold,
    fold_backward,
    fold_inverse,
    fold_inverse_backward,
    lu_weight,
    lu_weight_backward,
)
from glow_kernels.backends.triton.launch import Rows, launch, multiprocessors, power_of_two, rows_of, strided
from glow_kernels.backends.triton.linear_kernels import (
    apply_kernel,
    backward_kernel,
    sums_kernel,
)
from glow_kernels.backends.triton.sums import sum_partial
from glow_kernels.backends.triton.wide_linear_kernels import wide_apply_kernel, wide_sums_kernel

__all__ = [
    "apply",
    "apply_backward",
    "apply_reversible_backward",
    "fold",
    "fold_backward",
    "fold_inverse",
    "fold_inverse_backward",
    "lu_weight",
    "lu_weight_backward",
]

# Most channels that a program can hold.
_BLOCK_C = 64


def apply(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """``z_p = M x_p + v`` at every position p of ``x`` (B, C, *spatial)."""
    result = torch.empty_like(x, memory_format=output_format(x))
    _linear(x, matrix, shift, result)
    return result


def apply_backward(grad: Tensor, x: Tensor, matrix: Tensor, needs_grad_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``apply``: ``M^T g`` (or nothing), ``sum g x^T``, ``sum g`` (sums over samples and positions)."""
    grad_x = torch.empty_like(x, memory_format=output_format(x)) if needs_grad_x else x.new_empty(0)
    if needs_grad_x and _fits_one_pass(x):
        return grad_x, *_one_pass(grad, x, matrix, None, None, grad_x, grad_x)
    if needs_grad_x:
        _linear(grad, matrix.mT, None, grad_x)
    return grad_x, *_sums(grad, x, matrix)


def apply_reversible_backward(
    grad: Tensor, z: Tensor, matrix: Tensor, inverse: Tensor, inverse_shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The input ``x = M^-1 z - b`` of ``apply`` and its gradients in x, matrix and shift."""
    x, grad_x = (torch.empty_like(z, memory_format=output_format(z)) for _ in range(2))
    if _fits_one_pass(z):
        return x, grad_x, *_one_pass(grad, z, matrix, inverse, inverse_shift, x, grad_x)
    # On an H100 the error of the sums was up to 1.4 times the tolerance if the narrow kernel computed x.
    _linear(z, inverse, inverse_shift, x, wide=True)
    _linear(grad, matrix.mT, None, grad_x)
    return x, grad_x, *_sums(grad, x, matrix)


def _one_pass(
    grad: Tensor,
    data: Tensor,
    matrix: Tensor,
    inverse: Tensor | None,
    inverse_shift: Tensor | None,
    undone: Tensor,
    grad_x: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write ``M^T g``, and ``M^-1 z - b`` given an inverse, in one pass; return the sums of ``apply_backward``."""
    rows = _rows_of("linear_backward", data, grad, undone, grad_x)
    x, g, input_, dx = rows.planes
    # Programs per multiprocessor that fit into the registers of an H100.
    resident = 2 if data.shape[1] > 16 else 4 if inverse is None else 3
    partial = partial_sums(rows, matrix, 1, resident)
    # A kernel without an inverse ignores these pointers.
    inverse_of, shift = (matrix, matrix[0]) if inverse is None or inverse_shift is None else (inverse, inverse_shift)
    launch(
        backward_kernel,
        len(partial),
        data,
        *(*strided(g, x), input_, *strided(dx), partial, *strided(shift, inverse_of, matrix)),
        *x.shape[1:],
        rows.count,
        UNDO=inverse is not None,
        PRECISION=precision(matrix),
        PARTS=parts_of(rows),
        **_in_blocks(rows, data),
        ALL_REGISTERS=True,
    )
    return total_sums(partial, matrix)


def _sums(grad: Tensor, x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``sum g x^T`` and ``sum g``."""
    if x.numel() == 0:
        return matrix.new_zeros(matrix.shape), matrix.new_zeros(len(matrix))
    in_registers = _in_registers(x)
    rows = _rows_of("linear_sums" if in_registers else "wide_sums", x, grad)
    data, g = rows.planes
    options = rows.options
    blocks = _tiles_c(rows, x) ** 2
    if in_registers:
        options = _in_blocks(rows, x)
        # With more blocks, registers hold only the sums for one block of channels of g.
        of_grad = options["BLOCKS"] if options["BLOCKS"] <= 2 else 1
        options |= {"PARTS": parts_of(rows), "ROWS": of_grad}
        blocks = options["BLOCKS"] // of_grad
    partial = partial_sums(rows, matrix, blocks, 3 if in_registers else 4)
    launch(
        sums_kernel if in_registers else wide_sums_kernel,
        len(partial) * blocks,
        x,
        *(*strided(g, data), partial),
        *data.shape[1:],
        rows.count,
        PRECISION=precision(matrix),
        **options,
        ALL_REGISTERS=True,
    )
    return total_sums(partial, matrix)


def _in_registers(x: Tensor) -> bool:
    """Whether a program holds all channels. Not in float64, which is not meant for speed and fits only some GPUs."""
    return x.shape[1] <= _BLOCK_C and x.dtype != torch.float64


def _fits_one_pass(x: Tensor) -> bool:
    # With more channels, the sums leave no registers for a product.
    return x.shape[1] <= 32 and _in_registers(x) and x.numel() > 0


def _linear(x: Tensor, matrix: Tensor, shift: Tensor | None, out: Tensor, wide: bool = False) -> None:
    """Write ``M x_p + shift`` to ``out``; ``wide`` forces the kernel for more than 64 channels."""
    if x.numel() == 0:
        return
    in_registers = _in_registers(x) and not wide
    rows = _rows_of("linear" if in_registers else "wide", x, out)
    data, result = rows.planes
    vector = matrix[0] if shift is None else shift  # ignored by a kernel without a shift
    launch(
        apply_kernel if in_registers else wide_apply_kernel,
        rows.tiles * (1 if in_registers else _tiles_c(rows, x)),
        x,
        *strided(data, result, vector, matrix),
        *data.shape[1:],
        rows.count,
        HAS_SHIFT=shift is not None,
        PRECISION=precision(matrix),
        **(_in_blocks(rows, x) if in_registers else rows.options),
        ALL_REGISTERS=True,
    )


def _rows_of(family: str, x: Tensor, *others: Tensor) -> Rows:
    # A dot product has at least 16 rows and columns.
    block_c = min(max(16, power_of_two(x.shape[1])), _BLOCK_C)
    return rows_of(f"{family}_{block_c}", (x, *others), block_c)


def _in_blocks(rows: Rows, x: Tensor) -> dict[str, Any]:
    """Options of a kernel that holds all channels in blocks of 16."""
    options = {name: value for name, value in rows.options.items() if name != "BLOCK_C"}
    blocks = -(-x.shape[1] // 16)
    # Without vectors, addresses need more registers; so does channels-last data with 2 blocks, that is 4 block sums.
    more = options["VECTOR"] == 1 or (options["CHANNELS_LAST"] and blocks == 2)
    return {**options, "BLOCKS": blocks, "num_warps": options["num_warps"] * (2 if more else 1)}


def parts_of(rows: Rows) -> int:
    """Number of warps that keep separate sums, each of at least 16 positions of a tile."""
    warps = int(rows.options["num_warps"]) // (2 if torch.version.hip else 1)
    return max(1, min(warps, int(rows.options["BLOCK_P"]) // 16))


def _tiles_c(rows: Rows, x: Tensor) -> int:
    return -(-x.shape[1] // int(rows.options["BLOCK_C"]))


def partial_sums(rows: Rows, matrix: Tensor, blocks: int, resident: int = 4) -> Tensor:
    """A buffer for partial sums over parts of the positions, as many as it takes to fill the device.

    Each part is ``blocks`` programs; ``resident`` programs fit on a multiprocessor at a time, and no more are started.
    """
    parts = min(rows.tiles, -(-resident * multiprocessors(matrix.device) // blocks))
    channels = matrix.shape[0]
    return matrix.new_empty(parts, channels * (channels + 1))


def total_sums(partial: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    total, size = sum_partial(partial, 0), matrix.numel()
    # Cloned since the results of an operator must not share memory.
    return total[:size].view(matrix.shape), total[size:].clone()


def precision(matrix: Tensor) -> str:
    # AMD's matrix cores compute in IEEE float32; NVIDIA's tensor cores reach its accuracy in three passes of TF32.
    # Ordinary arithmetic units would read every operand from shared memory.
    return "ieee" if torch.version.hip or matrix.dtype == torch.float64 else "tf32x3"
