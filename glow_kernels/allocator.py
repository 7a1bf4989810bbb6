"""Tuning of the C library's memory allocator for large CPU tensors."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLDS = 1 << 30, 32 << 20  # the second is the largest that glibc accepted before 2.35
_TRIM_THRESHOLD = 1 << 30


def tune_allocator() -> bool:
    """Let glibc keep freed blocks of up to 1 GiB (before 2.35: 32 MiB) instead of returning them to the system at once.

    Otherwise every large temporary tensor is mapped anew, and its pages are faulted in one by one: operators on tensors
    of 12 MB run up to 4 times slower. This affects the whole process and cannot be undone; memory that the process has
    used stays allocated to it. The command line calls it at startup.

    Returns:
        Whether the allocator was tuned; False without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    is_set = any(mallopt(_M_MMAP_THRESHOLD, threshold) for threshold in _MMAP_THRESHOLDS)
    return is_set and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))
