"""Peak memory of a call, beyond what was allocated before it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile, record_function

# Otherwise Kineto, the profiler's library, announces every start and stop on standard error.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def peak_extra_bytes(call: Callable[[], object], device: torch.device, *, keeps: bool = True) -> int:
    """Peak bytes that PyTorch's allocator held during ``call``, results included, beyond those held before it.

    Args:
        call: the call to measure.
        device: the device on which it computes.
        keeps: whether a call leaves tensors that the next call frees, such as gradients of parameters; on a CPU it is
            then called twice.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Without acc_events PyTorch up to 2.12 warns about events between cycles, though there is only one cycle.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        if keeps:
            call()  # allocates under the profiler, which does not know the sizes of earlier allocations
        with record_function("measured"):
            result = call()
    del result
    events = profiler.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == "measured")
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    for _, nbytes in sorted((change for change in changes if change[0] >= start), key=lambda change: change[0]):
        held += nbytes
        peak = max(peak, held)
    return peak
