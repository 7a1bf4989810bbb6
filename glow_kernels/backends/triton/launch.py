"""How the kernels are launched: tiles, vector widths, index types and the number of warps.

The rules below hold for every device. A file ``tuned/<model>.json`` in this folder, which ``glow-kernels tune`` writes
on a GPU, overrides :data:`DEFAULTS` on that model. Nothing is measured at run time.
"""

from __future__ import annotations

import functools
import json
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

# Per family of kernels: elements of a tile, and warps that share it. A number in a name is the channels of a tile.
DEFAULTS: dict[str, dict[str, int]] = {
    "elementwise": {"elements": 512, "num_warps": 2},
    "statistics": {"elements": 4096, "num_warps": 4},
    "bias_relu": {"elements": 2048, "num_warps": 4},
    "linear_16": {"elements": 2048, "num_warps": 4},
    "linear_32": {"elements": 4096, "num_warps": 4},
    "linear_64": {"elements": 8192, "num_warps": 4},
    # Each warp keeps separate sums, of at least 16 positions of a tile.
    "linear_backward_16": {"elements": 1024, "num_warps": 4},
    "linear_backward_32": {"elements": 2048, "num_warps": 4},
    "linear_sums_16": {"elements": 1024, "num_warps": 4},
    "linear_sums_32": {"elements": 2048, "num_warps": 4},
    "linear_sums_64": {"elements": 4096, "num_warps": 4},
    "coupling_16": {"elements": 1024, "num_warps": 4},
    "coupling_32": {"elements": 2048, "num_warps": 4},
    "coupling_64": {"elements": 2048, "num_warps": 4},
    "coupling_backward_16": {"elements": 512, "num_warps": 4},
    "coupling_backward_32": {"elements": 1024, "num_warps": 4},
    "coupling_backward_64": {"elements": 2048, "num_warps": 4},
    # Operands of a dot product are in registers, so larger tiles spill.
    "wide_16": {"elements": 2048, "num_warps": 8},
    "wide_32": {"elements": 2048, "num_warps": 8},
    "wide_64": {"elements": 2048, "num_warps": 4},
    "wide_sums_16": {"elements": 512, "num_warps": 4},
    "wide_sums_32": {"elements": 512, "num_warps": 4},
    "wide_sums_64": {"elements": 1024, "num_warps": 8},
}


# Parameters that replace all others while ``glow-kernels tune`` measures them, by family.
OVERRIDES: dict[str, dict[str, int]] = {}


@dataclass(frozen=True)
class Tiles:
    """Consecutive tiles of every sample, and how their elements are addressed.

    Attributes:
        samples, per_sample: number of samples, and of tiles in each sample.
        options: compile-time arguments that every kernel over tiles takes.
    """

    samples: int
    per_sample: int
    options: dict[str, Any]

    @property
    def count(self) -> int:
        """Number of tiles."""
        return self.samples * self.per_sample


def planes(x: Tensor) -> Tensor:
    """``x`` (B, C, *spatial) as (B, C, P): a view of contiguous or channels-last data and slices of it, else a copy."""
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


def strided(*tensors: Tensor) -> tuple[Any, ...]:
    """Every tensor followed by its strides, as kernels take them."""
    return tuple(part for tensor in tensors for part in (tensor, *tensor.stride()))


def tiles_of(data: Sequence[Tensor], conditions: Sequence[Tensor]) -> Tiles:
    """Tiles for planes ``data`` (B, C, P) and ``conditions`` (B, 2 C, P), in the memory order of the first of data."""
    samples, channels, positions = data[0].shape
    parameters = tuned("elementwise", data[0])
    channels_last = is_channels_last(data[0])
    width = vector((*data, *conditions), channels if channels_last else positions, channels_last)
    options = {
        "BLOCK": parameters["elements"],
        "CHANNELS_LAST": channels_last,
        "VECTOR": width,
        # Without vectors, addresses need more registers.
        "num_warps": parameters["num_warps"] * (2 if width == 1 else 1),
    }
    return Tiles(samples, -(-channels * positions // parameters["elements"]), options)


def mixed_tiles_of(data: Sequence[Tensor], conditions: Sequence[Tensor], interleaved: bool) -> Tiles | None:
    """Tiles of 8 channels for contiguous planes ``data`` with channels-last ``conditions``; None for anything else."""
    if is_channels_last(data[0]) or not is_channels_last(conditions[0]):
        return None
    if data[0].dtype != torch.float32 or conditions[0].dtype not in (torch.float32, torch.bfloat16):
        return None
    samples, channels, positions = data[0].shape
    width, h_width = vector(data, positions, False), vector_of_pairs(conditions, channels, interleaved)
    if min(width, h_width) == 1:
        return None
    parameters = tuned("elementwise", data[0])
    block_p = parameters["elements"] // 8
    options = {
        "BLOCK_C": 8,
        "BLOCK_P": block_p,
        "VECTOR": width,
        "H_VECTOR": h_width,
        "num_warps": parameters["num_warps"],
    }
    return Tiles(samples, -(-channels // 8) * -(-positions // block_p), options)


@dataclass(frozen=True)
class Rows:
    """Tiles of rows, for kernels that need not tell samples apart: a row is a position of any sample.

    Attributes:
        planes: the tensors as (B, C, P), with B merged into P if their strides allow.
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
    """Tiles of ``block_c`` channels for ``tensors`` (B, C, *spatial), in the memory order of the first."""
    views = [planes(x) for x in tensors]
    if all(x.shape[2] == 1 or x.shape[0] == 1 or x.stride(0) == x.shape[2] * x.stride(2) for x in views):
        views = [x.movedim(0, 1).flatten(1).unsqueeze(0) for x in views]
    samples, channels, positions = views[0].shape
    parameters = tuned(family, tensors[0])
    channels_last = is_channels_last(views[0])
    options = {
        "BLOCK_P": max(16, parameters["elements"] // block_c),
        "BLOCK_C": block_c,
        "CHANNELS_LAST": channels_last,
        "VECTOR": vector(views, channels if channels_last else positions, channels_last),
        "num_warps": parameters["num_warps"],
    }
    return Rows(views, samples * positions, options)


def channels_of_tile(x: Tensor) -> int:
    """Channels of a tile of rows of ``x`` (B, C, *spatial), for kernels that treat channels independently."""
    return (8 if x.shape[1] <= 16 else 32) if is_channels_last(planes(x)) else 4


def is_channels_last(x: Tensor) -> bool:
    """Whether channels, rather than positions, are adjacent in memory in the planes ``x`` (B, C, P)."""
    return x.shape[1] > 1 and x.stride(1) == 1 and (x.shape[2] == 1 or x.stride(2) != 1)


def vector(tensors: Sequence[Tensor], inner_size: int, channels_last: bool, size: int = 16) -> int:
    """Elements to read at once: ``size`` bytes of the smallest type if sizes, strides and addresses allow, else 1."""
    inner, outer = (1, 2) if channels_last else (2, 1)
    elements = size // min([x.element_size() for x in tensors])
    if inner_size % elements:
        return 1
    for x in tensors:
        shape, strides = x.shape, x.stride()
        apart = (strides[0] if shape[0] > 1 else 0) | (strides[outer] if shape[outer] > 1 else 0)
        # ``apart`` is the bitwise or of two strides: a power of two divides it if and only if it divides both.
        if strides[inner] != 1 or apart % elements or x.data_ptr() % 16:
            return 1
    return elements


def vector_of_pairs(tensors: Sequence[Tensor], pairs: int, interleaved: bool) -> int:
    """Elements of channels-last ``h`` and its gradient to read at once: 16 bytes, else 4 elements, else 1.

    No vector crosses a multiple of ``pairs`` pairs of channels.
    """
    sizes = (4 * tensors[0].element_size(), 16)
    return max(vector(tensors, 2 * pairs if interleaved else pairs, True, size) for size in sizes)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of the device; 2 on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def launch(kernel: Any, programs: int, like: Tensor, *args: Any, **options: Any) -> None:
    """Start ``programs`` programs of ``kernel`` on the device of ``like`` and its current stream.

    ``num_warps`` counts warps of 32 threads. With ``ALL_REGISTERS`` a thread may use as many registers as there are for
    one program per multiprocessor.
    """
    all_registers = options.pop("ALL_REGISTERS", False)
    if torch.version.hip:  # AMD's warps have 64 threads
        options["num_warps"] = max(1, options["num_warps"] // 2)
    elif all_registers and not INTERPRETED:
        # Without an explicit limit ptxas chooses a lower one, and spills a register or two to stay within it.
        options["maxnreg"] = min(255, 2048 // options["num_warps"])
    # Since Triton 3.10 fused multiply-adds are not the default.
    options["enable_fp_fusion"] = True
    if INTERPRETED:
        with _quiet_arithmetic():
            kernel[(programs,)](*args, **options)
    elif like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device_of(like):
            _start(kernel, programs, like.device, args, options)
    else:
        _start(kernel, programs, like.device, args, options)


# The compiled kernel for a kernel, device, types and options; and the options that are the kernel's last arguments.
_COMPILED: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


def _start(kernel: Any, programs: int, device: torch.device, args: Sequence[Any], options: dict[str, Any]) -> None:
    """``kernel[(programs,)](*args, **options)``, with a faster lookup: Triton's takes the time of several operators.

    Triton checks every argument for properties that our kernels do not specialize on, see ``device_functions.kernel``.
    """
    types = [arg.dtype for arg in args if type(arg) not in (int, float)]
    key = (id(kernel), device, *types, *options.items())
    found = _COMPILED.get(key)
    if found is not None and not kernel.pre_run_hooks:
        compiled, constants = found
        compiled[(programs, 1, 1)](*args, *constants)
        return
    compiled = kernel[(programs,)](*args, **options)
    names = [parameter.name for parameter in kernel.params[len(args) :]]
    # Triton returns None if it does not compile for a GPU, as in tests.
    if compiled is not None and options.keys() >= set(names):
        _COMPILED[key] = compiled, [options[name] for name in names]


def _quiet_arithmetic() -> AbstractContextManager[Any]:
    # The interpreter computes with NumPy, which warns about overflow and 0 / 0, even in masked elements.
    import numpy

    return numpy.errstate(all="ignore")


def tuned(family: str, like: Tensor) -> dict[str, int]:
    """Launch parameters of a family of kernels, for data with the type and device of ``like``."""
    parameters = _parameters(family, like.device)
    if OVERRIDES:
        parameters = parameters | OVERRIDES.get(family, {})
    # Wider types take twice the registers per element.
    share = 2 if like.dtype == torch.float64 else 1
    return {**parameters, "elements": parameters["elements"] // share}


@functools.cache
def _parameters(family: str, device: torch.device) -> dict[str, int]:
    table = _table(torch.cuda.get_device_name(device)) if device.type == "cuda" else {}
    return DEFAULTS[family] | table.get(family, {})


@functools.cache
def _table(model: str) -> dict[str, dict[str, int]]:
    path = TUNED / f"{table_name(model)}.json"
    table: dict[str, dict[str, int]] = json.loads(path.read_text()) if path.exists() else {}
    return table
