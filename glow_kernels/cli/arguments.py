"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from glow_kernels.errors import DataError, UsageError
from glow_kernels.models import Glow
from glow_kernels.training import data as datasets
from glow_kernels.training import distributed, run_folder
from glow_kernels.training.config import LARGEST_SEED, TrainingConfig
from glow_kernels.training.data import ImageData


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the run folder as a positional argument."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="run folder that 'glow-kernels train' made")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; the default is a GPU if there is one")


def device(arguments: argparse.Namespace) -> torch.device:
    """The device that ``--device`` names; if a launcher started several ranks, the device of this one.

    Raises:
        UsageError: the device does not exist here, or several ranks would share it.
    """
    name = distributed.local_device(arguments.device) if distributed.is_launched() else arguments.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Read a value: torch.device accepts names of absent devices, and a tensor on "meta" has no values. The tensor's
        # device also tells which of several GPUs "cuda" is.
        zero = torch.zeros(1, device=name)
        zero.item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used here: {_first_sentence(error)}") from error
    return zero.device


def _first_sentence(error: Exception) -> str:
    """The first sentence of the message, without PyTorch's lists of devices or of operators without kernels."""
    return str(error).partition("\n")[0].partition(". ")[0]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole_number(text, 1)


def non_negative(text: str) -> int:
    """A whole number from 0 to the largest seed."""
    return _whole_number(text, 0)


def new_run_folder(text: str) -> Path:
    """A folder whose name can be encoded, as TensorBoard requires."""
    # An empty name, left by an unset shell variable, would mean the current folder and replace files there.
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got ''")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be text in the encoding of this terminal, got {text!r}") from None
    return Path(text)


def picture(text: str) -> Path:
    """The name of a PNG file, with or without its extension."""
    path = Path(text)
    if not path.name or path.suffix.lower() not in ("", ".png"):
        raise argparse.ArgumentTypeError(f"must be the name of a .png file, got {text!r}")
    return path


def temperature(text: str) -> float:
    """A finite number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, got {text!r}")
    return number


def _whole_number(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {LARGEST_SEED}, got {text!r}")
    return number


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Add ``--dataset``, data to use instead of the run's."""
    parser.add_argument("--dataset", help="other data of the same shape, as for 'train' (default: those of the run)")


def load_data(dataset: str | None, config: TrainingConfig, model: Glow, document: Mapping[str, Any]) -> ImageData:
    """The data of the run whose checkpoint has this document, or ``dataset`` if given, which must fit its model.

    Raises:
        DataError: the data do not fit the model, or the run's data have changed, so that images it was trained on may
            now be in the held-out parts.
    """
    data = datasets.load(
        config.dataset if dataset is None else dataset,
        n_bits=config.n_bits,
        image_size=config.image_size,
        show_progress=True,
    )
    got = (data.channels, *data.image_size), data.n_bins
    expected = (model.in_channels, *model.image_size), model.n_bins
    # Fewer classes than the model has are allowed: other data may lack some.
    if config.conditional and not 0 < (data.num_classes or 0) <= (model.num_classes or 0):
        raise DataError(f"{data.name} has {data.num_classes or 'no'} classes, and the model has {model.num_classes}")
    if got != expected:
        raise DataError(
            f"{data.name} has images of shape {got[0]} with {got[1]} levels, and the model takes shape {expected[0]} "
            f"with {expected[1]} levels"
        )
    if dataset is None:
        run_folder.check_data(document, data, "restore it, or name the data with --dataset to take them as they are")
    return data
