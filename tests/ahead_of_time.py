"""Compile the Triton kernels for GPUs that are not here, just as the operators launch them.

The operators run on meta tensors, on a stub of Triton's driver that claims to be the GPU, so that every choice of
tiles, types and options is their own; each launch is compiled and its resources are read from the binary. Run as a
program, this writes the report of all kernels or of the core ones.
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton_samples import Sample, all_samples, core_samples

# Compute capability or AMD architecture, threads of a warp, bytes of shared memory that a block may have, and registers
# and threads of a multiprocessor.
TARGETS: dict[str, tuple[str, int | str, int, int, int, int]] = {
    "sm_80": ("cuda", 80, 32, 166_912, 65_536, 2048),
    "sm_90": ("cuda", 90, 32, 232_448, 65_536, 2048),
    "sm_100": ("cuda", 100, 32, 232_448, 65_536, 2048),
    "sm_120": ("cuda", 120, 32, 101_376, 65_536, 1536),
    "gfx942": ("hip", "gfx942", 64, 65_536, 131_072, 2048),
}


Choice = tuple[str, tuple[str, ...], tuple[tuple[str, Any], ...]]


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


def choices(calls: Iterable[Callable[[], Any]]) -> set[Choice]:
    """What the calls would launch: kernel, types of its tensors, and all that is decided at compile time."""
    import triton

    found = set()

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        types = tuple(str(arg.dtype) for arg in args if isinstance(arg, torch.Tensor))
        found.add((self.fn.__name__, types, tuple(sorted(options.items()))))

    with mock.patch.object(triton.JITFunction, "run", record):
        for call in calls:
            call()
    return found


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
    for operator, call, _ in samples:
        compiled: list[Any] = []

        def compile_only(self: Any, *args: Any, _compiled: list[Any] = compiled, **options: Any) -> None:
            _compiled.append(run(self, *args, **{**options, "warmup": True}))

        with mock.patch.object(triton.JITFunction, "run", compile_only):
            call()
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
        usage = nvidia_tool("cuobjdump", "--dump-resource-usage", file.name)
        code = nvidia_tool("nvdisasm", "-c", file.name)
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


def nvidia_tool(name: str, *arguments: str) -> str:
    """Output of one of the tools that come with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
