"""CUDA C++ or Triton for a tensor on a GPU: whichever was measured to be faster for this operator and size.

``faster/<model>.json`` next to this file, which ``glow-kernels tune`` writes, holds for every operator a list of pairs:
a number of elements and the backend that is faster up to that number. For more elements, and without a table, CUDA C++
is preferred: on an H100 it was faster for all but one of 135 pairs of operator and size, since its launches take less
host time.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLES = Path(__file__).parent / "faster"

Table = dict[str, list[tuple[int, str]]]


def first(candidates: tuple[str, ...], operator: str, args: tuple[Any, ...]) -> tuple[str, ...]:
    """``candidates`` with the faster of CUDA C++ and Triton for these arguments first, if both are among them."""
    x = first_tensor(args)
    if x.is_cpu or not x.is_cuda or "native" not in candidates or "triton" not in candidates:
        return candidates
    measured = _measured(operator, x.get_device())
    if not measured:
        return candidates
    size = elements(args)
    backend = next((name for limit, name in measured if size <= limit), "native")
    return (backend, *(name for name in candidates if name != backend))


def first_tensor(args: tuple[Any, ...]) -> Tensor:
    """The first argument, or its first element where that is a list."""
    tensor: Tensor = args[0][0] if isinstance(args[0], list) else args[0]
    return tensor


def elements(args: tuple[Any, ...]) -> int:
    """The size that tables use: the most elements in one of the first three arguments, a tensor or a list of them."""
    lists = (x if isinstance(x, list) else [x] for x in args[:3])
    return max(sum(x.numel() for x in each if isinstance(x, Tensor)) for each in lists)


def _measured(operator: str, index: int) -> Sequence[tuple[int, str]]:
    return _table(index).get(operator, ())


# Constant for the life of the process, and torch.compile cannot trace it. A cached function would be traced regardless
# of the attribute, hence the wrapper.
_measured._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Cached: this runs at every call, and getting the name of a GPU takes longer than a kernel launch.
@functools.cache
def _table(index: int) -> Table:
    """The table of a GPU, reduced to the operators for which CUDA C++ is not always the faster one."""
    path = TABLES / f"{table_name(torch.cuda.get_device_name(index))}.json"
    table: Table = json.loads(path.read_text()) if path.exists() else {}
    return {operator: pairs for operator, pairs in table.items() if any(name != "native" for _, name in pairs)}


def table_name(model: str) -> str:
    """Name of the file for a GPU, ``NVIDIA H100 80GB HBM3`` -> ``nvidia_h100_80gb_hbm3``."""
    return re.sub(r"[^a-z0-9]+", "_", model.lower()).strip("_")
