"""Progress bars for what takes more than a moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def with_progress(
    items: Iterable[Item], description: str, unit: str, *, total: int | None = None, is_shown: bool = True
) -> Iterable[Item]:
    """``items`` with a bar on standard error, where that is a terminal, from the second second on.

    Without tqdm there is none.

    Args:
        items: what is gone through.
        description: what is being done.
        unit: what an item is, in the plural.
        total: how many there are, if they cannot be counted.
        is_shown: whether there is a bar at all.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[Item] = tqdm(
        items, description, total, unit=f" {unit}", delay=1, leave=False, disable=None if is_shown else True
    )
    return bar
