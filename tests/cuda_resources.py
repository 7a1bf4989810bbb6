"""What the kernels of the CUDA library need of a GPU, read from the machine code that nvcc made of them.

Run as a program, this writes the report of all kernels: registers, shared memory, local memory and how many of a
multiprocessor's threads can be there at once.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ahead_of_time import TARGETS, nvidia_tool

LIBRARY = Path(__file__).parents[1] / "glow_kernels" / "_C_cuda.so"
# Of a multiprocessor beside what TARGETS tells of sm_80 and the later ones.
OTHERS = {"sm_86": ("cuda", 86, 32, 101_376, 65_536, 1536), "sm_89": ("cuda", 89, 32, 101_376, 65_536, 1536)}


@dataclass(frozen=True)
class Kernel:
    """Registers per thread; bytes per thread on the stack and in local memory, which are in global memory in truth;
    bytes of static shared memory per block; threads of a block at most; share of a multiprocessor's threads.
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
    """All kernels for all GPUs that ``library`` has machine code for."""
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
            # From sm_90 on it counts what the system keeps.
            shared_memory = usage["SHARED"] - (1024 if int(target[3:]) >= 90 and usage["SHARED"] else 0)
            occupancy = _occupancy(target, usage["REG"], shared_memory, block)
            figures = (usage["REG"], usage["STACK"], usage["LOCAL"], shared_memory, block, occupancy)
            found.append(Kernel(target, name, *figures))
    return [Kernel(**{**asdict(kernel), "kernel": name}) for kernel, name in zip(found, _plain(found), strict=True)]


def _block_sizes(elf: str) -> dict[tuple[str, str], int]:
    """Threads that a kernel promises to have at most, per target and kernel."""
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
    # Registers are allocated in eights; the system keeps 1 KiB of shared memory per block.
    blocks = min(
        register_file // (-(-registers // 8) * 8 * warp * (threads // warp)),
        (most_shared + 1024) // (shared_memory + 1024),
        most_threads // threads,
        24 if most_threads == 1536 else 32,
    )
    return round(blocks * threads / most_threads, 2)


def _plain(found: list[Kernel]) -> list[str]:
    """Names as in the sources, without arguments and namespaces."""
    mangled = "\n".join(kernel.kernel for kernel in found)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    without = re.compile(r"glow_kernels::|\(anonymous namespace\)::|c10::|^void ")
    return [without.sub("", name).partition(">(")[0] + ">" * (">(" in name) for name in names]


def main(path: Path) -> None:
    """Write the report and say how it looks."""
    rows = kernels()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Kernel)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    targets = len({row.target for row in rows})
    spilling = sum(row.stack > 0 or row.local > 0 for row in rows)
    print(f"{path}: {len(rows)} CUDA kernels for {targets} targets, {spilling} use local memory")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
