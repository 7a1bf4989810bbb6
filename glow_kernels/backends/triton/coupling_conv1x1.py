"""Triton's ``coupling_conv1x1``; the mathematics is in ``glow_kernels.ops.coupling_conv1x1``.

A program holds all channels of a tile of positions, so each kernel reads and writes every element once:

===========  ===========  ============
kernel       reads        writes
===========  ===========  ============
forward      z, h         next z
backward     g, z, h      dz, dh
===========  ===========  ============

as well as the matrix. The forward writes ``sum log s`` of every 16 positions of a sample, the backward partial sums of
``dM`` and ``dv`` over a share of the positions; a second, tiny kernel sums these in a fixed order. With more than 16
channels, a program of the backward computes the sums of 16 of them; the programs of the other channels find the same
tile of g in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format
from glow_kernels.backends.triton.actnorm_conv1x1 import partial_sums, parts_of, precision, total_sums
from glow_kernels.backends.triton.affine_coupling import compiled_options
from glow_kernels.backends.triton.coupling_linear_kernels import coupled_apply_kernel, coupled_backward_kernel
from glow_kernels.backends.triton.launch import (
    Rows,
    is_channels_last,
    launch,
    power_of_two,
    rows_of,
    strided,
    vector,
    vector_of_pairs,
)
from glow_kernels.backends.triton.sums import sum_partial

# Number of positions over which a program sums ``log s``; every tile has a multiple of it.
_GROUP = 16


def forward(
    z: Tensor,
    h: Tensor,
    matrix: Tensor,
    shift: Tensor,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> tuple[Tensor, Tensor]:
    """``M [z1, y] + v`` like z, and ``log_det`` (B,) of z2 -> y."""
    result = torch.empty_like(z, memory_format=output_format(z))
    if z.numel() == 0:
        return result, z.new_zeros(z.shape[0], dtype=compute_dtype(z))
    rows = _rows_of("coupling", (z, result), (h,), layout)
    data, out, conditions = rows.planes
    positions = math.prod(z.shape[2:])
    # No group may have positions of two samples.
    group = _GROUP if positions % _GROUP == 0 and rows.options["VECTOR"] > 1 else 1
    partial = matrix.new_empty(z.shape[0], positions // group)
    launch(
        coupled_apply_kernel,
        rows.tiles,
        z,
        *(*strided(data, conditions, out), partial, *strided(shift, matrix)),
        *_sizes(rows, h),
        **compiled_options(kind, scale_parameters, layout, order),
        PRECISION=precision(matrix),
        GROUP=group,
        **rows.options,
        ALL_REGISTERS=True,
    )
    return result, sum_partial(partial, 1)


def backward(
    grad: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    h: Tensor,
    matrix: Tensor,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` in z, h, matrix and shift."""
    grad_z = torch.empty_like(z, memory_format=output_format(z))
    grad_h = torch.empty_like(h, memory_format=output_format(h))
    if z.numel() == 0:
        return grad_z, grad_h, matrix.new_zeros(matrix.shape), matrix.new_zeros(len(matrix))
    rows = _rows_of("coupling_backward", (z, grad, grad_z), (h, grad_h), layout)
    data, g, dz, conditions, dh = rows.planes
    blocks = rows.options["BLOCKS"]
    partial = partial_sums(rows, matrix, blocks, resident=2)
    launch(
        coupled_backward_kernel,
        len(partial) * blocks,
        z,
        *(*strided(g, data, conditions), grad_log_det, grad_log_det.stride(0)),
        *(*strided(dz, dh), partial, *strided(matrix)),
        *(*_sizes(rows, h), math.prod(z.shape[2:])),
        **compiled_options(kind, scale_parameters, layout, order),
        PRECISION=precision(matrix),
        PARTS=parts_of(rows),
        **rows.options,
        ALL_REGISTERS=True,
    )
    return grad_z, grad_h, *total_sums(partial, matrix)


def _rows_of(family: str, data: Sequence[Tensor], conditions: Sequence[Tensor], layout: str) -> Rows:
    """Tiles of all channels, in blocks of 16."""
    channels = data[0].shape[1]
    block_c = max(16, power_of_two(channels))
    rows = rows_of(f"{family}_{block_c}", (*data, *conditions), block_c)
    options: dict[str, Any] = {name: value for name, value in rows.options.items() if name != "BLOCK_C"}
    options["BLOCKS"] = -(-channels // 16)
    options |= _vectors(rows, len(data), layout)
    # Without vectors, addresses need more registers, and so does channels-last data: more warps share the sums.
    if options["VECTOR"] == 1 or options["CHANNELS_LAST"]:
        options["num_warps"] *= 2
    # Channels-last: tiles large enough for a whole vector of channels per thread, or for half a vector if the sums of
    # 48 channels leave too few registers.
    if options["CHANNELS_LAST"] and (family == "coupling" or options["BLOCKS"] < 3):
        options["BLOCK_P"] *= 2
    return Rows(rows.planes, rows.count, options)


def _vectors(rows: Rows, of_data: int, layout: str) -> dict[str, Any]:
    """How the first ``of_data`` planes (the data) and those of ``h`` are addressed: all in vectors, or none."""
    data, conditions = rows.planes[:of_data], rows.planes[of_data:]
    channels_last, h_channels_last = is_channels_last(data[0]), is_channels_last(conditions[0])
    width = h_width = rows.options["VECTOR"]
    if h_channels_last:
        _, channels, positions = data[0].shape
        width = vector(data, channels if channels_last else positions, channels_last)
        # A vector must begin at the first transformed channel.
        pairs = math.gcd(channels, conditions[0].shape[1] // 2)
        h_width = vector_of_pairs(conditions, pairs, layout.startswith("interleaved"))
    if min(width, h_width) == 1:
        return {"CHANNELS_LAST": False, "VECTOR": 1, "H_CHANNELS_LAST": False, "H_VECTOR": 1}
    return {"CHANNELS_LAST": channels_last, "VECTOR": width, "H_CHANNELS_LAST": h_channels_last, "H_VECTOR": h_width}


def _sizes(rows: Rows, h: Tensor) -> tuple[int, int, int, int]:
    """Numbers of channels, of channels that the coupling does not change, of positions, and of rows."""
    _, channels, positions = rows.planes[0].shape
    return channels, channels - h.shape[1] // 2, positions, rows.count
