"""Compile the Triton kernels for GPUs that are not here, just as the operators launch them.

The operators run on meta tensors, on a stub of Triton's driver that claims to be the GPU, so that every choice of
tiles, types and options is their own; each launch is compiled and its resources are read from the binary. Run as a
program, this writes the report of all kernels; the tests take :func:`samples`.
"""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from glow_kernels import ScaleMap
from glow_kernels.ops.affine_coupling import KINDS

# Compute capability or AMD architecture, threads of a warp, bytes of shared memory that a block may have, and registers
# and threads of a multiprocessor.
TARGETS: dict[str, tuple[str, int | str, int, int, int, int]] = {
    "sm_80": ("cuda", 80, 32, 166_912, 65_536, 2048),
    "sm_90": ("cuda", 90, 32, 232_448, 65_536, 2048),
    "sm_100": ("cuda", 100, 32, 232_448, 65_536, 2048),
    "sm_120": ("cuda", 120, 32, 101_376, 65_536, 1536),
    "gfx942": ("hip", "gfx942", 64, 65_536, 131_072, 2048),
}


@dataclass(frozen=True)
class Kernel:
    """Resources of one compiled kernel; registers per thread, bytes of shared memory, bits of an access."""

    target: str
    operator: str
    kernel: str
    registers: int
    spills: int
    shared_memory: int
    warps: int
    occupancy: float
    widest_load: int
    widest_store: int


Sample = tuple[str, Callable[[], Any]]


def empty(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> torch.Tensor:
    """A tensor without memory."""
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=format_)


# Types of the data and of h.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float32_with_bfloat16": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float64": (torch.float64, torch.float64),
}
BANDWIDTH_SHAPES = [(64, 12, 128, 128), (32, 48, 64, 64)]
SMALL_SHAPES = [(64, 24, 4, 4), (3, 5, 7, 11), (2, 13, 1, 1)]


def coupling_samples() -> Iterator[Sample]:
    """Every kernel with every memory format and type, then every map, layout and order."""
    for dtypes, channels_last in itertools.product(DTYPES, (False, True)):
        for shape in BANDWIDTH_SHAPES[:1] if dtypes != "float32" else BANDWIDTH_SHAPES + SMALL_SHAPES:
            yield from _coupling(shape, dtypes, channels_last)
    shape = BANDWIDTH_SHAPES[0]
    for kind, gain, floor in itertools.product(KINDS, (False, True), (0.0, 0.1)):
        if not (kind == "sigmoid" and gain):
            yield from _coupling(shape, "float32", True, ScaleMap(kind, 0.7, 0.1, 1.5, floor, -1.0, 1.0), gain)
            yield from _coupling(shape, "float64", False, ScaleMap(kind, 0.7, 0.1, 1.5, floor, -1.0, 1.0), gain)
    for layout, order in itertools.product(
        ("chunk_scale_shift", "interleaved_scale_shift"), ("shift_scale", "scale_shift", "unshift_scale")
    ):
        yield from _coupling(shape, "float32", True, layout=layout, order=order)


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
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = empty(shape[0], 2 * shape[1], *shape[2:], dtype=dtype, channels_last=channels_last)[:, shape[1] :]
    h = empty(shape[0], 2 * shape[1], *shape[2:], dtype=h_dtype, channels_last=channels_last)
    learned = empty(shape[1], dtype=compute) if gain else None
    options = (learned, scale_map.kind, scale_map.parameters, layout, order)
    of_map = f"{scale_map.kind}{' floor' * (scale_map.floor > 0)}{' gain' * gain} {layout} {order}"
    what = f"{'x'.join(map(str, shape))} {dtypes} {'channels last' if channels_last else 'NCHW'} {of_map}"
    for name in ("forward", "inverse"):
        yield f"affine_coupling.{name} {what}", lambda name=name: getattr(affine_coupling, name)(x, h, *options)
    for name in ("backward", "inverse_backward", "reversible_backward"):
        arguments = (x, empty(shape[0], dtype=compute), x, h, *options)
        yield (
            f"affine_coupling.{name} {what}",
            lambda name=name, arguments=arguments: getattr(affine_coupling, name)(*arguments),
        )


def gaussian_samples() -> Iterator[Sample]:
    """Every kernel with every memory format, type and layout."""
    from glow_kernels.backends.triton import gaussian_log_prob

    for dtypes, channels_last, layout in itertools.product(
        DTYPES, (False, True), ("interleaved_mean_log_sd", "chunk_mean_log_sd")
    ):
        dtype, h_dtype = DTYPES[dtypes]
        shape = BANDWIDTH_SHAPES[0]
        z = empty(*shape, dtype=dtype, channels_last=channels_last)
        h = empty(shape[0], 2 * shape[1], *shape[2:], dtype=h_dtype, channels_last=channels_last)
        per_sample = empty(shape[0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        what = f"{'x'.join(map(str, shape))} {dtypes} {'channels last' if channels_last else 'NCHW'} {layout}"
        for name in ("forward", "sample", "standardize"):
            yield (
                f"gaussian_log_prob.{name} {what}",
                lambda name=name, z=z, h=h, layout=layout: getattr(gaussian_log_prob, name)(z, h, layout),
            )
        for name, grad in (("backward", per_sample), ("sample_backward", z), ("standardize_backward", z)):
            yield (
                f"gaussian_log_prob.{name} {what}",
                lambda name=name, grad=grad, z=z, h=h, layout=layout: getattr(gaussian_log_prob, name)(
                    grad, z, h, layout
                ),
            )


def linear_samples() -> Iterator[Sample]:
    """Every kernel with every size of the tile, memory format and type."""
    from glow_kernels.backends.triton import actnorm_conv1x1

    shapes = [(64, 12, 128, 128), (64, 24, 64, 64), (32, 48, 64, 64), (64, 64, 32, 32), (64, 7, 5, 5), (8, 50, 1, 1)]
    shapes += [(4, 192, 8, 8)]
    for dtype, channels_last, shape in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16, torch.float64), (False, True), shapes
    ):
        x = empty(*shape, dtype=dtype, channels_last=channels_last)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        matrix, shift = empty(shape[1], shape[1], dtype=compute), empty(shape[1], dtype=compute)
        calls = {
            "apply": (x, matrix, shift),
            "apply_backward": (x, x, matrix, True),
            "apply_backward (no dx)": (x, x, matrix, False),
            "apply_reversible_backward": (x, x, matrix, matrix, shift),
        }
        what = f"{'x'.join(map(str, shape))} {str(dtype)[6:]} {'channels last' if channels_last else 'NCHW'}"
        for name, arguments in calls.items():
            yield (
                f"actnorm_conv1x1.{name} {what}",
                lambda name=name, arguments=arguments: getattr(actnorm_conv1x1, name.split()[0])(*arguments),
            )


def folding_samples() -> Iterator[Sample]:
    """Every kernel with every size of the tile."""
    from glow_kernels.backends.triton import folding

    for size, dtype in itertools.product((1, 3, 6, 12, 24, 48, 64), (torch.float32, torch.float64)):
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
            yield (
                f"actnorm_conv1x1.{name} 4x{size}x{size} {str(dtype)[6:]}",
                lambda name=name, arguments=arguments: getattr(folding, name.split()[0])(*arguments),
            )


def statistics_samples() -> Iterator[Sample]:
    """Both kernels with every memory format and type."""
    from glow_kernels.backends.triton import actnorm_statistics

    for dtype, channels_last, shape in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16, torch.float64), (False, True), BANDWIDTH_SHAPES + SMALL_SHAPES
    ):
        x = empty(*shape, dtype=dtype, channels_last=channels_last)
        what = f"{'x'.join(map(str, shape))} {str(dtype)[6:]} {'channels last' if channels_last else 'NCHW'}"
        yield f"actnorm_statistics.forward {what}", lambda x=x: actnorm_statistics.forward(x)


def all_samples() -> list[Sample]:
    """What the report is about."""
    return [
        *coupling_samples(),
        *gaussian_samples(),
        *linear_samples(),
        *folding_samples(),
        *statistics_samples(),
    ]


# What the tests compile: every kernel in both memory formats on a bandwidth shape, and where most registers are needed.
_CORE = (
    "coupling.* 64x12x128x128 float32 NCHW sigmoid interleaved_shift_scale shift_scale",
    "coupling.* 64x12x128x128 float32 channels last tanh floor gain",
    "coupling.*backward 64x12x128x128 float64 NCHW atan floor gain",
    "gaussian.* 64x12x128x128 float32 NCHW interleaved",
    "gaussian.*backward 64x12x128x128 float32 channels last interleaved",
    r"conv1x1.*[a-z)] (64x12x128x128|32x48x64x64) float32 NCHW",
    "conv1x1.*(apply|reversible_backward) 64x24x64x64 float32 channels last",
    "conv1x1.*[a-z)] 64x64x32x32 float64 NCHW",
    "conv1x1.* 4x64x64 float64",
    "statistics.* 64x12x128x128 float32",
)


def core_samples() -> list[Sample]:
    """What the tests compile."""
    return [sample for sample in all_samples() if re.search("|".join(_CORE), sample[0])]


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: Any, device: int) -> None:
        self._target, self._device = target, device

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(target: str, samples: Sequence[Sample]) -> list[Kernel]:
    """Compile what the samples launch, every kernel once. Only the interpreter cannot be on."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    backend, architecture, warp, *_ = TARGETS[target]
    driver.set_active(_Driver(GPUTarget(backend, architecture, warp), list(TARGETS).index(target)))
    torch.version.hip = "0" if backend == "hip" else None  # what the operators ask
    seen: set[int] = set()
    kernels = []
    run = triton.JITFunction.run
    for operator, call in samples:
        compiled: list[Any] = []

        def compile_only(self: Any, *args: Any, _compiled: list[Any] = compiled, **options: Any) -> None:
            _compiled.append(run(self, *args, **{**options, "warmup": True}))

        triton.JITFunction.run = compile_only
        try:
            call()
        finally:
            triton.JITFunction.run = run
        for kernel in compiled:
            if id(kernel) not in seen:
                seen.add(id(kernel))
                kernels.append(_read(target, operator, kernel))
    return kernels


def _read(target: str, operator: str, compiled: Any) -> Kernel:
    backend, _, warp, _, register_file, threads = TARGETS[target]
    metadata = compiled.metadata
    read = _read_nvidia if backend == "cuda" else _read_amd
    registers, spills, loads, stores = read(compiled.asm)
    # Registers are allocated in eights; AMD has a file for each of four units.
    per_block = -(-registers // 8) * 8 * warp * metadata.num_warps
    blocks = min(register_file * (4 if backend == "hip" else 1) // per_block, 32) if registers else 32
    occupancy = min(1.0, blocks * metadata.num_warps * warp / threads)
    shared = int(metadata.shared)
    widths = (max(loads, default=0), max(stores, default=0))
    return Kernel(
        target, operator, metadata.name, registers, spills, shared, metadata.num_warps, round(occupancy, 2), *widths
    )


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, list[int], list[int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack, *([_bits(found) for found in re.findall(rf"\b{name}\.E(\S*)", code)] for name in _ACCESSES)


_ACCESSES = ("LDG(?:STS)?", "STG")


def _bits(suffix: str) -> int:
    found = re.search(r"\.(?:U|S)?(8|16|64|128|256)\b", suffix)
    return int(found[1]) if found else 32


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, list[int], list[int]]:
    code = asm["amdgcn"]

    def value(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    spills = value("vgpr_spill_count") + value("sgpr_spill_count") + value("private_segment_fixed_size")
    accesses = (
        [_amd_bits(found) for found in re.findall(rf"(?:global|buffer)_{n}_(\w+)", code)] for n in _AMD_ACCESSES
    )
    return value("vgpr_count"), spills, *accesses


_AMD_ACCESSES = ("load", "store")


def _amd_bits(suffix: str) -> int:
    found = re.search(r"x(\d)$", suffix)
    return 32 * int(found[1]) if found else {"dword": 32}.get(suffix, 16)


def main(which: str, path: Path) -> None:
    """Compile the core samples or all of them for every target, and write one row per kernel."""
    samples = {"core": core_samples, "all": all_samples}[which]
    parts = 4
    jobs = [(target, which, part, parts) for target, part in itertools.product(TARGETS, range(parts))]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        kernels = [kernel for part in pool.starmap(_compile_part, jobs, chunksize=1) for kernel in part]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Kernel)])
        writer.writeheader()
        writer.writerows(asdict(kernel) for kernel in kernels)
    spilling = sum(kernel.spills > 0 for kernel in kernels)
    print(f"{path}: {len(samples())} calls, {len(kernels)} kernels for {len(TARGETS)} targets, {spilling} spill")


def _compile_part(target: str, which: str, part: int, parts: int) -> list[Kernel]:
    samples = {"core": core_samples, "all": all_samples}[which]()
    # Neighbours share kernels.
    size = -(-len(samples) // parts)
    return compile_for(target, samples[part * size : (part + 1) * size])


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
