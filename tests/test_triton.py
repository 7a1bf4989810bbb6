"""Properties of the Triton kernels only: arithmetic, addresses, tiles and tables, and the messages without a GPU.

Proven in the interpreter: elementary functions are accurate to a few ulps, addresses beyond 2^31 elements are right,
and every kernel reads and writes each element as often as its docstring says.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from unittest import mock

import pytest
import torch

import glow_kernels as gk
from glow_kernels import cli
from glow_kernels.backends import BackendStatus
from glow_kernels.backends import triton as backend
from glow_kernels.errors import BackendUnavailableError, UsageError

pytest.importorskip("triton")
INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter, TRITON_INTERPRET=1"
)

STATUS = "import glow_kernels as gk; print(gk.backend_status('triton')); print(gk.available_backends())"


def status_in_a_new_process(**environment: str) -> list[str]:
    """The backend's status in a new process, as lines."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", STATUS]
    result = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_the_interpreter_makes_it_available():
    status, names = status_in_a_new_process()
    assert "available=False" in status
    assert re.search("no (usable )?GPU", status)
    assert "TRITON_INTERPRET=1" in status
    assert "triton" not in names
    status, names = status_in_a_new_process(TRITON_INTERPRET="1")
    assert "available=True" in status
    assert "interpreted on the CPU" in status
    assert "'triton'" in names


def test_missing_triton_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    status = backend.status()
    assert not status.available
    assert (status.reason, status.remedy) == ("Triton is not installed", "run: pip install 'triton>=3.4'")


@pytest.mark.parametrize(
    ("visible", "capability", "hip", "missing"),
    [
        (False, (9, 0), None, "no GPU: this torch is built without CUDA and ROCm"),
        (True, (9, 0), None, ""),
        (True, (7, 5), None, "the kernels need GPUs of compute capability 8.0 or newer, got 7.5"),
        (True, (9, 4), "6.4", ""),
    ],
)
def test_gpus_that_triton_cannot_use_are_named(monkeypatch, visible, capability, hip, missing):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert backend._missing_gpu() == missing


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_is_an_error_of_one_line(capsys):
    for command in (["tune"], ["tune", "launches"]):
        assert cli.main(command) == 1
        assert capsys.readouterr().err.startswith("error: tuning needs a GPU that Triton supports: ")
    assert cli.main(["tune", "backends"]) == 1
    assert capsys.readouterr().err.startswith("error: there is nothing to compare: ")


def test_a_table_replaces_the_defaults_on_its_model(monkeypatch, tmp_path):
    from glow_kernels.backends.triton import launch

    name = launch.table_name("NVIDIA H100 80GB HBM3")
    assert name == "nvidia_h100_80gb_hbm3"
    (tmp_path / f"{name}.json").write_text(json.dumps({"elementwise": {"elements": 64, "num_warps": 1}}))
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    data = mock.Mock(device=torch.device("cuda"), dtype=torch.float32)
    assert launch.tuned("elementwise", data) == {"elements": 64, "num_warps": 1}
    assert launch.tuned("statistics", data) == launch.DEFAULTS["statistics"]
    assert launch.tuned("elementwise", torch.empty(1)) == launch.DEFAULTS["elementwise"]
    launch._table.cache_clear()
    launch._parameters.cache_clear()


def test_every_shipped_table_has_known_families_and_powers_of_two():
    from glow_kernels.backends.triton import launch

    for path in launch.TUNED.glob("*.json"):
        table = json.loads(path.read_text())
        assert table.keys() <= launch.DEFAULTS.keys(), path
        for parameters in table.values():
            assert parameters.keys() == {"elements", "num_warps"}, path
            assert all(value & (value - 1) == 0 for value in parameters.values()), path


def test_warmup_changes_neither_the_model_nor_random_numbers():
    model = gk.models.Glow(image_size=8, steps=2, levels=2, hidden_channels=8, num_classes=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    gk.warmup(model, (4, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="initiali"):
        model.eval().encode(torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_warmup_of_a_layer(mode):
    with mode():
        gk.warmup(gk.nn.InvertibleConv1x1(4), (2, 4, 3))


def test_warmup_says_what_it_needs():
    with pytest.raises(UsageError, match="model must have parameters, got a Squeeze without any"):
        gk.warmup(gk.nn.Squeeze(), (1, 4, 2, 2))
    with pytest.raises(UsageError, match=r"shape must be .*, got \(0, 4\)"):
        gk.warmup(gk.nn.InvertibleConv1x1(4), (0, 4))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        gk.warmup(3, (1, 4))
    with pytest.raises(TypeError, match="shape must be a sequence of whole numbers, got 3"):
        gk.warmup(gk.nn.InvertibleConv1x1(4), 3)
    with pytest.raises(TypeError, match=r"a size in shape must be a whole number, got 2\.5"):
        gk.warmup(gk.nn.InvertibleConv1x1(4), (2.5, 4))


def test_tuning_without_a_gpu_names_the_reason():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BackendUnavailableError, match=r"no (usable )?GPU"):
        gk.tuning.tune()


def test_tuning_measures_every_family_but_matrix_products_of_many_channels():
    from glow_kernels.backends.triton import launch

    families = gk.tuning._families(torch.device("meta"))
    assert families.keys() == {family for family in launch.DEFAULTS if not family.startswith("wide")}
    for family in families:
        candidates = list(gk.tuning._candidates(family))
        assert candidates[0] == launch.DEFAULTS[family]
        assert len({tuple(parameters.items()) for parameters in candidates}) == len(candidates)


def test_tuning_keeps_what_it_has_when_it_is_interrupted(tmp_path, monkeypatch):
    from glow_kernels.backends.triton import launch

    def fastest(family, calls):
        if family == "statistics":
            raise KeyboardInterrupt
        return {"elements": 512, "num_warps": 2}

    monkeypatch.setattr(gk.tuning, "backend_status", lambda name: BackendStatus(name, True, "there is a GPU"))
    monkeypatch.setattr(gk.tuning, "_families", lambda device: {"elementwise": [], "statistics": []})
    monkeypatch.setattr(gk.tuning, "_compile_all", lambda: None)
    monkeypatch.setattr(gk.tuning, "_fastest", fastest)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    before = {"elementwise": {"elements": 1, "num_warps": 1}, "linear_16": {"elements": 2048, "num_warps": 4}}
    path = tmp_path / f"{launch.table_name('Some GPU')}.json"
    path.write_text(json.dumps(before))
    with pytest.raises(KeyboardInterrupt):
        gk.tuning.tune(tmp_path)
    assert json.loads(path.read_text()) == {**before, "elementwise": {"elements": 512, "num_warps": 2}}


ELEMENTARY = {
    "exp": (torch.exp, torch.linspace(-110, 95, 4096, dtype=torch.float64)),
    "exp_small": (torch.exp, torch.linspace(-1e-3, 1e-3, 1024, dtype=torch.float64)),
    "log1p_of_fraction": (torch.log1p, torch.logspace(-30, 0, 4096, dtype=torch.float64)),
    "tanh": (torch.tanh, torch.logspace(-30, 3, 4096, dtype=torch.float64)),
    "atan": (torch.atan, torch.logspace(-30, 30, 4096, dtype=torch.float64)),
}


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ELEMENTARY)
def test_elementary_functions_are_accurate_to_a_few_ulps(name, dtype):
    import triton_probes as probes

    function, x = ELEMENTARY[name]
    x = x.to(dtype)
    if name in ("tanh", "atan"):
        x = torch.cat((-x, x, x.new_tensor([0.0])))
    truth = function(x.double())
    actual = probes.elementary(x, name.removesuffix("_small")).double()
    # Subnormal float32 results and infinity must be the rounded truth.
    finfo = torch.finfo(dtype)
    truth = truth.where(truth < finfo.max, truth.new_tensor(torch.inf))
    allowed = 4 * finfo.eps * truth.abs() + finfo.tiny * finfo.eps
    assert ((actual == truth) | ((actual - truth).abs() <= allowed)).all()


@INTERPRETED
@pytest.mark.parametrize("name", ["exp", "tanh", "atan"])
def test_elementary_functions_let_nan_and_infinity_through(name):
    import triton_probes as probes

    x = torch.tensor([torch.nan, torch.inf, -torch.inf])
    torch.testing.assert_close(probes.elementary(x, name), getattr(torch, name)(x), equal_nan=True)


@INTERPRETED
@pytest.mark.parametrize(("sizes", "dimension"), [((3, 300), 1), ((300, 70), 0), ((7, 70), 0)])
def test_sums_of_many_partial_results(sizes, dimension):
    from glow_kernels.backends.triton.sums import sum_partial

    partial = torch.randn(sizes, dtype=torch.float64)
    torch.testing.assert_close(sum_partial(partial, dimension), partial.sum(dimension))


@INTERPRETED
def test_statistics_where_more_programs_find_room_than_are_combined(monkeypatch):
    from glow_kernels.backends.triton import actnorm_statistics, launch

    monkeypatch.setattr(actnorm_statistics, "_MAX_CHUNKS", 4)
    monkeypatch.setitem(launch.OVERRIDES, "statistics", {"elements": 64})
    x = torch.randn(1, 2, 300)
    mean, variance = actnorm_statistics.forward(x)
    torch.testing.assert_close(mean, x.mean((0, 2)))
    torch.testing.assert_close(variance, x.var((0, 2), correction=0))


@INTERPRETED
def test_vectors_where_none_may_begin_are_an_error_of_the_interpreter(monkeypatch):
    from triton.runtime.errors import InterpreterError

    from glow_kernels.backends.triton import bias_relu, launch

    monkeypatch.setattr(launch, "vector", lambda *_: 4)
    with pytest.raises(InterpreterError, match="no multiples of 16 bytes"):
        bias_relu.forward(torch.zeros(9)[1:].view(1, 2, 4), torch.zeros(2))


# Sizes, positions and strides (B, C, P) whose products exceed 32 bits.
WIDE = [
    ((8, 1, 70_000), (7, 0, 65_536), (70_000 * 65_536, 1, 65_536)),
    ((2, 5, 3), (0, 4, 2), (5 * 2**30, 2**30, 16)),
    ((2**20, 1, 2), (2**20 - 1, 0, 1), (2**13, 2, 1)),
]


@INTERPRETED
@pytest.mark.parametrize(("sizes", "at", "strides"), WIDE)
def test_offsets_beyond_31_bits(sizes, at, strides):
    import triton_probes as probes

    sample, channel, position = at
    expected = sample * strides[0] + channel * strides[1] + position * strides[2]
    assert probes.offsets(sample, position, channel, sizes[2], strides) == (expected, expected)


@INTERPRETED
def test_tensors_that_span_more_than_2_to_the_31_elements():
    # Two channels 4 GiB apart; untouched memory between them is not allocated by the system.
    stride = 2**31 + 64
    base = torch.empty(stride + 16, dtype=torch.float16)
    x = base.as_strided((1, 2, 4), (stride, stride, 1))
    small = torch.randn(1, 2, 4).half()
    x.copy_(small)
    h = torch.randn(1, 4, 4).half()
    matrix, shift = torch.randn(2, 2), torch.randn(2)
    with gk.use_backend("triton"):
        calls = [
            lambda x: gk.affine_coupling(x, h),
            lambda x: (gk.gaussian_log_prob(x, h), gk.gaussian_standardize(x, h)),
            lambda x: gk.actnorm_statistics(x),
            lambda x: (torch.ops.glow_kernels.actnorm_conv1x1_apply_triton(x, matrix, shift),),
        ]
        for call in calls:
            for actual, expected in zip(call(x), call(small), strict=True):
                assert torch.equal(actual, expected)


SHAPES = [(3, 6, 5, 7), (2, 12, 8, 8), (5, 4)]


def coupling_arguments(shape, dtype):
    """Data, gradients, and the options."""
    x, grad = torch.randn(2, *shape, dtype=dtype)
    h = torch.randn(shape[0], 2 * shape[1], *shape[2:], dtype=dtype)
    options = (None, "sigmoid", [1.0, 2.0, 1.0, 0.0, 0.0, 0.0], "interleaved_shift_scale", "shift_scale")
    return x, h, grad, torch.randn(shape[0]), options


# Of the data, and of h: whether it lies channels last.
FORMATS = [(False, False), (True, True), (False, True)]


@INTERPRETED
@pytest.mark.parametrize(("channels_last", "h_last"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_of_the_data_is_read_once_and_written_once(shape, channels_last, h_last):
    import triton_probes as probes

    from glow_kernels.backends.triton import affine_coupling, coupling_conv1x1, gaussian_log_prob

    x, h, grad, grad_log_det, options = coupling_arguments(shape, torch.float32)
    conditions = h[:, : shape[1] // 2 * 2].contiguous()
    if h_last and len(shape) == 4:
        h, conditions = (tensor.to(memory_format=torch.channels_last) for tensor in (h, conditions))
    if channels_last and len(shape) == 4:
        x, grad = (tensor.to(memory_format=torch.channels_last) for tensor in (x, grad))
    matrix, shift = torch.randn(shape[1], shape[1]), torch.randn(shape[1])
    calls = [
        (lambda: coupling_conv1x1.forward(x, conditions, matrix, shift, *options[1:])[:1], (x, conditions)),
        (
            lambda: coupling_conv1x1.backward(grad, grad_log_det, x, conditions, matrix, *options[1:])[:2],
            (grad, x, conditions),
        ),
        (lambda: affine_coupling.forward(x, h, *options), (x, h)),
        (lambda: affine_coupling.inverse(x, h, *options), (x, h)),
        (lambda: affine_coupling.backward(grad, grad_log_det, x, h, *options), (grad, x, h)),
        (lambda: affine_coupling.reversible_backward(grad, grad_log_det, x, h, *options), (grad, x, h)),
        (lambda: (gaussian_log_prob.forward(x, h, "chunk_mean_log_sd"),), (x, h)),
        (lambda: (gaussian_log_prob.sample(x, h, "interleaved_mean_log_sd"),), (x, h)),
        (lambda: gaussian_log_prob.sample_backward(grad, x, h, "interleaved_mean_log_sd"), (grad, x, h)),
    ]
    for call, inputs in calls:
        results, traffic = probes.count(call)
        for tensor in inputs:
            assert traffic.reads(tensor) == [1] * tensor.numel()
        for result in results:
            if result.dim() > 1:
                assert traffic.writes(result) == [1] * result.numel()


@INTERPRETED
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 31, 3)], ids=str)
def test_the_linear_map_reads_from_memory_once(shape, channels_last):
    import triton_probes as probes

    from glow_kernels.backends.triton import actnorm_conv1x1, actnorm_statistics

    x, grad = torch.randn(2, *shape)
    if channels_last and len(shape) == 4:
        x, grad = (tensor.to(memory_format=torch.channels_last) for tensor in (x, grad))
    matrix, shift = torch.randn(shape[1], shape[1]), torch.randn(shape[1])
    calls = [
        (lambda: (actnorm_conv1x1.apply(x, matrix, shift),), {x: 1}),
        (lambda: actnorm_conv1x1.apply_backward(grad, x, matrix, True), {x: 1, grad: 1}),
        (lambda: actnorm_conv1x1.apply_reversible_backward(grad, x, matrix, matrix, shift), {x: 1, grad: 1}),
        (lambda: actnorm_statistics.forward(x), {x: 1}),
    ]
    for call, inputs in calls:
        results, traffic = probes.count(call)
        for tensor, times in inputs.items():
            assert traffic.reads(tensor) == [times] * tensor.numel()
        for result in results:
            if result.shape == x.shape:
                assert traffic.writes(result) == [1] * result.numel()


# From the operators' docstrings: passes over data of the size of x, read plus written, where h counts as two.
PASSES = {
    "affine_coupling.forward": 3 + 1,
    "affine_coupling.inverse": 3 + 1,
    "affine_coupling.backward": 4 + 3,
    "affine_coupling.inverse_backward": 4 + 3,
    "affine_coupling.reversible_backward": 4 + 4,
    "gaussian_log_prob.forward": 3,
    "gaussian_log_prob.sample": 3 + 1,
    "gaussian_log_prob.standardize": 3 + 1,
    "gaussian_log_prob.backward": 3 + 3,
    "gaussian_log_prob.sample_backward": 4 + 3,
    "gaussian_log_prob.standardize_backward": 4 + 3,
    "actnorm_conv1x1.apply": 1 + 1,
    "actnorm_conv1x1.apply_backward": 2 + 1,
    "actnorm_conv1x1.apply_backward (no dx)": 2,
    "actnorm_conv1x1.apply_reversible_backward": 2 + 2,
    "coupling_conv1x1.forward": 2 + 1,
    "coupling_conv1x1.backward": 3 + 2,
    "actnorm_statistics.forward": 1,
    "bias_relu.forward": 1 + 1,
    "bias_relu.backward": 2 + 1,
}
# From 33 channels on: one launch each for z or x, dx, and the sums.
PASSES_OF_MANY_CHANNELS = {
    "actnorm_conv1x1.apply": 1 + 1,
    "actnorm_conv1x1.apply_backward": 1 + 1 + 2,
    "actnorm_conv1x1.apply_backward (no dx)": 2,
    "actnorm_conv1x1.apply_reversible_backward": 2 * (1 + 1) + 2,
}
# In the operators across steps, three programs read the same tile of g, and two of them find it in the cache.
PASSES_ACROSS_STEPS = {name: passes for name, passes in PASSES.items() if name.startswith("coupling_conv1x1")}


MOVED = [
    *((name, passes, (3, 10, 16, 17)) for name, passes in PASSES.items()),
    *((name, passes, (2, c, 16, 17)) for c in (33, 65) for name, passes in PASSES_OF_MANY_CHANNELS.items()),
    *((name, passes, (2, 34, 16, 17)) for name, passes in PASSES_ACROSS_STEPS.items()),
]


@INTERPRETED
@pytest.mark.parametrize(
    ("name", "passes", "shape", "channels_last", "h_last"),
    [
        (*moved, *formats)
        for moved in MOVED
        for formats in (FORMATS if moved[0].startswith(("affine", "gaussian", "coupling")) else FORMATS[:2])  # have h
    ],
)
def test_no_byte_is_moved_twice(name, passes, shape, channels_last, h_last):
    import triton_probes as probes

    from glow_kernels.backends import implementation

    module, _, function = name.partition(".")
    x, h, grad, grad_log_det, options = coupling_arguments(shape, torch.float32)
    if h_last:
        h = h.to(memory_format=torch.channels_last)
    if channels_last:
        x, grad = (tensor.to(memory_format=torch.channels_last) for tensor in (x, grad))
    matrix, shift, layout = torch.randn(shape[1], shape[1]), torch.randn(shape[1]), "interleaved_mean_log_sd"
    # Half of the channels are transformed, so h has as many channels as x.
    conditions = torch.randn_like(h[:, : shape[1]])
    arguments = {
        "affine_coupling": (grad, grad_log_det, x, h, *options) if "backward" in name else (x, h, *options),
        "gaussian_log_prob": (x, h, layout) if "backward" not in name else (grad, x, h, layout),
        "actnorm_conv1x1": {
            "apply": (x, matrix, shift),
            "apply_backward": (grad, x, matrix, True),
            "apply_backward (no dx)": (grad, x, matrix, False),
            "apply_reversible_backward": (grad, x, matrix, matrix, shift),
        }.get(function, ()),
        "coupling_conv1x1": (
            (grad, grad_log_det, x, conditions, matrix, *options[1:])
            if function == "backward"
            else (x, conditions, matrix, shift, *options[1:])
        ),
        "actnorm_statistics": (x,),
        "bias_relu": (grad, x, 1) if function == "backward" else (x, shift),
    }[module]
    if name == "gaussian_log_prob.backward":
        arguments = (grad_log_det, x, h, layout)
    implemented = getattr(implementation("triton", module), function.split()[0])
    _, traffic = probes.count(lambda: implemented(*arguments))
    minimum = passes * x.numel() * x.element_size()
    # Bytes that do not grow with the data: parameters, and partial sums of at most eight programs, written and read; or
    # mean, deviations and count per channel from at most sixteen programs, written and read, and the results.
    beside = {
        "actnorm_conv1x1": 4 * (2 * matrix.numel() + 18 * (matrix.numel() + shape[1])),
        "coupling_conv1x1": 4 * (2 * matrix.numel() + 18 * (matrix.numel() + shape[1])),
        "actnorm_statistics": 4 * (16 * 3 * 2 + 2) * shape[1],
        "bias_relu": 4 * (2 * 8 + 1) * shape[1],
    }
    assert minimum <= traffic.moved() <= 1.02 * minimum + beside.get(module, 0)
