"""The record of all compiled Triton kernels: ``triton_kernels.csv`` beside this file, a row per kernel and target.

A row has hashes of the kernel's sources and of the list of its variants, and a summary of their resource usage. ``make
kernels-report`` runs this: it compiles all variants of the kernels whose sources or variants differ from those in the
record, and updates the record unless one has a fault.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from ahead_of_time import TARGETS, Kernel, Variant, compile_all, faults, variants, write_report
from triton_samples import all_samples

RECORD = Path(__file__).with_name("triton_kernels.csv")


@dataclass(frozen=True)
class Entry:
    """One kernel on one target, with hashes of its sources and variants."""

    kernel: str
    target: str
    triton: str
    sources: str
    variants: str
    count: int

    def key(self) -> tuple[str, str]:
        """The key of the entry in the record."""
        return self.kernel, self.target


@dataclass(frozen=True)
class Recorded(Entry):
    """An entry that has been compiled, with the most that any variant needs."""

    registers: int
    spills: int
    shared_memory: int
    occupancy: float


def current(target: str) -> list[tuple[Entry, list[Variant]]]:
    """Every kernel in its current state, with the variants that the launch rules can choose."""
    import triton

    found = variants((sample.call for sample in all_samples()), target)
    kernels = {key[0]: function for key, function in found.items()}
    entries = []
    for name, function in sorted(kernels.items()):
        keys = sorted(key for key in found if key[0] == name)
        listed = _short(" ".join(options for _, options in keys))
        entries.append((Entry(name, target, triton.__version__, _sources(function), listed, len(keys)), keys))
    return entries


def recorded() -> list[Recorded]:
    """The record, empty if there is none."""
    if not RECORD.exists():
        return []
    with RECORD.open(newline="") as file:
        rows = list(csv.DictReader(file))
    types = {"count": int, "registers": int, "spills": int, "shared_memory": int, "occupancy": float}
    return [Recorded(**{name: types.get(name, str)(value) for name, value in row.items()}) for row in rows]


def update(report: Path, again: bool) -> None:
    """Compile what is missing or has changed, or everything if ``again``; write the record and a report of variants."""
    known = {} if again else {entry.key(): entry for entry in recorded()}
    rows: dict[tuple[str, str], Recorded] = {}
    kernels: list[Kernel] = []
    for target in TARGETS:
        now = current(target)
        stale = [(entry, keys) for entry, keys in now if not _covers(known.get(entry.key()), entry)]
        compiled = compile_all({target: [key for _, keys in stale for key in keys]})
        kernels += compiled
        write_report(kernels, report)
        if found := [fault for kernel in compiled for fault in faults(kernel)]:
            raise SystemExit("\n".join(found))
        fresh = {entry.key(): _summary(entry, compiled) for entry, _ in stale}
        rows |= {entry.key(): fresh.get(entry.key()) or known[entry.key()] for entry, _ in now}
        # Write after every target, so an interruption loses at most one.
        _write([*rows.values(), *(entry for entry in known.values() if entry.target not in {at for _, at in rows})])
        total = sum(entry.count for entry, _ in now)
        print(f"{target}: compiled {len(compiled)} of {total} variants", flush=True)
    print(f"The record is {RECORD}; {report} has a row for each that was compiled")


def _write(rows: list[Recorded]) -> None:
    with RECORD.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Recorded)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in sorted(rows, key=Entry.key))


def _covers(known: Recorded | None, entry: Entry) -> bool:
    return known is not None and all(
        getattr(known, field.name) == getattr(entry, field.name) for field in fields(Entry)
    )


def _summary(entry: Entry, kernels: list[Kernel]) -> Recorded:
    ours = [kernel for kernel in kernels if (kernel.kernel, kernel.target) == entry.key()]
    if len(ours) != entry.count:
        raise RuntimeError(f"{entry.kernel} for {entry.target}: {len(ours)} variants compiled, {entry.count} listed")
    return Recorded(
        **asdict(entry),
        registers=max(kernel.registers for kernel in ours),
        spills=max(kernel.spills for kernel in ours),
        shared_memory=max(kernel.shared_memory for kernel in ours),
        occupancy=min(kernel.occupancy for kernel in ours),
    )


def _sources(kernel: Any) -> str:
    """Triton's own hash of a kernel and all that it calls, made independent of their positions in their files."""
    for function in _functions():
        function.starting_line_number, function.hash = 0, None
    return _short(kernel.cache_key)


def _functions() -> Iterator[Any]:
    import importlib
    import pkgutil

    import triton

    from glow_kernels.backends import triton as backend

    for module in pkgutil.iter_modules(backend.__path__, backend.__name__ + "."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, triton.JITFunction):
                yield value


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("report", type=Path, help="where to write a row per compiled variant")
    parser.add_argument("--all", action="store_true", help="compile everything again")
    arguments = parser.parse_args()
    update(arguments.report, arguments.all)
