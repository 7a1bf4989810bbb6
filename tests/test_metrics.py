import json
import math
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from glow_kernels.errors import CheckpointError, MissingDependencyError
from glow_kernels.training import metrics
from glow_kernels.training.metrics import MetricsWriter


def write_steps(folder: Path, steps: range) -> None:
    with MetricsWriter(folder, tensorboard=False) as writer:
        for step in steps:
            writer.write(step, loss=step / 3)


def steps_in(folder: Path) -> list[int]:
    return [record["step"] for record in metrics.read(folder)]


def tensorboard_scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_records_are_json_lines_as_soon_as_they_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "on the way"
    with MetricsWriter(folder, tensorboard=False) as writer:
        writer.write(1, loss=4.5, lr=1e-3)
        writer.write(2, loss=4.25)
        lines = (folder / metrics.FILE_NAME).read_text().splitlines()
    first, second = map(json.loads, lines)
    assert first["time"] >= 0
    assert first == {"step": 1, "time": first["time"], "loss": 4.5, "lr": 1e-3}
    assert second["time"] >= first["time"]
    assert metrics.read(folder) == [first, second]


def test_non_finite_values_are_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, a=math.nan, b=math.inf, c=-math.inf, d=1.0)
    assert "NaN" not in (tmp_path / metrics.FILE_NAME).read_text()
    (record,) = metrics.read(tmp_path)
    assert [record[name] for name in "abcd"] == [None, None, None, 1.0]


def test_nothing_written_is_no_records(tmp_path: Path) -> None:
    assert metrics.read(tmp_path) == []


def test_truncate_removes_later_records_and_writing_goes_on(tmp_path: Path) -> None:
    write_steps(tmp_path, range(10))
    before = metrics.read(tmp_path)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.truncate(6)
        writer.write(7, loss=0.5)
    after = metrics.read(tmp_path)
    assert after[:-1] == before[:7]
    assert after[-1]["loss"] == 0.5
    assert list(tmp_path.iterdir()) == [tmp_path / metrics.FILE_NAME]


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', "{", "\0\0\0\0"])
def test_last_line_cut_short_by_a_crash_is_dropped(tmp_path: Path, tail: str) -> None:
    write_steps(tmp_path, range(4))
    with (tmp_path / metrics.FILE_NAME).open("a") as file:
        file.write(tail)
    assert steps_in(tmp_path) == [0, 1, 2, 3]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(4, loss=1.0)
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "lines",
    [
        '{"st\n{"step": 3, "time": 3}\n',
        '{"x": 1}\n',
        "3\n",
        '{"step": 2, "time": null}\n',
        '{"step": "2", "time": 3}\n',
        '{"step": 2, "time": 3, "loss": "low"}\n',
    ],
)
def test_damage_that_no_crash_leaves_is_an_error(lines: str, tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE_NAME
    path.write_text('{"step": 1, "time": 1}\n' + lines)
    with pytest.raises(CheckpointError, match=f"{path}, line 2"):
        metrics.read(tmp_path)


def test_failed_truncate_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_steps(tmp_path, range(10))
    with MetricsWriter(tmp_path, tensorboard=False) as writer, monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(CheckpointError, match="No space left"):
            writer.truncate(3)
    assert steps_in(tmp_path) == list(range(10))


def test_line_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        (tmp_path / metrics.FILE_NAME).unlink()
        (tmp_path / metrics.FILE_NAME).mkdir()
        with pytest.raises(CheckpointError, match="cannot write"):
            writer.write(1, loss=1.0)


def test_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot make"):
        MetricsWriter(tmp_path / "file", tensorboard=False)


def test_clock_goes_on_after_resume(tmp_path: Path) -> None:
    records = [{"step": 1, "time": 1000.0}, {"step": 2, "time": 2000.0}]
    (tmp_path / metrics.FILE_NAME).write_text("".join(json.dumps(record) + "\n" for record in records))
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(3)
        writer.truncate(1)
        writer.write(2)
    assert 1000 <= metrics.read(tmp_path)[-1]["time"] < 1100
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(3)
    assert 1000 <= metrics.read(tmp_path)[-1]["time"] < 1100


def test_tensorboard_has_the_same_scalars_and_forgets_truncated_ones(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(6):
            writer.write(step, loss=float(step))
    assert tensorboard_scalars(tmp_path, "loss") == [(step, float(step)) for step in range(6)]
    with MetricsWriter(tmp_path) as writer:
        writer.truncate(3)
        writer.write(4, loss=40.0)
    assert tensorboard_scalars(tmp_path, "loss") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    writer.close()


def test_missing_tensorboard_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'glow_kernels\[train\]'"):
        MetricsWriter(tmp_path)
    MetricsWriter(tmp_path, tensorboard=False).write(1, loss=1.0)
