"""Compares two sets of results: what became slower by more than the noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from glow_kernels.bench import results
from glow_kernels.bench.results import Row

# A smaller change counts as noise, whatever the ranges.
MIN_CHANGE = 0.1


@dataclass(frozen=True)
class Change:
    """How many times faster than eager we are in two sets of results; ``factor`` above 1 means slower in the second.

    ``certain`` if the ranges of the two ratios do not overlap.
    """

    name: str
    before: float
    after: float
    certain: bool

    @property
    def factor(self) -> float:
        """How many times slower the second is."""
        return self.before / self.after

    @property
    def regression(self) -> bool:
        """Whether it is slower by more than the noise."""
        return self.certain and self.factor > 1.0 + MIN_CHANGE


def by_device(before: list[Row], after: list[Row]) -> tuple[list[Change], list[str]]:
    """:func:`changes` and :func:`newly_wrong` for each device in both sets.

    If each set has only one device, the two are compared even if they differ.
    """
    old, new = results.by_device(before), results.by_device(after)
    if len(old) == len(new) == 1:
        return changes(before, after), newly_wrong(before, after)
    found: list[Change] = []
    wrong: list[str] = []
    for device in old.keys() & new.keys():
        found += [replace(change, name=f"{change.name}, {device}") for change in changes(old[device], new[device])]
        wrong += [f"{case}, {device}" for case in newly_wrong(old[device], new[device])]
    return sorted(found, key=lambda change: -change.factor), sorted(wrong)


def changes(before: list[Row], after: list[Row]) -> list[Change]:
    """Every case in both sets; speed is relative to eager in the same run, so a different load affects both alike."""
    old = {results.key(row): row for kind in ("operator", "model") for row in results.of_kind(before, kind)}
    found = []
    for kind in ("operator", "model"):
        for row in results.of_kind(after, kind):
            if other := old.get(results.key(row)):
                found += list(_compare(other, row))
    return sorted(found, key=lambda change: -change.factor)


def newly_wrong(before: list[Row], after: list[Row]) -> list[str]:
    """Cases that were right and are wrong now."""
    right = {results.key(row) for row in results.of_kind(before, "operator") if not row.get("wrong")}
    return [
        f"{name(row)}: {row['wrong']}"
        for row in results.of_kind(after, "operator")
        if row.get("wrong") and results.key(row) in right
    ]


def name(row: Row) -> str:
    """A case in words."""
    return " ".join(
        "x".join(map(str, value)) if isinstance(value, list) else str(value) for value in row["case"].values()
    )


def _compare(old: Row, new: Row) -> Iterator[Change]:
    if "candidates" not in old or "candidates" not in new:
        measured = "ratio_to_ours" in old and "ratio_to_ours" in new
        if measured and old["case"].get("implementation") == "reference":
            yield _change(name(new), old["ratio_to_ours"], new["ratio_to_ours"])
        return
    if "eager" in old["candidates"] and "eager" in new["candidates"]:
        pair = (row["candidates"]["eager"]["ratio_to_ours"] for row in (old, new))
        yield _change(name(new), *pair)


def _change(what: str, old: Sequence[float], new: Sequence[float]) -> Change:
    (before, *before_range), (after, *after_range) = old, new
    apart = before_range[0] > after_range[1] or after_range[0] > before_range[1]
    return Change(what, before, after, apart)
