"""Progress bars for long operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def with_progress(
    items: Iterable[Item], description: str, unit: str, *, total: int | None = None, is_shown: bool = True
) -> Iterable[Item]:
    """Iterate over ``items`` with a progress bar on standard error if that is a terminal, shown after one second.

    Without tqdm there is no bar.

    Args:
        items: the items to iterate over.
        description: what is being done.
        unit: name of the items, in the plural.
        total: number of items, if ``items`` has no length.
        is_shown: whether to show a bar at all.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[Item] = tqdm(
        items, description, total, unit=f" {unit}", delay=1, leave=False, disable=None if is_shown else True
    )
    return bar
