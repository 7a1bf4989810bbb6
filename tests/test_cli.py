"""The command line on tiny data: what each command writes and prints, and that a stopped run can be resumed."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluation import tiles
from test_trainer import before_step, send

import glow_kernels
from glow_kernels import backends
from glow_kernels.backends import PREFERENCE, backend_status
from glow_kernels.bench import compilation
from glow_kernels.cli import main
from glow_kernels.cli import train as train_command
from glow_kernels.training import checkpoint, data, evaluation, gallery, metrics, run_folder
from glow_kernels.training.config import TrainingConfig
from glow_kernels.training.run_folder import BEST, CONFIG, LAST, METRICS, PICTURES, TENSORBOARD
from glow_kernels.training.trainer import Trainer

TINY = (
    *("--flow-steps", "1", "--levels", "1", "--hidden-channels", "4", "--batch-size", "16", "--warmup", "1"),
    *("--iterations", "6", "--validate-every", "3", "--log-every", "1", "--schedule", "constant"),
)
WRITTEN = {CONFIG, LAST, BEST, METRICS, TENSORBOARD, *PICTURES}


def cli(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def save_images(path: Path, *, size: int = 4, channels: int = 1, classes: int | None = 3, seed: int = 0) -> Path:
    """Save images with 256 levels, optionally with labels: 32 to train, 64 to validate and 40 to test."""
    random = np.random.default_rng(seed)
    arrays = {}
    for part, count in (("train", 32), ("validation", 64), ("test", 40)):
        arrays[part] = random.integers(256, size=(count, channels, size, size), dtype=np.uint8)
        if classes is not None:
            arrays[f"{part}_labels"] = np.arange(count) % classes
    np.savez(path, **arrays)
    return path


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def _no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not draw curves: Matplotlib takes longer than all the rest of a run this small."""
    monkeypatch.setattr(gallery, "draw_curve", lambda _, path: path.touch())


def train_two_runs(folder: Path, dataset: str) -> None:
    """Make two runs, ``plain`` and ``conditional``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "draw_curve", lambda _, path: path.touch())
        assert cli("train", "--run", folder / "plain", "--dataset", dataset, *TINY, "--learning-rate", "0.02") == 0
        # The learning rate is high, so that samples of different classes differ.
        fast = ("--conditional", "--learning-rate", "0.1")
        assert cli("train", "--run", folder / "conditional", "--dataset", dataset, *TINY, *fast) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images.npz and two runs trained on it, ``plain`` and ``conditional``."""
    folder = tmp_path_factory.mktemp("trained")
    train_two_runs(folder, f"array:{save_images(folder / 'images.npz')}")
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of ``trained`` for one test."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


# train


def test_train_leaves_a_complete_run_and_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "run"
    assert cli("train", "--run", folder, *TINY) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    assert {path.name for path in folder.iterdir()} == WRITTEN
    for name in PICTURES:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 100
            assert len(np.unique(np.asarray(picture))) > 10
    assert list((folder / TENSORBOARD).glob("events.out.tfevents.*"))
    assert [record["step"] for record in metrics.read(folder)] == [1, 2, 3, 3, 4, 5, 6, 6]

    config = json.loads((folder / CONFIG).read_text())
    assert config.keys() == TrainingConfig().to_json().keys()
    assert (config["dataset"], config["flow_steps"], config["schedule"]) == ("digits", 1, "constant")

    model, _, document = run_folder.load_model(str(folder))
    digits = data.load("digits")
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters on 1,400 images of digits" in output
    validations = [record["validation_bits_per_dim"] for record in metrics.read(folder)[3::4]]
    assert re.findall(r"iteration (\d): validation (\d\.\d+)", output) == [
        (step, f"{value:.4f}") for step, value in zip("36", validations, strict=True)
    ]
    assert document["validation_bits_per_dim"] == min(validations)
    table = dict(re.findall(r"^  (\S.*?)  +(\S.*)$", output, flags=re.MULTILINE))
    test = evaluation.evaluate(model, digits.test, draws=13)
    assert table["test bits/dim"] == f"{test}  (297 images, never trained on)"
    assert table["validation"] == f"{min(validations):.4f}  (best, at iteration {document['iteration']})"
    assert float(table["reconstruction error"].split()[0]) < 1e-4
    assert re.match(r"[\d,]+ images/s  \(6 iterations, \d+ s\)", table["training speed"])
    assert table["skipped steps"].startswith("0 ")
    assert table["pictures"] == ", ".join(str(folder / name) for name in PICTURES)


@pytest.mark.usefixtures("_no_curve")
def test_run_folder_is_named_after_the_data_unless_given(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("train", "--dataset", f"array:{trained}/images.npz", *TINY) == 0
    assert {path.name for path in (tmp_path / "runs" / "array").iterdir()} == WRITTEN


@pytest.mark.usefixtures("_no_curve")
def test_three_image_files_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One each to train, validate and test, so there is no second test image to interpolate to."""
    (tmp_path / "images").mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(256, size=(9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    settings = ("--dataset", f"folder:{tmp_path}/images", "--image-size", "4", "--n-bits", "5")
    assert cli("train", "--run", tmp_path / "run", *settings, *TINY, "--iterations", 1) == 0
    assert "test bits/dim" in capsys.readouterr().out
    for command in ("evaluate", "sample", "interpolate"):
        assert cli(command, tmp_path / "run") == 0


@pytest.mark.usefixtures("_no_curve")
@pytest.mark.parametrize("run", ["plain", "conditional"])
def test_resuming_a_finished_run_prints_the_table_again(
    run: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = WRITTEN - {TENSORBOARD}
    before = {name: (runs / run / name).read_bytes() for name in names}
    assert cli("train", "--run", runs / run, "--resume") == 0
    assert "test bits/dim" in capsys.readouterr().out
    assert {name: (runs / run / name).read_bytes() for name in names} == before


@pytest.mark.usefixtures("_no_curve")
def test_the_time_of_training_is_that_of_the_whole_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, document = checkpoint.load(runs / "plain" / LAST)
    document["progress"]["seconds"] = 8.0
    checkpoint.save(runs / "plain" / LAST, tensors, document)
    assert cli("train", "--run", runs / "plain", "--resume") == 0
    assert "  12 images/s  (6 iterations, 8 s)" in capsys.readouterr().out


@pytest.mark.usefixtures("_no_curve")
def test_patience_can_change_when_a_run_goes_on(runs: Path) -> None:
    """Training on noise soon stops improving, so the run ends early."""
    options = ("--iterations", 60, "--patience", 2)
    assert cli("train", "--run", runs / "conditional", "--resume", *options) == 0
    assert 6 < metrics.read(runs / "conditional")[-1]["step"] < 60


@pytest.mark.usefixtures("_no_curve")
def test_a_run_goes_on_where_its_data_have_moved(runs: Path) -> None:
    moved = (runs / "images.npz").rename(runs / "moved.npz")
    config = json.loads((runs / "plain" / CONFIG).read_text())
    (runs / "plain" / CONFIG).write_text(json.dumps(config | {"dataset": f"array:{runs}/images.npz"}))
    assert cli("interpolate", runs / "plain") == 1
    assert cli("interpolate", runs / "plain", "--dataset", f"array:{moved}") == 0
    assert cli("train", "--run", runs / "plain", "--resume", "--dataset", f"array:{moved}") == 0
    assert cli("evaluate", runs / "plain") == 0


def interrupt_steps(monkeypatch: pytest.MonkeyPatch, *steps: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal in these steps of every training run."""

    class Interrupted(Trainer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            for step in steps:
                before_step(self, send(number, at=step))

    monkeypatch.setattr(train_command, "Trainer", Interrupted)


@pytest.mark.usefixtures("_no_curve")
@pytest.mark.parametrize("extended", [False, True])
def test_the_command_that_an_interrupted_run_prints_resumes_it(
    extended: bool, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my run"
    dataset = f"array:{trained}/images.npz"
    start = ["train", "--run", folder, "--dataset", dataset, *TINY]
    if extended:
        assert cli(*start) == 0
        start = ["train", "--run", folder, "--resume", "--iterations", 12]
    with monkeypatch.context() as patch:
        interrupt_steps(patch, 4, 10)
        assert cli(*start) == 0
    output = capsys.readouterr().out
    assert f"stopped at iteration {10 if extended else 4}, everything is saved; continue with:" in output
    command = shlex.split(output.splitlines()[-1])
    assert command[0] == "glow-kernels"
    assert cli(*command[1:]) == 0
    assert "test bits/dim" in capsys.readouterr().out
    steps = [record["step"] for record in metrics.read(folder) if "train_bits_per_dim" in record]
    assert steps == list(range(1, 13 if extended else 7))


def test_second_interrupt_exits_at_once_with_the_code_of_a_signal(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (runs / "plain" / BEST).read_bytes()
    interrupt_steps(monkeypatch, 8, 8)
    assert cli("train", "--run", runs / "plain", "--resume", "--iterations", 20) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert (runs / "plain" / BEST).read_bytes() == before
    assert checkpoint.load(runs / "plain" / LAST)[1]["progress"]["iteration"] == 6


@pytest.mark.usefixtures("_no_curve")
def test_signal_from_outside_stops_training_and_nothing_is_lost(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    endless = ("--iterations", "1000000", "--validate-every", "1000000")
    settings = ("--run", str(folder), "--dataset", f"array:{trained}/images.npz", *TINY, *endless)
    command = [sys.executable, "-m", "glow_kernels", "train", *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while len(metrics.read(folder)) < 5:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "Traceback" not in errors
    assert process.returncode == 0
    (stop,) = map(int, re.findall(r"stopped at iteration (\d+), everything is saved", output))
    assert checkpoint.load(folder / LAST)[1]["progress"]["iteration"] == stop >= 5
    assert cli("train", "--run", folder, "--resume", "--iterations", stop + 2) == 0
    steps = [record["step"] for record in metrics.read(folder) if "train_bits_per_dim" in record]
    assert steps == list(range(1, stop + 3))


@pytest.mark.usefixtures("_no_curve")
def test_overwrite_replaces_the_run_and_nothing_else(runs: Path) -> None:
    folder = runs / "plain"
    mine = {"notes.txt": "mine", "pictures/samples.png": "mine too", "last.safetensors.bak": "my backup"}
    for name, text in mine.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / TENSORBOARD / "events.out.tfevents.1.old").touch()
    old = bytes_of(folder)
    settings = ("--dataset", f"array:{runs}/images.npz", *TINY, "--seed", 5, "--iterations", 2)
    assert cli("train", "--run", folder, *settings, "--overwrite") == 0
    assert {name: (folder / name).read_text() for name in mine} == mine
    new = bytes_of(folder)
    events = {name for name in new if name.startswith(TENSORBOARD)}
    assert not events & set(old)
    assert new.keys() - events == old.keys() - {name for name in old if name.startswith(TENSORBOARD)}
    assert [record["step"] for record in metrics.read(folder)] == [1, 2, 2]
    assert json.loads(new[CONFIG])["seed"] == 5


@pytest.mark.usefixtures("_no_curve")
@pytest.mark.parametrize("option", [[], ["--overwrite"]])
def test_a_folder_without_a_run_is_taken_and_its_files_stay(option: list[str], trained: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert cli("train", "--run", tmp_path, "--dataset", f"array:{trained}/images.npz", *TINY, *option) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


# evaluate


@pytest.mark.parametrize("run", ["plain", "conditional"])
@pytest.mark.parametrize(("split", "images"), [("train", 32), ("validation", 64), ("test", 40)])
@pytest.mark.parametrize("draws", [1, 4])
def test_evaluate_prints_what_the_best_weights_give(
    run: str, split: str, images: int, draws: int, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _, _ = run_folder.load_model(trained / run)
    source = data.load(f"array:{trained}/images.npz")
    labels = getattr(source, f"{split}_labels") if run == "conditional" else None
    expected = evaluation.evaluate(model, getattr(source, split), labels, draws=draws)
    assert cli("evaluate", trained / run, "--split", split, "--draws", draws) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{expected} bits/dim on {images} {split} images of {source.name}, {draws} draws each"
    assert float(second.split()[0]) < 1e-4


def test_evaluate_takes_the_test_images_unless_told(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for options in ((), ("--split", "test", "--draws", 4, "--batch-size", 256), ("--batch-size", 7)):
        assert cli("evaluate", trained / "plain", *options) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert "on 40 test images" in outputs[2]


def test_evaluate_on_other_data(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_images(tmp_path / "other.npz", seed=1, classes=2)
    assert cli("evaluate", trained / "conditional", "--dataset", f"array:{other}") == 0, "a class may be missing"
    capsys.readouterr()
    assert cli("evaluate", trained / "plain", "--dataset", f"array:{other}") == 0
    model, _, _ = run_folder.load_model(trained / "plain")
    expected = evaluation.evaluate(model, data.load(f"array:{other}").test, draws=4)
    assert capsys.readouterr().out.startswith(f"{expected} bits/dim on 40 test images of array:{other}")


def test_before_the_first_validation_the_last_weights_are_used(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the best weights of a run that was replaced."""
    folder = runs / "plain"
    interrupt_steps(monkeypatch, 2)
    assert cli("train", "--overwrite", "--run", folder, "--dataset", f"array:{runs}/images.npz", *TINY) == 0
    assert {path.name for path in folder.iterdir()} == {CONFIG, LAST, METRICS, TENSORBOARD}
    assert cli("evaluate", folder) == 0
    assert "bits/dim on 40 test images" in capsys.readouterr().out


# sample


def samples_of(path: Path, count: int) -> torch.Tensor:
    columns = int(np.ceil(np.sqrt(count)))
    drawn = tiles(path, columns, size=4).flatten(0, 1)
    assert (drawn[count:] == 128).all()
    return drawn[:count]


def test_sample_writes_into_the_run_folder_unless_told(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "plain" / "samples.png").unlink()
    assert cli("sample", runs / "plain") == 0
    assert capsys.readouterr().out == f"{runs / 'plain' / 'samples.png'}\n"
    assert len(samples_of(runs / "plain" / "samples.png", 64)) == 64
    before = bytes_of(runs)
    assert cli("sample", runs / "plain", "--output", runs / "mine.png") == 0
    assert capsys.readouterr().out == f"{runs / 'mine.png'}\n"
    after = bytes_of(runs)
    # The picture above was drawn with the defaults of all options.
    assert after.pop("mine.png") == before["plain/samples.png"]
    assert after == before


@pytest.mark.parametrize("run", ["plain", "conditional"])
def test_samples_are_reproducible_byte_for_byte(run: str, trained: Path, tmp_path: Path) -> None:
    options = {
        "one": (),
        "again": ("--seed", 0, "-n", 64, "--temperature", 0.7),
        "seed": ("--seed", 1),
        "temperature": ("--temperature", 1.0),
    }
    pictures = {}
    for name, arguments in options.items():
        torch.manual_seed(len(pictures))
        assert cli("sample", trained / run, "--output", tmp_path / name, *arguments) == 0
        pictures[name] = (tmp_path / name).read_bytes()
    assert pictures["one"] == pictures["again"]
    assert len(set(pictures.values())) == 3


@pytest.mark.parametrize("count", [1, 5, 300])
def test_sample_draws_as_many_as_asked_for_and_every_class_in_turn(count: int, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "samples.png"
    command = ("sample", trained / "conditional", "--temperature", 0, "--output", path)
    assert cli(*command, "-n", count) == 0
    drawn = samples_of(path, count)
    for label in range(3):
        assert cli(*command, "-n", 2, "--class", label) == 0
        first, second = samples_of(path, 2)
        assert torch.equal(first, second)
        of_class = drawn[label::3]
        assert torch.equal(of_class, first.expand_as(of_class))
    assert len({image.numpy().tobytes() for image in drawn}) == min(count, 3)


def test_less_temperature_makes_less_varied_samples(trained: Path, tmp_path: Path) -> None:
    spreads = []
    for temperature in (0, 0.3, 1.0):
        assert cli("sample", trained / "plain", "--temperature", temperature, "--output", tmp_path / "samples.png") == 0
        spreads.append(samples_of(tmp_path / "samples.png", 64).double().std(dim=0).mean().item())
    assert spreads[0] == 0 < 2 * spreads[1] < spreads[2]


# interpolate


@pytest.mark.parametrize("run", ["plain", "conditional"])
@pytest.mark.parametrize("pair", [(0, 1), (7, 39), (5, 5)])
def test_interpolated_row_runs_from_one_test_image_to_the_other(
    run: str, pair: tuple[int, int], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "row.png"
    assert cli("interpolate", trained / run, "--pair", *pair, "--count", 5, "--output", path) == 0
    assert capsys.readouterr().out == f"{path}\n"
    (row,) = tiles(path, columns=5, size=4)
    images = data.load(f"array:{trained}/images.npz").test
    assert torch.equal(row[0], images[pair[0]].expand(3, -1, -1))
    assert torch.equal(row[-1], images[pair[1]].expand(3, -1, -1))
    assert (len(torch.unique(row, dim=0)) == 5) == (pair[0] != pair[1])


def test_interpolate_takes_random_pairs_unless_told(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs / "plain" / "interpolation.png"
    path.unlink()
    images = {image.numpy().tobytes() for image in data.load(f"array:{runs}/images.npz").test.expand(-1, 3, -1, -1)}
    pictures = []
    for options, rows, columns in (
        ((), 8, 9),
        (("--rows", 8, "--count", 9, "--seed", 0), 8, 9),
        (("--seed", 1), 8, 9),
        (("--rows", 3, "--count", 2), 3, 2),
        (("--rows", 999, "--count", 2), 20, 2),
    ):
        assert cli("interpolate", runs / "plain", *options) == 0
        assert capsys.readouterr().out == f"{path}\n"
        pictures.append(path.read_bytes())
        drawn = tiles(path, columns, size=4)
        assert drawn.shape[:2] == (rows, columns)
        ends = {image.contiguous().numpy().tobytes() for image in drawn[:, [0, -1]].flatten(0, 1)}
        assert ends <= images
        assert len(ends) == 2 * rows
    assert pictures[0] == pictures[1] != pictures[2]


# info, help and how the command is started


def test_info_says_of_every_backend_and_package_whether_it_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("info") == 0
    output = capsys.readouterr().out
    for expected in (glow_kernels.__version__, torch.__version__, "device        cpu", "(default)"):
        assert expected in output
    for name in PREFERENCE:
        (line,) = re.findall(rf"^  {name} .*$", output, flags=re.MULTILINE)
        status = backend_status(name)
        assert status.reason in line
        assert ("not available" in line) != status.available
        assert status.remedy in line
    for package in ("numpy", "pillow", "safetensors", "scikit-learn", "tqdm", "matplotlib", "tensorboard"):
        version = re.escape(importlib.metadata.version(package))
        assert re.search(rf"^  {package} +{version}$", output, flags=re.MULTILINE)
    assert "glow_kernels[train]" not in output


def test_info_says_what_is_chosen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(backends, "_chosen", "reference")  # as importing the package does from GLOW_KERNELS_BACKEND
    assert cli("info") == 0
    output = capsys.readouterr().out
    assert re.search(r"^  reference +available \(chosen\)", output, flags=re.MULTILINE)
    assert "(default)" not in output
    monkeypatch.setattr(backends, "_chosen", "quantum")
    assert cli("info") == 2
    assert "got 'quantum'" in capsys.readouterr().err


def test_info_says_how_to_install_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = importlib.metadata.version

    def without_tqdm(package: str) -> str:
        if package == "tqdm":
            raise importlib.metadata.PackageNotFoundError
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without_tqdm)
    assert cli("info") == 0
    output = capsys.readouterr().out
    assert re.search(r"^  tqdm +missing$", output, flags=re.MULTILINE)
    assert "pip install 'glow_kernels[train]'" in output


OPTIONS = {
    "train": {
        *("--run-folder", "--resume", "--overwrite", "--quiet", "--cuda-graph", "--fsdp", "--device"),
        *(f"--{option.name.replace('_', '-')}" for option in fields(TrainingConfig)),
    },
    "evaluate": {"RUN", "--device", "--split", "--dataset", "--draws", "--batch-size"},
    "sample": {"RUN", "--device", "-n", "--temperature", "--class", "--seed", "--output"},
    "interpolate": {"RUN", "--device", "--dataset", "--pair", "--rows", "--count", "--seed", "--output"},
    "info": set(),
}


def help_of(*command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli(*command, "--help")
    assert exit_.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", OPTIONS)
def test_help_mentions_every_option_with_a_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, capsys=capsys)
    # An option at the beginning of a line, and its help text after the metavariable or on the next line.
    found = re.findall(
        r"^  (?:-h, |--run(?: FOLDER)?, )?(RUN|--?[a-z-]+)(?: [A-Z{][^ \n]*)*(?:  +|\n +)\w", text, flags=re.MULTILINE
    )
    assert set(found) == OPTIONS[command] | {"--help", "--debug"}
    assert command in help_of(capsys=capsys)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli("--version")
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"glow_kernels {importlib.metadata.version('glow_kernels')}\n"


@pytest.mark.parametrize(("arguments", "code"), [(["info"], 0), (["info", "--no"], 2), (["sample", "no/run"], 1)])
def test_module_is_the_command_line(arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["glow_kernels", *arguments])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("glow_kernels", run_name="__main__")
    assert exit_.value.code == code


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "glow_kernels", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.usefixtures("_no_curve")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_is_closed_is_no_error(stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = f"array:{save_images(tmp_path / 'images.npz')}"
    monkeypatch.setattr(sys, stream, None)
    assert cli("train", "--run", tmp_path / "run", "--dataset", dataset, *TINY) == 0


@pytest.mark.usefixtures("_no_curve")
def test_a_stream_that_cannot_spell_a_path_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = f"array:{save_images(tmp_path / 'images.npz')}"
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    assert cli("train", "--run", tmp_path / "r\xfcn", "--dataset", dataset, *TINY) == 0
    assert rb"r\xfcn/samples.png" in written.getvalue()


@pytest.mark.parametrize("seconds", [0.0, 0.5], ids=["workers start", "workers import torch"])
def test_ctrl_c_while_the_benchmark_compiles_is_one_line(seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    command = [sys.executable, "-m", "glow_kernels", "bench", "operators", "--minutes", "0.5", "--output", str(path)]
    # A terminal sends Ctrl-C to the whole process group.
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("compiling"):
                break
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr.read() == "interrupted\n"
    assert process.returncode == 130


def test_ctrl_c_that_another_thread_gets_waits_until_the_workers_have_started() -> None:
    is_over, done = threading.Event(), []
    thread = threading.Thread(target=is_over.wait, daemon=True)
    thread.start()

    def start_workers() -> None:
        with compilation._sigint_blocked():
            assert thread.ident is not None
            signal.pthread_kill(thread.ident, signal.SIGINT)
            time.sleep(0.05)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        start_workers()
    is_over.set()
    assert done


def test_script_is_the_command_line() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="glow-kernels")
    assert script.load() is main
