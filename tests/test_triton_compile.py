"""Triton kernels compiled for GPUs that are not here, just as the operators launch them.

Proven for every target: nothing spills, every block fits, and the bandwidth shapes are read and written 128 bits at a
time. The tests compile every function, type, tile, size of matrix and option; ``make kernels-report`` compiles all of
their combinations, and no shape and no memory layout leads to a kernel that it does not list. On the way to a launch
nothing waits for the device.
"""

from __future__ import annotations

import csv
import functools
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from ahead_of_time import TARGETS, Choice, choices
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import LAYOUTS
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from triton_samples import DTYPES, all_samples, compute_dtype, core_samples

from glow_kernels import ScaleMap

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiled by the run without the interpreter"
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """A row of the report for every kernel of the core samples."""
    path = tmp_path_factory.mktemp("kernels") / "kernels.csv"
    script = Path(__file__).with_name("ahead_of_time.py")
    subprocess.run([sys.executable, str(script), "core", str(path)], check=True)
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills_and_every_block_fits(kernels, target):
    ours = [kernel for kernel in kernels if kernel["target"] == target]
    names = {kernel["operator"].split(maxsplit=1)[0] for kernel in ours}
    assert len(names) >= 20  # every function of every operator
    shared_memory = TARGETS[target][3]
    assert [kernel for kernel in ours if int(kernel["spills"])] == []
    assert [kernel for kernel in ours if int(kernel["shared_memory"]) > shared_memory] == []
    assert [kernel for kernel in ours if float(kernel["occupancy"]) == 0] == []


@pytest.mark.parametrize("target", TARGETS)
def test_bandwidth_shapes_are_read_and_written_128_bits_at_a_time(kernels, target):
    bandwidth = [
        kernel
        for kernel in kernels
        if kernel["target"] == target
        and ("x128x128 float32" in kernel["operator"] or "32x48x64x64 float32" in kernel["operator"])
        and kernel["kernel"] not in ("_sum_kernel", "_combine_kernel")
    ]
    assert len(bandwidth) >= 15
    assert [kernel for kernel in bandwidth if int(kernel["widest_load"]) < 128] == []
    # These write nothing but partial results.
    reductions = ("_log_prob_kernel", "_chunk_kernel", "sums_kernel")
    writing = [kernel for kernel in bandwidth if kernel["kernel"] not in reductions]
    assert [kernel for kernel in writing if int(kernel["widest_store"]) < 128] == []


@functools.cache
def listed() -> set[Choice]:
    """Every kernel of the report."""
    return choices(sample.call for sample in all_samples())


shapes = st.tuples(
    st.one_of(st.integers(1, 4), st.just(2**30)),
    st.one_of(st.integers(1, 64), st.integers(1, 400)),
    *[st.one_of(st.integers(1, 16), st.integers(1, 2000))] * 2,
)


@given(shape=shapes, dtypes=st.sampled_from(list(DTYPES)), layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 3))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_report_lists_every_kernel_that_may_be_launched(shape, dtypes, layouts):
    from glow_kernels.backends.triton import (
        actnorm_conv1x1,
        actnorm_statistics,
        affine_coupling,
        bias_relu,
        gaussian_log_prob,
        scale_filters,
    )

    dtype, h_dtype = DTYPES[dtypes]
    x, grad, h = (
        LAYOUTS[layout](torch.empty(shape[0], channels, *shape[2:], dtype=type_, device="meta"))
        for layout, channels, type_ in zip(
            layouts, (shape[1], shape[1], 2 * shape[1]), (dtype, dtype, h_dtype), strict=True
        )
    )
    matrix, vector, number = (
        torch.empty(size, dtype=compute_dtype(dtype), device="meta")
        for size in ((shape[1], shape[1]), shape[1:2], shape[:1])
    )
    bias = vector.to(h_dtype)
    weight, of_weight = torch.empty(shape[1:], dtype=dtype, device="meta"), vector.to(dtype)
    scale_map = ScaleMap("sigmoid", offset=2.0)
    options = (None, scale_map.kind, scale_map.parameters, "interleaved_shift_scale", "shift_scale")
    calls = [
        lambda: affine_coupling.forward(x, h, *options),
        lambda: affine_coupling.inverse_backward(grad, number, x, h, *options),
        lambda: affine_coupling.reversible_backward(grad, number, x, h, *options),
        lambda: gaussian_log_prob.forward(x, h, "interleaved_mean_log_sd"),
        lambda: gaussian_log_prob.backward(number, x, h, "interleaved_mean_log_sd"),
        lambda: gaussian_log_prob.sample_backward(grad, x, h, "interleaved_mean_log_sd"),
        lambda: actnorm_conv1x1.apply(x, matrix, vector),
        lambda: actnorm_conv1x1.apply_backward(grad, x, matrix, True),
        lambda: actnorm_conv1x1.apply_backward(grad, x, matrix, False),
        lambda: actnorm_conv1x1.apply_reversible_backward(grad, x, matrix, matrix, vector),
        lambda: actnorm_statistics.forward(x),
        lambda: bias_relu.forward(x, bias),
        lambda: bias_relu.backward(grad, x),
        lambda: scale_filters.forward(weight, of_weight, of_weight, 3.0, h_dtype),
        lambda: scale_filters.backward(weight.to(h_dtype), bias, weight, of_weight, of_weight, 1.0),
    ]
    if shape[1] <= 64:
        calls.append(lambda: actnorm_conv1x1.fold_inverse(vector, vector, matrix, None))
    assert choices(calls) - listed() == set()


def test_every_tile_is_listed_once_for_every_type():
    for kernel in ("gradient_kernel", "map_kernel"):
        tiles = [dict(options) for name, types, options in listed() if name == kernel and types[0] == "torch.float32"]
        found = {(tile["CHANNELS_LAST"], tile["BLOCK_P"], tile["BLOCK_C"]) for tile in tiles}
        assert found == {(False, 1 << n, 1 << (10 - n)) for n in range(3, 11)} | {
            (True, 1 << (10 - n), 1 << n) for n in range(3, 11)
        }


class _Calls(TorchDispatchMode):
    """Notes the operators of PyTorch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


ALLOCATIONS = {"empty", "empty_like", "new_empty"}
VIEWS = {"view", "permute", "_unsafe_view", "transpose", "unsqueeze", "slice", "select", "expand", "detach", "alias"}
COPIES = {"clone"}  # of the sums over positions, since results share no memory


def test_an_operator_only_allocates_and_launches():
    # Values that Python asks for, or that go to the host, would be an error: these tensors have none.
    samples = core_samples()
    with _Calls() as seen:
        choices(sample.call for sample in samples)
    assert seen.names <= ALLOCATIONS | VIEWS | COPIES


@pytest.mark.parametrize("known", [True, False], ids=["known_log_det", "unknown_log_det"])
def test_folding_large_matrices_does_not_wait_for_the_device(known):
    from glow_kernels.backends.reference import actnorm_conv1x1 as library
    from glow_kernels.backends.triton import folding, support

    def tensors(device: str) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(size, device=device) for size in ((4, 96), (4, 96, 96), (4,)))

    # On tensors without values, so that asking for one is an error.
    vector, matrix, number = tensors("meta")
    with _Calls() as seen:
        folding.fold_inverse(vector, vector, matrix, number if known else None)
    assert ("_linalg_slogdet" in seen.names) != known
    with FakeTensorMode():
        vector, matrix, number = tensors("cpu")
        parameters, grads = (vector, vector, matrix, number if known else None), (matrix, vector, number)
        lu = (matrix, matrix, matrix, vector, vector)
        library.fold(*parameters)
        library.fold_backward(*grads, *parameters)
        library.fold_inverse_backward(*grads, *parameters)
        library.lu_weight(*lu)
        library.lu_weight_backward(matrix, number, *lu)
        with pytest.raises(DataDependentOutputException):
            library.fold_inverse(*parameters)
    # Which of the two computes it on a GPU.
    on_gpu = [torch.empty(size, device="meta") for size in ((96,), (96,), (96, 96))]
    with mock.patch.object(support, "_on_device", return_value=True):
        taken = {name: support.actnorm_conv1x1(name, *on_gpu) for name in ("fold", "fold_inverse", "fold_backward")}
    assert taken == {"fold": False, "fold_inverse": True, "fold_backward": False}
