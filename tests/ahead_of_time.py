"""Compile the Triton kernels for GPUs that are not here, exactly as the operators launch them.

The operators run on meta tensors with a stub of Triton's driver that pretends to be the GPU, so they choose all tiles,
types and options themselves. Each launch is compiled, and its resource usage is read from the binary.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton_samples import Sample, all_samples, is_bandwidth, is_of_two_formats

# Backend, compute capability or AMD architecture, threads per warp, bytes of shared memory per block at most, and
# registers and threads per multiprocessor.
TARGETS: dict[str, tuple[str, int | str, int, int, int, int]] = {
    "sm_80": ("cuda", 80, 32, 166_912, 65_536, 2048),
    "sm_90": ("cuda", 90, 32, 232_448, 65_536, 2048),
    "sm_100": ("cuda", 100, 32, 232_448, 65_536, 2048),
    "sm_120": ("cuda", 120, 32, 101_376, 65_536, 1536),
    "gfx942": ("hip", "gfx942", 64, 65_536, 131_072, 2048),
}

# Name of a kernel, and all that selects a compiled variant: the types of its tensors and its compile-time arguments.
Variant = tuple[str, str]


@dataclass(frozen=True)
class Kernel:
    """Resource usage of one compiled variant: registers per thread, bytes of shared memory, bits per memory access."""

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
    narrowest_load: int
    narrowest_store: int


class _Driver:
    """The part of a driver that compiling needs."""

    def __init__(self, target: Any, device: int) -> None:
        self._target, self._device = target, device

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def fake_gpu(target: str, launched: Callable[..., None]) -> Iterator[None]:
    """Pretend that the GPU is ``target``; ``launched(kernel, *args, **options)`` is called instead of every launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    backend, architecture, warp, *_ = TARGETS[target]
    driver.set_active(_Driver(GPUTarget(backend, architecture, warp), list(TARGETS).index(target)))
    hip = "0" if backend == "hip" else None  # the operators check torch.version.hip
    with mock.patch.object(torch.version, "hip", hip), mock.patch.object(triton.JITFunction, "run", launched):
        yield


def variant(kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> Variant:
    """The variant of a launch. Numbers and addresses do not affect it: see ``device_functions.kernel``."""
    types = [str(arg.dtype) for arg in args if isinstance(arg, torch.Tensor)]
    chosen = sorted((name, value) for name, value in options.items() if name not in ("grid", "warmup"))
    return kernel.fn.__name__, f"{types} {chosen}"


def variants(calls: Iterable[Callable[[], Any]], target: str = "sm_90") -> dict[Variant, Any]:
    """The variants that the calls would launch on ``target``, with the kernel of each."""
    found: dict[Variant, Any] = {}

    def launched(kernel: Any, *args: Any, **options: Any) -> None:
        found[variant(kernel, args, options)] = kernel

    with fake_gpu(target, launched):
        for call in calls:
            call()
    return found


def compile_for(target: str, samples: Sequence[Sample], wanted: Iterable[Variant]) -> list[Kernel]:
    """Compile the ``wanted`` variants among those that the samples launch. The interpreter must be off."""
    import triton

    run, left, kernels, operator = triton.JITFunction.run, set(wanted), [], ""

    def launched(kernel: Any, *args: Any, **options: Any) -> None:
        key = variant(kernel, args, options)
        if key in left:
            left.remove(key)
            kernels.append(_read(target, operator, run(kernel, *args, **{**options, "warmup": True})))

    with fake_gpu(target, launched):
        for operator, call in samples:  # noqa: B007
            call()
    return kernels


def compile_all(wanted: dict[str, Sequence[Variant]], parts: int = 8) -> list[Kernel]:
    """Compile these variants for these targets, with one process per core."""
    jobs = [(target, part, parts, keys) for (target, keys), part in itertools.product(wanted.items(), range(parts))]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        return [kernel for part in pool.imap(_compile_part, jobs) for kernel in part]


def _compile_part(job: tuple[str, int, int, Sequence[Variant]]) -> list[Kernel]:
    target, part, parts, wanted = job
    # Neighbours are similar, so they are dealt out to different parts.
    return compile_for(target, all_samples(), wanted[part::parts])


# Kernels that only sum partial results, and kernels that write only partial results.
_WITHOUT_DATA = ("_sum_kernel", "_combine_kernel")
_REDUCTIONS = ("_log_prob_kernel", "_chunk_kernel", "sums_kernel", "wide_sums_kernel")


def faults(kernel: Kernel) -> list[str]:
    """The faults of a kernel.

    It must not spill, its block must fit, it must move the bandwidth shapes 128 bits at a time, and it must not move
    single elements of an ``h`` whose memory format differs from that of the data.
    """
    found = []
    if kernel.spills or kernel.shared_memory > TARGETS[kernel.target][3] or not kernel.occupancy:
        found.append("spills or does not fit")
    # AMD's matrix units put neighbouring channels of a product into different threads.
    amd = kernel.target == "gfx942"
    products = ("apply_kernel", "backward_kernel") if amd and "channels last" in kernel.operator else ()
    if is_bandwidth(kernel.operator) and kernel.kernel not in _WITHOUT_DATA:
        if kernel.widest_load < 128:
            found.append(f"reads {kernel.widest_load} bits at a time")
        if kernel.widest_store < 128 and kernel.kernel.removeprefix("coupled_") not in (*_REDUCTIONS, *products):
            found.append(f"writes {kernel.widest_store} bits at a time")
    if is_of_two_formats(kernel.operator) and kernel.kernel.startswith(("coupled_", "mixed_")):
        # h is in bfloat16: an access of 16 bits moves a single element.
        if min(kernel.widest_load, kernel.widest_store) < 128 or kernel.narrowest_load < 32:
            found.append(f"moves an h that lies otherwise {kernel.narrowest_load} bits at a time, or less than 128")
        if kernel.narrowest_store < 32 and not (amd and "chunk" in kernel.operator):
            found.append(f"writes an h that lies otherwise {kernel.narrowest_store} bits at a time")
    return [f"{kernel.operator} for {kernel.target}: {kernel.kernel} {fault}" for fault in found]


def write_report(kernels: Sequence[Kernel], path: Path) -> None:
    """Write a CSV file with a row per compiled variant."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Kernel)])
        writer.writeheader()
        writer.writerows(asdict(kernel) for kernel in kernels)


def _read(target: str, operator: str, compiled: Any) -> Kernel:
    backend, _, warp, _, register_file, threads = TARGETS[target]
    metadata = compiled.metadata
    if backend == "cuda":
        registers, spills, loads, stores = _read_nvidia(compiled.asm, disassemble=is_bandwidth(operator))
    else:
        registers, spills, loads, stores = _read_amd(compiled.asm)
    # Registers are allocated in multiples of eight; AMD has a register file for each of four SIMD units.
    per_block = -(-registers // 8) * 8 * warp * metadata.num_warps
    blocks = min(register_file * (4 if backend == "hip" else 1) // per_block, 32) if registers else 32
    occupancy = min(1.0, blocks * metadata.num_warps * warp / threads)
    shared = int(metadata.shared)
    widths = (extreme(of, default=0) for extreme in (max, min) for of in (loads, stores))
    return Kernel(
        target, operator, metadata.name, registers, spills, shared, metadata.num_warps, round(occupancy, 2), *widths
    )


def _read_nvidia(asm: dict[str, Any], disassemble: bool) -> tuple[int, int, list[int], list[int]]:
    """Registers, stack, and bits of loads and stores, from the machine code or, which is faster, from PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = nvidia_tool("cuobjdump", "--dump-resource-usage", file.name)
        code = nvidia_tool("nvdisasm", "-c", file.name) if disassemble else ""
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    if disassemble:
        loads, stores = (re.findall(rf"\b{name}\.E(\S*)", code) for name in ("LDG(?:STS)?", "STG"))
        return registers, stack, [_bits(found) for found in loads], [_bits(found) for found in stores]
    copies = [8 * int(found, 16) for found in re.findall(r"cp\.async\S* \[[^]]*\], \[[^]]*\], 0x(\d+)", asm["ptx"])]
    return registers, stack, copies + _ptx_bits("ld", asm["ptx"]), _ptx_bits("st", asm["ptx"])


def _bits(suffix: str) -> int:
    found = re.search(r"\.(?:U|S)?(8|16|64|128|256)\b", suffix)
    return int(found[1]) if found else 32


def _ptx_bits(name: str, code: str) -> list[int]:
    found = re.findall(rf"\b{name}\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", code)
    return [int(count or 1) * int(bits) for count, bits in found]


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, list[int], list[int]]:
    code = asm["amdgcn"]

    def value(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    # Scalar registers spill to lanes of vector registers; the private segment counts what spills to memory.
    spills = value("vgpr_spill_count") + value("private_segment_fixed_size")
    loads, stores = (re.findall(rf"(?:global|buffer)_{name}_(\w+)", code) for name in ("load", "store"))
    return value("vgpr_count"), spills, [_amd_bits(found) for found in loads], [_amd_bits(found) for found in stores]


def _amd_bits(suffix: str) -> int:
    found = re.search(r"x(\d)$", suffix)
    return 32 * int(found[1]) if found else {"dword": 32}.get(suffix, 16)


def nvidia_tool(name: str, *arguments: str) -> str:
    """The output of one of the tools that come with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout
