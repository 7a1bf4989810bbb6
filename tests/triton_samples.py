"""Calls of every Triton operator that between them launch every kernel that the launch rules can choose.

The tensors have no memory: the calls are made where launches are recorded or compiled, not run. A sample is *core* if
the tests compile it: every function in both memory formats and all types, every tile, every size of matrix and every
option once. The report compiles all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glow_kernels import ScaleMap
from glow_kernels.ops.affine_coupling import KINDS


class Sample(NamedTuple):
    """A call, and whether the tests compile what it launches."""

    name: str
    call: Callable[[], Any]
    core: bool


# Types of the data and of h.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float32_with_bfloat16": (torch.float32, torch.bfloat16),
    "bfloat16_with_float32": (torch.bfloat16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float64": (torch.float64, torch.float64),
}
# float32 of these is what bandwidth is measured with.
BANDWIDTH_SHAPES = [(64, 12, 128, 128), (32, 48, 64, 64)]
Data = tuple[str, bool, Sequence[int], bool]


def all_samples() -> list[Sample]:
    """What the report is about."""
    return [
        *coupling_samples(),
        *gaussian_samples(),
        *linear_samples(),
        *folding_samples(),
        *statistics_samples(),
        *network_samples(),
    ]


def core_samples() -> list[Sample]:
    """What the tests compile."""
    return [sample for sample in all_samples() if sample.core]


def empty(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """A tensor without memory."""
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=format_)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def powers_of_two(first: int, last: int) -> list[int]:
    """From ``first`` to ``last``."""
    return [1 << n for n in range(first.bit_length() - 1, last.bit_length())]


def sizes(inner: int, itemsize: int) -> list[int]:
    """Sizes that a tile ``inner`` wide covers, one for every width of a vector; the widest first."""
    widest = 16 // itemsize
    return [inner, *(inner - vector for vector in powers_of_two(1, widest // 2))]


def elementwise_data() -> Iterator[Data]:
    """Types, memory format and shape of every tile and vector; core: the bandwidth shape, and float32's tiles."""
    for dtypes, channels_last in itertools.product(DTYPES, (False, True)):
        yield dtypes, channels_last, BANDWIDTH_SHAPES[0], True
        itemsize = min(dtype.itemsize for dtype in DTYPES[dtypes])
        for inner in powers_of_two(8, 512 if dtypes == "float64" else 1024):
            for size in sizes(inner, itemsize):
                shape = (4, size, 3, 3) if channels_last else (4, 12, size, 1)
                yield dtypes, channels_last, shape, dtypes == "float32" and size == inner


def describe(shape: Sequence[int], dtypes: str, channels_last: bool, *more: str) -> str:
    """``64x12x128x128 float32 NCHW``."""
    return " ".join(("x".join(map(str, shape)), dtypes, "channels last" if channels_last else "NCHW", *more))


def coupling_samples() -> Iterator[Sample]:
    """Every function with every tile, then with every map, layout and order."""
    for dtypes, channels_last, shape, core in elementwise_data():
        bandwidth = shape == BANDWIDTH_SHAPES[0]
        for sample in _coupling(shape, dtypes, channels_last):
            heaviest = "reversible" in sample.name
            yield sample._replace(core=core and (heaviest or (bandwidth and dtypes == "float32")))
    shape = BANDWIDTH_SHAPES[0]
    for kind, gain, floor in itertools.product(KINDS, (False, True), (0.0, 0.1)):
        if not (kind == "sigmoid" and gain):
            scale_map = ScaleMap(kind, 0.7, 0.1, 1.5, floor, -1.0, 1.0)
            for sample in (
                *_coupling(shape, "float32", True, scale_map, gain),
                *_coupling(shape, "float64", False, scale_map, gain),
            ):
                heaviest = floor > 0 and (gain or kind == "sigmoid") and "reversible" in sample.name
                yield sample._replace(core=heaviest)
    for layout, order in itertools.product(
        ("chunk_scale_shift", "interleaved_scale_shift"), ("shift_scale", "scale_shift", "unshift_scale")
    ):
        for sample in _coupling(shape, "float32", True, layout=layout, order=order):
            yield sample._replace(core="reversible" in sample.name)


def _coupling(
    shape: Sequence[int],
    dtypes: str,
    channels_last: bool,
    scale_map: ScaleMap = ScaleMap("sigmoid", offset=2.0),  # noqa: B008
    gain: bool = False,
    layout: str = "interleaved_shift_scale",
    order: str = "shift_scale",
) -> Iterator[Sample]:
    from glow_kernels.backends.triton import affine_coupling

    dtype, h_dtype = DTYPES[dtypes]
    compute = compute_dtype(dtype)
    x = empty(shape[0], 2 * shape[1], *shape[2:], dtype=dtype, channels_last=channels_last)[:, shape[1] :]
    h = empty(shape[0], 2 * shape[1], *shape[2:], dtype=h_dtype, channels_last=channels_last)
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
    """Every function with every tile and layout."""
    from glow_kernels.backends.triton import gaussian_log_prob

    for dtypes, channels_last, shape, core in elementwise_data():
        bandwidth = shape == BANDWIDTH_SHAPES[0]
        for layout in ("interleaved_mean_log_sd", "chunk_mean_log_sd")[: 1 + bandwidth]:
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
                wanted = bandwidth and layout.startswith("i") and (dtypes == "float32" or name == "backward")
                yield _sample(gaussian_log_prob, name, what, arguments, core and wanted)


def linear_data() -> Iterator[Data]:
    """Types, memory format and shape of every tile and vector; 2^30 positions need wider indices."""
    for dtype, channels_last in itertools.product(("float32", "bfloat16", "float16", "float64"), (False, True)):
        itemsize = DTYPES[dtype][0].itemsize
        for channels in (12, 24, 48, 64, 192):
            shape = (32, channels, 64, 64) if channels > 12 else BANDWIDTH_SHAPES[0]
            yield dtype, channels_last, shape, channels != 64
        for channels, samples in itertools.product((16, 32, 64, 192), (3, 2**30)):
            for size in sizes(channels if channels_last else 16, itemsize):
                yield (
                    dtype,
                    channels_last,
                    (samples, size, 3, 3) if channels_last else (samples, channels, size, 1),
                    False,
                )


def linear_samples() -> Iterator[Sample]:
    """Every function with every tile."""
    from glow_kernels.backends.triton import actnorm_conv1x1

    for dtypes, channels_last, shape, core in linear_data():
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
            heaviest = dtypes != "float16" and not channels_last and "reversible" in name
            yield _sample(actnorm_conv1x1, name, what, arguments, core and (dtypes == "float32" or heaviest))


def folding_samples() -> Iterator[Sample]:
    """Every function with every size of the tile."""
    from glow_kernels.backends.triton import folding

    for size, dtype in itertools.product((4, 8, 16, 32, 64), (torch.float32, torch.float64)):
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
            core = dtype == torch.float32 and (size == 64 or (size in (16, 32) and "known" not in name))
            yield _sample(folding, name, f"4x{size}x{size} {str(dtype)[6:]}", arguments, core)


def statistics_data() -> Iterator[Data]:
    """Types, memory format and shape of every tile and vector; 2^30 positions need wider indices."""
    for dtypes, channels_last in itertools.product(("float32", "bfloat16", "float16", "float64"), (False, True)):
        yield dtypes, channels_last, BANDWIDTH_SHAPES[0], dtypes == "float32"
        for block, samples in itertools.product((8, 16, 32, 64), (3, 2**30)):
            for size in sizes(block, DTYPES[dtypes][0].itemsize):
                shape = (samples, size, 3, 3) if channels_last else (samples, 12, size, 1)
                yield dtypes, channels_last, shape, dtypes == "float32" and (size, samples) == (block, 3)


def statistics_samples() -> Iterator[Sample]:
    """Every tile."""
    from glow_kernels.backends.triton import actnorm_statistics

    for dtypes, channels_last, shape, core in statistics_data():
        x = empty(*shape, dtype=DTYPES[dtypes][0], channels_last=channels_last)
        yield _sample(actnorm_statistics, "forward", describe(shape, dtypes, channels_last), (x,), core)


def network_samples() -> Iterator[Sample]:
    """Bias and ReLU with every tile, and filters of every size of block."""
    from glow_kernels.backends.triton import bias_relu, scale_filters

    for dtypes, channels_last, shape, core in elementwise_data():
        dtype, bias_dtype = DTYPES[dtypes]
        x = empty(*shape, dtype=dtype, channels_last=channels_last)
        arguments = (x, empty(shape[1], dtype=bias_dtype))
        yield _sample(bias_relu, "forward", describe(shape, dtypes, channels_last), arguments, core)
    for dtypes, channels_last, shape, core in statistics_data():
        y = empty(*shape, dtype=DTYPES[dtypes][0], channels_last=channels_last)
        yield _sample(bias_relu, "backward", describe(shape, dtypes, channels_last), (y, y), core)
    for dtypes, size, factor in itertools.product(DTYPES, powers_of_two(1, 1024), (1.0, 3.0)):
        dtype, result = DTYPES[dtypes]
        weight, vector = empty(16, size, 1, 1, dtype=dtype), empty(16, dtype=dtype)
        grads = (empty(16, size, 1, 1, dtype=result), empty(16, dtype=result))
        what = f"16x{size} {dtypes} {factor:g}"
        core = dtypes in ("float32", "float32_with_bfloat16") and size in (64, 1024) and factor == 3.0
        yield _sample(scale_filters, "forward", what, (weight, vector, vector, factor, result), core)
        yield _sample(scale_filters, "backward", what, (*grads, weight, vector, vector, factor), core)


def _sample(module: Any, name: str, what: str, arguments: tuple[Any, ...], core: bool = False) -> Sample:
    operator = module.__name__.rpartition(".")[2].replace("folding", "actnorm_conv1x1")
    function = getattr(module, name.split()[0])
    return Sample(f"{operator}.{name} {what}", lambda: function(*arguments), core)
