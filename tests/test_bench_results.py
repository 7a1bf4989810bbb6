"""Files of results and what is made from them: comparison, goals, report, page."""

import importlib.util
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from glow_kernels.bench import check, compare, document, environment, page, plan, plots, results, table, timing
from glow_kernels.bench.results import Writer
from glow_kernels.cli import main
from glow_kernels.errors import DataError, TrainingError, UsageError

ROOT = Path(__file__).parents[1]


def script(name):
    """A module of benchmarks, which is not installed."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu, gpu_curve, gpu_stages = script("gpu"), script("gpu_curve"), script("gpu_stages")

ENVIRONMENT = {
    "kind": "environment",
    "run": "run1",
    "date": "2026-01-02T03:04:05+00:00",
    "device": "Test CPU",
    "commit": "c" * 40,
    "dirty": False,
    "torch": "2.13.0",
    "python": "3.11",
    "cores": 2,
}


def operator_row(
    ratio=5.0, spread=0.1, direction="forward", shape=(64, 12, 16, 16), operator="affine_coupling", **case
):
    """A row like those of ``Session.measure``; eager takes ``ratio`` times as long as ours."""
    named = {"operator": operator, "direction": direction, "shape": list(shape), "dtype": "float32"}
    case = named | {"memory_format": "contiguous", "threads": 1, "allocator": "tuned", "device": "cpu"} | case

    def candidate(seconds):
        times = seconds / 1e-5
        return {
            "seconds": [seconds, seconds, seconds],
            "percent_of_limit": 50.0 / times,
            "ratio_to_ours": [times, times * (1 - spread), times * (1 + spread)],
            "peak_extra_bytes": 1000,
        }

    candidates = {"copy": 0.5e-5, "eager": ratio * 1e-5, "compile": 2e-5, "native": 1e-5}
    named = {name: candidate(seconds) for name, seconds in candidates.items()}
    return {"kind": "operator", "case": case, "ours": "native", "bytes": 10**6, "limit": "copy", "candidates": named}


def model_row(part, implementation, ratio, **sizes):
    case = {"part": part, **sizes, "implementation": implementation, "device": "cpu"}
    spread = [ratio, ratio, ratio]
    return {
        "kind": "model",
        "case": case,
        "ours": "native",
        "seconds": spread,
        "images_per_second": 10.0,
        "ratio_to_ours": spread,
        "peak_extra_bytes": 10**6,
        "note": "",
    }


def written(path, *rows, **environment):
    writer = Writer(path, {**ENVIRONMENT, **environment})
    for row in rows:
        writer.write(row)
    return path


def test_rows_are_read_as_written_and_appended(tmp_path):
    path = written(tmp_path / "deep" / "r.jsonl", operator_row())
    written(path, operator_row(6.0), run="run2")
    assert [row["run"] for row in results.read(path)] == ["run1", "run1", "run2", "run2"]
    (latest,) = results.of_kind(results.read(path), "operator")
    assert latest["candidates"]["eager"]["ratio_to_ours"][0] == pytest.approx(6.0)


def test_a_finished_run_keeps_the_last_row_of_every_case(tmp_path):
    path = written(tmp_path / "r.jsonl", operator_row(5.0), operator_row(5.0))
    before = path.read_text()
    writer = results.Writer(path, {"kind": "environment", "run": "run2"})
    for row in (
        {"kind": "warning", "text": "a"},
        {"kind": "warning", "text": "b"},
        operator_row(6.0),
        operator_row(7.0),
    ):
        writer.write(row)
    writer.finish()
    assert path.read_text().startswith(before), "other runs stay as they are"
    mine = [row for row in results.read(path) if row["run"] == "run2"]
    assert [row["kind"] for row in mine] == ["environment", "warning", "warning", "operator"]
    assert mine[-1]["candidates"]["eager"]["ratio_to_ours"][0] == pytest.approx(7.0)


def test_a_line_cut_short_is_left_out_and_the_next_run_goes_on(tmp_path):
    path = written(tmp_path / "r.jsonl", operator_row())
    path.write_text(path.read_text()[:-20])
    with pytest.warns(UserWarning, match=r"r\.jsonl: the last line is cut short and left out"):
        assert len(results.read(path)) == 1
    written(path, operator_row())
    assert [row["kind"] for row in results.read(path)] == ["environment", "environment", "operator"]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = written(tmp_path / "r.jsonl", operator_row())
    path.write_text(path.read_text().rstrip())
    written(path)
    assert len(results.read(path)) == 3


@pytest.mark.parametrize("kept", [0, 1, 5, 12, 40])
def test_a_first_line_cut_short_is_written_again(kept, tmp_path):
    path = written(tmp_path / "r.jsonl")
    path.write_text(path.read_text()[:kept])
    written(path)
    assert len(results.read(path)) == 1


NO_RESULTS = {
    "{\n{}\n": "line 1: not JSON",
    "[]\n": "line 1: not a row",
    '{"version":true}\n': "line 1: not a row",
    '{"version":99}\n': "line 1: format 99 is newer than 2",
    '{"version":1}\n': "line 1: format 1 is older than 2; move the file away and measure again",
    '{"version":2,"run":"x"}\n': "line 1: a row without its run, kind or case; delete that line",
    '{"version":2,"kind":"warning"}\n': "line 1: a row without its run, kind or case",
    '{"version":2,"run":"x","kind":"operator","case":3}\n': "line 1: a row without its run, kind or case",
    "my diary\n": "line 1: not JSON",
    "my diary\nday 2": "line 1: not JSON",
}


@pytest.mark.parametrize(("text", "message"), [*NO_RESULTS.items(), ("", "has no rows")])
def test_damaged_files_are_named(text, message, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        results.read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *NO_RESULTS.items(),
        ("my diary", "is not a file of results: name another with --output"),
        ("\xff", "it is not text"),
    ],
)
def test_a_file_of_something_else_is_refused_before_measuring_and_stays(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "run", lambda *_, **__: pytest.fail("measured"))
    path = tmp_path / "diary.txt"
    path.write_text(text, encoding="latin-1")
    assert main(["bench", "operators", "--quick", "--no-compile", "--output", str(path)]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert path.read_text(encoding="latin-1") == text


def test_what_cannot_be_read_again_is_no_file_of_results(tmp_path):
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(DataError, match=f"cannot be written to {path}: it is not a regular file"):
            written(path)


def test_results_are_selected_by_file_or_revision(tmp_path, monkeypatch):
    path = written(tmp_path / "r.jsonl", operator_row())
    answers = {
        ("rev-parse", "--verify", "--quiet", "main^{commit}"): "c" * 40,
        ("ls-tree", "-r", "--name-only", "c" * 40, "--", "results"): "results/README.md\nresults/r.jsonl",
        ("show", f"{'c' * 40}:results/r.jsonl"): path.read_text(),
    }
    monkeypatch.setattr(environment, "git", lambda *arguments: answers.get(arguments))
    assert results.select("main", Path("results")) == results.select(str(path)) == results.read(path)
    with pytest.raises(UsageError, match="'nothing' is neither a file of results nor a git revision"):
        results.select("nothing", tmp_path)
    with pytest.raises(DataError, match=r"there are no results in other at main \(cccccccccccc\)"):
        results.select("main", Path("other"))


@pytest.mark.parametrize("tracked", ["glow_kernels/__init__.py", None])
def test_a_commit_of_another_repository_is_not_recorded(tracked, monkeypatch):
    answers = {("rev-parse", "HEAD"): "c" * 40, ("ls-files", "--error-unmatch", "glow_kernels"): tracked}
    monkeypatch.setattr(environment, "git", lambda *arguments: answers.get(arguments))
    record = environment.record(torch.device("cpu"))
    assert (record["commit"], record["dirty"]) == (("c" * 40, False) if tracked else (None, None))


@pytest.mark.parametrize(
    ("after", "spread", "regression"), [(5.0, 0.1, False), (3.0, 0.1, True), (3.0, 0.5, False), (4.8, 0.001, False)]
)
def test_regressions_are_beyond_the_noise(after, spread, regression):
    (change,) = compare.changes([operator_row(5.0, spread)], [operator_row(after, spread)])
    assert change.regression == regression
    assert change.factor == pytest.approx(5.0 / after)


def test_compare_fails_if_asked_to(tmp_path, capsys):
    before, after = written(tmp_path / "a", operator_row(5.0)), written(tmp_path / "b", operator_row(2.0))
    assert main(["bench", "compare", str(before), str(after)]) == 0
    assert "slower   2.50x  affine_coupling forward 64x12x16x16" in capsys.readouterr().out
    assert main(["bench", "compare", "--fail", str(before), str(after)]) == 1
    assert main(["bench", "compare", "--fail", str(after), str(before)]) == 0
    other = written(tmp_path / "c", operator_row(operator="gaussian_log_prob"))
    assert main(["bench", "compare", str(before), str(other)]) == 1
    assert "no measured case in common" in capsys.readouterr().err


def test_results_of_several_devices_are_not_mixed(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    before = written(tmp_path / "before", operator_row(5.0))
    written(before, operator_row(2.0), run="run2", device="Other CPU")
    after = written(tmp_path / "after", operator_row(2.0))
    written(after, operator_row(2.0), run="run2", device="Other CPU")
    assert main(["bench", "compare", str(before), str(after)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"slower +2.50x .*, Test CPU: 5.00 -> 2.00 times eager", out)
    assert "2 cases compared, 1 slower" in out
    unknown = written(tmp_path / "unknown", operator_row(2.0), device="Third CPU")
    assert main(["bench", "compare", str(before), str(unknown)]) == 1
    assert main(["bench", "report", str(before), "--output", str(tmp_path / "page")]) == 0
    for device, figure in (("test-cpu", "5.00"), ("other-cpu", "2.00")):
        text = (tmp_path / "page" / device / "report.html").read_text()
        assert f'<td class="">{figure}</td>' in text


def test_newly_wrong_cases_are_regressions():
    wrong = {key: value for key, value in operator_row().items() if key != "candidates"} | {"wrong": {"native": "off"}}
    assert len(compare.newly_wrong([operator_row()], [wrong])) == 1
    assert compare.newly_wrong([wrong], [wrong]) == []


def goals(*rows):
    return {(goal.group, goal.name): goal for goal in check.checks(rows)}


ONE_TUNED = "1 thread, tuned allocator"


def test_goals_are_reached_or_missed():
    found = goals(operator_row(5.0), operator_row(3.0, shape=(64, 24, 8, 8)))
    name = "affine_coupling forward: times faster than eager"
    goal = found[ONE_TUNED, name]
    assert (goal.figure, goal.verdict) == (pytest.approx(math.sqrt(15.0)), "missed")
    assert goal.where == "geometric mean of 2 shapes, least 3.00 at 64x24x8x8"
    assert found["2 threads, tuned allocator", name].verdict == "not measured"
    assert goals(operator_row(4.5))[ONE_TUNED, name].verdict == "reached"
    slowest = "affine_coupling: worst shape and direction, times faster than the better of eager and compile"
    assert (found[ONE_TUNED, slowest].figure, found[ONE_TUNED, slowest].verdict) == (pytest.approx(2.0), "reached")
    as_it_is = goals(operator_row(5.0, allocator="default", threads=2))
    assert as_it_is["2 threads, allocator as it is", slowest].verdict == "reached"
    assert ("2 threads, allocator as it is", name) not in as_it_is


def test_other_types_and_many_channels_are_not_goals_of_the_linear_map():
    name = "actnorm_conv1x1 forward, C <= 48: times faster than eager"
    for row in (
        operator_row(operator="actnorm_conv1x1", shape=(4, 96, 16, 16)),
        operator_row(operator="actnorm_conv1x1", dtype="float64"),
        operator_row(operator="actnorm_conv1x1", memory_format="channels_last"),
        operator_row(operator="actnorm_conv1x1", device="cuda"),
    ):
        assert goals(row)[ONE_TUNED, name].verdict == "not measured"
    assert goals(operator_row(operator="actnorm_conv1x1"))[ONE_TUNED, name].verdict == "reached"


def test_large_shapes_are_held_against_a_copy():
    name = ONE_TUNED, "affine_coupling: worst shape over 8 MiB, forward and inverse, times a clone of the same bytes"
    assert goals(operator_row(direction="no_grad"))[name].verdict == "not measured"
    large = operator_row(direction="no_grad", shape=(64, 12, 128, 128))
    assert (goals(large)[name].figure, goals(large)[name].verdict) == (pytest.approx(2.0), "reached")
    large["candidates"]["copy"]["ratio_to_ours"] = [0.2, 0.2, 0.5]  # the ratio counts, whatever the medians
    assert (goals(large)[name].figure, goals(large)[name].verdict) == (pytest.approx(5.0), "missed")


def test_goals_of_a_gpu_are_of_its_own_rows():
    shapes = ((64, 12, 128, 128), (32, 48, 64, 64))
    rows = [operator_row(ratio, shape=shape, device="cuda") for ratio, shape in zip((5.0, 3.0), shapes, strict=True)]
    training = {"steps": 32, "levels": 3, "hidden": 512, "image_size": 32, "batch": 64}
    for name, seconds in (
        ("glow_kernels", 0.5),
        ("reference", 1.6),
        ("glow_kernels anchor", 0.7),
        ("glow_kernels, graph", 0.2),
        ("glow_kernels anchor, graph", 0.25),
        ("glow_kernels bfloat16, graph", 0.1),
        ("glow_kernels anchor, bfloat16, graph", 0.13),
        ("floor: bare convolutions, bfloat16, graph", 0.08),
    ):
        rows.append(model_row("training_step", name, seconds, **training))
    deep = {"steps": 80, "levels": 3, "hidden": 256, "image_size": 256, "batch": 8}
    for steps, peak in ((80, 0.7e9), (16, 0.5e9)):
        rows.append(model_row("memory", "anchor 4", 0.8, **{**deep, "steps": steps}))
        rows[-1]["peak_extra_bytes"] = peak
    for row in results.of_kind(rows, "model"):
        row["case"]["device"] = "cuda"
    found = [(goal.name, goal.figure, goal.verdict) for goal in check.checks(rows) if goal.group.startswith("GPU, ")]
    by_host, graph = "float32, launched by the host", "networks in bfloat16, a graph"
    assert [goal for goal in found if goal[1] == goal[1]] == [
        ("affine_coupling forward: % of a copy of the same bytes", pytest.approx(50), "missed"),
        ("affine_coupling forward: times faster than eager", pytest.approx(3), "missed"),
        ("affine_coupling forward: times faster than compile", pytest.approx(2), "reached"),
        (f"{by_host}: times faster than reference in float32", pytest.approx(3.2), "reached"),
        (f"{by_host}: reversible, times plain autograd", pytest.approx(1.4), "missed"),
        ("float32, a graph: times faster than reference in float32", pytest.approx(8), "reached"),
        ("float32, a graph: reversible, times plain autograd", pytest.approx(1.25), "reached"),
        (f"{graph}: times faster than reference in float32", pytest.approx(16), "reached"),
        (f"{graph}: reversible, times plain autograd", pytest.approx(1.3), "reached"),
        (f"{graph}: times the bare convolutions alone", pytest.approx(1.25), "reached"),
        ("anchor 4: GB, also what the convolutions work in", pytest.approx(0.7), "missed"),
    ]


def test_goals_of_models():
    sizes = {"steps": 8, "levels": 2, "hidden": 64, "image_size": 32, "batch": 16}
    found = goals(
        model_row("training_step", "reference", 1.2, **sizes), model_row("training_step", "native anchor", 1.4, **sizes)
    )
    verdicts = {goal.name.rpartition(": ")[2]: goal.verdict for goal in found.values() if goal.group == "Training"}
    assert verdicts == {"native, times faster than reference": "reached", "reversible, times plain autograd": "missed"}
    without_native = {**model_row("training_step", "reference", 1.0, **sizes), "ours": "reference"}
    smaller = model_row("training_step", "reference", 1.2, **{**sizes, "steps": 4})
    for other in (smaller, without_native):
        assert not any(goal.is_measured for goal in goals(other).values() if goal.group == "Training")


def memory_row(policy, steps, kept, peak):
    case = {"part": "activations", "policy": policy, "steps": steps}
    return {"kind": "memory", "case": case, "kept_bytes": kept, "peak_bytes": peak}


def test_goals_of_memory():
    # Measured values: a state of all levels per 4 steps, and the same sums as in tests/test_reversible_memory.py.
    rows = [
        memory_row("anchor 4", 8, 42_481_232, 444_089_676),
        memory_row("anchor 4", 16, 64_501_328, 456_672_588),
        memory_row("invert", 8, 20_461_136, 434_803_880),
        memory_row("invert", 16, 20_461_136, 434_803_880),
        memory_row("anchor 6, 8 micro-batches", 13, 42_481_232, 93_573_000),
    ]
    found = [goal for goal in goals(*rows).values() if goal.group.startswith("Activations")]
    assert [goal.figure for goal in found] == pytest.approx([1.0, 0.0, 0.557, 0.164], abs=1e-3)
    assert {goal.verdict for goal in found} == {"reached"}
    alone = [goal.verdict for goal in goals(rows[0]).values() if goal.group.startswith("Activ")]
    assert alone == ["not measured", "not measured", "reached", "not measured"]  # a slope needs two rows


@pytest.mark.parametrize(("difference", "verdict"), [(1e-6, "reached"), (1e-3, "missed"), (None, "missed")])
def test_goals_of_gradients(difference, verdict):
    case = {"part": "bad_row", "steps": 32, "device": "cpu"}
    found = goals({"kind": "accuracy", "case": case, "relative_difference": difference})
    (goal,) = (goal for goal in found.values() if goal.name.startswith("the same for one bad row"))
    assert goal.verdict == verdict


def test_goals_of_the_run():
    row = operator_row()
    repeats = [
        {"kind": "repeat", "case": {"number": number}, "first": {"eager": 2.0}, "again": {"eager": again}}
        for number, again in enumerate((2.1, 1.9, 2.5))
    ]
    found = {goal.name: goal for goal in check.checks([row | {"wrong": {"triton": "off"}}, *repeats])}
    wrong = found["candidates with wrong results or errors"]
    assert (wrong.figure, wrong.verdict, wrong.where) == (1, "missed", "64x12x16x16 triton")
    same = found["share of ratios that differ by less than 10% when measured twice in one run"]
    assert (same.figure, same.verdict, same.where) == (pytest.approx(2 / 3), "missed", "3 ratios")


def test_check_reads_a_file(tmp_path, capsys):
    path = written(tmp_path / "r.jsonl", operator_row(), operator_row())
    path.write_text(path.read_text()[:-9])
    assert main(["bench", "--check", "--results", str(path)]) == 0
    out, errors = capsys.readouterr()
    assert errors == f"warning: results {path}: the last line is cut short and left out\n"
    assert re.search(r"reached +5 at least 4 +affine_coupling forward: times faster than eager", out)
    assert re.search(r"\d+ reached, 0 missed, \d+ not measured", out)


def curve_row(implementation, train, validation):
    case = {"part": "curve", "implementation": implementation}
    return {"kind": "curve", "case": case, "train": train, "validation": validation}


def every_kind_of_row():
    sizes = {"steps": 4, "batch": 8}
    return [
        {"version": results.VERSION, **ENVIRONMENT},
        operator_row(),
        operator_row(operator="actnorm_conv1x1", direction="inverse"),
        *(model_row("curve by steps", name, 1.0, steps=steps) for name in ("a", "b") for steps in (1, 4)),
        model_row("training_step", "native", 1.0, **sizes),
        model_row("chain", "<peer>", 2.0, **sizes),
        memory_row("anchor 4", 8, 10**6, 10**7),
        curve_row("reference", [[10, 1.0, 5.0], [20, 2.0, 4.0]], [[20, 2.5, 3.5]]),
        curve_row("full stack", [[10, 0.1, 5.0], [20, 0.2, None]], [[20, 0.3, 3.5], [40, 0.5, 3.25], [60, 0.8, None]]),
        {"kind": "warning", "text": "the machine is busy"},
    ]


def test_report_is_one_page_and_its_plots(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    paths = page.write(every_kind_of_row(), tmp_path)
    assert sorted(path.name for path in paths) == sorted(["report.html", *(f"{name}.png" for name in plots.PLOTS)])
    text = paths[0].read_text()
    assert text.count("data:image/png;base64,") == len(plots.PLOTS)
    for expected in ("Test CPU", "cccccccccc", "64x12x16x16", "&lt;peer&gt;", "the machine is busy", "reached"):
        assert expected in text
    assert "<peer>" not in text
    assert not re.search(r"(src|href)=.https?:", text), "the page needs nothing from elsewhere"


def test_report_of_little_leaves_the_rest_out(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    paths = page.write([{"version": results.VERSION, **ENVIRONMENT}], tmp_path)
    assert [path.name for path in paths] == ["report.html"]


def test_report_draws_what_is_in_the_folder(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    command = ["bench", "report", "--folder", str(tmp_path), "--output", str(tmp_path / "page")]
    assert main(command) == 1
    assert "there are no results in" in capsys.readouterr().err
    written(tmp_path / "r.jsonl", operator_row())
    assert main(command) == 0
    assert (tmp_path / "page" / "report.html").exists()


def test_an_unwritable_report_is_named(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    path = written(tmp_path / "r.jsonl", operator_row())
    assert main(["bench", "report", str(path), "--output", str(path)]) == 1
    assert f"error: the report cannot be written to {path}" in capsys.readouterr().err


def test_page_of_performance_says_where_and_nothing_unmeasured(tmp_path):
    path = written(tmp_path / "r.jsonl", operator_row(), model_row("chain", "memcnn", 2.0, steps=4))
    text = document.markdown([path])
    for expected in ("## Test CPU", "`cccccccccccc`", "| affine_coupling | forward | 5.00 (5.00) |", "| memcnn |"):
        assert expected in text
    assert "not measured" not in text
    assert "bad row" not in text
    with pytest.raises(DataError, match="there are no results"):
        document.markdown([])
    stages = tmp_path / "stages.jsonl"
    results.append(stages, {"kind": "stage", "case": {"stage": "build"}, "outcome": "failed", "run": "gpu"})
    with pytest.raises(DataError, match=f"results {stages} do not say where they were measured"):
        document.markdown([stages])


def test_page_of_performance_compares_trainings_at_the_same_step(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    path = written(tmp_path / "r.jsonl", *every_kind_of_row()[1:])
    document.write([path], tmp_path / "p.md")
    text = (tmp_path / "p.md").read_text()
    assert "| validation at step 20 |" in text
    assert "| reference | 20 | 2 | 3.5 | 2.5 | 3.5 | 2.5 |" in text
    assert "| full stack | 20 | 0.2 | 3.5 | 0.3 | 3.25 | 0.5 |" in text
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_page_of_performance_is_written_from_committed_files_alone(tmp_path, capsys):
    path = written(tmp_path / "r.jsonl", operator_row())
    command = ["bench", "report", "--markdown", "--folder", str(tmp_path), "--output", str(tmp_path / "p.md")]
    assert main(command) == 0
    assert (tmp_path / "p.md").read_text() == document.markdown([path])
    assert main([*command, str(path)]) == 2
    assert "--markdown takes the files of --folder" in capsys.readouterr().err
    path.unlink()
    assert main(command) == 1
    assert f"there are no results in {tmp_path}; run" in capsys.readouterr().err


def test_committed_page_is_that_of_the_committed_results():
    """Local results that are not committed do not matter."""
    listed = environment.git("ls-files", "benchmarks/results/*.jsonl")
    files = sorted(ROOT / name for name in (listed or "").splitlines())
    if not files:  # no repository
        files = sorted((ROOT / "benchmarks/results").glob("*.jsonl"))
    page_of_docs = ROOT / "docs/performance.md"
    assert page_of_docs.exists() == bool(files), "glow-kernels bench report --markdown writes it"
    if files:
        assert page_of_docs.read_text() == document.markdown(files)
        assert all(path.stat().st_size < 2**20 for path in files)


def test_numbers_are_rounded_and_files_small(tmp_path):
    path = written(tmp_path / "r.jsonl", operator_row(1.23456789))
    (row,) = (row for row in results.read(path) if row["kind"] == "operator")
    assert row["candidates"]["eager"]["ratio_to_ours"][0] == 1.235
    assert len(path.read_text().splitlines()[1]) < 900, "a thousand rows make a file of less than a megabyte"


@pytest.mark.parametrize(("version", "old"), [("2.9.1", True), ("2.10.0+cu130", False), ("3.0a1", False)])
def test_gpu_script_knows_versions(version, old):
    assert (gpu.too_old("torch", version) is not None) == old


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_script_says_why_it_cannot(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path / "r.jsonl")]) == 1
    assert re.match("error: (torch .* is built without CUDA|no usable NVIDIA GPU)", capsys.readouterr().err)
    assert not (tmp_path / "r.jsonl").exists()


def test_gpu_script_names_unknown_stages(capsys):
    assert gpu.main(["--dry-run", "--only", "backends,fly"]) == 2
    assert re.match("error: stages are build, info, .*, got fly", capsys.readouterr().err)


def test_gpu_stages_survive_each_other(tmp_path, monkeypatch, capsys):
    python = [sys.executable, "-c"]
    path = tmp_path / "deep" / "r.jsonl"
    cut_short = "open(__import__('sys').argv[1], 'a').write('{\"ki'); raise SystemExit(3)"
    found = [
        gpu.Stage("good", [*python, "pass"], 30),
        gpu.Stage("bad", [*python, cut_short, str(path)], 30),
        gpu.Stage("slow", [*python, "import time; time.sleep(60)"], 1),
        gpu.Stage("absent", ["/nonexistent"], 1),
        gpu.Stage("impossible", [*python, "raise SystemExit(1)"], 1, skip="no such device"),
    ]
    monkeypatch.setattr(gpu, "stages", lambda results, dry_run: found)
    assert gpu.main(["--dry-run", "--output", str(path)]) == 1
    outcomes = {row["case"]["stage"]: row["outcome"] for row in results.read(path)}
    expected = {"good": "ok", "bad": "failed with exit code 3", "slow": "stopped after 1 s"}
    expected |= {"absent": "could not start", "impossible": "skipped: no such device"}
    assert outcomes.keys() == expected.keys()
    assert all(outcomes[name].startswith(start) for name, start in expected.items())
    assert gpu.main(["--dry-run", "--output", str(path), "--only", "good,impossible"]) == 0
    (tmp_path / "file").touch()
    assert gpu.main(["--dry-run", "--output", str(tmp_path / "file" / "r.jsonl")]) == 1
    assert "results cannot be written to" in capsys.readouterr().err


def test_a_stopped_stage_leaves_no_process_behind(tmp_path):
    child = f"import time; time.sleep(2); open({str(tmp_path / 'alive')!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.run([gpu.Stage("slow", [sys.executable, "-c", parent], 1)]) == {"slow": "stopped after 1 s"}
    time.sleep(2.5)
    assert not (tmp_path / "alive").exists()


def test_gpu_script_stays_within_its_time(tmp_path):
    groups = gpu.grouped(gpu.stages(tmp_path / "r.jsonl", dry_run=True))
    assert sum(max(stage.limit for stage in group) for group in groups) <= 480


def test_parallel_stages_share_their_time(tmp_path, monkeypatch, capsys):
    wait = "import pathlib, time; pathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)"
    paths = [str(tmp_path / name) for name in ("first", "second")]
    found = [
        gpu.Stage(
            f"check {own}",
            [sys.executable, "-c", wait.format(own, other) + f"\nprint('said {own}')"],
            30,
            parallel=True,
        )
        for own, other in (paths, paths[::-1])
    ]
    monkeypatch.setattr(
        gpu, "stages", lambda results, dry_run: [*found, gpu.Stage("last", [sys.executable, "-c", ""], 30)]
    )
    assert [len(group) for group in gpu.grouped(gpu.stages(tmp_path, True))] == [2, 1]
    assert gpu.main(["--dry-run", "--output", str(tmp_path / "r.jsonl")]) == 0
    said = capsys.readouterr().out
    assert all(re.search(f"=== check {path}: ok, .* s\nsaid {path}\n", said) for path in paths)
    rows = results.of_kind(results.read(tmp_path / "r.jsonl"), "stage")
    assert [row["case"]["stage"] for row in rows] == [f"check {paths[0]}", f"check {paths[1]}", "last"]


@pytest.mark.filterwarnings("ignore")  # warnings of other packages and of the compiler
def test_what_the_gpu_stages_measure_runs_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_stages.models, "compiled", lambda model, x: model)  # compiling takes half a minute
    monkeypatch.setattr(timing, "_MIN_ROUNDS", 1)
    path = tmp_path / "r.jsonl"
    # For convolutions this small, oneDNN's set-up takes longer than the computation.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    commands = {stage.name: stage.command for stage in gpu.stages(path, dry_run=True)}
    assert main(["bench", *commands["kernels"][commands["kernels"].index("operators") :]]) == 0
    for name in ("compile", "training", "memory", "sampling", "drop-in"):
        assert commands[name][2] == "benchmarks.gpu_stages"
        assert gpu_stages.main(commands[name][3:]) == 0
    rows = list(results.of_kind(results.read(path), "model"))
    assert {row["case"]["part"] for row in rows} == {"training_step", "memory", "sampling", "drop_in"}
    assert not any("failed" in row for row in rows)
    replayed = [row["case"]["implementation"].endswith("graph") for row in rows]
    assert any(replayed)
    assert all(
        "peak_extra_bytes" not in row if replay else row["peak_extra_bytes"] > 0
        for replay, row in zip(replayed, rows, strict=True)
    )
    document.write([path], tmp_path / "performance.md")
    assert "glow_kernels bfloat16, graph" in (tmp_path / "performance.md").read_text()
    trained = [row["case"]["implementation"] for row in rows if row["case"]["part"] == "training_step"]
    assert {*gpu_stages.KEY_IMPLEMENTATIONS, *gpu_stages.OTHER_IMPLEMENTATIONS} <= set(trained)


def test_a_model_that_does_not_fit_is_noted_and_the_others_go_on(tmp_path):
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory\nTried to allocate")

    writer = Writer(tmp_path / "r.jsonl", ENVIRONMENT)
    stages = gpu_stages.Stages(torch.device("cpu"), writer, toy=True)
    stages._measure("memory", {"steps": 80}, "store", too_large, 1)
    assert writer.rows[-1]["failed"] == "OutOfMemoryError: CUDA out of memory"
    assert "OutOfMemoryError: CUDA out of memory" in document.markdown([tmp_path / "r.jsonl"])


def test_the_floor_is_made_of_all_convolutions_of_the_networks():
    model, x = gpu_stages.Glow(3, 8, steps=2, levels=2, hidden_channels=4), torch.rand(2, 3, 8, 8) - 0.5
    model.train().initialize(x)
    found = gpu_stages._network_convolutions(model, x)
    assert [tuple(args[1].shape) for args in found[:3]] == [(4, 6, 3, 3), (4, 4, 1, 1), (12, 4, 3, 3)]
    assert len(found) == 2 * 2 * 3


def test_compiled_summaries_keep_conditions_apart():
    found = table.overview([operator_row(4.0), operator_row(9.0, threads=2), operator_row(1.0, shape=(64, 24, 8, 8))])
    (one, two) = found.values()
    assert list(found) == [f"{text}, tuned allocator, float32, contiguous" for text in ("1 thread", "2 threads")]
    assert one[0].faster_than["eager"] == (pytest.approx(2.0), 1.0, 2)
    assert two[0].faster_than["eager"] == (pytest.approx(9.0), 9.0, 1)


def test_curves_of_both_trainings_are_written_also_of_one_that_fails(tmp_path, monkeypatch, capsys):
    def train(folder, backend, options, seconds):
        records = [{"step": 10, "time": 0.5, "train_bits_per_dim": 4.0, "learning_rate": 0.1}]
        if backend == "reference":
            records += [{"step": 10, "time": 0.7, "validation_bits_per_dim": None}]
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if backend != "reference":
            raise TrainingError("training ended with exit code 3")

    monkeypatch.setattr(gpu_curve, "train", train)
    assert gpu_curve.main(["--device", "cpu", "--output", str(tmp_path / "r.jsonl")]) == 1
    assert "exit code 3" in capsys.readouterr().err
    first, second = results.of_kind(results.read(tmp_path / "r.jsonl"), "curve")
    assert (first["train"], first["validation"]) == ([[10, 0.5, 4.0]], [[10, 0.7, None]])
    assert (second["train"], second["validation"]) == ([[10, 0.5, 4.0]], [])


def test_a_curve_ends_when_its_time_is_up_and_says_when_training_failed(tmp_path):
    options = ["--device", "cpu", "--dataset", "digits", "--iterations", "1000000"]
    start = time.monotonic()
    gpu_curve.train(tmp_path / "run", "reference", options, 1.0)
    assert 1.0 <= time.monotonic() - start < 30.0
    with pytest.raises(TrainingError, match="training ended with exit code 2"):
        gpu_curve.train(tmp_path / "other", "", [*options, "--levels", "99"], 60.0)
