"""Triton's ``affine_coupling``; the mathematics stands in ``glow_kernels.ops.affine_coupling``.

A program covers one tile of one sample. It leaves what it adds to the log-determinant, and per channel to the gradient
of the learned gain, in buffers that a second, tiny kernel sums in a fixed order. Each element is read and written once:

========================  ===============================  =====================================
kernel                    reads per element of x           writes per element of x
========================  ===============================  =====================================
forward, inverse          x, 2 of h                        y
backward, inverse's too   g, y, 2 of h                     dx, 2 of dh
reversible backward       g, y, 2 of h                     x, dx, 2 of dh
========================  ===============================  =====================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format
from glow_kernels.backends.triton.affine_coupling_kernels import ORDERS, gradient_kernel, map_kernel
from glow_kernels.backends.triton.launch import Tile, elementwise_tile, launch, planes
from glow_kernels.backends.triton.sums import sum_partial


def forward(
    x: Tensor,
    h: Tensor,
    log_scale_gain: Tensor | None,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> tuple[Tensor, Tensor]:
    """``y`` like x and ``log_det`` (B,) of x -> y."""
    return _map(x, h, log_scale_gain, _options(kind, scale_parameters, layout, order), inverse=False)


def inverse(
    y: Tensor,
    h: Tensor,
    log_scale_gain: Tensor | None,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> tuple[Tensor, Tensor]:
    """``x`` like y and ``log_det`` (B,) of y -> x."""
    return _map(y, h, log_scale_gain, _options(kind, scale_parameters, layout, order), inverse=True)


def backward(
    grad: Tensor,
    grad_log_det: Tensor,
    y: Tensor,
    h: Tensor,
    log_scale_gain: Tensor | None,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` in x, h and log_scale_gain (empty if there is none)."""
    options = _options(kind, scale_parameters, layout, order)
    return _gradients(grad, grad_log_det, y, h, log_scale_gain, None, options, inverse=False)


def inverse_backward(
    grad: Tensor,
    grad_log_det: Tensor,
    x: Tensor,
    h: Tensor,
    log_scale_gain: Tensor | None,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``inverse`` in y, h and log_scale_gain (empty if there is none)."""
    options = _options(kind, scale_parameters, layout, order)
    return _gradients(grad, grad_log_det, x, h, log_scale_gain, None, options, inverse=True)


def reversible_backward(
    grad: Tensor,
    grad_log_det: Tensor,
    y: Tensor,
    h: Tensor,
    log_scale_gain: Tensor | None,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The input x of ``forward`` and the gradients in x, h and log_scale_gain (empty if there is none)."""
    x = torch.empty_like(y, memory_format=output_format(y))
    options = _options(kind, scale_parameters, layout, order)
    return x, *_gradients(grad, grad_log_det, y, h, log_scale_gain, x, options, inverse=False)


def _options(kind: str, parameters: Sequence[float], layout: str, order: str) -> dict[str, object]:
    """Compile-time arguments: a model has one or two such choices."""
    slope, offset, gain, floor, low, high = map(float, parameters)
    return {
        "KIND": kind,
        "SLOPE": slope,
        "OFFSET": offset,
        "GAIN": gain,
        "LOG_GAIN": math.log(gain) if kind == "sigmoid" else 0.0,
        "HAS_FLOOR": floor > 0.0,
        "LOG_FLOOR": math.log(floor) if floor > 0.0 else 0.0,
        "LOW": low,
        "HIGH": high,
        "INTERLEAVED": layout.startswith("interleaved"),
        "SCALE_FIRST": layout.endswith("scale_shift"),
        "ORDER": ORDERS[order],
    }


def _map(
    data: Tensor, h: Tensor, gain: Tensor | None, options: dict[str, object], inverse: bool
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(data)
    result = torch.empty_like(data, memory_format=output_format(data))
    if data.numel() == 0:
        return result, data.new_zeros(data.shape[0], dtype=dtype)
    x, conditions, out = planes(data), planes(h), planes(result)
    tile = elementwise_tile((x, out), (conditions,))
    partial = data.new_empty((tile.samples, tile.tiles), dtype=dtype)
    launch(
        map_kernel,
        tile.samples * tile.tiles,
        data,
        *(x, x.stride(), conditions, conditions.stride(), _gain(gain, data), out, out.stride(), partial),
        *x.shape[1:],
        **options,
        **tile.options,
        INVERSE=inverse,
        HAS_GAIN=gain is not None,
    )
    return result, sum_partial(partial, 1)


def _gradients(
    grad: Tensor,
    grad_log_det: Tensor,
    data: Tensor,
    h: Tensor,
    gain: Tensor | None,
    undone: Tensor | None,
    options: dict[str, object],
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, given the output ``data``; the input is written to ``undone`` if that is given."""
    dtype = compute_dtype(data)
    grad_data = torch.empty_like(data, memory_format=output_format(data))
    grad_h = torch.empty_like(h, memory_format=output_format(h))
    if data.numel() == 0:
        return grad_data, grad_h, data.new_zeros(0 if gain is None else data.shape[1], dtype=dtype)
    g, y, conditions, dx, dh = map(planes, (grad, data, h, grad_data, grad_h))
    tile = elementwise_tile((y, g, dx), (conditions, dh))
    partial = _partial_gain(tile, y, dtype, gain is not None)
    launch(
        gradient_kernel,
        tile.samples * tile.tiles,
        data,
        *(g, g.stride(), grad_log_det, grad_log_det.stride(0), y, y.stride(), conditions, conditions.stride()),
        *(_gain(gain, data), dx if undone is None else planes(undone), dx, dx.stride(), dh, dh.stride(), partial),
        *y.shape[1:],
        **options,
        **tile.options,
        INVERSE=inverse,
        UNDO=undone is not None,
        HAS_GAIN=gain is not None,
    )
    return grad_data, grad_h, data.new_empty(0, dtype=dtype) if gain is None else sum_partial(partial, 1)


def _gain(gain: Tensor | None, data: Tensor) -> Tensor:
    # A kernel without a gain does not touch the pointer.
    return data if gain is None else gain.contiguous()


def _partial_gain(tile: Tile, y: Tensor, dtype: torch.dtype, wanted: bool) -> Tensor:
    """What every tile adds to the gradient of the gain of a channel: (C, samples * tiles of positions)."""
    if not wanted:
        return y
    tiles_p = -(-y.shape[2] // tile.options["BLOCK_P"])
    return y.new_empty((y.shape[1], tile.samples * tiles_p), dtype=dtype)
