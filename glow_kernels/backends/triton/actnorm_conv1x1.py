"""Triton's ``actnorm_conv1x1``; the mathematics stands in ``glow_kernels.ops.actnorm_conv1x1``.

The folding stands in ``folding.py``; here is the pass over the data. Up to 64 channels a program holds all channels of
a tile of positions, so each kernel reads and writes every element once:

===========================  =============  ==============
kernel                       reads          writes
===========================  =============  ==============
apply                        x              z
backward                     g, x           dx
backward without dx          g, x
reversible backward          g, z           x, dx
===========================  =============  ==============

and the matrices, and one partial sum of ``dM`` and ``dv`` per program; the backwards find ``g`` once more in the cache.
More channels are matrix products, limited by arithmetic: in blocks of 64 channels, whose tiles of the input the cache
serves again, and a launch for each of ``z`` or ``x``, ``dx`` and the sums; so are the backwards in float64.
"""

from __future__ import annotations

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

# Channels of a block of a product: what a program can hold together with the sums over its positions.
_BLOCK_C = 64


def apply(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """``z_p = M x_p + v`` at every position p of ``x`` (B, C, *spatial)."""
    result = torch.empty_like(x, memory_format=output_format(x))
    _linear(x, matrix, shift, result)
    return result


def apply_backward(grad: Tensor, x: Tensor, matrix: Tensor, needs_grad_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``apply``: ``M^T g`` (or nothing), ``sum g x^T``, ``sum g`` (sums over samples and positions)."""
    grad_x = torch.empty_like(x, memory_format=output_format(x)) if needs_grad_x else x.new_empty(0)
    if not (needs_grad_x and _fits_one_pass(x)):
        if needs_grad_x:
            _linear(grad, matrix.mT, None, grad_x)
        return grad_x, *_sums(grad, x, matrix)
    return grad_x, *_gradients(grad, x, matrix, None, None, grad_x, grad_x)


def apply_reversible_backward(
    grad: Tensor, z: Tensor, matrix: Tensor, inverse: Tensor, inverse_shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The input ``x = M^-1 z - b`` of ``apply`` and its gradients in x, matrix and shift."""
    x, grad_x = (torch.empty_like(z, memory_format=output_format(z)) for _ in range(2))
    if not _fits_one_pass(z):
        _linear(z, inverse, inverse_shift, x)
        _linear(grad, matrix.mT, None, grad_x)
        return x, grad_x, *_sums(grad, x, matrix)
    return x, grad_x, *_gradients(grad, z, matrix, inverse, inverse_shift, x, grad_x)


def _gradients(
    grad: Tensor,
    data: Tensor,
    matrix: Tensor,
    inverse: Tensor | None,
    inverse_shift: Tensor | None,
    undone: Tensor,
    grad_x: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write ``M^T g``, and ``M^-1 z - b`` if there is an inverse, in one pass; sums as of ``apply_backward``."""
    rows = _rows_of("linear_backward", data, grad, undone, grad_x)
    x, g, input_, dx = rows.planes
    partial = _partial_sums(rows, matrix, blocks=1)
    # A kernel without an inverse does not touch it.
    inverse_of, shift = (matrix, matrix[0]) if inverse is None or inverse_shift is None else (inverse, inverse_shift)
    launch(
        backward_kernel,
        len(partial),
        data,
        *(*strided(g, x), input_, *strided(dx), partial, *strided(shift, inverse_of, matrix)),
        *x.shape[1:],
        rows.count,
        **rows.options,
        UNDO=inverse is not None,
        PRECISION=_precision(matrix, rows),
        SUM_PRECISION=_sum_precision(matrix),
        ALL_REGISTERS=True,
    )
    return _total(partial, matrix)


def _fits_one_pass(x: Tensor) -> bool:
    # In float64, which is not for speed, the registers of some GPUs hold too little.
    return x.shape[1] <= _BLOCK_C and x.dtype != torch.float64 and x.numel() > 0


def _linear(x: Tensor, matrix: Tensor, shift: Tensor | None, out: Tensor) -> None:
    """Write ``M x_p + shift`` to ``out``."""
    if x.numel() == 0:
        return
    rows = _rows_of("linear", x, out)
    data, result = rows.planes
    vector = matrix[0] if shift is None else shift  # which a kernel without a shift does not touch
    launch(
        apply_kernel,
        rows.tiles * _tiles_c(rows, x),
        x,
        *strided(data, result, vector, matrix),
        *data.shape[1:],
        rows.count,
        **rows.options,
        HAS_SHIFT=shift is not None,
        PRECISION=_precision(matrix, rows),
        # Fewer are limited by memory, which wants many threads.
        ALL_REGISTERS=rows.options["BLOCK_C"] == _BLOCK_C,
    )


def _sums(grad: Tensor, x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``sum g x^T`` and ``sum g``."""
    channels = x.shape[1]
    if x.numel() == 0:
        return matrix.new_zeros(channels, channels), matrix.new_zeros(channels)
    rows = _rows_of("linear_sums", x, grad)
    data, g = rows.planes
    blocks = _tiles_c(rows, x) ** 2
    partial = _partial_sums(rows, matrix, blocks)
    launch(
        sums_kernel,
        len(partial) * blocks,
        x,
        *(*strided(g, data), partial),
        *data.shape[1:],
        rows.count,
        **rows.options,
        PRECISION=_sum_precision(matrix),
        ALL_REGISTERS=True,
    )
    return _total(partial, matrix)


def _rows_of(family: str, x: Tensor, *others: Tensor) -> Rows:
    # A dot product has at least 16 rows and columns.
    block_c = min(max(16, power_of_two(x.shape[1])), _BLOCK_C)
    return rows_of(f"{family}_{block_c}", (x, *others), block_c)


def _tiles_c(rows: Rows, x: Tensor) -> int:
    return -(-x.shape[1] // int(rows.options["BLOCK_C"]))


def _partial_sums(rows: Rows, matrix: Tensor, blocks: int) -> Tensor:
    """Room for the sums of so many parts of the positions that all blocks of them fill the device."""
    parts = min(rows.tiles, -(-4 * multiprocessors(matrix.device) // blocks))
    channels = matrix.shape[0]
    return matrix.new_empty(parts, channels * (channels + 1))


def _total(partial: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    total, size = sum_partial(partial, 0), matrix.numel()
    # Results of an operator share no memory.
    return total[:size].view(matrix.shape), total[size:].clone()


def _precision(matrix: Tensor, rows: Rows) -> str:
    # With 48 channels an H200 at its peak of float32 arithmetic takes longer than its memory; three passes of TF32 on
    # the matrix units take a third of that, and with that many terms they are no less accurate.
    return "ieee" if int(rows.options["BLOCK_C"]) < _BLOCK_C else _sum_precision(matrix)


def _sum_precision(matrix: Tensor) -> str:
    # AMD's matrix units have IEEE float32; NVIDIA's reach its accuracy in three passes of TF32.
    return "ieee" if torch.version.hip or matrix.dtype == torch.float64 else "tf32x3"
