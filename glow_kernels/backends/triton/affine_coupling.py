"""Triton's ``affine_coupling``; the mathematics is in ``glow_kernels.ops.affine_coupling``.

A program covers one tile of one sample. It writes partial sums of the log-determinant, and per channel of the gradient
of the learned gain, to buffers that a second, tiny kernel sums in a fixed order. Each element is read and written once:

========================  ===============================  =====================================
kernel                    reads per element of x           writes per element of x
========================  ===============================  =====================================
forward, inverse          x, 2 of h                        y
backward of both          g, y, 2 of h                     dx, 2 of dh
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
from glow_kernels.backends.triton.launch import Tiles, launch, mixed_tiles_of, planes, strided, tiles_of
from glow_kernels.backends.triton.mixed_coupling_kernels import mixed_gradient_kernel, mixed_map_kernel
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
    return _map(x, h, log_scale_gain, compiled_options(kind, scale_parameters, layout, order), inverse=False)


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
    return _map(y, h, log_scale_gain, compiled_options(kind, scale_parameters, layout, order), inverse=True)


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
    options = compiled_options(kind, scale_parameters, layout, order)
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
    options = compiled_options(kind, scale_parameters, layout, order)
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
    options = compiled_options(kind, scale_parameters, layout, order)
    return x, *_gradients(grad, grad_log_det, y, h, log_scale_gain, x, options, inverse=False)


def in_place_backward(
    grad: Tensor,
    grad_log_det: Tensor,
    y: Tensor,
    h: Tensor,
    kind: str,
    scale_parameters: Sequence[float],
    layout: str,
    order: str,
) -> Tensor:
    """Gradient in h; y and ``grad`` are overwritten with the input x of ``forward`` and its gradient."""
    options = compiled_options(kind, scale_parameters, layout, order)
    return _gradients(grad, grad_log_det, y, h, None, y, options, inverse=False, grad_data=grad)[1]


def compiled_options(kind: str, parameters: Sequence[float], layout: str, order: str) -> dict[str, object]:
    """Compile-time arguments: a model uses only one or two combinations of them."""
    slope, offset, gain, floor, low, high = map(float, parameters)
    log_gain = math.log(gain) if kind == "sigmoid" else 0.0
    log_floor = math.log(floor) if floor > 0.0 else 0.0
    return {
        "SCALE_MAP": (kind, slope, offset, gain, log_gain, floor > 0.0, log_floor, low, high),
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
    mixed = mixed_tiles_of((x, out), (conditions,), bool(options["INTERLEAVED"]))
    tiles = mixed or tiles_of((x, out), (conditions,))
    partial = data.new_empty((tiles.samples, tiles.per_sample), dtype=dtype)
    launch(
        mixed_map_kernel if mixed else map_kernel,
        tiles.count,
        data,
        *(*strided(x, conditions, out), _gain(gain, data), partial),
        *x.shape[1:],
        **options,
        **tiles.options,
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
    grad_data: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, given the output ``data``; the input is written to ``undone`` if that is given.

    ``undone`` may be ``data`` itself, and ``grad_data``, to which the gradient of the input is written, may be
    ``grad``: a program reads all of its tile before it writes.
    """
    dtype = compute_dtype(data)
    if grad_data is None:
        grad_data = torch.empty_like(data, memory_format=output_format(data))
    grad_h = torch.empty_like(h, memory_format=output_format(h))
    if data.numel() == 0:
        return grad_data, grad_h, data.new_zeros(0 if gain is None else data.shape[1], dtype=dtype)
    g, y, conditions, dx, dh = map(planes, (grad, data, h, grad_data, grad_h))
    mixed = mixed_tiles_of((y, g, dx), (conditions, dh), bool(options["INTERLEAVED"]))
    tiles = mixed or tiles_of((y, g, dx), (conditions, dh))
    programs, partial = tiles.count, data
    if gain is not None:
        programs, partial = _sums_of_channels(y, tiles)
    undone = dx if undone is None else planes(undone)
    launch(
        mixed_gradient_kernel if mixed else gradient_kernel,
        programs,
        data,
        *(*strided(g, y, conditions), grad_log_det, grad_log_det.stride(0)),
        *(undone, *strided(dx, dh), _gain(gain, data), partial),
        *y.shape,
        **options,
        **tiles.options,
        INVERSE=inverse,
        UNDO=undone is not dx,
        HAS_GAIN=gain is not None,
    )
    return grad_data, grad_h, data.new_empty(0, dtype=dtype) if gain is None else sum_partial(partial, 1)


def _gain(gain: Tensor | None, data: Tensor) -> Tensor:
    # A kernel without a gain ignores the pointer.
    return data if gain is None else gain.contiguous()


def _sums_of_channels(y: Tensor, tiles: Tiles) -> tuple[int, Tensor]:
    """Number of programs, each for a channel or a vector or block of channels, and a buffer for their partial sums."""
    samples, channels, positions = y.shape
    if "BLOCK_C" in tiles.options:
        parts = samples * -(-positions // tiles.options["BLOCK_P"])
        return tiles.count, y.new_empty((channels, parts), dtype=compute_dtype(y))
    vector = tiles.options["VECTOR"]
    vectors_c, vectors_p = (vector, 1) if tiles.options["CHANNELS_LAST"] else (1, vector)
    parts = -(-samples * positions // vectors_p // (tiles.options["BLOCK"] // vector))
    return channels // vectors_c * parts, y.new_empty((channels, parts), dtype=compute_dtype(y))
