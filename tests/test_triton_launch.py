"""Launches of Triton's kernels: a compiled kernel is found again without Triton's own look-up.

Proven with a stub of Triton's driver that records launches, in comparison with the arguments that Triton passes itself.
"""

from __future__ import annotations

import copy
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from triton_samples import empty

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiled by the run without the interpreter"
)


@pytest.fixture
def started():
    """Grid and arguments of every launch on a fake GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    found = []

    def launcher(source, metadata):
        # The arguments in between are stream, function, metadata and hooks.
        return lambda *args: found.append((args[:3], args[9:]))

    utils = SimpleNamespace(
        load_binary=lambda *_: (object(), 1, 32, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 232_448}
    )
    driver.set_active(
        SimpleNamespace(
            utils=utils,
            launcher_cls=launcher,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 99,  # a device whose cached kernels no other test gets
            get_current_stream=lambda device: 0,
        )
    )
    yield found
    if torch.cuda.is_available():  # Triton has no driver to go back to otherwise
        driver.reset_active()


def test_what_is_compiled_is_started_without_looking_it_up_again(started, monkeypatch):
    from glow_kernels.backends.triton import launch, sums

    monkeypatch.setattr(launch, "_COMPILED", {})
    with mock.patch.object(triton.JITFunction, "run", autospec=True, side_effect=triton.JITFunction.run) as looked_up:
        for size in (40, 300):
            sums.sum_partial(empty(2, size), 1)
        assert looked_up.call_count == 1
        sums.sum_partial(empty(2, 40, dtype=torch.float64), 1)
        assert looked_up.call_count == 2
        monkeypatch.setattr(launch, "_COMPILED", {})
        sums.sum_partial(empty(2, 300), 1)
        assert looked_up.call_count == 3
    _, (grid, ours), _, (expected_grid, expected) = started
    assert grid == expected_grid
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        same = one.shape == other.shape if isinstance(one, torch.Tensor) else one == other
        assert same, (one, other)


def test_another_kernel_device_or_option_is_looked_up(started, monkeypatch):
    from glow_kernels.backends.triton import launch, sums

    monkeypatch.setattr(launch, "_COMPILED", {})
    kernel, args = sums._sum_kernel, (empty(2, 40), 1, 40, empty(2), 40, 2)
    variants = [(kernel, "cuda:0", 4), (copy.copy(kernel), "cuda:0", 4), (kernel, "cuda:1", 4), (kernel, "cuda:0", 8)]
    for one, device, warps in variants * 2:
        options = {"BLOCK_N": 16, "BLOCK_R": 8, "num_warps": warps, "enable_fp_fusion": True}
        launch._start(one, 1, torch.device(device), args, options)
    assert len(launch._COMPILED) == len(variants)


def test_numbers_with_a_fraction_choose_no_variant(started, monkeypatch):
    from glow_kernels.backends.triton import launch, scale_filters

    monkeypatch.setattr(launch, "_COMPILED", {})
    filters = [empty(4, 3, 3, 3)], [empty(4)], [empty(4)]
    for factor in (1.0, 0.3):
        scale_filters.forward_all(*filters, [factor], torch.float32, [4, 3])
    assert len(launch._COMPILED) == 1
    assert [args[12] for _, args in started] == [1.0, 0.3]


def test_hooks_before_a_run_are_called(started, monkeypatch):
    from glow_kernels.backends.triton import launch, sums

    hook = mock.Mock()
    monkeypatch.setattr(launch, "_COMPILED", {})
    sums.sum_partial(empty(2, 7), 1)
    with mock.patch.object(sums._sum_kernel, "pre_run_hooks", [hook]):
        sums.sum_partial(empty(2, 7), 1)
    hook.assert_called_once()
