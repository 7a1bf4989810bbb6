"""C++ on the CPU and CUDA C++ on NVIDIA GPUs, from the libraries ``_C.so`` and ``_C_cuda.so``, built from csrc."""

from __future__ import annotations

import functools
import os

import torch

from glow_kernels.backends import BackendStatus
from glow_kernels.backends.native.library import Library, UnusableError, load

LIBRARY = Library("_C.so", "cpu", "the native library", "build", "cpu")


def status() -> BackendStatus:
    """Load the library for the CPU and describe it, or say why it cannot be used; ``cuda.py`` does so for GPUs."""
    try:
        built, stale = load(LIBRARY)
    except UnusableError as error:
        return BackendStatus("native", False, error.reason, error.remedy)
    reason = f"C++ on the CPU, {_described_isa()}, built with torch {built['torch']}"
    if stale:
        return BackendStatus("native", True, f"{reason}, out of date: csrc has changed since", "run 'make build'")
    return BackendStatus("native", True, reason)


@functools.cache
def isa() -> str:
    """Instruction set in use."""
    # Redispatched directly to the CPU kernel, below tracing: otherwise an exported program would contain this call.
    on_cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    name: str = torch.ops.glow_kernels.native_isa.default.redispatch(on_cpu)
    return name


def _described_isa() -> str:
    """The instruction set in use, and whether ``GLOW_KERNELS_ISA`` asked for another that is not available."""
    wanted = os.environ.get("GLOW_KERNELS_ISA") or isa()
    return isa() if wanted == isa() else f"{isa()} (GLOW_KERNELS_ISA={wanted} is not available here)"
