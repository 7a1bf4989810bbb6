"""The run folder: everything needed to resume, evaluate, sample from and inspect a training run."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glow_kernels.errors import CheckpointError, DataError, UsageError
from glow_kernels.models import Glow
from glow_kernels.training import checkpoint
from glow_kernels.training.config import TrainingConfig
from glow_kernels.training.data import ImageData

if sys.platform != "win32":
    import fcntl

CONFIG = "config.json"
LAST = "last.safetensors"
BEST = "best.safetensors"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
PICTURES = ("samples.png", "reconstruction.png", "interpolation.png", "curve.png")


def prepare(folder: Path, *, overwrite: bool) -> None:
    """Make ``folder`` for a new run; an existing run stays until the new run's first checkpoint replaces it.

    Raises:
        UsageError: the folder already holds a run and ``overwrite`` is not set, or it is a file.
        CheckpointError: the folder cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name a folder with --run")
    if not overwrite and any((folder / name).exists() for name in (CONFIG, LAST, BEST)):
        raise UsageError(f"{folder} already holds a run: continue it with --resume or replace it with --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the run folder {folder}: {error.strerror}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against other trainings; the system releases the lock however this process ends.

    Raises:
        UsageError: another process trains in it.
        CheckpointError: the folder cannot be opened.
    """
    if sys.platform == "win32":
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot open the run folder {folder}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder} is in use by another training: wait for it, or stop it") from None
        except OSError:
            pass  # some network file systems have no locks
        yield
    finally:
        os.close(descriptor)


def begin(folder: Path, config: TrainingConfig) -> None:
    """Complete a new run whose first checkpoint is in ``folder``, and remove the files of the run before it.

    Raises:
        CheckpointError: the configuration cannot be written; the checkpoint is then removed too.
    """
    try:
        write_config(folder, config)
    except CheckpointError:
        # A checkpoint without its own configuration is not a run.
        (folder / LAST).unlink()
        raise
    # Remove only what a run writes: the folder may hold files of the user.
    for name in (BEST, METRICS, *PICTURES):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)


def write_config(folder: Path, config: TrainingConfig) -> None:
    """Write the configuration of the run in ``folder``.

    Raises:
        CheckpointError: it cannot be written.
    """
    document = json.dumps(config.to_json(), indent=2) + "\n"
    checkpoint.write_atomically(folder / CONFIG, document.encode())


def read_config(folder: Path) -> TrainingConfig:
    """The configuration of the run in ``folder``.

    Raises:
        CheckpointError: there is no run, or its configuration cannot be read.
    """
    path = folder / CONFIG
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file, not a run folder: name a folder that 'glow-kernels train' made")
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a run folder: it has no {CONFIG}; make one with 'glow-kernels train'")
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(document).__name__}")
    return TrainingConfig.from_json(document, str(path))


def describe_model(config: TrainingConfig, data: ImageData) -> dict[str, Any]:
    """What a checkpoint stores about its model, enough to rebuild it without the data."""
    return {
        "config": config.to_json(),
        "channels": data.channels,
        "image_size": list(data.image_size),
        "n_bins": data.n_bins,
        "num_classes": data.num_classes,
        "data": data.fingerprint,
    }


def check_data(document: Mapping[str, Any], data: ImageData, remedy: str) -> None:
    """Refuse data that differ from those of the run whose checkpoint has this document.

    Checkpoints of earlier versions have no fingerprint: with these only shape and levels are compared.

    Raises:
        DataError: the data differ. The message ends with ``remedy``.
    """
    model = document["model"]
    differs = f"{data.name} is not what the run was trained on: it has"
    # Loading would not catch these: the same weights can fit images of another size or number of levels.
    before = _form(model["channels"], model["image_size"], model["n_bins"])
    form = _form(data.channels, data.image_size, data.n_bins)
    if form != before:
        raise DataError(f"{differs} images of {form}, and had {before}; {remedy}")
    then, now = model.get("data") or {}, data.fingerprint
    changed = {name for name, number in now.items() if then.get(name, number) != number}
    if changed - {"labels"}:
        counts = [", ".join(str(numbers[part]) for part in ("train", "validation", "test")) for numbers in (then, now)]
        raise DataError(
            f"{differs} {counts[1]} images to train, validate and test, "
            f"and had {counts[0]}{' others' if counts[0] == counts[1] else ''}; {remedy}"
        )
    if changed and model["config"]["conditional"]:
        raise DataError(f"{differs} other labels; {remedy}")


def _form(channels: int, image_size: Sequence[int], n_bins: int) -> str:
    return f"shape {(channels, *image_size)} with {n_bins} levels"


def load_model(
    folder: str | Path, device: str | torch.device = "cpu"
) -> tuple[Glow, TrainingConfig, Mapping[str, Any]]:
    """The best model of a run, in evaluation mode, with its configuration and its checkpoint's document.

    Before the first validation, when there is no best model yet, it is the last one.

    Args:
        folder: run folder that ``glow-kernels train`` made.
        device: where to put the weights.

    Raises:
        CheckpointError: there is no run, or no usable checkpoint in it.
    """
    folder = Path(folder)
    dataset = read_config(folder).dataset
    path = folder / BEST if (folder / BEST).exists() else folder / LAST
    tensors, document = checkpoint.load(path, device)
    try:
        description: Any = document["model"]
        # From config.json, because the data may have moved since this checkpoint was written.
        config = replace(TrainingConfig.from_json(description["config"], str(path)), dataset=dataset)
        height, width = description["image_size"]
        shape = description["channels"], (height, width), description["n_bins"], description["num_classes"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a model of this version: {error!r}") from error
    model = config.build_model(*shape).to(device)
    checkpoint.load_weights(model, strip_prefix(tensors, "average."), path)
    return model.eval(), config, document


def strip_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names start with ``prefix``, which is removed from the names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
