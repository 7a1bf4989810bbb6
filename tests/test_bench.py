"""The benchmark harness: what it measures, that it finds wrong results, and its messages about bad input."""

import argparse
import dataclasses
import itertools
import json
import os
import re
import sys
import time
from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters

import glow_kernels as gk
from glow_kernels.bench import (
    chains,
    compilation,
    environment,
    measurement,
    memory,
    models,
    operators,
    overhead,
    plan,
    results,
    reversible,
    suite,
    table,
    timing,
)
from glow_kernels.bench.measurement import Session
from glow_kernels.bench.operators import DIRECTIONS, OPERATORS, Case, Functions
from glow_kernels.bench.plan import Task
from glow_kernels.bench.suite import Selection, Suite
from glow_kernels.bench.timing import Spread, Times
from glow_kernels.cli import bench as bench_command
from glow_kernels.cli import main
from glow_kernels.cli.bench import QUICK_DIRECTIONS
from glow_kernels.errors import BackendUnavailableError, UsageError
from glow_kernels.models import Glow

SHAPE = (2, 4, 3, 5)
CASES = [
    Case(name, direction, SHAPE)
    for name, direction in itertools.product(OPERATORS, DIRECTIONS)
    if direction in OPERATORS[name].traffic
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
    _, _, plain = built(case, OPERATORS[case.operator].textbook)
    pairs = zip(operators.tensors(ours()), operators.tensors(plain()), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_declared_bytes_are_those_of_the_tensors(case):
    # The size of the parameters does not depend on the positions, so it is negligible with many.
    case = Case(case.operator, case.direction, (4, 4, 64, 64))
    arguments, grads, call = built(case)
    written = operators.tensors(call())
    if case.direction == "forward_backward":
        written += operators.tensors(built(Case(case.operator, "forward", case.shape))[2]())
        read = 2 * [*arguments] + grads
        # The backward reads the coupling's output, which has the size of its input.
    else:
        read = [*arguments, *grads] if "backward" in case.direction else arguments
    moved = sum(tensor.numel() * tensor.element_size() for tensor in (*read, *written))
    assert operators.moved_bytes(case) == pytest.approx(moved, rel=0.01)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_case_becomes_a_row(case):
    row = Session(with_compile=False).measure(case, 0.01)
    assert set(row["candidates"]) == {"copy", "eager", *gk.available_backends()}
    for candidate in row["candidates"].values():
        median, low, high = candidate["seconds"]
        assert 0 < low <= median <= high
        assert candidate["peak_extra_bytes"] > 0
    assert row["candidates"][row["ours"]]["ratio_to_ours"] == [1.0, 1.0, 1.0]
    json.dumps(row)
    assert table.operator_line(row).startswith(case.operator)


@pytest.fixture
def call_taking(monkeypatch):
    """Makes calls that take so many seconds of a clock that nothing else moves."""
    now = 0.0

    def call(seconds):
        nonlocal now
        now += seconds

    for clock in ("perf_counter", "monotonic"):
        monkeypatch.setattr(time, clock, lambda: now)
    return lambda seconds: lambda: call(seconds)


def test_on_a_gpu_the_figures_are_of_replays_where_they_can_be_captured(monkeypatch, call_taking):
    calls = {"copy": [call_taking(2e-3)], "eager": [call_taking(9e-3)], "ours": [call_taking(8e-3)]}
    replays = {"copy": [call_taking(2e-3)], "ours": [call_taking(3e-3)]}
    monkeypatch.setattr(timing, "as_graphs", lambda candidates: dict(replays))
    device = torch.device("cpu")
    times = timing.measure(calls, 0.05, device)
    row = measurement._replays(calls, times, 0.05, device, ["copy"], dict.fromkeys(calls, 1), "ours")
    found = row["candidates"]
    assert (found["ours"]["seconds"][0], found["ours"]["call"][0]) == pytest.approx((3e-3, 8e-3))
    assert found["eager"]["ratio_to_ours"][0] == pytest.approx(3)
    assert found["ours"]["percent_of_limit"] == pytest.approx(200 / 3)
    assert [found[name]["replayed"] for name in calls] == [True, False, True]
    row |= {"case": Case("affine_coupling", "forward", SHAPE).as_dict(), "ours": "ours", "bytes": 1000}
    assert re.search(r" 9\d+\.\d\* ", table.operator_line(row))


def test_compiled_code_is_a_candidate():
    session = Session()
    row = session.measure(Case("gaussian_log_prob", "no_grad", SHAPE), 0.01)
    assert "wrong" not in row
    assert row["candidates"]["compile"]["seconds"][0] > 0


def test_one_compilation_serves_all_numbers_of_threads(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    case = Case("actnorm_statistics", "no_grad", SHAPE)
    for threads, compiled in ((1, 1), (2, 0)):
        counters.clear()
        with measurement.threads(threads):
            compilation._compile(dataclasses.replace(case, threads=threads))
        assert counters["inductor"]["fxgraph_cache_miss"] == compiled
    assert compilation.unit(dataclasses.replace(case, threads=2)) == compilation.unit(case)


def test_cases_that_differ_in_the_allocator_share_their_compilation():
    compiler, case = compilation.Compiler(), Case("affine_coupling", "backward", SHAPE)
    forward = compiler.functions(case).forward
    assert compiler.functions(dataclasses.replace(case, allocator="default")).forward is forward
    assert compiler.functions(dataclasses.replace(case, direction="forward")).forward is forward
    for other in ({"direction": "no_grad"}, {"threads": 2}, {"dtype": "float64"}):
        assert compiler.functions(dataclasses.replace(case, **other)).forward is not forward


@pytest.mark.parametrize(
    ("error", "named"), [(RuntimeError("no\nsuch thing"), "RuntimeError: no"), (AssertionError(), "AssertionError")]
)
@pytest.mark.parametrize("direction", ["no_grad", "backward"])
def test_what_cannot_be_compiled_is_named_and_the_rest_measured(direction, error, named, monkeypatch):
    def broken(*arguments):
        raise error

    monkeypatch.setattr(compilation, "_compiled", lambda function: broken)
    row = Session().measure(Case("gaussian_log_prob", direction, SHAPE), 0.01)
    assert row["wrong"] == {"compile": named}
    assert set(row["candidates"]) == {"copy", "eager", *gk.available_backends()}


def test_matrix_products_limit_many_channels():
    row = Session(with_compile=False).measure(Case("actnorm_conv1x1", "no_grad", (1, 64, 4, 4)), 0.01)
    assert "matmul" in row["candidates"]


def test_wrong_results_are_not_timed(monkeypatch):
    def slightly_off(x, h):
        y, log_det = gk.affine_coupling(x, h)
        return y * (1 + 1e-4), log_det

    operator = OPERATORS["affine_coupling"]
    broken = operators.Operator(
        operator.name,
        Functions(slightly_off),
        operator.textbook,
        operator.arguments,
        operator.traffic,
        operator.products,
    )
    monkeypatch.setitem(OPERATORS, "affine_coupling", broken)
    row = Session(with_compile=False).measure(Case("affine_coupling", "no_grad", SHAPE), 0.01)
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
    assert len(times.rounds["a"]) == len(times.rounds["b"]) >= 3
    turns = [list(turn) for _, turn in itertools.groupby(order, key=lambda call: call[0])][-4:]
    assert [turn[0][0] for turn in turns] == ["a", "b", "a", "b"]
    assert turns[0][0] not in (turns[2][0], turns[0][1]), "copies of the inputs rotate"


def test_what_a_candidate_finds_in_the_caches_does_not_count(call_taking):
    warm = []

    def call():
        call_taking(1e-4 if warm else 1e-2)()
        warm.append(True)

    times = timing.measure({"a": [call], "b": [lambda: call() or warm.clear()]}, 0.1, torch.device("cpu"))
    assert times.rounds["a"] == pytest.approx([1e-4] * len(times.rounds["a"]))


def test_measuring_takes_the_time_it_is_given(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: 1e-3 * next(ticks))  # every call takes equally long
    calls = {"a": [lambda: None], "b": [lambda: None]}
    # A round reads the clock five times.
    assert 190 < len(timing.measure(calls, 1.0, torch.device("cpu")).rounds["a"]) < 210


def test_ratios_are_those_of_undisturbed_rounds():
    # Other load slowed all but three rounds of each, and one candidate more than the other.
    times = Times({"slow": [9.0, 2.0, 2.0, 2.0, 30.0, 9.0], "fast": [1.0, 1.0, 1.0, 5.0, 5.0, 5.0]})
    assert times.fastest("slow") == 2.0
    assert times.ratio("slow", "fast") == (2.0, 1.8, 6.0)
    assert Times({"one": [float(value) for value in range(20, 0, -1)]}).fastest("one") == 2.5  # the mean of four rounds
    later = Times({"slow": [2.0], "fast": [0.7]})
    merged = times.merged(later)
    assert (merged.rounds["fast"][-1], merged.fastest("fast")) == (0.7, pytest.approx(0.9))
    assert Times({"slow": [4.0], "fast": [1.0]}).ratio("slow", "fast") == (4.0, 4.0, 4.0)
    assert Spread.of([float(value) for value in range(11)]) == Spread(5.0, 2.0, 8.0)


def test_peak_memory_is_without_what_the_call_before_has_left():
    x, kept = torch.randn(256, 256), []

    def call():
        kept.clear()
        kept.append(x + 1.0)

    call()
    assert memory.peak_extra_bytes(call, torch.device("cpu")) == pytest.approx(0, abs=1e3)


def test_peak_memory_is_that_of_temporary_tensors_and_results():
    x = torch.randn(256, 256)
    assert memory.peak_extra_bytes(lambda: (x + 1.0).sum(), torch.device("cpu")) == pytest.approx(4 * 256**2, abs=1e3)
    assert memory.peak_extra_bytes(lambda: (x + 1.0) * 2.0, torch.device("cpu")) == pytest.approx(8 * 256**2, abs=1e3)
    once = memory.peak_extra_bytes(lambda: (x + 1.0) * 2.0, torch.device("cpu"), keeps=False)
    assert once == pytest.approx(8 * 256**2, abs=1e3)


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (4, 96, 16, 16)], ids=str)
def test_what_only_the_reference_computes_is_not_measured_where_a_model_does_not_call_it(monkeypatch, shape):
    def measured():
        return [case.direction for case in Selection(operators=["coupling_conv1x1"], shapes=[shape]).cases()]

    assert measured() == []
    assert not any("coupling_conv1x1" in task.name for task in overhead.tasks(torch.device("cpu"), None, None))
    few = dataclasses.replace(OPERATORS["coupling_conv1x1"], is_fast=lambda z, *_: z.shape[1] <= 48)
    monkeypatch.setitem(OPERATORS, "coupling_conv1x1", few)
    assert measured() == (["forward", "no_grad", "backward", "forward_backward"] if shape[1] <= 48 else [])


def test_a_run_without_a_case_is_refused(capsys, tmp_path):
    path = tmp_path / "r.jsonl"
    assert main(["bench", "operators", "--operator", "coupling_conv1x1", "--device", "cpu", "--output", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: nothing to measure: none of these operators has such a direction")
    assert not path.exists()


def test_call_overhead(tmp_path):
    writer = results.Writer(tmp_path / "r.jsonl", {"kind": "environment", "run": "a"})
    for task in overhead.tasks(torch.device("cpu"), writer, lambda line: None):
        task.run(0.01)
    rows = writer.rows[1:]
    assert len(rows) == 8
    assert all(row["ratio"][0] > 0 for row in rows)


@pytest.mark.parametrize("part", [overhead, models])
def test_a_part_alone_is_measured_as_in_a_full_run(part, tmp_path, monkeypatch):
    seen = []

    def measure(candidates, seconds, device):
        seen.append(torch.get_num_threads())
        return Times({name: [1.0] for name in candidates})

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(part, "tune_allocator", lambda: seen.append("tuned"))
    writer = results.Writer(tmp_path / "r.jsonl", {"kind": "environment", "run": "a"})
    nowhere = torch.device("cpu"), writer, lambda line: None
    with measurement.threads(2):
        if part is overhead:
            for task in overhead.tasks(*nowhere)[:2]:
                task.run(0.0)
        else:
            models.Models(*nowhere, with_compile=False).tasks(quick=True)[1].run(0.0)
    assert (seen[0], seen[1]) == ("tuned", writer.rows[-1]["case"]["threads"])


@pytest.mark.filterwarnings("ignore")  # other packages use functions that PyTorch has deprecated
@pytest.mark.parametrize("name", chains.available())
def test_chains_are_trained(name):
    chain = chains.CHAINS[name](4, 8, 2, 4)
    step = chains.training_step(chain, torch.randn(2, 4, 4, 4))
    assert torch.isfinite(step())
    trained = [parameter for parameter in chain[1].parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)


def test_allocators_are_measured_in_the_order_that_can_be(tmp_path):
    writer = results.Writer(tmp_path / "r.jsonl", {"kind": "environment", "run": "a"})
    measured = []
    measure = Suite(writer, lambda line: None, with_compile=False)
    measure._session.measure = lambda case, seconds, series="": (
        measured.append(case.allocator)
        or {  # instead of measuring
            "kind": "operator",
            "case": case.as_dict(),
            "wrong": {},
        }
    )
    for task in measure.tasks([Selection(shapes=[SHAPE], allocators=["tuned", "default"])]):
        task.run(0.0)
    assert measured == sorted(measured)
    assert measured.count("tuned") >= len(CASES)


def test_other_conditions_are_measured_between_two_visits(tmp_path):
    writer = results.Writer(tmp_path / "r.jsonl", {"kind": "environment", "run": "a"})
    selection = Selection(["actnorm_statistics"], ["no_grad"], [SHAPE], dtypes=["float32", "float64"])
    tasks = Suite(writer, lambda line: None, with_compile=False).tasks([selection])
    headings = [task.name for task in tasks if task.seconds == 0.0]
    assert len(headings) == 2 * suite._VISITS
    assert len(set(headings)) == 2
    assert all(one != other for one, other in itertools.pairwise(headings))


def test_large_tensors_are_visited_less_often(tmp_path):
    writer = results.Writer(tmp_path / "r.jsonl", {"kind": "environment", "run": "a"})
    selection = Selection(["actnorm_statistics"], ["no_grad"], [SHAPE, (64, 12, 128, 128)])
    tasks = Suite(writer, lambda line: None, with_compile=False).tasks([selection])
    counts = Counter(task.name.split()[-1] for task in tasks if task.seconds > 0)
    # Each case is also measured a second time.
    assert counts == {"2x4x3x5": 2 * 8, "64x12x128x128": 2 * 2}


def full_run(*options: str) -> set[Case]:
    parser = argparse.ArgumentParser()
    bench_command.add_parser(parser.add_subparsers())
    selections = bench_command._selections(parser.parse_args(["bench", *options]), torch.device("cpu"))
    return {case for selection in selections for case in selection.cases()}


def test_a_full_run_leaves_out_what_tells_nothing_new(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    cases = full_run()

    def shapes(name: str, direction: str) -> list[int]:
        """The numbers of shapes with one thread and with two, under the usual conditions."""
        like = {"operator": name, "direction": direction, "allocator": "tuned", "dtype": "float32"}
        found = [case for case in cases if like.items() <= case.as_dict().items()]
        return [
            sum(case.threads == threads and case.memory_format == "contiguous" for case in found) for threads in (1, 2)
        ]

    assert shapes("affine_coupling", "forward") == [13, 13]
    assert shapes("affine_coupling", "forward_backward") == [13, 0]
    assert shapes("affine_coupling", "no_grad") == [3, 0]
    assert shapes("folded_conv1x1", "forward") == [13, 0]
    assert shapes("actnorm_statistics", "no_grad") == [13, 13]


def test_a_full_run_measures_what_is_asked_for(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    asked = full_run("--operator", "folded_conv1x1", "--direction", "no_grad,forward_backward")
    assert {(case.direction, case.threads) for case in asked if case.dtype == "float32"} == {
        (direction, threads) for direction in ("no_grad", "forward_backward") for threads in (1, 2)
    }


def test_cases_are_visited_again_and_some_measured_again(tmp_path):
    writer = results.Writer(tmp_path / "r.jsonl", {"kind": "environment", "run": "a"})
    measure = Suite(writer, lambda line: None, with_compile=False)
    selection = Selection(operators=["gaussian_log_prob"], directions=["no_grad"], shapes=[SHAPE], seconds=0.01)
    for task in measure.tasks([selection]):
        task.run(1e-6)
    assert [row["kind"] for row in writer.rows] == ["environment", *8 * ["operator", "repeat"]]
    *_, last, repeat = writer.rows
    assert repeat["first"]["eager"] == last["candidates"]["eager"]["ratio_to_ours"][0]
    assert repeat["again"]["eager"] > 0
    case = next(iter(selection.cases()))
    # Three rounds per visit; the second measurement is kept separate.
    rounds = [len(measure._session._times[case, series].rounds["eager"]) for series in ("", "again")]
    assert rounds == [3 * 8, 3 * 8]


def test_cases_measured_again_are_of_every_shape_and_operator(tmp_path):
    writer = results.Writer(tmp_path / "r.jsonl", {"kind": "environment", "run": "a"})
    names = ["actnorm_conv1x1", "folded_conv1x1", "affine_coupling", "gaussian_log_prob"]
    selection = Selection(operators=names, directions=QUICK_DIRECTIONS, shapes=[SHAPE, (2, 6, 4, 4)])
    assert len(list(selection.cases())) > suite._MIN_REPEATED
    tasks = Suite(writer, lambda line: None, with_compile=False).tasks([selection])
    counts = Counter(task.name for task in tasks if task.seconds > 0)
    again = [name.split() for name, count in counts.items() if count > suite._VISITS]
    assert len(again) == suite._MIN_REPEATED
    assert {name for name, _, _ in again} == set(names)
    assert {shape for _, _, shape in again} == {"2x4x3x5", "2x6x4x4"}


def test_a_plan_shares_its_time(call_taking):
    shown, allowed = [], {}
    tasks = [
        Task("heading", 0.0, lambda seconds: None),
        Task("a", 1.0, lambda seconds: allowed.update(a=seconds) or call_taking(0.125)()),
        Task("b", 3.0, lambda seconds: allowed.update(b=seconds)),
    ]
    plan.run(tasks, 1.0, shown.append)
    assert shown[0] == "2 measurements, planned to take 1 s"
    # The second gets all that the first has left, of which it needs 3 s.
    assert allowed == {"a": 0.25, "b": 0.875}
    plan.run(tasks, 100.0, shown.append)
    assert allowed == {"a": 1.0, "b": 3.0}
    assert plan.duration(150.0) == "2.5 min"


def test_a_strict_plan_leaves_out_what_comes_too_late(call_taking):
    done, shown = [], []

    def slow(allowed):
        done.append(allowed)
        call_taking(0.02)()

    tasks = [Task(name, 0.01, slow) for name in "abc"]
    plan.run([*tasks[:1], Task("heading", 0.0, slow), *tasks[1:]], 0.01, shown.append, strict=True)
    assert len(done) == 1
    assert shown[-1].endswith("; 2 measurements were left out for lack of time")
    plan.run(tasks, 0.01, shown.append)
    assert len(done) == 4


@pytest.fixture
def _small_convolutions():
    """For convolutions this small, oneDNN's set-up takes longer than the computation."""
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        yield


@pytest.mark.usefixtures("_small_convolutions")
def test_models_become_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "_MIN_ROUNDS", 1)
    monkeypatch.setattr(models, "QUICK_CURVES", {"steps": (2,)})
    monkeypatch.setattr(chains, "available", lambda: ["glow_kernels", "checkpoint"])
    sizes = {"steps": 1, "levels": 1, "hidden": 4, "image_size": 4, "batch": 2}
    monkeypatch.setattr(models, "QUICK_GLOWS", (sizes,))
    monkeypatch.setattr(models, "CHAIN", {"steps": 1, "channels": 4, "hidden": 4, "image_size": 4, "batch": 2})
    writer = results.Writer(tmp_path / "r.jsonl", {"kind": "environment", "run": "a"})
    for task in models.Models(torch.device("cpu"), writer, lambda line: None, with_compile=False).tasks(quick=True):
        task.run(0.01)
    rows = [row for row in writer.rows if row["kind"] == "model"]
    assert {row["case"]["part"] for row in rows} == {"training_step", "sampling", "chain", "curve by steps"}
    ours = gk.available_backends()[0]
    trained = [row["case"]["implementation"] for row in rows if row["case"]["part"] == "training_step"]
    assert trained == [*gk.available_backends(), f"{ours} anchor"]
    assert all(row["seconds"][0] > 0 and row["peak_extra_bytes"] > 0 for row in rows)


@pytest.mark.usefixtures("_small_convolutions")
def test_a_model_that_cannot_be_compiled_is_named_and_the_rest_measured(tmp_path, monkeypatch):
    def broken(model, x):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(models, "compiled", broken)
    writer, shown = results.Writer(tmp_path / "r.jsonl", {"kind": "environment", "run": "a"}), []
    sizes = {"steps": 1, "levels": 1, "hidden": 4, "image_size": 4, "batch": 2}
    measure = models.Models(torch.device("cpu"), writer, shown.append, with_compile=True)
    measure.training(0.01, "training_step", sizes, compiles=True)
    assert shown[0] == "reference compiled cannot be measured: RuntimeError: no compiler"
    assert len(writer.rows) == 2 + len(gk.available_backends())


@pytest.mark.usefixtures("_small_convolutions")
def test_promises_of_reversible_training_become_rows(tmp_path, monkeypatch):
    for name, value in {"SIZE": 8, "HIDDEN": 4, "LEVELS": 1, "BATCH": 2}.items():
        monkeypatch.setattr(reversible, name, value)
    writer = results.Writer(tmp_path / "r.jsonl", {"kind": "environment", "run": "a"})
    measure = reversible.Reversible(torch.device("cpu"), writer, lambda line: None)
    measure.memory(reversible.ANCHOR, 4)
    measure.gradients(4)
    measure.bad_row(steps=2, iterations=2)
    kept = writer.rows[1]
    assert 0 < kept["kept_bytes"] <= kept["peak_bytes"]
    assert [row["case"]["part"] for row in writer.rows[2:]] == ["gradients", "bad_row"]
    assert all(row["relative_difference"] < 1e-4 for row in writer.rows[2:])


def test_without_photographs_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    writer, shown = results.Writer(tmp_path / "r.jsonl", {"kind": "environment", "run": "a"}), []
    reversible.Reversible(torch.device("cpu"), writer, shown.append).bad_row()
    assert re.match("bad_row cannot be measured: .* needs scikit-learn: pip install", shown[0])


def test_an_interrupted_run_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    measure = Session.measure

    def interrupted(session, case, seconds):
        if case.direction == "inverse":
            raise KeyboardInterrupt
        return measure(session, case, seconds)

    monkeypatch.setattr(Session, "measure", interrupted)
    path = tmp_path / "r.jsonl"
    command = ["bench", "operators", "--operator", "affine_coupling", "--shape", "1x2x2x2", "--seconds", "0.01"]
    assert main([*command, "--no-compile", "--output", str(path), "--threads", "1", "--allocator", "tuned"]) == 130
    assert [row["kind"] for row in results.read(path) if row["kind"] != "warning"] == ["environment", "operator"]
    assert f"the results so far are in {path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--operator", "conv"], "operator must be one of actnorm_conv1x1, .* got 'conv'"),
        (["--direction", "up"], "direction must be one of forward, .* got 'up'"),
        (["--shape", "1x3x2"], "a shape must be four whole numbers BxCxHxW of at least 1, got '1x3x2'"),
        (["--shape", "1x3x2x2"], "a shape must have an even number of channels"),
        (["--dtype", "int8"], "dtype must be one of float32, .* got 'int8'"),
        (["--backend", "cublas"], "backend must be one of native, triton, reference, got 'cublas'"),
        (["--threads", "1,9999"], "threads must be at most "),
        (["--allocator", "slab"], "allocator must be one of default, tuned, got 'slab'"),
        (["--results", "x"], "--results needs --check"),
        (["--device", "tpu"], "--device tpu cannot be used here"),
    ],
)
def test_wrong_use_is_named(options, message, tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    assert main(["bench", "operators", *options, "--output", str(path)]) == 2
    assert re.match(f"error: {message}", capsys.readouterr().err)
    assert not path.exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [("--minutes=0", "must be above 0 and at most 3600, got '0'"), ("--threads=x", "must be a whole number from 1")],
)
def test_wrong_numbers_are_named(option, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["bench", option])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("busy", "found"), [("97", True), ("0", False), ("[N/A]", False)])  # [N/A] of a MIG instance
def test_a_busy_gpu_is_named(busy, found, monkeypatch):
    monkeypatch.setattr(environment, "_nvidia_smi", lambda query: f"1500, 1980, {busy}")
    monkeypatch.setattr(environment, "_spin", lambda: 1.0)
    warnings = environment.warnings(torch.device("cuda"))
    assert any("GPU at 1500 of 1980 MHz" in warning for warning in warnings) == found


def test_an_unwritable_folder_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["bench", "overhead", "--output", str(tmp_path / "file" / "r.jsonl")]) == 1
    assert re.match("error: results cannot be written to .*: File exists", capsys.readouterr().err)


def test_an_absent_backend_is_named(monkeypatch):
    absent = gk.backends.BackendStatus("native", False, "it is not built", "build it")
    monkeypatch.setattr(suite, "backend_status", lambda name: absent)
    with pytest.raises(BackendUnavailableError, match="'native' is not available: it is not built; build it"):
        suite.require(["native"])


def test_shapes():
    assert operators.parse_shape("64x12x16x16") == (64, 12, 16, 16)
    with pytest.raises(UsageError, match="'0x2x1x1'"):
        operators.parse_shape("0x2x1x1")


def test_a_step_takes_a_compiled_model():
    model, x = Glow(1, 4, steps=1, levels=1, hidden_channels=4), torch.rand(2, 1, 4, 4)
    model.train().initialize(x)
    step = models.glow_step(torch.compile(model, backend="eager"), x)
    assert step() == -model(x).mean()
