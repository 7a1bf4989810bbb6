"""Triton kernels compiled for GPUs that are not here, exactly as the operators launch them.

Proven for every target: nothing spills, every block fits, and the bandwidth shapes are read and written 128 bits at a
time. ``make kernels-report`` compiles every variant of every kernel and records hashes of sources and variants, which
must match the current ones. The tests compile some variants again, different ones every day, and compare them with the
record. No shape and no memory layout leads to a variant that is not listed, and no launch waits for the device.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import inspect
import json
import os
from dataclasses import replace
from unittest import mock

import kernel_record
import pytest
import torch
from ahead_of_time import TARGETS, Kernel, Variant, compile_all, fake_gpu, faults, variants
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from operators import LAYOUTS
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from triton_samples import DTYPES, SCALE_MAP, all_samples, compute_dtype, is_bandwidth, is_of_two_formats

from glow_kernels.backends.triton import support

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiled by the run without the interpreter"
)
RUN = "run: make kernels-report"


@pytest.fixture(scope="module")
def kernels():
    """A tenth of all variants, compiled for one target; the tenth and the target change every day."""
    day = datetime.date.today().toordinal()
    target = list(TARGETS)[day % len(TARGETS)]
    part = day // len(TARGETS) % 10
    return compile_all({target: [key for key in listed(target) if int(_digest("".join(key)), 16) % 10 == part]})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_no_kernel_spills_and_all_move_as_many_bits_as_they_can(kernels):
    assert len(kernels) >= 50
    assert [fault for kernel in kernels for fault in faults(kernel)] == []


def test_kernels_need_what_is_recorded(kernels):
    record = {row.key(): row for row in kernel_record.recorded()}
    for kernel in kernels:
        most = record[kernel.kernel, kernel.target]
        if most.triton == triton.__version__:
            assert kernel.registers <= most.registers, kernel
            assert kernel.shared_memory <= most.shared_memory, kernel
            assert kernel.occupancy >= most.occupancy, kernel


OF_ONE_FORMAT = "affine_coupling.forward 64x12x128x128 float32 NCHW"
SOUND = Kernel("sm_90", OF_ONE_FORMAT, "map_kernel", 32, 0, 0, 4, 1.0, 128, 128, 128, 128)
OF_TWO_FORMATS = {"operator": "affine_coupling.forward 64x12x64x64 float32_with_bfloat16 NCHW with channels last"}
MIXED = OF_TWO_FORMATS | {"kernel": "mixed_map_kernel"}


@pytest.mark.parametrize(
    "changes",
    [
        {"spills": 8},
        {"shared_memory": 232_449},
        {"occupancy": 0.0},
        {"widest_load": 64},
        {"widest_store": 64},
        MIXED | {"widest_load": 64},
        MIXED | {"widest_store": 64},
        MIXED | {"narrowest_load": 16},
        MIXED | {"narrowest_store": 16},
    ],
    ids=lambda changes: "_".join(changes),
)
def test_faults_are_seen(changes):
    assert faults(SOUND) == faults(replace(SOUND, **MIXED)) == []
    (fault,) = faults(replace(SOUND, **changes))
    assert fault.startswith((SOUND.operator, OF_TWO_FORMATS["operator"]))


def test_a_kernel_with_a_fault_is_not_recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_record, "RECORD", tmp_path / "record.csv")
    monkeypatch.setattr(kernel_record, "compile_all", lambda wanted: [replace(SOUND, spills=8)])
    with pytest.raises(SystemExit, match="map_kernel spills"):
        kernel_record.update(tmp_path / "report.csv", again=True)
    assert [path.name for path in tmp_path.iterdir()] == ["report.csv"]


def test_the_faults_are_looked_for_in_every_operator():
    assert len({sample.name.split()[0] for sample in all_samples() if is_bandwidth(sample.name)}) >= 15
    apart = variants(sample.call for sample in all_samples() if is_of_two_formats(sample.name))
    assert {name for name, _ in apart if name.startswith(("coupled_", "mixed_"))} == {
        *("coupled_apply_kernel", "coupled_backward_kernel", "mixed_map_kernel", "mixed_gradient_kernel")
    }


@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_of_these_sources_has_been_compiled(target):
    record = {row.key(): row for row in kernel_record.recorded()}
    versions = {row.triton for row in record.values()}
    if versions != {triton.__version__}:
        pytest.skip(f"Triton {triton.__version__} is here, and the record is of {', '.join(sorted(versions))}")
    now = {entry.key(): entry for entry, _ in kernel_record.current(target)}
    missing = sorted(name for name, _ in now.keys() - record.keys())
    assert not missing, f"never compiled for {target}: {', '.join(missing)}; {RUN}"
    gone = sorted(name for name, where in record.keys() - now.keys() if where == target)
    assert not gone, f"recorded, but no longer launched: {', '.join(gone)}; {RUN}"
    for what in ("sources", "variants", "count"):
        changed = [
            name for (name, where), entry in now.items() if getattr(record[name, where], what) != getattr(entry, what)
        ]
        assert not changed, (
            f"the {what} of {', '.join(changed)} have changed since all were compiled for {target}; {RUN}"
        )
    rows = [row for row in record.values() if row.target == target]
    assert [row for row in rows if row.spills or row.shared_memory > TARGETS[target][3] or not row.occupancy] == []


@functools.cache
def listed(target: str = "sm_90") -> dict[Variant, object]:
    """Every variant in the record."""
    return variants((sample.call for sample in all_samples()), target)


def test_numbers_and_addresses_choose_no_variant():
    for kernel in {id(kernel): kernel for kernel in listed().values()}.values():
        for parameter in kernel.params:
            if not parameter.is_constexpr:
                assert parameter.do_not_specialize, (kernel.fn.__name__, parameter.name)
                number = not parameter.name.endswith("_ptr")
                assert parameter.annotation_type in (("i32", "i64", "fp64") if number else ("",)), parameter.name
        launched = inspect.signature(kernel.fn).parameters
        assert all(given.default is inspect.Parameter.empty for given in launched.values())


shapes = st.tuples(
    st.one_of(st.integers(1, 4), st.just(2**20)),
    st.one_of(st.integers(1, 64), st.integers(1, 400)),
    *[st.one_of(st.integers(1, 16), st.integers(1, 2000))] * 2,
)


@given(shape=shapes, dtypes=st.sampled_from(list(DTYPES)), layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 3))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_variant_that_may_be_launched_is_listed(shape, dtypes, layouts):
    from glow_kernels.backends.triton import (
        actnorm_conv1x1,
        actnorm_statistics,
        affine_coupling,
        bias_relu,
        coupling_conv1x1,
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
    with mock.patch.object(support, "_on_device", return_value=True):
        assume(support.gaussian_log_prob("forward", x, h))
    bias = vector.to(h_dtype)
    weight, of_weight = torch.empty(shape[1:], dtype=dtype, device="meta"), vector.to(dtype)
    several = ([weight] * 2, [of_weight] * 2, [of_weight] * 2)
    options = (None, SCALE_MAP.kind, SCALE_MAP.parameters, "interleaved_shift_scale", "shift_scale")
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
        lambda: bias_relu.backward(grad, x, 1),
        lambda: bias_relu.bias_backward(x, 2),
        lambda: bias_relu.pad(x, shape[1] + 1, h_dtype, True, 2),
        lambda: scale_filters.forward(weight, of_weight, of_weight, 3.0, h_dtype),
        lambda: scale_filters.backward(weight.to(h_dtype), bias, weight, of_weight, of_weight, 1.0),
        lambda: scale_filters.forward_all(*several, [1.0, 3.0], h_dtype, [*shape[1:3]] * 2),
        lambda: scale_filters.backward_all(
            [weight.to(h_dtype), vector, weight.to(h_dtype), bias], *several, [1.0, 3.0]
        ),
    ]
    conditions = h[:, : 2 * (shape[1] // 2)]
    with mock.patch.object(support, "_on_device", return_value=True):
        if shape[1] > 1 and support.coupling_conv1x1("forward", x, conditions, matrix):
            calls += [
                lambda: coupling_conv1x1.forward(x, conditions, matrix, vector, *options[1:]),
                lambda: coupling_conv1x1.backward(grad, number, x, conditions, matrix, *options[1:]),
            ]
    if shape[1] <= 64:
        calls.append(lambda: actnorm_conv1x1.fold_inverse(vector, vector, matrix, None))
    assert variants(calls).keys() - listed().keys() == set()


def test_a_table_in_the_package_adds_what_it_chooses(monkeypatch, tmp_path):
    from glow_kernels.backends.triton import launch

    usual = listed().keys()
    (tmp_path / "some_gpu.json").write_text(json.dumps({"statistics": {"elements": 4096, "num_warps": 8}}))
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    added = variants(sample.call for sample in all_samples()).keys() - usual
    assert {name for name, _ in added} == {"_chunk_kernel"}


def test_filters_of_three_convolutions_take_one_launch():
    from glow_kernels.backends.triton import scale_filters

    names: list[str] = []
    with fake_gpu("sm_90", lambda kernel, *_, **__: names.append(kernel.fn.__name__)):
        for count in (1, 3, 7):
            weights, vectors = [torch.empty(4, 3, 3, 3, device="meta")] * count, [torch.empty(4, device="meta")] * count
            scaled = scale_filters.forward_all(weights, vectors, vectors, [1.0] * count, torch.float32, [4, 3] * count)
            scale_filters.backward_all(scaled, weights, vectors, vectors, [1.0] * count)
    one, three = ["_scale_kernel", "_scale_backward_kernel"], ["_scale_three_kernel", "_scale_backward_three_kernel"]
    assert names == [*one, *three, *[three[0]] * 2, one[0], *[three[1]] * 2, one[1]]


class _Calls(TorchDispatchMode):
    """Records the operators of PyTorch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


ALLOCATIONS = {"empty", "empty_like", "new_empty"}
VIEWS = {"view", "permute", "_unsafe_view", "transpose", "unsqueeze", "slice", "select", "expand", "detach", "alias"}
# Copies of sums over positions, since results share no memory, and of a bias's gradient that needs another dtype.
COPIES = {"clone", "_to_copy"}


def test_an_operator_only_allocates_and_launches():
    # These tensors have no values, so reading one or copying it to the host would be an error.
    samples = all_samples()
    with _Calls() as seen:
        variants(sample.call for sample in samples)
    assert seen.names <= ALLOCATIONS | VIEWS | COPIES


@pytest.mark.parametrize(("installed", "takes"), [((3, 4), False), ((3, 5), True)])
def test_a_triton_that_cannot_multiply_float64_is_not_asked_to(installed, takes):
    x, matrix = (torch.empty(shape, dtype=torch.float64, device="meta") for shape in ((2, 4, 3, 3), (4, 4)))
    with (
        mock.patch.object(support, "_on_device", return_value=True),
        mock.patch.object(support, "version", return_value=installed),
    ):
        assert support.actnorm_conv1x1("apply", x, matrix, matrix[0]) == takes
        assert support.actnorm_conv1x1("apply", x.float(), matrix.float(), matrix[0].float())


@pytest.mark.parametrize(
    ("shape", "takes"),
    [((1, 4, 2**28), False), ((4, 1, 2**28), False), ((4, 4, 2**28), False), ((4, 4, 2**28 - 1), True)],
    ids=str,
)
def test_data_that_32_bits_cannot_count_are_not_taken(shape, takes):
    with mock.patch.object(support, "_on_device", return_value=True):
        assert support.actnorm_statistics("forward", torch.empty(shape, device="meta")) == takes


@pytest.mark.parametrize(
    ("channels", "positions", "takes"),
    [(48, 2**14, True), (49, 2**14, False), (4, 2**18, True), (4, 2**18 + 1, False)],
)
def test_steps_are_fused_for_few_channels_and_elements(channels, positions, takes):
    z, matrix = (torch.empty(1, channels, size, device="meta") for size in (positions, channels))
    with mock.patch.object(support, "_on_device", return_value=True):
        assert support.coupling_conv1x1("forward", z, z, matrix[0]) == takes


@pytest.mark.parametrize("known", [True, False], ids=["known_log_det", "unknown_log_det"])
def test_folding_large_matrices_does_not_wait_for_the_device(known):
    from glow_kernels.backends.reference import actnorm_conv1x1 as library
    from glow_kernels.backends.triton import folding

    def tensors(device: str) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(size, device=device) for size in ((4, 96), (4, 96, 96), (4,)))

    # Tensors without values: reading one would be an error.
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
    # Whether the backend itself or the reference computes it on a GPU.
    on_gpu = [torch.empty(size, device="meta") for size in ((96,), (96,), (96, 96))]
    with mock.patch.object(support, "_on_device", return_value=True):
        taken = {name: support.actnorm_conv1x1(name, *on_gpu) for name in ("fold", "fold_inverse", "fold_backward")}
    assert taken == {"fold": False, "fold_inverse": True, "fold_backward": False}
