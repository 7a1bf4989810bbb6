"""The numbers to reach that can be measured on a CPU, each with a name: reached, missed or not measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from glow_kernels.bench import results, table
from glow_kernels.bench.operators import LARGEST_MEMORY_BOUND_CHANNELS
from glow_kernels.bench.results import Row

_LARGE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Check:
    """One goal: ``figure`` is NaN where nothing was measured."""

    name: str
    goal: float
    figure: float
    at_least: bool = True
    where: str = ""

    @property
    def verdict(self) -> str:
        """``reached``, ``missed`` or ``not measured``."""
        if math.isnan(self.figure):
            return "not measured"
        reached = self.figure >= self.goal if self.at_least else self.figure <= self.goal
        return "reached" if reached else "missed"

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        figure = "" if math.isnan(self.figure) else f"{self.figure:6.3g}"
        where = f"  {self.where}" if self.where and self.verdict != "not measured" else ""
        return f"{self.verdict:13} {figure:>6} {sign} {self.goal:<5} {self.name}{where}"


def checks(rows: Sequence[Row]) -> list[Check]:
    """All goals, from the last measurement of every case on a CPU by the native backend."""
    operators = [
        row
        for row in results.of_kind(list(rows), "operator")
        if row["case"]["device"] == "cpu" and row["ours"] == "native" and row["case"]["dtype"] == "float32"
    ]
    found = _linear(operators) + _coupling(operators) + _limits(operators) + _slower(operators)
    wrong = [row for row in operators if row.get("wrong")]
    found.append(Check("wrong results", 0, len(wrong) if operators else math.nan, at_least=False))
    found.append(_repeatability(operators))
    return found + _overhead(rows) + _models(rows)


def _linear(rows: Sequence[Row]) -> list[Check]:
    found = []
    for direction in ("forward", "no_grad", "inverse", "backward", "reversible_backward"):
        small = [
            row
            for row in _select(rows, "actnorm_conv1x1", direction)
            if row["case"]["shape"][1] <= LARGEST_MEMORY_BOUND_CHANNELS
        ]
        for other, goal in (("eager", 4), ("compile", 2)):
            found.append(_mean(f"actnorm_conv1x1 {direction}, C <= 48, times faster than {other}", small, other, goal))
    return found


def _coupling(rows: Sequence[Row]) -> list[Check]:
    found = []
    for direction, goal in (
        ("forward", 4),
        ("no_grad", 4),
        ("inverse", 4),
        ("forward_backward", 3),
        ("backward", 3),
        ("reversible_backward", 3),
    ):
        selected = _select(rows, "affine_coupling", direction)
        for other, least in (("eager", goal), ("compile", 1.5)):
            found.append(_mean(f"affine_coupling {direction}, times faster than {other}", selected, other, least))
    return found


def _limits(rows: Sequence[Row]) -> list[Check]:
    found = []
    for operator in ("actnorm_conv1x1", "affine_coupling"):
        for direction in ("forward", "no_grad", "inverse"):
            copies = [
                (100.0 / row["candidates"][row["ours"]]["percent_of_limit"], _shape(row))
                for row in _select(rows, operator, direction)
                if _data_bytes(row) > _LARGE_BYTES and row["case"]["allocator"] == "tuned"
            ]
            worst, where = max(copies, default=(math.nan, ""))
            title = f"{operator} {direction}, over 8 MiB, tuned allocator, times a copy of the same bytes"
            found.append(Check(title, 4, worst, at_least=False, where=where))
    return found


def _slower(rows: Sequence[Row]) -> list[Check]:
    found = []
    for operator, direction in dict.fromkeys((row["case"]["operator"], row["case"]["direction"]) for row in rows):
        ratios = [
            (min(table.ratio(row, other) for other in ("eager", "compile") if other in row["candidates"]), _shape(row))
            for row in _select(rows, operator, direction)
        ]
        worst, where = min(ratios, default=(math.nan, ""))
        title = f"{operator} {direction}, slowest shape against the better of eager and compile"
        found.append(Check(title, 1, worst, where=where))
    return found


def _repeatability(rows: Sequence[Row]) -> Check:
    differences = table.repeat_differences(rows)
    share = sum(difference < 0.1 for difference in differences) / len(differences) if differences else math.nan
    return Check("share of ratios that differ by less than 10% when measured twice in one run", 0.9, share)


def _overhead(rows: Sequence[Row]) -> list[Check]:
    ratios = [
        (row["ratio"]["median"], f"{row['case']['operator']} {row['case']['direction']}")
        for row in results.of_kind(list(rows), "overhead")
        if row["case"]["device"] == "cpu"
    ]
    worst, where = max(ratios, default=(math.nan, ""))
    return [Check("a call on one 8x8 image, times one elementwise operation", 2, worst, at_least=False, where=where)]


def _models(rows: Sequence[Row]) -> list[Check]:
    def figure(part: str, implementation: str, wanted: Callable[[Row], bool]) -> float:
        for row in results.of_kind(list(rows), "model"):
            case = row["case"]
            if (case["part"], case["implementation"], case["device"]) == (part, implementation, "cpu") and wanted(case):
                return float(row["ratio_to_ours"]["median"])
        return math.nan

    def is_goal(case: Row) -> bool:
        return (case["steps"], case["levels"], case["hidden"], case["batch"]) == (8, 2, 64, 16)

    ratio = figure("training_step", "reference", is_goal)
    found = [Check("training step of Glow, K=8, L=2, width 64, batch 16, times faster than reference", 1.15, ratio)]
    reversible = figure("training_step", "native anchor", is_goal)
    found.append(Check("reversible training step, times plain autograd", 1.33, reversible, at_least=False))
    differences = [
        row["relative_difference"]
        for row in results.of_kind(list(rows), "accuracy")
        if (row["case"]["steps"], row["case"]["device"]) == (64, "cpu")
    ]
    title = "gradients, reversible against plain autograd, K=64, relative L2 difference"
    found.append(Check(title, 1e-4, max(differences, default=math.nan), at_least=False))
    return found


def _mean(name: str, rows: Sequence[Row], other: str, goal: float) -> Check:
    ratios = [table.ratio(row, other) for row in rows if other in row["candidates"]]
    figure = table.geometric_mean(ratios) if ratios else math.nan
    return Check(f"{name} (geometric mean of {len(ratios)})", goal, figure)


def _select(rows: Sequence[Row], operator: str, direction: str) -> list[Row]:
    wanted = (operator, direction)
    return [
        row for row in rows if (row["case"]["operator"], row["case"]["direction"]) == wanted and "candidates" in row
    ]


def _data_bytes(row: Row) -> int:
    return 4 * int(math.prod(row["case"]["shape"]))


def _shape(row: Row) -> str:
    return "x".join(map(str, row["case"]["shape"])) + f", {row['case']['threads']} threads"
