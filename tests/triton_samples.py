"""Calls of every Triton operator that together launch every kernel variant that the launch rules can choose.

The tensors have no memory, since launches are only recorded or compiled, not run. For a new kernel, add samples here
and run ``make kernels-report``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from glow_kernels import ScaleMap
from glow_kernels.ops.affine_coupling import KINDS


class Sample(NamedTuple):
    """A call, named after its operator, shape, types, formats and options."""

    name: str
    call: Callable[[], Any]


# Dtypes of the data and of h.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float32_with_bfloat16": (torch.float32, torch.bfloat16),
    "float32_with_float16": (torch.float32, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float64": (torch.float64, torch.float64),
}
PLAIN = ("float32", "bfloat16", "float16", "float64")
# Bandwidth is measured on these shapes in float32.
BANDWIDTH_SHAPES = [(64, 12, 128, 128), (32, 48, 64, 64)]
SCALE_MAP = ScaleMap("sigmoid", offset=2.0)


def all_samples() -> list[Sample]:
    """The samples of the record, with the default launch parameters and with those of every table in the package."""
    from glow_kernels.backends.triton import launch

    samples = [
        *coupling_samples(),
        *mixed_coupling_samples(),
        *gaussian_samples(),
        *linear_samples(),
        *coupling_linear_samples(),
        *folding_samples(),
        *statistics_samples(),
        *network_samples(),
    ]
    tables = [json.loads(path.read_text()) for path in sorted(launch.TUNED.glob("*.json"))]
    return samples + [_tuned(sample, table) for table in tables for sample in samples]


def _tuned(sample: Sample, table: dict[str, dict[str, int]]) -> Sample:
    from glow_kernels.backends.triton import launch

    def call() -> None:
        with mock.patch.dict(launch.OVERRIDES, table):
            sample.call()

    return Sample(sample.name, call)


def is_bandwidth(name: str) -> bool:
    """Whether a sample has a shape and dtype on which bandwidth is measured."""
    return any(f"{'x'.join(map(str, shape))} float32 " in name for shape in BANDWIDTH_SHAPES)


def is_of_two_formats(name: str) -> bool:
    """Whether a sample has contiguous float32 data and a channels-last bfloat16 ``h``."""
    return "float32_with_bfloat16 NCHW with channels last" in name


def empty(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """A tensor without memory."""
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=format_)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe(shape: Sequence[int], dtypes: str, channels_last: bool | Sequence[bool], *more: str) -> str:
    """For example ``64x12x128x128 float32 NCHW``; ``NCHW with channels last`` if the formats of data and h differ."""
    of_data, of_h = (channels_last, channels_last) if isinstance(channels_last, bool) else channels_last
    formats = ["channels last" if last else "NCHW" for last in (of_data, of_h)]
    return " ".join(("x".join(map(str, shape)), dtypes, " with ".join(dict.fromkeys(formats)), *more))


def elementwise_data() -> Iterator[tuple[str, bool, Sequence[int]]]:
    """Dtypes and memory formats with a shape that is read in vectors and one that is not."""
    for dtypes, channels_last in itertools.product(DTYPES, (False, True)):
        yield dtypes, channels_last, (64, 16, 128, 128) if "16" in dtypes else BANDWIDTH_SHAPES[0]
        yield dtypes, channels_last, (64, 3, 5, 5)


def coupling_samples() -> Iterator[Sample]:
    """Every function with all dtypes and formats, then with every map, layout and order."""
    for dtypes, channels_last, shape in elementwise_data():
        yield from _coupling(shape, dtypes, channels_last)
    for kind, gain, floor in itertools.product(KINDS, (False, True), (0.0, 0.1)):
        if not (kind == "sigmoid" and gain):
            scale_map = ScaleMap(kind, 0.7, 0.1, 1.5, floor, -1.0, 1.0)
            heaviest = floor > 0 and (gain or kind == "sigmoid")
            formats = [("float32", True)] + [("float64", False)] * heaviest
            for dtypes, channels_last in formats:
                yield from _coupling(BANDWIDTH_SHAPES[0], dtypes, channels_last, scale_map, gain)
    for layout, order in itertools.product(
        ("chunk_scale_shift", "interleaved_scale_shift"), ("shift_scale", "scale_shift", "unshift_scale")
    ):
        yield from _coupling(BANDWIDTH_SHAPES[0], "float32", True, layout=layout, order=order)


def mixed_coupling_samples() -> Iterator[Sample]:
    """Contiguous data with a channels-last h: every dtype and width, then every map, layout and order."""
    formats = (False, True)
    for dtypes, channels in (("float32", 12), ("float32_with_bfloat16", 6), ("float32_with_bfloat16", 12)):
        yield from _coupling((64, channels, 64, 64), dtypes, formats)
    for kind in KINDS:
        scale_map = ScaleMap(kind, 0.7, 0.1, 1.5, 0.1, -1.0, 1.0)
        for sample in _coupling((64, 12, 64, 64), "float32_with_bfloat16", formats, scale_map, kind != "sigmoid"):
            if "reversible" in sample.name:  # the heaviest
                yield sample
    for layout, order in (("chunk_scale_shift", "scale_shift"), ("chunk_shift_scale", "unshift_scale")):
        options = ("float32_with_bfloat16", formats, SCALE_MAP, False, layout, order)
        for sample in _coupling((64, 12, 64, 64), *options):
            if "reversible" in sample.name:
                yield sample


def _coupling(
    shape: Sequence[int],
    dtypes: str,
    channels_last: bool | Sequence[bool],
    scale_map: ScaleMap = SCALE_MAP,
    gain: bool = False,
    layout: str = "interleaved_shift_scale",
    order: str = "shift_scale",
) -> Iterator[Sample]:
    from glow_kernels.backends.triton import affine_coupling

    dtype, h_dtype = DTYPES[dtypes]
    compute = compute_dtype(dtype)
    last, h_last = (channels_last, channels_last) if isinstance(channels_last, bool) else channels_last
    x = empty(shape[0], 2 * shape[1], *shape[2:], dtype=dtype, channels_last=last)[:, shape[1] :]
    h = empty(shape[0], 2 * shape[1], *shape[2:], dtype=h_dtype, channels_last=h_last)
    options = (empty(shape[1], dtype=compute) if gain else None, scale_map.kind, scale_map.parameters, layout, order)
    of_map = f"{scale_map.kind}{' floor' * (scale_map.floor > 0)}{' gain' * gain}"
    what = describe(shape, dtypes, channels_last, of_map, layout, order)
    backward = (x, empty(shape[0], dtype=compute), x, h, *options)
    for name, arguments in {
        "forward": (x, h, *options),
        "inverse": (x, h, *options),
        "backward": backward,
        "inverse_backward": backward,
        "reversible_backward": backward,
    }.items():
        yield _sample(affine_coupling, name, what, arguments)


def gaussian_samples() -> Iterator[Sample]:
    """Every function with all dtypes, formats and layouts."""
    from glow_kernels.backends.triton import gaussian_log_prob

    for (dtypes, channels_last, shape), layout in itertools.product(
        elementwise_data(), ("interleaved_mean_log_sd", "chunk_mean_log_sd")
    ):
        dtype, h_dtype = DTYPES[dtypes]
        z = empty(*shape, dtype=dtype, channels_last=channels_last)
        h = empty(shape[0], 2 * shape[1], *shape[2:], dtype=h_dtype, channels_last=channels_last)
        what = describe(shape, dtypes, channels_last, layout)
        for name, arguments in {
            "forward": (z, h, layout),
            "sample": (z, h, layout),
            "standardize": (z, h, layout),
            "backward": (empty(shape[0], dtype=compute_dtype(dtype)), z, h, layout),
            "sample_backward": (z, z, h, layout),
            "standardize_backward": (z, z, h, layout),
        }.items():
            yield _sample(gaussian_log_prob, name, what, arguments)


def linear_data() -> Iterator[tuple[str, bool, Sequence[int]]]:
    """Types, memory format, and shapes of every block of channels that are read in vectors or not."""
    for dtype, channels_last in itertools.product(PLAIN, (False, True)):
        yield dtype, channels_last, BANDWIDTH_SHAPES[0]
        for channels in (16, 24, 48, 64, 192):
            yield dtype, channels_last, (32, channels, 64, 64)
            yield dtype, channels_last, (32, channels - 1, 5, 5)


def linear_samples() -> Iterator[Sample]:
    """Every function with every block size."""
    from glow_kernels.backends.triton import actnorm_conv1x1

    for dtypes, channels_last, shape in linear_data():
        dtype = DTYPES[dtypes][0]
        x = empty(*shape, dtype=dtype, channels_last=channels_last)
        matrix, shift = (empty(*[shape[1]] * n, dtype=compute_dtype(dtype)) for n in (2, 1))
        what = describe(shape, dtypes, channels_last)
        for name, arguments in {
            "apply": (x, matrix, shift),
            "apply_backward": (x, x, matrix, True),
            "apply_backward (no dx)": (x, x, matrix, False),
            "apply_reversible_backward": (x, x, matrix, matrix, shift),
        }.items():
            yield _sample(actnorm_conv1x1, name, what, arguments)


def coupling_linear_samples() -> Iterator[Sample]:
    """Both functions with every block size, dtype, format and width of h, then with every map, layout and order."""
    for dtypes, *formats in itertools.product(("float32", "float32_with_bfloat16"), (False, True), (False, True)):
        yield from _coupling_linear(BANDWIDTH_SHAPES[0], dtypes, formats)
        for channels in (16, 20, 32, 36, 48):
            # With positions that log-determinants sum in groups of 16, and without.
            yield from _coupling_linear((32, channels, 64, 64), dtypes, formats)
            yield from _coupling_linear((32, channels, 4, 2), dtypes, formats)
            # Read in single elements.
            yield from _coupling_linear((32, channels - 1, 5, 5), dtypes, formats)
        yield from _coupling_linear((64, 12, 4, 2), dtypes, formats)
    for kind in KINDS:
        scale_map = ScaleMap(kind, 0.7, 0.1, 1.5, 0.1, -1.0, 1.0)
        for sample in _coupling_linear(BANDWIDTH_SHAPES[1], "float32", (True, True), scale_map):
            if "backward" in sample.name:  # the heavier
                yield sample
    for layout, order in (
        ("chunk_scale_shift", "scale_shift"),
        ("chunk_shift_scale", "unshift_scale"),
        ("interleaved_scale_shift", "shift_scale"),
    ):
        options = ("float32_with_bfloat16", (False, True), SCALE_MAP, layout, order)
        yield from _coupling_linear(BANDWIDTH_SHAPES[1], *options)


def _coupling_linear(
    shape: Sequence[int],
    dtypes: str,
    channels_last: Sequence[bool],
    scale_map: ScaleMap = SCALE_MAP,
    layout: str = "interleaved_shift_scale",
    order: str = "shift_scale",
) -> Iterator[Sample]:
    """Both functions for z and h in these formats."""
    from glow_kernels.backends.triton import coupling_conv1x1

    batch, channels, *spatial = shape
    z, h = (
        empty(batch, size, *spatial, dtype=dtype, channels_last=last)
        for size, dtype, last in zip((channels, channels // 2 * 2), DTYPES[dtypes], channels_last, strict=True)
    )
    matrix, shift, grad_log_det = (empty(*size) for size in ((channels, channels), (channels,), (batch,)))
    options = (scale_map.kind, scale_map.parameters, layout, order)
    what = describe(shape, dtypes, channels_last, scale_map.kind, layout, order)
    yield _sample(coupling_conv1x1, "forward", what, (z, h, matrix, shift, *options))
    yield _sample(coupling_conv1x1, "backward", what, (z, grad_log_det, z, h, matrix, *options))


def folding_samples() -> Iterator[Sample]:
    """Every function with every tile size."""
    from glow_kernels.backends.triton import folding

    for size, dtype in itertools.product((16, 32, 64), (torch.float32, torch.float64)):
        vector, matrix, number = (empty(*shape, dtype=dtype) for shape in ((4, size), (4, size, size), (4,)))
        calls = {
            "lu_weight": (matrix, matrix, matrix, vector, vector),
            "lu_weight_backward": (matrix, number, matrix, matrix, matrix, vector, vector),
            "fold": (vector, vector, matrix, None),
            "fold (known)": (vector, vector, matrix, number),
            "fold_inverse": (vector, vector, matrix, None),
            "fold_inverse (known)": (vector, vector, matrix, number),
        }
        for name in ("fold_backward", "fold_inverse_backward"):
            calls[name] = (matrix, vector, number, vector, vector, matrix, None)
            calls[f"{name} (known)"] = (matrix, vector, number, vector, vector, matrix, number)
        for name, arguments in calls.items():
            yield _sample(folding, name, f"4x{size}x{size} {str(dtype)[6:]}", arguments)


def statistics_data() -> Iterator[tuple[str, bool, Sequence[int]]]:
    """Types, memory format, and shapes of every block of channels that are read in vectors or not."""
    for dtypes, channels_last in itertools.product(PLAIN, (False, True)):
        for shape in (BANDWIDTH_SHAPES[0], (64, 16, 128, 128), BANDWIDTH_SHAPES[1], (4, 5, 5, 5), (4, 47, 5, 5)):
            yield dtypes, channels_last, shape


def statistics_samples() -> Iterator[Sample]:
    """Every dtype, format and block size."""
    from glow_kernels.backends.triton import actnorm_statistics

    for dtypes, channels_last, shape in statistics_data():
        x = empty(*shape, dtype=DTYPES[dtypes][0], channels_last=channels_last)
        yield _sample(actnorm_statistics, "forward", describe(shape, dtypes, channels_last), (x,))


def network_samples() -> Iterator[Sample]:
    """Bias and ReLU with every dtype, format and block size, and the filters."""
    from glow_kernels.backends.triton import bias_relu

    for dtypes, channels_last, shape in elementwise_data():
        dtype, bias_dtype = DTYPES[dtypes]
        arguments = (empty(*shape, dtype=dtype, channels_last=channels_last), empty(shape[1], dtype=bias_dtype))
        yield _sample(bias_relu, "forward", describe(shape, dtypes, channels_last), arguments)
    for dtypes, channels_last, shape in statistics_data():
        y = empty(*shape, dtype=DTYPES[dtypes][0], channels_last=channels_last)
        yield _sample(bias_relu, "backward", describe(shape, dtypes, channels_last), (y, y, 1))
    for dtypes, parts in itertools.product(DTYPES, (0, 2)):
        x = empty(64, 12, 16, 16, dtype=DTYPES[dtypes][0])
        what = f"64x12x16x16 {dtypes} in {parts} parts"
        yield _sample(bias_relu, "pad", what, (x, 16, DTYPES[dtypes][1], True, parts))
        if parts:
            yield _sample(bias_relu, "bias_backward", what, (x, parts))
    yield from _filter_samples()


def _filter_samples() -> Iterator[Sample]:
    """One convolution and three, with every dtype."""
    from glow_kernels.backends.triton import scale_filters

    for dtypes, count in itertools.product(DTYPES, (1, 3)):
        dtype, result = DTYPES[dtypes]
        weights, vectors = ([empty(*shape, dtype=dtype) for _ in range(count)] for shape in ((16, 54, 3, 3), (16,)))
        filters = (weights, vectors, vectors, [3.0] * count)
        what = f"{count}x16x54x3x3 {dtypes}"
        yield _sample(scale_filters, "forward_all", what, (*filters, result, [16, 54] * count))
        grads = [empty(*shape, dtype=result) for _ in range(count) for shape in ((16, 54, 3, 3), (16,))]
        yield _sample(scale_filters, "backward_all", what, (grads, *filters))


def _sample(module: Any, name: str, what: str, arguments: tuple[Any, ...]) -> Sample:
    operator = module.__name__.rpartition(".")[2].replace("folding", "actnorm_conv1x1")
    function = getattr(module, name.split()[0])
    return Sample(f"{operator}.{name} {what}", lambda: function(*arguments))
