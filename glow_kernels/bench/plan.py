"""Runs measurements one after the other within a planned time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Show = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """A measurement: ``run`` gets the seconds that it may take, at most ``seconds``; 0 for a heading."""

    name: str
    seconds: float
    run: Callable[[float], None]


def run(tasks: Sequence[Task], limit: float, show: Show, *, strict: bool = False) -> None:
    """Run all tasks; if they need more than ``limit`` seconds together, each gets its share of the time left.

    Time that a task saves or overruns is shared among the later ones. When no time is left, each of them takes the
    least that it can, or is left out if ``strict``. A terminal shows a progress bar with the time left.
    """
    planned = sum(task.seconds for task in tasks)
    limit = min(limit, planned)
    show(f"{sum(task.seconds > 0 for task in tasks)} measurements, planned to take {duration(limit)}")
    start = time.monotonic()
    left, left_out = planned, 0
    with _bar(limit) as update:
        for task in tasks:
            time_left = start + limit - time.monotonic()
            update(time_left, task.name)
            if strict and time_left <= 0:
                left_out += task.seconds > 0
                continue
            task.run(max(0.0, min(1.0, time_left / left) * task.seconds))
            left -= task.seconds
    missing = f"; {left_out} measurements were left out for lack of time" if left_out else ""
    show(f"\nmeasured in {duration(time.monotonic() - start)}{missing}")


def duration(seconds: float) -> str:
    """A duration as text."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


@contextlib.contextmanager
def _bar(limit: float) -> Iterator[Callable[[float, str], None]]:
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda time_left, name: None
        return
    # disable=None shows the bar only if standard error is a terminal.
    with tqdm(total=limit, disable=None, leave=False, bar_format="{percentage:3.0f}%|{bar:30}| {desc}") as bar:

        def update(time_left: float, name: str) -> None:
            bar.n = min(limit, max(0.0, limit - time_left))
            bar.set_description_str(f"{duration(max(0.0, time_left))} left, {name}")

        yield update
