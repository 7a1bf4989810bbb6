"""Progress bars are shown only if standard error is a terminal, and only for work that takes more than a moment."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest

from glow_kernels.progress import with_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time as tqdm sees it."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def three(seconds: float, clock: list[float]) -> Iterator[int]:
    for number in range(3):
        clock[0] += seconds
        yield number


@pytest.mark.parametrize(
    ("stream", "seconds", "is_shown", "has_bar"),
    [
        pytest.param(Terminal, 0.6, True, True, id="slow, on a terminal"),
        pytest.param(Terminal, 0.6, False, False, id="not asked for"),
        pytest.param(Terminal, 0.0, True, False, id="fast"),
        pytest.param(io.StringIO, 0.6, True, False, id="into a file"),
    ],
)
def test_a_bar_is_shown_for_slow_work_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
    clock: list[float],
    stream: type[io.StringIO],
    seconds: float,
    is_shown: bool,
    has_bar: bool,
) -> None:
    errors = stream()
    monkeypatch.setattr(sys, "stderr", errors)
    items = three(seconds, clock)
    assert list(with_progress(items, "waiting", "numbers", total=3, is_shown=is_shown)) == [0, 1, 2]
    assert ("waiting:  67%" in errors.getvalue() and "numbers/s" in errors.getvalue()) == has_bar
    assert bool(errors.getvalue()) == has_bar


def test_without_tqdm_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(with_progress(range(3), "waiting", "numbers")) == [0, 1, 2]
