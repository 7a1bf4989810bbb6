"""The goals on a CPU and on a GPU, each of them reached, missed or not measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from glow_kernels.bench import results, reversible, table
from glow_kernels.bench.models import GLOWS
from glow_kernels.bench.operators import BANDWIDTH_SHAPES, LARGEST_MEMORY_BOUND_CHANNELS
from glow_kernels.bench.results import Row

# The first model that ``make gpu`` trains, and the first whose memory it measures.
GPU_GLOW = {"steps": 32, "levels": 3, "hidden": 512, "image_size": 32, "batch": 64}
GPU_DEEP_GLOW = {"steps": 80, "levels": 3, "hidden": 256, "image_size": 256, "batch": 8}
_LARGE_BYTES = 8 * 2**20
_CONDITIONS = tuple((threads, allocator) for threads in (1, 2) for allocator in ("tuned", "default"))
_LINEAR = {"forward": 4, "no_grad": 4, "inverse": 4, "backward": 4, "reversible_backward": 4}
_COUPLING = {
    "forward": 4,
    "no_grad": 4,
    "inverse": 4,
    "forward_backward": 3,
    "backward": 3,
    "reversible_backward": 3,
}
_SINGLE_THREAD_ONLY = ("no_grad", "forward_backward")
_PER_COMPILE = {"actnorm_conv1x1": 2, "affine_coupling": 1.5}


@dataclass(frozen=True)
class Check:
    """One goal: ``figure`` is NaN if nothing was measured; ``where`` says which cases it is the mean or worst of."""

    group: str
    name: str
    goal: float
    figure: float
    at_least: bool = True
    where: str = ""

    @property
    def is_measured(self) -> bool:
        """Whether there is a figure."""
        return not math.isnan(self.figure)

    @property
    def verdict(self) -> str:
        """``reached``, ``missed`` or ``not measured``."""
        if not self.is_measured:
            return "not measured"
        reached = self.figure >= self.goal if self.at_least else self.figure <= self.goal
        return "reached" if reached else "missed"

    @property
    def wanted(self) -> str:
        """The goal in words."""
        return f"{'at least' if self.at_least else 'at most'} {self.goal:g}"

    def __str__(self) -> str:
        figure = f"{self.figure:.3g}" if self.is_measured else ""
        return f"{self.verdict:13} {figure:>8} {self.wanted:14} {self.name}" + (f"; {self.where}" if self.where else "")


def checks(rows: Sequence[Row]) -> list[Check]:
    """All goals, judged by the last measurement of every case; on a CPU only those of the native backend count."""
    return [
        *_operators(rows),
        *_operators_on_gpu(rows),
        *_overhead(rows),
        *_training(rows),
        *_training_on_gpu(rows),
        *_peaks_on_gpu(rows),
        *_activations(rows),
        *_accuracy(rows),
        *_whole_run(rows),
    ]


def lines(found: Sequence[Check]) -> Iterator[str]:
    """The measured goals as text, with a heading for every group, and then the tally of all goals."""
    measured = [goal for goal in found if goal.is_measured]
    for group in dict.fromkeys(goal.group for goal in measured):
        yield f"\n{group}"
        yield from (f"  {goal}" for goal in measured if goal.group == group)
    yield f"\n{tally(found)}"


def tally(found: Sequence[Check]) -> str:
    """How many were reached, missed and not measured."""
    verdicts = [check.verdict for check in found]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("reached", "missed", "not measured"))


def _operators(rows: Sequence[Row]) -> Iterator[Check]:
    standard = [row for row in _native(rows) if _is_standard(row["case"])]
    for threads, allocator in _CONDITIONS:
        group = f"{threads} thread{'s' * (threads > 1)}, "
        group += "tuned allocator" if allocator == "tuned" else "allocator as it is"
        chosen = [row for row in standard if (row["case"]["threads"], row["case"]["allocator"]) == (threads, allocator)]
        for operator, goals in (("actnorm_conv1x1", _LINEAR), ("affine_coupling", _COUPLING)):
            of_operator = [row for row in chosen if row["case"]["operator"] == operator]
            yield _slowest(group, operator, of_operator)
            # With the default allocator only the largest shapes are measured, too few for means.
            if allocator == "tuned":
                for direction, goal in goals.items():
                    if threads > 1 and direction in _SINGLE_THREAD_ONLY:
                        continue
                    yield from _faster(group, operator, direction, goal, of_operator)
                yield _large(group, operator, of_operator)
        for operator in ("gaussian_log_prob", "actnorm_statistics"):
            yield _slowest(group, operator, [row for row in chosen if row["case"]["operator"] == operator])


def _faster(group: str, operator: str, direction: str, goal: float, rows: Sequence[Row]) -> Iterator[Check]:
    """Geometric means over shapes; for the linear map only over shapes that are limited by memory."""
    most = LARGEST_MEMORY_BOUND_CHANNELS if operator == "actnorm_conv1x1" else math.inf
    chosen = [row for row in rows if row["case"]["direction"] == direction and row["case"]["shape"][1] <= most]
    for other, least in (("eager", goal), ("compile", _PER_COMPILE[operator])):
        ratios = [(table.ratio(row, other), table.shape(row["case"]["shape"])) for row in chosen if _has(row, other)]
        figure, where = math.nan, ""
        if ratios:
            figure = table.geometric_mean(ratio for ratio, _ in ratios)
            where = f"geometric mean of {len(ratios)} shapes, least {min(ratios)[0]:.2f} at {min(ratios)[1]}"
        channels = f", C <= {most}" if operator == "actnorm_conv1x1" else ""
        yield Check(group, f"{operator} {direction}{channels}: times faster than {other}", least, figure, True, where)


def _slowest(group: str, operator: str, rows: Sequence[Row]) -> Check:
    """The worst shape and direction: none may be slower than the better of eager and compiled code."""
    ratios = [
        (min(table.ratio(row, other) for other in ("eager", "compile") if _has(row, other)), _place(row))
        for row in rows
        if _has(row, "eager")
    ]
    worst, where = min(ratios, default=(math.nan, ""))
    name = f"{operator}: worst shape and direction, times faster than the better of eager and compile"
    return Check(group, name, 1, worst, True, where)


def _large(group: str, operator: str, rows: Sequence[Row]) -> Check:
    """The worst of forward and inverse on large shapes, in units of the time to copy the same bytes."""
    copies = [
        (1.0 / table.ratio(row, "copy"), _place(row))
        for row in rows
        if row["case"]["direction"] in ("forward", "no_grad", "inverse") and _data_bytes(row) > _LARGE_BYTES
    ]
    worst, where = max(copies, default=(math.nan, ""))
    name = f"{operator}: worst shape over 8 MiB, forward and inverse, times a clone of the same bytes"
    return Check(group, name, 4, worst, False, where)


def _operators_on_gpu(rows: Sequence[Row]) -> Iterator[Check]:
    """Every operator and direction on the shapes that fit in no cache, timed as replayed CUDA graphs."""
    group = "GPU, bandwidth shapes, float32"
    measured = [
        row
        for row in table.measured(rows)
        if row["case"]["device"] != "cpu"
        and _is_standard(row["case"])
        and tuple(row["case"]["shape"]) in BANDWIDTH_SHAPES
    ]
    for operator, direction in dict.fromkeys((row["case"]["operator"], row["case"]["direction"]) for row in measured):
        chosen = [
            row for row in measured if (row["case"]["operator"], row["case"]["direction"]) == (operator, direction)
        ]
        limit, where = min((row["candidates"][row["ours"]]["percent_of_limit"], _place(row)) for row in chosen)
        yield Check(group, f"{operator} {direction}: % of a copy of the same bytes", 85, limit, True, where)
        for other, goal in (("eager", 4), ("compile", 1.2)):
            ratios = [(table.ratio(row, other), _place(row)) for row in chosen if _has(row, other)]
            worst, where = min(ratios, default=(math.nan, ""))
            yield Check(group, f"{operator} {direction}: times faster than {other}", goal, worst, True, where)


def _overhead(rows: Sequence[Row]) -> Iterator[Check]:
    ratios = [
        (row["ratio"][0], f"{row['case']['operator']} {row['case']['direction']}")
        for row in results.of_kind(rows, "overhead")
        if _is_native(row)
    ]
    worst, where = max(ratios, default=(math.nan, ""))
    yield Check("Calls", "worst operator on one 8x8 image, times one elementwise operation", 2, worst, False, where)


def _implementations(rows: Sequence[Row], part: str, sizes: Mapping[str, int], on_gpu: bool) -> dict[str, Row]:
    """Rows of a model of these sizes, by implementation."""
    return {
        row["case"]["implementation"]: row
        for row in results.of_kind(rows, "model")
        if row["case"]["part"] == part
        and (row["case"]["device"] != "cpu") == on_gpu
        and all(row["case"][name] == value for name, value in sizes.items())
    }


def _training(rows: Sequence[Row]) -> Iterator[Check]:
    measured = _implementations(rows, "training_step", GLOWS[0], on_gpu=False)
    found = {name: row["ratio_to_ours"][0] for name, row in measured.items() if _is_native(row)}
    title = "training step of Glow, K=8, L=2, width 64, batch 16, 32x32"
    name = f"{title}: native, times faster than reference"
    yield Check("Training", name, 1.15, found.get("reference", math.nan))
    name = f"{title}: reversible, times plain autograd"
    yield Check("Training", name, 1.33, found.get("native anchor", math.nan), at_least=False)


def _training_on_gpu(rows: Sequence[Row]) -> Iterator[Check]:
    """Ratios of medians, since the implementations were measured one after the other and not in turns."""
    measured = _implementations(rows, "training_step", GPU_GLOW, on_gpu=True)
    found = {name: row["seconds"][0] for name, row in measured.items() if "seconds" in row}
    group = "GPU, training step of Glow, K=32, L=3, width 512, batch 64, 32x32"
    for ends, as_run in (
        (("", ""), "float32, launched by the host"),
        ((", graph", ", graph"), "float32, a graph"),
        ((" bfloat16, graph", ", bfloat16, graph"), "networks in bfloat16, a graph"),
    ):
        ours, reversible = (found.get(f"glow_kernels{end}", math.nan) for end in (ends[0], f" anchor{ends[1]}"))
        for other, goal in (("reference", 3), ("reference compiled", 1.3)):
            name = f"{as_run}: times faster than {other} in float32"
            yield Check(group, name, goal, found.get(other, math.nan) / ours)
        yield Check(group, f"{as_run}: reversible, times plain autograd", 1.33, reversible / ours, at_least=False)
    floor = found.get("floor: bare convolutions, bfloat16, graph", math.nan)
    yield Check(group, f"{as_run}: times the bare convolutions alone", 1.25, ours / floor, at_least=False)


def _peaks_on_gpu(rows: Sequence[Row]) -> Iterator[Check]:
    measured = _implementations(rows, "memory", GPU_DEEP_GLOW, on_gpu=True)
    found = {name: row["peak_extra_bytes"] / 1e9 for name, row in measured.items() if "peak_extra_bytes" in row}
    group = "GPU, peak of a training step of Glow, K=80, L=3, width 256, batch 8, 256x256, float32"
    for implementation, goal in (("anchor 4", 0.62), ("anchor 6, 8 micro-batches", 0.18)):
        name = f"{implementation}: GB, also what the convolutions work in"
        yield Check(group, name, goal, found.get(implementation, math.nan), at_least=False)


def _activations(rows: Sequence[Row]) -> Iterator[Check]:
    found: dict[str, dict[int, Row]] = {}
    for row in results.of_kind(rows, "memory"):
        found.setdefault(row["case"]["policy"], {})[row["case"]["steps"]] = row
    group = "Activations at 256x256, batch 8, hidden 256, L=3, float32, fake tensors"

    def slope(policy: str) -> float:
        kept = sorted((steps, row["kept_bytes"]) for steps, row in found.get(policy, {}).items())
        return (kept[-1][1] - kept[0][1]) / (kept[-1][0] - kept[0][0]) if len(kept) > 1 else math.nan

    per_anchor = 4 * slope(reversible.ANCHOR) / reversible.ALL_STATES_BYTES
    name = "anchors at every 4th step: bytes kept per 4 steps, in states of all levels"
    yield Check(group, name, 1.02, per_anchor, at_least=False)
    name = "inverting: bytes kept per step, in states of all levels"
    yield Check(group, name, 0, slope(reversible.INVERT) / reversible.ALL_STATES_BYTES, at_least=False)
    for policy, anchor_every, goal, options in (
        (reversible.ANCHOR, 4, 0.62, "anchors at every 4th step"),
        (reversible.MICRO_BATCHES, 6, 0.18, "8 micro-batches, anchors at every 6th step"),
    ):
        peak, where = math.nan, ""
        if policy in found:
            steps, row = max(found[policy].items())
            peak = _deepest_peak(steps, row, anchor_every) / 1e9
            where = f"from K={steps} by its exact slope" if steps < reversible.DEEPEST else ""
        yield Check(group, f"peak in GB, K=80, {options}", goal, peak, False, where)


def _deepest_peak(steps: int, row: Row, anchor_every: int) -> float:
    """Peak bytes of the deepest chain, extrapolated from ``steps``, to which each further anchor adds its state.

    The peak is either right after the forward, with the anchors of all levels, or in the backward of the first level.
    """
    anchors = reversible.DEEPEST // anchor_every - steps // anchor_every
    kept, peak = row["kept_bytes"], row["peak_bytes"]
    return float(max(kept + anchors * reversible.ALL_STATES_BYTES, peak + anchors * reversible.STATE_BYTES))


def _accuracy(rows: Sequence[Row]) -> Iterator[Check]:
    for part, steps, name in (
        ("gradients", 64, "gradients of 64 steps, reversible against plain autograd: relative L2 difference"),
        ("bad_row", 32, "the same for one bad row in one of 8 images, trained Glow of 32 steps"),
    ):
        differences = [
            math.inf if row["relative_difference"] is None else row["relative_difference"]
            for row in results.of_kind(rows, "accuracy")
            if (row["case"]["part"], row["case"]["steps"], row["case"]["device"]) == (part, steps, "cpu")
        ]
        yield Check("Gradients", name, 1e-4, max(differences, default=math.nan), at_least=False)


def _whole_run(rows: Sequence[Row]) -> Iterator[Check]:
    cases = [row for row in results.of_kind(rows, "operator") if row["case"]["device"] == "cpu"]
    wrong = [f"{table.shape(row['case']['shape'])} {name}" for row in cases for name in row.get("wrong", {})]
    figure = len(wrong) if cases else math.nan
    yield Check("The run", "candidates with wrong results or errors", 0, figure, False, ", ".join(wrong[:3]))
    share, count = table.repeatability(rows)
    name = "share of ratios that differ by less than 10% when measured twice in one run"
    yield Check("The run", name, 0.9, share, True, f"{count} ratios" if count else "")


def _native(rows: Sequence[Row]) -> list[Row]:
    return [row for row in results.of_kind(rows, "operator") if _is_native(row) and "candidates" in row]


def _is_native(row: Row) -> bool:
    return bool(row["case"]["device"] == "cpu" and row["ours"] == "native")


def _is_standard(case: Row) -> bool:
    return bool((case["dtype"], case["memory_format"]) == ("float32", "contiguous"))


def _has(row: Row, other: str) -> bool:
    return other in row["candidates"]


def _data_bytes(row: Row) -> int:
    return 4 * int(math.prod(row["case"]["shape"]))


def _place(row: Row) -> str:
    return f"{row['case']['direction']} {table.shape(row['case']['shape'])}"
