"""Every user error gives one line that names it and the remedy, and the right exit code, and harms no run."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from test_cli import TINY, bytes_of, cli, save_images, train_two_runs
from test_trainer import contents

from glow_kernels import backends
from glow_kernels.cli import arguments
from glow_kernels.errors import GlowKernelsError
from glow_kernels.training import checkpoint, gallery, run_folder
from glow_kernels.training.run_folder import BEST, CONFIG, LAST, METRICS

COMMANDS_ON_A_RUN = ("evaluate", "sample", "interpolate", "train --resume --run")


@pytest.fixture(scope="module", autouse=True)
def _no_curve() -> Iterator[None]:
    """Do not draw curves: Matplotlib takes longer than all the rest of a run this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "draw_curve", lambda _, path: path.touch())
        yield


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images.npz, two runs trained on it, ``plain`` and ``conditional``, and bad data of all kinds."""
    folder = tmp_path_factory.mktemp("originals")
    save_images(folder / "images.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_two_runs(folder, "array:images.npz")
    save_images(folder / "odd.npz", size=5)
    save_images(folder / "color.npz", channels=3)
    save_images(folder / "large.npz", size=8)
    save_images(folder / "unlabelled.npz", classes=None, seed=1)
    np.save(folder / "unsplit.npy", np.arange(30 * 16, dtype=np.uint8).reshape(30, 4, 4))
    save_images(folder / "nine.npz", classes=9)
    np.save(folder / "float.npy", np.ones((9, 4, 4), dtype=np.float32))
    np.save(folder / "nan.npy", np.full((9, 4, 4), np.nan))
    np.save(folder / "two.npy", np.ones((2, 4, 4), dtype=np.uint8))
    (folder / "damaged.npz").write_bytes((folder / "odd.npz").read_bytes()[:500])
    (folder / "damaged.tar.gz").write_bytes(b"\x1f\x8b\x08" + bytes(range(200)))
    (folder / "empty").mkdir()
    (folder / "photos").mkdir()
    for index in range(4):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / "photos" / f"{index}.png")
    (folder / "photos" / "2.png").write_bytes((folder / "photos" / "1.png").read_bytes()[:40])
    return folder


@pytest.fixture
def runs(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``originals`` for one test, as its current folder."""
    folder = Path(shutil.copytree(originals, tmp_path / "runs"))
    monkeypatch.chdir(folder)
    return folder


def exit_code(arguments: list[str]) -> tuple[int | str | None, bool]:
    """The exit code of a command, and whether its arguments could be parsed."""
    try:
        return cli(*arguments), True
    except SystemExit as exit_:
        return exit_.code, False


class Failing:
    """Runs commands that must fail."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, code: int, message: str, command: str) -> str:
        """Check that the command fails with one line that matches the regular expression ``message``; return it."""
        arguments = shlex.split(command)
        self._capsys.readouterr()
        got, parsed = exit_code(arguments)
        assert got == code
        errors = self._capsys.readouterr().err
        assert re.fullmatch(r"error: [^\n]+\n", errors)
        assert re.search(message, errors), errors
        if parsed:
            with pytest.raises((GlowKernelsError, OSError)) as caught:
                cli(*arguments, "--debug")
            assert errors.split() == f"error: {caught.value}".split()
        return errors


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Failing:
    return Failing(capsys)


@pytest.fixture
def harmless(runs: Path, fails: Failing) -> Iterator[Failing]:
    """Like ``fails``, and also checks at the end that no file is new, gone or changed."""
    before = bytes_of(runs)
    yield fails
    assert bytes_of(runs) == before


# Data


@pytest.mark.parametrize(
    ("code", "message", "dataset"),
    [
        (2, "unknown data 'nope'; use one of digits, .*array:PATH", "nope"),
        (2, r"image_size must be divisible by 2 \*\* levels = 2, got \(5, 5\) with levels = 1", "array:odd.npz"),
        (2, "image_size 6 does not fit digits: its images are 8x8.*leave image_size out", "digits --image-size 6"),
        (2, "n_bits must be from 1 to 8, not 9", "patches --n-bits 9"),
        (2, "n_bits must be from 1 to 8, not 0", "patches --n-bits 0"),
        (
            2,
            "conditional needs data with classes, and array:unlabelled.npz has none",
            "array:unlabelled.npz --conditional",
        ),
        (1, "float.npy has float32 values, not integers; save images as integers", "array:float.npy"),
        (1, "nan.npy has float64 values, with NaN among them.*; save images as integers", "array:nan.npy"),
        (1, r"two.npy has 2 image\(s\) and at least 3 are needed.*; add images", "array:two.npy"),
        (1, "damaged.npz is not a .npy or .npz file.*damaged.*; save the arrays again", "array:damaged.npz"),
        (1, "missing.npz .*does not exist.*; check the path", "array:missing.npz"),
        (1, "cannot read empty.*; name a .npy or .npz file", "array:empty"),
        (1, "empty has no image files.*; add images", "folder:empty"),
        (1, "cannot list odd.npz.*; name a folder of images", "folder:odd.npz"),
        (
            2,
            "(new|plain) is inside folder:., so its pictures would be training images: name another folder with --run",
            "folder:.",
        ),
        (1, "cannot read image photos/2.png.*; replace or remove it", "folder:photos --image-size 4"),
        (1, "damaged.tar.gz is not a readable .tar.gz archive.*; download", "cifar10:damaged.tar.gz"),
        (1, "empty has no data_batch_1,.*; download", "cifar10:empty"),
    ],
)
def test_bad_data(code: int, message: str, dataset: str, harmless: Failing) -> None:
    tiny = shlex.join(TINY)
    harmless(code, message, f"train --run new {tiny} --dataset {dataset}")
    # A run that it should replace is not touched either.
    harmless(code, message, f"train --run plain --overwrite {tiny} --dataset {dataset}")


@pytest.mark.parametrize(
    ("message", "command"),
    [
        (r"color.npz has images of shape \(3, 4, 4\) .* takes shape \(1, 4, 4\)", "plain --dataset array:color.npz"),
        (r"large.npz has images of shape \(1, 8, 8\) .* takes shape \(1, 4, 4\)", "plain --dataset array:large.npz"),
        ("digits .* 17 levels, and the model takes .* 256 levels", "plain --dataset digits"),
        ("unlabelled.npz .*classes", "conditional --dataset array:unlabelled.npz"),
        ("nine.npz .*9 classes", "conditional --dataset array:nine.npz"),
        ("nan.npy has float64 values", "plain --dataset array:nan.npy"),
    ],
)
def test_other_data_that_do_not_fit_the_model(message: str, command: str, harmless: Failing) -> None:
    harmless(1, message, f"evaluate {command}")


@pytest.mark.parametrize("command", ["evaluate", "interpolate", "train --resume --run"])
def test_empty_data(command: str, harmless: Failing) -> None:
    harmless(2, "unknown data ''; use one of digits", f"{command} plain --dataset ''")


@pytest.mark.parametrize("command", ["evaluate", "interpolate", "train --resume --run"])
def test_data_of_the_run_are_gone(command: str, runs: Path, fails: Failing) -> None:
    (runs / "images.npz").unlink()
    before = bytes_of(runs)
    fails(1, "images.npz .*does not exist.*; check the path", f"{command} plain")
    assert bytes_of(runs) == before


def test_data_of_the_run_have_changed(runs: Path, fails: Failing) -> None:
    np.savez("images.npz", x=np.zeros((26, 4, 4), dtype=np.uint8))
    before = bytes_of(runs)
    fails(1, "of 32 images, not of 22; resume with the data that the run began with", "train --resume --run plain")
    assert bytes_of(runs) == before


def test_images_held_out_are_not_those_of_other_data_in_the_same_place(runs: Path, fails: Failing) -> None:
    """The test split of changed data may contain images that were trained on."""
    assert cli("train", "--run", "split", "--dataset", "array:unsplit.npy", *TINY) == 0
    np.save("unsplit.npy", np.zeros((31, 4, 4), dtype=np.uint8))
    before = bytes_of(runs)
    message = "array:unsplit.npy is not what the run was trained on: it has 25, 3, 3 images.* and had 24, 3, 3; "
    for command in ("evaluate", "interpolate"):
        fails(1, f"{message}restore it, or name the data with --dataset", f"{command} split")
    assert bytes_of(runs) == before
    assert cli("evaluate", "split", "--dataset", "array:unsplit.npy") == 0


@pytest.mark.parametrize(
    ("run", "change", "message"),
    [
        ("plain", lambda x: {"x": x, "n_bins": 32}, r"shape \(1, 4, 4\) with 32 levels, and had .* with 16 levels"),
        (
            "plain",
            lambda x: {"x": x.reshape(-1, 2, 8), "n_bins": 16},
            r"shape \(1, 2, 8\) .*, and had shape \(1, 4, 4\) .*",
        ),
        ("conditional", lambda x: {"x": x, "n_bins": 16, "y": np.arange(30)[::-1] % 3}, "other labels"),
    ],
    ids=["levels", "size", "labels"],
)
def test_other_data_that_the_weights_fit(run: str, change: Any, message: str, runs: Path, fails: Failing) -> None:
    images = np.random.default_rng(0).integers(16, size=(30, 4, 4), dtype=np.uint8)
    np.savez("given.npz", x=images, n_bins=16, y=np.arange(30) % 3)
    options = ["--conditional"] if run == "conditional" else []
    assert cli("train", "--run", "run", "--dataset", "array:given.npz", *options, *TINY) == 0
    np.savez("given.npz", **change(images))
    before = bytes_of(runs)
    fails(1, f"array:given.npz is not what the run .*{message}; resume with the data", "train --resume --run run")
    assert bytes_of(runs) == before


def test_labels_do_not_matter_to_a_run_without_classes(runs: Path, fails: Failing) -> None:
    images = dict(np.load("images.npz"))
    np.savez("images.npz", **{**images, "test_labels": 2 - images["test_labels"]})
    assert cli("evaluate", "plain") == 0
    fails(1, "other labels; restore it, or name the data with --dataset", "evaluate conditional")


# Run folders

OTHER_DATA = "--resume --run plain --dataset array:unlabelled.npz"


@pytest.mark.parametrize(
    ("code", "message", "command"),
    [
        (2, "plain already holds a run: continue it with --resume or replace it with --overwrite", "--run plain"),
        (2, "images.npz is a file: name a folder with --run", "--run images.npz"),
        (1, "cannot make the run folder images.npz/run: Not a directory", "--run images.npz/run"),
        (2, "--resume needs --run: name the run folder", "--resume"),
        (2, "--resume and --overwrite cannot be used together", "--resume --overwrite --run plain"),
        (2, "--resume continues with the settings in plain: leave out --levels", "--resume --run plain --levels 2"),
        (2, "--resume continues with .*: leave out --conditional", "--resume --run plain --conditional"),
        (1, "unlabelled.npz is not what the run was .* had 32, 64, 40 others; resume with the data", OTHER_DATA),
        (2, "iterations must be at least 1, got 0", "--resume --run plain --iterations 0"),
    ],
)
def test_bad_run_to_train(code: int, message: str, command: str, harmless: Failing) -> None:
    settings = "" if "--resume" in command else f"--dataset array:images.npz {shlex.join(TINY)}"
    harmless(code, message, f"train {command} {settings}")


@pytest.mark.parametrize("command", COMMANDS_ON_A_RUN)
@pytest.mark.parametrize("folder", ["empty", "missing", f"plain/{CONFIG}"])
def test_folder_without_a_run(folder: str, command: str, harmless: Failing) -> None:
    message = f"{folder} is not a run folder: it has no config.json; make one with 'glow-kernels train'"
    if folder.endswith(CONFIG):
        message = f"{folder} is a file, not a run folder: name a folder that 'glow-kernels train' made"
    harmless(1, message, f"{command} {folder}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot read plain/config.json"),
        ('{"levels": 1', "cannot read plain/config.json"),
        ("\xff", "cannot read plain/config.json"),
        ("[1]", "plain/config.json must hold a JSON object, got list"),
        ('{"levles": 1}', "plain/config.json has unknown settings levles: it is from another version"),
        ('{"levels": 0}', "plain/config.json has settings that do not make sense: levels must be at least 1, got 0"),
        ('{"levels": 1.5}', "plain/config.json has settings that do not make sense: .*levels"),
        ('{"batch_size": null}', "plain/config.json has settings that do not make sense: .*batch_size"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS_ON_A_RUN)
def test_damaged_config(content: str, message: str, command: str, runs: Path, fails: Failing) -> None:
    (runs / "plain" / CONFIG).write_text(content, encoding="latin-1")
    before = bytes_of(runs)
    fails(1, message, f"{command} plain")
    assert bytes_of(runs) == before


def test_folder_where_a_file_of_the_run_should_be(runs: Path, fails: Failing) -> None:
    (runs / "plain" / LAST).unlink()
    (runs / "plain" / LAST).mkdir()
    fails(1, "plain/last.safetensors is a folder", "train --resume --run plain")
    settings = f"--dataset array:images.npz {shlex.join(TINY)}"
    fails(1, "plain/last.safetensors", f"train --overwrite --run plain {settings}")


# Checkpoints


def truncated(length: float) -> Callable[[Path], None]:
    """Keep this many bytes, or this fraction of them; a negative number cuts bytes off the end."""

    def cut(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])

    return cut


def pickled(path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, path)


def without_metadata(path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.ones(3)}, path)


def of_another_program(path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.ones(3)}, path, {"format": "pt", "step": "3"})


def of_a_newer_version(path: Path) -> None:
    document = json.dumps({"format_version": checkpoint.FORMAT_VERSION + 1, "document": {}})
    safetensors.torch.save_file({"weight": torch.ones(3)}, path, {"glow_kernels": document})


def of_another_model(path: Path) -> None:
    tensors, document = checkpoint.load(path)
    checkpoint.save(path, {name: value for name, value in tensors.items() if not name.endswith("bias")}, document)


def without_a_document(path: Path) -> None:
    checkpoint.save(path, checkpoint.load(path)[0], {})


CUT_SHORT = "(damaged or cut short|not a glow_kernels checkpoint)"
DAMAGES = {
    "empty": (truncated(0), CUT_SHORT),
    "one byte": (truncated(1), CUT_SHORT),
    "length only": (truncated(8), CUT_SHORT),
    "part of the header": (truncated(100), CUT_SHORT),
    "half": (truncated(0.5), CUT_SHORT),
    "last byte gone": (truncated(-1), CUT_SHORT),
    "text": (lambda path: path.write_text("not a checkpoint"), "is not a glow_kernels checkpoint; name a file that"),
    "pickle": (pickled, "is not a glow_kernels checkpoint; name a file that"),
    "no metadata": (without_metadata, "not a glow_kernels checkpoint; name one that glow_kernels saved"),
    "another program": (of_another_program, "not a glow_kernels checkpoint; name one that glow_kernels saved"),
    "newer version": (of_a_newer_version, "has format 2 .*; upgrade glow_kernels"),
    "another model": (of_another_model, "does not fit the model: .*missing.*; use the settings"),
    "no document": (without_a_document, "(does not describe a model|cannot be resumed).*version"),
    "missing": (Path.unlink, "does not exist; check the path"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize(
    ("name", "command"), [(BEST, "sample"), (LAST, "train --resume --iterations 9 --run")], ids=["best", "last"]
)
def test_damaged_checkpoint(
    damage: Callable[[Path], None], message: str, name: str, command: str, runs: Path, fails: Failing
) -> None:
    path = runs / "plain" / name
    damage(path)
    if damage is Path.unlink:
        # Without a best checkpoint, the last one would be used.
        (runs / "plain" / LAST).unlink(missing_ok=True)
    before = bytes_of(runs)
    fails(1, f"plain/.*safetensors.*{message}", f"{command} plain")
    assert bytes_of(runs) == before


def test_damaged_metrics(runs: Path, fails: Failing) -> None:
    lines = (runs / "plain" / METRICS).read_text().splitlines(keepends=True)
    (runs / "plain" / METRICS).write_text("".join([lines[0], "{damaged\n", *lines[1:]]))
    before = bytes_of(runs)
    fails(1, "plain/metrics.jsonl, line 2, is damaged; delete that line", "train --resume --run plain")
    assert bytes_of(runs) == before


# Options


@pytest.mark.parametrize(
    ("message", "command"),
    [
        ("the following arguments are required: COMMAND; see 'glow-kernels --help'", ""),
        ("invalid choice: 'trian' .*train", "trian"),
        ("unrecognized arguments: --colour; see", "train --colour"),
        ("unrecognized arguments: --overwrite", "sample plain --overwrite"),
        ("required: RUN; see 'glow-kernels sample --help'", "sample"),
        ("argument --coupling: invalid choice: 'linear' .*affine", "train --coupling linear"),
        ("argument --split: invalid choice: 'all' .*test", "evaluate plain --split all"),
        ("argument --pair: expected 2 arguments", "interpolate plain --pair 1"),
        (r"--pair must name two of 40 test images, 0 to 39, got \[0, 40\]", "interpolate plain --pair 0 40"),
        (r"--pair must name two of 40 test images, 0 to 39, got \[99, 3\]", "interpolate plain --pair 99 3"),
        ("--class: the model in plain has no classes; train it with --conditional", "sample plain --class 0"),
        ("--class must be below 3, got 3", "sample conditional --class 3"),
        ("--count must be at least 2, got 1", "interpolate plain --count 1"),
    ],
)
def test_bad_use(message: str, command: str, harmless: Failing) -> None:
    harmless(2, message, command)


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        ("train", "flow-steps", ["0", "-1", "1.5", "nan", "x", ""]),
        ("train", "levels", ["0", "x"]),
        ("train", "hidden-channels", ["0", "x"]),
        ("train", "iterations", ["0", "-1", "1e3", "x"]),
        ("train", "batch-size", ["0", "-8", "x"]),
        ("train", "validate-every", ["0", "x"]),
        ("train", "log-every", ["0", "x"]),
        ("train", "n-bits", ["x", "1.5"]),
        ("train", "image-size", ["x", "0", "-4"]),
        ("train", "warmup", ["-1", "x"]),
        ("train", "patience", ["-1", "x"]),
        ("train", "seed", ["-1", "0.5", "x", "99999999999999999999"]),
        ("train", "learning-rate", ["0", "-1", "nan", "inf", "x"]),
        ("train", "clip", ["0", "-1", "nan", "x"]),
        ("train", "weight-decay", ["-1", "nan", "inf", "x"]),
        ("train", "class-weight", ["-1", "nan", "inf", "x"]),
        ("train", "ema", ["-1", "1", "nan", "x"]),
        ("sample plain", "temperature", ["-1", "nan", "inf", "x"]),
        ("sample conditional", "class", ["-1", "x"]),
        ("sample plain", "seed", ["-1", "x", "99999999999999999999"]),
        ("evaluate plain", "draws", ["0", "-1", "x"]),
        ("evaluate plain", "batch-size", ["0", "-1", "x"]),
        ("interpolate plain", "rows", ["0", "-1", "x"]),
        ("interpolate plain", "count", ["0", "-1", "x"]),
        ("interpolate plain", "seed", ["-1", "x", "99999999999999999999"]),
    ],
)
def test_number_that_makes_no_sense(command: str, option: str, values: list[str], harmless: Failing) -> None:
    name = option.replace("-", "[-_]")
    if command == "train":
        command = f"train --run new --dataset array:images.npz {shlex.join(TINY)}"
    for value in values:
        message = f"{name}.*(got|not|value:) '?{re.escape(value)}"
        line = harmless(2, message, f"{command} --{option}={shlex.quote(value)}")
        # Names from the source code must not be in messages.
        assert "_int" not in line


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x"])
def test_bad_number_of_samples(value: str, harmless: Failing) -> None:
    line = harmless(2, f"-n: .*{re.escape(value)}", f"sample plain -n {value}")
    assert "_int" not in line


@pytest.mark.parametrize("command", [*COMMANDS_ON_A_RUN, "train --run new"])
@pytest.mark.parametrize("device", ["cuda:7", "mps", "nonsense", "meta", ""])
def test_device_that_cannot_be_used(device: str, command: str, harmless: Failing) -> None:
    run = "" if command.endswith("new") else "plain"
    line = harmless(2, f"--device {device}.*cannot be used here", f"{command} {run} --device={device}")
    assert len(line) < 300


def test_the_default_device_is_one_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.cuda.set_device`` needs a device with an index, which ``torch.device("cuda")`` lacks."""
    first = SimpleNamespace(item=lambda: 0.0, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda size, device: first if device == "cuda" else None)
    assert arguments.device(argparse.Namespace(device="auto")) == torch.device("cuda", 0)


def out_of_memory_on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def out_of_memory_in_python() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    "allocate",
    [out_of_memory_on_a_gpu, lambda: torch.empty(2**60), out_of_memory_in_python],
    ids=["gpu", "cpu", "python"],
)
def test_out_of_memory_names_the_remedy(
    allocate: Callable[[], object], runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gallery, "draw_samples", lambda *_, **__: allocate())
    assert cli("sample", "plain") == 1
    assert re.fullmatch(r"error: out of memory: [^\n]+; draw fewer images with -n\n", capsys.readouterr().err)
    with pytest.raises((RuntimeError, MemoryError)):
        cli("sample", "plain", "--debug")


def test_other_errors_of_the_program_are_not_hidden(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(gallery, "draw_samples", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        cli("sample", "plain")


def test_backend_that_does_not_exist(harmless: Failing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_chosen", "quantum")  # as importing the package does from GLOW_KERNELS_BACKEND
    harmless(2, "backend must be one of .*reference, got 'quantum'", "evaluate plain")


@pytest.mark.parametrize("command", ["sample", "interpolate"])
@pytest.mark.parametrize("output", [".", "''", "/", "picture.jpg"])
def test_output_that_names_no_picture(output: str, command: str, harmless: Failing) -> None:
    harmless(2, r"--output: must be the name of a \.png file, got '", f"{command} plain --output {output}")


@pytest.mark.parametrize("option", ["", "--overwrite", "--resume"])
def test_run_without_a_name(option: str, harmless: Failing) -> None:
    """It would mean the current folder."""
    harmless(2, "--run/--run-folder: must name a folder, got ''", f"train --run '' {option} {shlex.join(TINY)}")


def test_run_that_has_no_name_in_unicode(harmless: Failing) -> None:
    harmless(2, r"--run/--run-folder: must be text in the encoding of this terminal, got 'b\S+'", "train --run b\udcff")


@pytest.mark.parametrize("command", ["sample", "interpolate"])
@pytest.mark.parametrize("output", ["missing/picture.png", "empty", "images.npz/picture.png"])
def test_output_that_cannot_be_written(output: str, command: str, harmless: Failing) -> None:
    harmless(1, f"cannot write {output}: .*; .*use another folder", f"{command} plain --output {output}")


def test_a_checkpoint_without_a_configuration_is_not_overwritten_unasked(runs: Path, fails: Failing) -> None:
    (runs / "plain" / CONFIG).unlink()
    before = bytes_of(runs)
    fails(2, "plain already holds a run", f"train --run plain --dataset array:images.npz {shlex.join(TINY)}")
    assert bytes_of(runs) == before


@pytest.mark.parametrize("options", ["--resume", "--overwrite --dataset array:images.npz --levels 1"])
def test_a_run_folder_in_which_another_training_is_going_on(options: str, runs: Path, fails: Failing) -> None:
    before = bytes_of(runs)
    with run_folder.locked(runs / "plain"):
        fails(2, "plain is in use by another training: wait for it, or stop it", f"train --run plain {options}")
    assert bytes_of(runs) == before
    assert cli("train", "--resume", "--run", "plain", "--iterations", "7") == 0


def test_training_that_diverges(runs: Path, fails: Failing) -> None:
    """The loss of the first step is finite, but not the weights after it."""
    settings = f"--dataset array:images.npz {shlex.join(TINY)} --iterations 3 --learning-rate 1e30"
    fails(1, "--learning-rate", f"train --overwrite --run plain {settings}")


# A full disk


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def extended(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The contents of ``plain`` after three more steps with enough disk space."""
    folder = Path(shutil.copytree(originals / "plain", tmp_path_factory.mktemp("extended") / "plain"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(originals)
        assert cli("train", "--resume", "--run", folder, "--iterations", 9) == 0
    return contents(folder)


@pytest.mark.parametrize("size", [100, 2000, 20_000])
def test_resume_on_a_full_disk(size: int, runs: Path, fails: Failing, extended: dict[str, Any]) -> None:
    before = {name: (runs / "plain" / name).read_bytes() for name in (LAST, BEST, METRICS)}
    with largest_file(size):
        fails(1, "cannot write plain/.*: File too large; free some space", "train --resume --run plain --iterations 9")
    assert {name: (runs / "plain" / name).read_bytes() for name in before} == before
    assert cli("train", "--resume", "--run", "plain", "--iterations", 9) == 0
    assert contents(runs / "plain") == extended


def fill_disk(patch: pytest.MonkeyPatch, writes: int) -> None:
    """Let only ``writes`` writes succeed."""
    left = iter(range(writes))
    replace = os.replace

    def replace_while_there_is_space(source: Path, target: Path) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        replace(source, target)

    patch.setattr(os, "replace", replace_while_there_is_space)


@pytest.mark.parametrize(
    ("folder", "writes", "file", "left"),
    [
        ("plain", 0, LAST, {CONFIG, LAST, BEST, METRICS}),
        ("plain", 1, CONFIG, {CONFIG, BEST, METRICS}),
        ("new", 0, LAST, set()),
        ("new", 1, CONFIG, set()),
    ],
)
def test_a_run_that_cannot_begin_on_a_full_disk(
    folder: str, writes: int, file: str, left: set[str], runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """If the folder was empty, nothing stays in it; if it held a run to be replaced, its best weights stay."""
    before = bytes_of(runs / folder)
    start = ("train", "--overwrite", "--run", folder, "--dataset", "array:images.npz", *TINY)
    with monkeypatch.context() as patch:
        fill_disk(patch, writes)
        assert cli(*start) == 1
    assert f"cannot write {folder}/{file}: No space left" in capsys.readouterr().err
    assert bytes_of(runs / folder).items() <= before.items()
    assert left <= bytes_of(runs / folder).keys()
    assert (runs / folder / LAST).exists() == (LAST in left)


@pytest.mark.parametrize("writes", range(9))
def test_disk_fills_up_while_training(
    writes: int,
    runs: Path,
    extended: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whichever write is the first to fail, the files are intact, and a resumed run ends as if nothing had failed."""
    with monkeypatch.context() as patch:
        fill_disk(patch, writes)
        assert cli("train", "--resume", "--run", "plain", "--iterations", 9) == 1
    message = r"error: cannot write plain/\S+: No space left on device; free some .*\n"
    assert re.fullmatch(message, capsys.readouterr().err)
    assert not list((runs / "plain").glob(".*.tmp"))
    assert cli("evaluate", "plain") == 0
    assert cli("train", "--resume", "--run", "plain", "--iterations", 9) == 0
    assert contents(runs / "plain") == extended
