"""Which of two fast backends to take for which size, from measurements of both."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from glow_kernels.bench import results
from glow_kernels.bench.results import Row
from glow_kernels.errors import DataError

# Of an operator, then of a direction: up to so many elements of data this backend was the faster one.
Table = dict[str, dict[str, list[tuple[int, str]]]]


def table(rows: Sequence[Row], backends: tuple[str, str]) -> Table:
    """The faster of the two for every operator, direction and size, in order of size.

    Neighbouring sizes with the same winner become one entry, the largest of them; sizes above the last entry go to its
    winner too.

    Raises:
        DataError: no case was measured with both.
    """
    winners: dict[str, dict[str, dict[int, str]]] = {}
    for row in results.of_kind(rows, "operator"):
        times = {name: row.get("candidates", {}).get(name) for name in backends}
        if all(times.values()):
            winner = min(backends, key=lambda name: times[name]["seconds"][0])
            case = row["case"]
            sizes = winners.setdefault(case["operator"], {}).setdefault(case["direction"], {})
            sizes[math.prod(case["shape"])] = winner
    if not winners:
        raise DataError(f"no case was measured with both {backends[0]} and {backends[1]}: there is nothing to choose")
    return {
        operator: {direction: _merged(sizes) for direction, sizes in directions.items()}
        for operator, directions in winners.items()
    }


def write(table: Table, device: str, folder: Path) -> Path:
    """Write the table of a device to ``fastest-<device>.json``."""
    name = "-".join("".join(letter if letter.isalnum() else " " for letter in device.lower()).split())
    path = folder / f"fastest-{name}.json"
    path.write_text(json.dumps(table, indent=1) + "\n")
    return path


def _merged(sizes: dict[int, str]) -> list[tuple[int, str]]:
    entries: list[tuple[int, str]] = []
    for elements, winner in sorted(sizes.items()):
        if entries and entries[-1][1] == winner:
            entries.pop()
        entries.append((elements, winner))
    return entries
