"""With glibc the allocator is tuned and keeps freed memory; elsewhere it is not changed. No call leaks memory."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import glow_kernels as gk

IN_A_NEW_PROCESS = """
import resource, torch, glow_kernels as gk
tuned = gk.tune_allocator()
x = torch.rand(10 * 2**20)
for repeat in range(20):
    if repeat == 15:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = x.clone()
    assert torch.equal(x, y)
    del y
print(tuned, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_tuning_keeps_freed_memory():
    command = [sys.executable, "-c", IN_A_NEW_PROCESS]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    tuned, page_faults = output.split()
    assert tuned == str(platform.libc_ver()[0] == "glibc")
    # Untuned, each of the last five clones faults in its 40 MiB again, 10240 pages of 4 KiB.
    assert tuned == "False" or int(page_faults) < 1024


@pytest.mark.parametrize("name", ["darwin", "win32"])
def test_other_platforms_are_not_tuned(monkeypatch, name):
    monkeypatch.setattr(sys, "platform", name)
    monkeypatch.delattr(ctypes, "CDLL")
    assert gk.tune_allocator() is False


def test_a_c_library_without_mallopt_is_not_tuned(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    assert gk.tune_allocator() is False


@pytest.mark.parametrize("refused", [None, -1, -3])
def test_both_thresholds_must_be_accepted(monkeypatch, refused):
    thresholds = {}

    def mallopt(option: int, value: int) -> int:
        thresholds[option] = value
        return int(option != refused)

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert gk.tune_allocator() is (refused is None)
    if refused is None:
        # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h.
        assert thresholds == {-1: 2**30, -3: 2**30}


def test_older_libraries_take_a_smaller_threshold(monkeypatch):
    """glibc before 2.35 accepts thresholds of at most 32 MiB."""
    thresholds = {}

    def mallopt(option: int, value: int) -> int:
        taken = option != -3 or value <= 2**25
        thresholds.update({option: value} if taken else {})
        return int(taken)

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert gk.tune_allocator()
    assert thresholds == {-1: 2**30, -3: 2**25}


class _Usage(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [("before", 7 * ctypes.c_size_t), ("in_use", ctypes.c_size_t), ("after", 2 * ctypes.c_size_t)]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library does not count what it gave out")
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_calls_leave_nothing_allocated(backend):
    if not gk.backends.backend_status(backend).available:
        pytest.skip(f"no {backend} backend")
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Usage
    x, h = torch.randn(2, 6, 4, 4), torch.randn(2, 12, 4, 4, requires_grad=True)
    parameters = torch.zeros(6), torch.zeros(6), torch.eye(6)

    def step() -> None:
        z, log_det = gk.affine_coupling(gk.actnorm_conv1x1(x, *parameters)[0], h)
        torch.autograd.grad(gk.gaussian_log_prob(z, h).sum() + log_det.sum(), h)
        gk.affine_coupling_inverse(z.detach(), h)
        gk.actnorm_statistics(x)

    with gk.use_backend(backend):
        for _ in range(100):  # fills caches
            step()
        before, calls = mallinfo().in_use, 500
        for _ in range(calls):
            step()
    # A leaked string of an option would take 32 bytes per call.
    assert mallinfo().in_use - before < 16 * calls
