"""The resource usage of the CUDA library's kernels, read from the machine code.

Run as a program, this writes the report of all kernels: registers, shared memory, local memory and occupancy. If the
library has been built for all GPUs, it also writes the record, which is committed: a summary for every GPU, with the
hash of the sources that have been compiled.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ahead_of_time import TARGETS, nvidia_tool

from glow_kernels.backends.native.library import source_hash

REPOSITORY = Path(__file__).parents[1]
LIBRARY = REPOSITORY / "glow_kernels" / "_C_cuda.so"
RECORD = Path(__file__).with_name("cuda_kernels.csv")
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# The same data as in TARGETS, for GPUs that are not in it.
OTHERS = {"sm_86": ("cuda", 86, 32, 101_376, 65_536, 1536), "sm_89": ("cuda", 89, 32, 101_376, 65_536, 1536)}


@dataclass(frozen=True)
class Kernel:
    """Registers per thread; bytes per thread of stack and local memory, both in global memory; bytes of static shared
    memory per block; most threads per block; occupancy, the fraction of a multiprocessor's threads.
    """

    target: str
    kernel: str
    registers: int
    stack: int
    local: int
    shared_memory: int
    threads: int
    occupancy: float


def kernels(library: Path = LIBRARY) -> list[Kernel]:
    """All kernels for all GPUs for which ``library`` has machine code."""
    threads = _block_sizes(nvidia_tool("cuobjdump", "-elf", str(library)))
    found, target = [], ""
    for line in nvidia_tool("cuobjdump", "--dump-resource-usage", str(library)).splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            target = match[1]
        elif match := re.match(r" *Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            usage = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            block = threads[target, name]
            # From sm_90 on, the number includes the 1 KiB that the system reserves.
            shared_memory = usage["SHARED"] - (1024 if int(target[3:]) >= 90 and usage["SHARED"] else 0)
            occupancy = _occupancy(target, usage["REG"], shared_memory, block)
            figures = (usage["REG"], usage["STACK"], usage["LOCAL"], shared_memory, block, occupancy)
            found.append(Kernel(target, name, *figures))
    return [Kernel(**{**asdict(kernel), "kernel": name}) for kernel, name in zip(found, _plain(found), strict=True)]


def _block_sizes(elf: str) -> dict[tuple[str, str], int]:
    """The most threads per block that each kernel declares, per target and kernel."""
    sizes: dict[tuple[str, str], int] = {}
    target = name = attribute = ""
    for line in elf.splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            target = match[1]
        elif match := re.match(r"\.nv\.info\.(\S+)", line):
            name = match[1]
        elif match := re.match(r"\s*Attribute:\s*(\S+)", line):
            attribute = match[1]
        elif attribute == "EIATTR_MAX_THREADS" and (match := re.match(r"\s*Value:\s*(0x\w+)", line)):
            sizes[target, name] = int(match[1], 16)
    return sizes


def _occupancy(target: str, registers: int, shared_memory: int, threads: int) -> float:
    _, _, warp, most_shared, register_file, most_threads = (TARGETS | OTHERS)[target]
    # Registers are allocated in multiples of eight; the system reserves 1 KiB of shared memory per block.
    blocks = min(
        register_file // (-(-registers // 8) * 8 * warp * (threads // warp)),
        (most_shared + 1024) // (shared_memory + 1024),
        most_threads // threads,
        24 if most_threads == 1536 else 32,
    )
    return round(blocks * threads / most_threads, 2)


def _plain(found: list[Kernel]) -> list[str]:
    """The kernels' names as in the sources, without arguments and namespaces."""
    mangled = "\n".join(kernel.kernel for kernel in found)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    without = re.compile(r"glow_kernels::|\(anonymous namespace\)::|c10::|^void ")
    return [without.sub("", name).partition(">(")[0] + ">" * (">(" in name) for name in names]


def sources() -> str:
    """A hash of everything that the kernels are compiled from, including the compiler's options."""
    made_of = source_hash(REPOSITORY / "csrc", "cuda").encode() + (REPOSITORY / "setup.py").read_bytes()
    return hashlib.sha256(made_of).hexdigest()[:16]


def summary(found: list[Kernel]) -> list[dict[str, str]]:
    """A row of the record for every GPU: the number of kernels, and the most that any of them needs."""
    nvcc = json.loads(LIBRARY.with_suffix(".json").read_text())["nvcc"]
    rows = []
    for target in ARCHS:
        if ours := [kernel for kernel in found if kernel.target == target]:
            row = {"target": target, "nvcc": nvcc, "sources": sources(), "kernels": len(ours)}
            row |= {name: max(getattr(kernel, name) for kernel in ours) for name in ("registers", "stack", "local")}
            row["all_registers"] = sum(kernel.registers for kernel in ours)
            rows.append({name: str(value) for name, value in row.items()})
    return rows


def recorded() -> list[dict[str, str]]:
    """The rows of the record that match the current sources."""
    with RECORD.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["sources"] == sources()]


def _write(path: Path, names: Iterable[str], rows: Iterable[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(path: Path) -> None:
    """Write the report and print a summary."""
    rows = kernels()
    _write(path, [field.name for field in fields(Kernel)], map(asdict, rows))
    if {row.target for row in rows} == set(ARCHS):
        record = summary(rows)
        _write(RECORD, record[0], record)
    targets = len({row.target for row in rows})
    spilling = sum(row.stack > 0 or row.local > 0 for row in rows)
    print(f"{path}: {len(rows)} CUDA kernels for {targets} targets, {spilling} use local memory")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
