"""The benchmark harness: what it measures, that it finds wrong results, and what it says of bad input."""

import itertools
import json
import re

import pytest
import torch

import glow_kernels as gk
from glow_kernels.bench import chains, measurement, memory, models, operators, overhead, results, suite, table, timing
from glow_kernels.bench.operators import DIRECTIONS, OPERATORS, Case, Functions
from glow_kernels.bench.suite import Selection
from glow_kernels.bench.timing import Spread, Times
from glow_kernels.cli import main
from glow_kernels.errors import BackendUnavailableError, UsageError
from glow_kernels.models import Glow

SHAPE = (2, 4, 3, 5)
CASES = [
    Case(name, direction, SHAPE)
    for name, direction in itertools.product(OPERATORS, DIRECTIONS)
    if direction in OPERATORS[name].moved
]


def case_id(case):
    return f"{case.operator}-{case.direction}"


def built(case, functions=None):
    """Arguments, upstream gradients and call of a case."""
    torch.manual_seed(0)
    operator = OPERATORS[case.operator]
    arguments = operator.arguments(case)
    grads = operators.upstream(operator, case, arguments)
    return arguments, grads, operators.call(functions or operator.ours, case.direction, arguments, grads)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_textbook_and_ours_compute_the_same(case):
    _, _, ours = built(case)
    _, _, plain = built(case, OPERATORS[case.operator].plain)
    pairs = zip(operators.tensors(ours()), operators.tensors(plain()), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_declared_bytes_are_those_of_the_tensors(case):
    # A position costs nothing to the parameters, so they vanish beside large data.
    case = Case(case.operator, case.direction, (4, 4, 64, 64))
    operator = OPERATORS[case.operator]
    arguments, grads, call = built(case)
    written = operators.tensors(call())
    if case.direction == "forward_backward":
        written += operators.tensors(built(Case(case.operator, "forward", case.shape))[2]())
        read = 2 * [*arguments] + grads
        # The backward reads the output of the coupling instead of its input, of the same size.
    else:
        read = [*arguments, *grads] if "backward" in case.direction else arguments
    moved = sum(tensor.numel() * tensor.element_size() for tensor in (*read, *written))
    assert measurement.moved_bytes(operator, case) == pytest.approx(moved, rel=0.01)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_case_becomes_a_row(case):
    row = measurement.measure(case, seconds=0.01, with_compile=False)
    assert set(row["candidates"]) == {"copy", "eager", *gk.available_backends()}
    for candidate in row["candidates"].values():
        assert 0 < candidate["seconds_low"] <= candidate["seconds_median"] <= candidate["seconds_high"]
        assert candidate["peak_extra_bytes"] > 0
    assert row["candidates"][row["ours"]]["ratio_to_ours"]["median"] == 1.0
    json.dumps(row)
    assert table.operator_line(row).startswith(case.operator)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # PyTorch's own, at import
def test_compiled_code_is_a_candidate():
    row = measurement.measure(Case("gaussian_log_prob", "no_grad", SHAPE), seconds=0.01)
    assert row["candidates"]["compile"]["seconds_median"] > 0


def test_matrix_products_limit_many_channels():
    row = measurement.measure(Case("actnorm_conv1x1", "no_grad", (1, 64, 4, 4)), seconds=0.01, with_compile=False)
    assert "matmul" in row["candidates"]


def test_wrong_results_are_not_timed(monkeypatch):
    def slightly_off(x, h):
        y, log_det = gk.affine_coupling(x, h)
        return y * (1 + 1e-4), log_det

    operator = OPERATORS["affine_coupling"]
    broken = operators.Operator(
        operator.name, Functions(slightly_off), operator.plain, operator.arguments, operator.moved, operator.products
    )
    monkeypatch.setitem(OPERATORS, "affine_coupling", broken)
    row = measurement.measure(Case("affine_coupling", "no_grad", SHAPE), seconds=0.01, with_compile=False)
    assert "candidates" not in row
    assert re.match(r"result 0 is off by .* and .* is allowed", row["wrong"][row["ours"]])
    assert "WRONG" in table.operator_line(row)


@pytest.mark.parametrize("broken", [lambda x: x * torch.nan, lambda x: x[:1], lambda x: x + 1e-3])
def test_inaccuracy_is_found(broken):
    truth = torch.randn(3, 4, dtype=torch.float64)
    assert measurement.inaccuracy([truth.float()], [truth], [truth.float()]) is None
    assert measurement.inaccuracy([broken(truth.float())], [truth], [truth.float()])
    assert measurement.inaccuracy([], [truth], [truth.float()]) == "0 results, not 1"


def test_candidates_take_turns():
    order = []
    calls = {name: [lambda name=name, copy=copy: order.append((name, copy)) for copy in range(2)] for name in "ab"}
    times = timing.measure(calls, 0.0, torch.device("cpu"))
    assert len(times.rounds["a"]) == len(times.rounds["b"]) >= 5
    turns = [key for key, _ in itertools.groupby(order)][-4:]
    assert [name for name, _ in turns] == ["a", "b", "a", "b"]
    assert turns[0][1] != turns[2][1], "copies of the inputs rotate"


def test_ratios_are_taken_round_by_round():
    times = Times({"slow": [2.0, 20.0, 2.0], "fast": [1.0, 10.0, 1.0]})  # another load hit the second round
    assert times.ratio("slow", "fast") == Spread(2.0, 2.0, 2.0)
    assert Spread.of([float(value) for value in range(11)]) == Spread(5.0, 2.0, 8.0)


def test_peak_memory_is_that_of_temporary_tensors_and_results():
    x = torch.randn(256, 256)
    assert memory.peak_extra_bytes(lambda: (x + 1.0).sum(), torch.device("cpu")) == pytest.approx(4 * 256**2, abs=1e3)
    assert memory.peak_extra_bytes(lambda: (x + 1.0) * 2.0, torch.device("cpu")) == pytest.approx(8 * 256**2, abs=1e3)


def test_call_overhead(tmp_path):
    writer = results.Writer(tmp_path / "r.jsonl", {"kind": "environment", "run": "a"})
    rows = overhead.run(torch.device("cpu"), 0.01, writer, lambda line: None)
    assert len(rows) == 7
    assert all(row["ratio"]["median"] > 0 for row in rows)


@pytest.mark.filterwarnings("ignore")  # of other packages, about functions that PyTorch will remove
@pytest.mark.parametrize("name", chains.available())
def test_chains_are_trained(name):
    chain = chains.CHAINS[name](4, 8, 2, 4)
    step = chains.training_step(chain, torch.randn(2, 4, 4, 4))
    assert torch.isfinite(step())
    trained = [parameter for parameter in chain[1].parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)


def test_allocators_are_measured_in_the_order_that_can_be(tmp_path):
    cases = list(Selection(shapes=[SHAPE], allocators=["tuned", "default"]).cases())
    assert [case.allocator for case in cases] == sorted(case.allocator for case in cases)
    assert len(cases) == 2 * len(CASES)


def test_an_interrupted_run_keeps_what_was_measured(tmp_path, monkeypatch):
    measure = measurement.measure

    def interrupted(case, **options):
        if case.direction == "no_grad":
            raise KeyboardInterrupt
        return measure(case, **options)

    monkeypatch.setattr(suite.measurement, "measure", interrupted)
    path = tmp_path / "r.jsonl"
    command = ["bench", "operators", "--operator", "affine_coupling", "--shape", "1x2x2x2", "--seconds", "0.01"]
    assert main([*command, "--no-compile", "--output", str(path), "--threads", "1"]) == 130
    assert [row["kind"] for row in results.read(path) if row["kind"] != "warning"] == ["environment", "operator"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--operator", "conv"], "operator must be one of actnorm_conv1x1, .* got 'conv'"),
        (["--direction", "up"], "direction must be one of forward, .* got 'up'"),
        (["--shape", "1x3x2"], "a shape must be four whole numbers BxCxHxW of at least 1, got '1x3x2'"),
        (["--shape", "1x3x2x2"], "a shape must have an even number of channels"),
        (["--dtype", "int8"], "dtype must be one of float32, .* got 'int8'"),
        (["--backend", "cublas"], "backend must be one of native, triton, reference, got 'cublas'"),
        (["--allocator", "slab"], "allocator must be one of default, tuned, got 'slab'"),
        (["--results", "x"], "--results goes with --check"),
        (["--device", "tpu"], "--device tpu cannot be used here"),
    ],
)
def test_wrong_use_is_named(options, message, tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    assert main(["bench", "operators", *options, "--output", str(path)]) == 2
    assert re.match(f"error: {message}", capsys.readouterr().err)
    assert not path.exists()


def test_an_unwritable_folder_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["bench", "overhead", "--output", str(tmp_path / "file" / "r.jsonl")]) == 1
    assert re.match("error: results cannot be written to .*: File exists", capsys.readouterr().err)


def test_an_absent_backend_is_named(monkeypatch):
    absent = gk.backends.BackendStatus("native", False, "it is not built", "build it")
    monkeypatch.setattr(suite, "backend_status", lambda name: absent)
    with pytest.raises(BackendUnavailableError, match="'native' is not available: it is not built; build it"):
        Selection(backends=["native"])


def test_shapes():
    assert operators.parse_shape("64x12x16x16") == (64, 12, 16, 16)
    with pytest.raises(UsageError, match="'0x2x1x1'"):
        operators.parse_shape("0x2x1x1")


def test_a_step_takes_a_compiled_model():
    model, x = Glow(1, 4, steps=1, levels=1, hidden_channels=4), torch.rand(2, 1, 4, 4)
    model.train().initialize(x)
    step = models._glow_step(model, x, torch.compile(model, backend="eager"))
    assert step() == -model(x).mean()
