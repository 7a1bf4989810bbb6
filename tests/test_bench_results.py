"""Files of results and what is made from them: comparison, goals, report, page."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from glow_kernels.bench import check, compare, document, environment, report, results
from glow_kernels.bench.results import Writer
from glow_kernels.cli import main
from glow_kernels.errors import DataError, UsageError

# A script, which must start where torch is missing: it is in no package.
_spec = importlib.util.spec_from_file_location("gpu", Path(__file__).parents[1] / "benchmarks" / "gpu.py")
gpu = sys.modules["gpu"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gpu)

ENVIRONMENT = {
    "kind": "environment",
    "run": "run1",
    "date": "2026-01-02T03:04:05+00:00",
    "device": "Test CPU",
    "commit": "c" * 40,
    "dirty": False,
    "torch": "2.13.0",
    "python": "3.11",
}


def operator_row(
    ratio=5.0, spread=0.1, direction="forward", shape=(64, 12, 16, 16), operator="affine_coupling", **case
):
    """As ``measurement.measure`` makes it; eager takes ``ratio`` times as long as ours."""
    case = {"operator": operator, "direction": direction, "shape": list(shape), "dtype": "float32"}
    case |= {"memory_format": "contiguous", "threads": 1, "allocator": "tuned", "device": "cpu"}

    def candidate(seconds):
        times = seconds / 1e-5
        return {
            "seconds_median": seconds,
            "bytes_per_second": 1e6 / seconds,
            "percent_of_limit": 50.0 / times,
            "ratio_to_ours": {"median": times, "low": times * (1 - spread), "high": times * (1 + spread)},
            "ratio_to_ours_again": times * 1.02,
            "peak_extra_bytes": 1000,
        }

    candidates = {"copy": 0.5e-5, "eager": ratio * 1e-5, "compile": 2e-5, "native": 1e-5}
    named = {name: candidate(seconds) for name, seconds in candidates.items()}
    return {"kind": "operator", "case": case, "ours": "native", "bytes": 10**6, "limit": "copy", "candidates": named}


def model_row(part, implementation, ratio, **sizes):
    case = {"part": part, **sizes, "implementation": implementation, "device": "cpu"}
    spread = {"median": ratio, "low": ratio, "high": ratio}
    return {
        "kind": "model",
        "case": case,
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
    assert latest["candidates"]["eager"]["ratio_to_ours"]["median"] == pytest.approx(6.0)


def test_a_line_cut_short_is_left_out_and_the_next_run_goes_on(tmp_path):
    path = written(tmp_path / "r.jsonl", operator_row())
    path.write_text(path.read_text()[:-20])
    assert len(results.read(path)) == 1
    written(path, operator_row())
    assert [row["kind"] for row in results.read(path)] == ["environment", "environment", "operator"]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = written(tmp_path / "r.jsonl", operator_row())
    path.write_text(path.read_text().rstrip())
    written(path)
    assert len(results.read(path)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("{\n{}\n", "line 1: not JSON"),
        ("[]\n", "line 1: not a row"),
        (json.dumps({"version": 99}) + "\n", "line 1: format 99 is newer than 1"),
    ],
)
def test_damaged_files_are_named(text, message, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        results.read(path)


def test_results_are_selected_by_file_or_revision(tmp_path, monkeypatch):
    path = written(tmp_path / "r.jsonl", operator_row())
    monkeypatch.setattr(environment, "git", lambda *arguments: "c" * 40 if "main^{commit}" in arguments else None)
    assert results.select("main", tmp_path) == results.select(str(path)) == results.read(path)
    with pytest.raises(UsageError, match="'nothing' is neither a file of results nor a git revision"):
        results.select("nothing", tmp_path)
    monkeypatch.setattr(environment, "git", lambda *arguments: "d" * 40)
    with pytest.raises(DataError, match=r"nothing in .* was measured at main"):
        results.select("main", tmp_path)


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


def test_newly_wrong_cases_are_regressions():
    wrong = {key: value for key, value in operator_row().items() if key != "candidates"} | {"wrong": {"native": "off"}}
    assert len(compare.newly_wrong([operator_row()], [wrong])) == 1
    assert compare.newly_wrong([wrong], [wrong]) == []


def goals(*rows):
    return {goal.name: goal for goal in check.checks(rows)}


def test_goals_are_reached_or_missed():
    found = goals(operator_row(5.0), operator_row(3.0, shape=(64, 24, 8, 8)))
    goal = found["affine_coupling forward, times faster than eager (geometric mean of 2)"]
    assert goal.figure == pytest.approx(math.sqrt(15.0))
    assert goal.verdict == "missed"
    name = "affine_coupling forward, times faster than eager (geometric mean of 1)"
    assert goals(operator_row(4.5))[name].verdict == "reached"
    slowest = found["affine_coupling forward, slowest shape against the better of eager and compile"]
    assert (slowest.figure, slowest.verdict) == (pytest.approx(2.0), "reached")


def test_large_shapes_are_held_against_a_copy():
    name = "affine_coupling no_grad, over 8 MiB, tuned allocator, times a copy of the same bytes"
    assert goals(operator_row(direction="no_grad"))[name].verdict == "not measured"
    large = operator_row(direction="no_grad", shape=(64, 12, 128, 128))
    assert goals(large)[name].figure == pytest.approx(2.0)
    assert goals(large)[name].verdict == "reached"


def test_goals_of_models():
    row = model_row("training_step", "reference", 1.2, steps=8, levels=2, hidden=64, image_size=32, batch=16)
    name = "training step of Glow, K=8, L=2, width 64, batch 16, times faster than reference"
    assert goals(row)[name].verdict == "reached"
    assert goals()[name].verdict == "not measured"


def test_check_reads_a_file(tmp_path, capsys):
    path = written(tmp_path / "r.jsonl", operator_row())
    assert main(["bench", "--check", "--results", str(path)]) == 0
    assert "reached            5 >= 4     affine_coupling forward" in capsys.readouterr().out


def test_report_is_one_page_and_its_plots(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    rows = [ENVIRONMENT, operator_row(), *(model_row("depth", "glow_kernels", 1.0, steps=steps) for steps in (1, 4))]
    paths = report.write(rows, tmp_path)
    assert sorted(path.name for path in paths) == sorted(["report.html", *(f"{name}.png" for name in report.PLOTS)])
    page = paths[0].read_text()
    assert page.count("data:image/png;base64,") == len(report.PLOTS)
    assert "affine_coupling forward 64x12x16x16" in page
    assert "http" not in page, "the page needs nothing from elsewhere"


def test_page_of_performance_says_where_and_nothing_unmeasured(tmp_path):
    text = document.markdown([written(tmp_path / "r.jsonl", operator_row())])
    assert "Test CPU" in text
    assert "`cccccccccccc`" in text
    assert "5.00x eager" in text
    assert "not measured" not in text
    assert "training step" not in text
    with pytest.raises(DataError, match="there are no results"):
        document.markdown([])


@pytest.mark.parametrize(("version", "old"), [("2.9.1", True), ("2.10.0+cu130", False), ("3.0a1", False)])
def test_gpu_script_knows_versions(version, old):
    assert (gpu.too_old("torch", version) is not None) == old


def test_gpu_stages_survive_each_other():
    python = [sys.executable, "-c"]
    assert gpu.run(gpu.Stage("good", [*python, "pass"], 30)).startswith("ok")
    assert "exit code 3" in gpu.run(gpu.Stage("bad", [*python, "raise SystemExit(3)"], 30))
    assert gpu.run(gpu.Stage("slow", [*python, "import time; time.sleep(60)"], 1)) == "stopped after 1 s"
    assert "could not start" in gpu.run(gpu.Stage("absent", ["/nonexistent"], 1))


def test_gpu_script_stays_within_its_time(tmp_path):
    assert sum(stage.limit for stage in gpu.stages(tmp_path / "r.jsonl")) <= 480
