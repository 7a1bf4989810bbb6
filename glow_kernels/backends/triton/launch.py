"""How the kernels are launched: tiles, vector widths, index types and the number of warps.

The rules below hold for every device. A file ``tuned/<model>.json`` beside this one, which ``glow-kernels tune`` writes
on a GPU, replaces :data:`DEFAULTS` on that model. Nothing is measured in a user's call.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.faster import table_name
from glow_kernels.backends.triton import INTERPRETED

TUNED = Path(__file__).parent / "tuned"

# Least elements of a tile that lie next to each other: a vector of the smallest type.
_NARROWEST = 8

# Per family of kernels: elements of a tile, and warps that share it. A number in a name is the tile's channels.
DEFAULTS: dict[str, dict[str, int]] = {
    "elementwise": {"elements": 1024, "num_warps": 4},
    "statistics": {"elements": 2048, "num_warps": 4},
    "linear_16": {"elements": 2048, "num_warps": 4},
    "linear_32": {"elements": 2048, "num_warps": 8},
    "linear_64": {"elements": 2048, "num_warps": 4},
    # Operands of a dot product live in registers, so larger tiles spill.
    "linear_backward_16": {"elements": 1024, "num_warps": 4},
    "linear_backward_32": {"elements": 512, "num_warps": 4},
    "linear_backward_64": {"elements": 1024, "num_warps": 8},
    "linear_sums_16": {"elements": 1024, "num_warps": 4},
    "linear_sums_32": {"elements": 1024, "num_warps": 4},
    "linear_sums_64": {"elements": 1024, "num_warps": 8},
}


# What is being measured at the moment.
MEASURED: dict[str, dict[str, int]] = {}


@dataclass(frozen=True)
class Tile:
    """A tile of one sample that one program covers, and how its elements are addressed.

    Attributes:
        samples, tiles: samples, and tiles in each.
        options: compile-time arguments that every kernel over tiles takes.
    """

    samples: int
    tiles: int
    options: dict[str, Any]


def planes(x: Tensor) -> Tensor:
    """``x`` (B, C, *spatial) as (B, C, P): a view of NCHW, of channels last and of slices of them, else a copy."""
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


def elementwise_tile(data: Sequence[Tensor], conditions: Sequence[Tensor]) -> Tile:
    """Tiles for planes ``data`` (B, C, P) and ``conditions`` (B, 2 C, P); the first of data decides the order.

    Few tiles, and so few kernels to compile: as much as there is of what lies next to each other in memory, up to a
    whole tile, by as many of the others as fill it.
    """
    samples, channels, positions = data[0].shape
    parameters = tuned("elementwise", data[0].device)
    channels_last = is_channels_last(data[0])
    elements = parameters["elements"] // (2 if data[0].dtype == torch.float64 else 1)
    inner_size = channels if channels_last else positions
    inner = min(max(_NARROWEST, power_of_two(inner_size)), elements)
    block_p, block_c = (elements // inner, inner) if channels_last else (inner, elements // inner)
    options = {
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
        "CHANNELS_LAST": channels_last,
        "VECTOR": vector_width((*data, *conditions), inner_size, channels_last),
        "num_warps": parameters["num_warps"],
    }
    return Tile(samples, -(-channels // block_c) * -(-positions // block_p), options)


@dataclass(frozen=True)
class Rows:
    """Tiles of rows, which count the positions of all samples together, where samples do not matter.

    Attributes:
        planes: the tensors, all of the shape (B, C, P) with as few samples as their strides allow.
        count: number of rows, B * P.
        options: compile-time arguments that every kernel over rows takes.
    """

    planes: list[Tensor]
    count: int
    options: dict[str, Any]

    @property
    def tiles(self) -> int:
        """Number of tiles of rows."""
        return -(-self.count // int(self.options["BLOCK_P"]))


def rows_of(family: str, tensors: Sequence[Tensor], block_c: int) -> Rows:
    """Tiles of ``block_c`` channels for ``tensors`` (B, C, *spatial); the first decides the order."""
    views = [planes(x) for x in tensors]
    if all(x.shape[2] == 1 or x.shape[0] == 1 or x.stride(0) == x.shape[2] * x.stride(2) for x in views):
        views = [x.movedim(0, 1).flatten(1).unsqueeze(0) for x in views]
    samples, channels, positions = views[0].shape
    count = samples * positions
    parameters = tuned(family, tensors[0].device)
    channels_last = is_channels_last(views[0])
    elements = parameters["elements"] // (2 if tensors[0].dtype == torch.float64 else 1)
    options = {
        "BLOCK_P": max(16, elements // block_c),
        "BLOCK_C": block_c,
        "CHANNELS_LAST": channels_last,
        "VECTOR": vector_width(views, channels if channels_last else positions, channels_last),
        "WIDE": count >= 2**30,
        "num_warps": parameters["num_warps"],
    }
    return Rows(views, count, options)


def is_channels_last(x: Tensor) -> bool:
    """Whether channels, rather than positions, lie next to each other in the planes ``x`` (B, C, P)."""
    return x.shape[1] > 1 and x.stride(1) == 1 and (x.shape[2] == 1 or x.stride(2) != 1)


def vector_width(tensors: Sequence[Tensor], inner_size: int, channels_last: bool) -> int:
    """The largest power of two that divides the inner size and all strides but the inner one, at most 16 bytes."""
    inner, outer = (1, 2) if channels_last else (2, 1)
    if any(tensor.stride(inner) != 1 for tensor in tensors):
        return 1
    strides = (x.stride(dimension) for x in tensors for dimension in (0, outer) if x.shape[dimension] > 1)
    return math.gcd(16 // min(x.element_size() for x in tensors), inner_size, *strides)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()


def multiprocessors(device: torch.device) -> int:
    """Number of programs that fill the device at least once."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def launch(kernel: Any, programs: int, like: Tensor, *args: Any, **options: Any) -> None:
    """Start ``programs`` programs of ``kernel`` on the device of ``like`` and its current stream.

    ``num_warps`` counts warps of 32 threads.
    """
    if torch.version.hip:  # whose warps have 64
        options["num_warps"] = max(1, options["num_warps"] // 2)
    with _quiet_arithmetic() if INTERPRETED else torch.cuda.device_of(like):
        # Fused multiply-adds are no longer Triton's default from 3.10 on.
        kernel[(programs,)](*args, **options, enable_fp_fusion=True)


def _quiet_arithmetic() -> AbstractContextManager[Any]:
    # The interpreter computes with NumPy, which warns of overflow and of 0 / 0, also in what a mask leaves out.
    import numpy

    return numpy.errstate(all="ignore")


def tuned(family: str, device: torch.device) -> dict[str, int]:
    """Launch parameters of a family of kernels on a device."""
    table = _table(torch.cuda.get_device_name(device)) if device.type == "cuda" else {}
    return DEFAULTS[family] | table.get(family, {}) | MEASURED.get(family, {})


@functools.cache
def _table(model: str) -> dict[str, dict[str, int]]:
    path = TUNED / f"{table_name(model)}.json"
    table: dict[str, dict[str, int]] = json.loads(path.read_text()) if path.exists() else {}
    return table
