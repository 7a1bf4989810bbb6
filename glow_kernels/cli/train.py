"""``glow-kernels train``: train a Glow and keep a run folder."""

from __future__ import annotations

import argparse
import shlex
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from glow_kernels.cli import arguments as common
from glow_kernels.errors import UsageError
from glow_kernels.training import data as datasets
from glow_kernels.training import distributed, gallery, run_folder
from glow_kernels.training.config import TrainingConfig
from glow_kernels.training.evaluation import batch_size_for, draws_for, evaluate
from glow_kernels.training.trainer import Trainer

TYPES = {"int": int, "int | None": int, "float": float, "str": str}
# Settings that --resume may change; dataset only to say where the same data are now.
CAN_CHANGE = ("dataset", "iterations", "patience")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "train",
        help="train a Glow",
        description="Train a Glow. Without options: the 8x8 digits of scikit-learn, in a few minutes on a CPU. "
        "Ctrl-C saves and stops; --resume continues as if nothing had happened. On several devices: "
        f"{distributed.LAUNCH}; every batch is split over the processes.",
    )
    # --run-folder exists because torchrun takes --run for an ambiguous abbreviation of two of its own options.
    parser.add_argument(
        "--run",
        "--run-folder",
        dest="folder",
        type=common.new_run_folder,
        help="run folder to make or resume (default: runs/DATASET); with torchrun write --run-folder",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in the run folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the run folder")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--fsdp", action="store_true", help="shard the weights over the processes of torchrun")
    parser.add_argument("--cuda-graph", action="store_true", help="replay a whole step as one CUDA graph (adam only)")
    common.add_device(parser)
    group = parser.add_argument_group(
        "settings", "digits and patches have smaller defaults; a run keeps its settings in config.json"
    )
    for option in fields(TrainingConfig):
        flag = "--" + option.name.replace("_", "-")
        description = option.metadata["help"]
        if option.default is not None and option.type != "bool":
            description += f" (default: {option.default})"
        if option.type == "bool":
            group.add_argument(flag, dest=option.name, action="store_true", default=None, help=description)
        else:
            type_, choices = TYPES[str(option.type)], option.metadata["choices"]
            group.add_argument(flag, dest=option.name, type=type_, choices=choices, help=description)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Train, then evaluate the best weights on the test split and draw the pictures."""
    settings = {option.name: getattr(arguments, option.name) for option in fields(TrainingConfig)}
    given = {name: value for name, value in settings.items() if value is not None}
    with distributed.connected(arguments.fsdp) as ranks, ExitStack() as resources:
        _train(arguments, given, ranks, resources)


def _train(
    arguments: argparse.Namespace, given: dict[str, Any], ranks: distributed.Ranks, resources: ExitStack
) -> None:
    device = common.device(arguments)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    folder, config = _resumed(arguments, given) if arguments.resume else _new(arguments, given)
    data = datasets.load(
        config.dataset,
        n_bits=config.n_bits,
        image_size=config.image_size,
        show_progress=ranks.is_writer and not arguments.quiet,
    )
    if not arguments.resume:
        config.build_model_for(data)
        if ranks.is_writer:
            run_folder.prepare(folder, overwrite=arguments.overwrite)
    if ranks.is_writer:
        # Two trainings in one folder would overwrite and resume from each other's checkpoints.
        resources.enter_context(run_folder.locked(folder))
    trainer = Trainer(
        config,
        data,
        folder,
        device=device,
        resume=arguments.resume,
        show_progress=not arguments.quiet,
        ranks=ranks,
        cuda_graph=arguments.cuda_graph,
    )
    if not arguments.resume:
        trainer.save()
        if ranks.is_writer:
            run_folder.begin(folder, config)
    elif ranks.is_writer:
        run_folder.write_config(folder, config)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    if ranks.is_writer:
        where = f"in {folder}" if ranks.size == 1 else f"by {ranks.size} processes, in {folder}"
        print(
            f"training a Glow of {parameters:,} parameters on {len(data.train):,} images of {data.name}, {where}",
            flush=True,
        )
    if trainer.train():
        _report(trainer, data, folder, device)
    elif ranks.is_writer:
        print(f"stopped at iteration {trainer.progress.iteration}, everything is saved; continue with:")
        command = f"{distributed.LAUNCH} --run-folder" if distributed.is_launched() else "glow-kernels train --run"
        print(f"  {command} {shlex.quote(str(folder))} --resume")


def _new(arguments: argparse.Namespace, given: dict[str, Any]) -> tuple[Path, TrainingConfig]:
    dataset = given.pop("dataset", "digits")
    config = TrainingConfig.for_dataset(dataset, **given)
    name, data = datasets.parsed(dataset)
    folder: Path = arguments.folder or Path("runs") / name
    # The run's pictures would become part of the data, and a run cannot resume with data that have changed.
    if name == "folder" and data is not None and folder.resolve().is_relative_to(data.resolve()):
        raise UsageError(
            f"{folder} is inside {dataset}, so its pictures would be training images: name another folder with --run"
        )
    return folder, config


def _resumed(arguments: argparse.Namespace, given: dict[str, Any]) -> tuple[Path, TrainingConfig]:
    if arguments.overwrite:
        raise UsageError("--resume and --overwrite cannot be used together")
    if arguments.folder is None:
        raise UsageError("--resume needs --run: name the run folder to continue")
    for name in given:
        if name not in CAN_CHANGE:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"--resume continues with the settings in {arguments.folder}: leave out {flag}")
    config = run_folder.read_config(arguments.folder)
    return arguments.folder, TrainingConfig(**{**config.to_json(), **given})


def _report(trainer: Trainer, data: datasets.ImageData, folder: Path, device: torch.device) -> None:
    ranks = trainer.ranks
    ranks.any(False)  # A barrier: all ranks read below what one has written.
    model, config, document = run_folder.load_model(folder, "cpu" if ranks.fsdp else device)
    ranks.shard(model, device)
    labels = data.test_labels if config.conditional else None
    result = evaluate(
        model,
        data.test,
        labels,
        draws=draws_for(data.test, 4096),
        ranks=ranks,
        show_progress=trainer.show_progress,
    )
    pictures = {name: folder / name if ranks.is_writer else None for name in run_folder.PICTURES}
    gallery.draw_samples(model, pictures["samples.png"])
    error = gallery.draw_reconstruction(model, data.test, labels, pictures["reconstruction.png"])
    pairs = min(8, batch_size_for(data.image_size), max(1, len(data.test) // 2))
    ends = None if labels is None else (labels[:pairs], labels[-pairs:])
    gallery.draw_interpolation(model, data.test[:pairs], data.test[-pairs:], ends, pictures["interpolation.png"])
    if not ranks.is_writer:
        return
    gallery.draw_curve(folder, folder / "curve.png")
    progress = trainer.progress
    best = "never finite"
    if "validation_bits_per_dim" in document:
        best = f"{document['validation_bits_per_dim']:.4f}  (best, at iteration {document['iteration']:,})"
    speed = progress.iteration * len(data.train[: config.batch_size]) / progress.seconds
    rows = {
        "test bits/dim": f"{result}  ({result.images:,} images, never trained on)",
        "validation": best,
        "reconstruction error": f"{error:.1e}  (largest |decode(encode(x)) - x|)",
        "training speed": f"{speed:,.0f} images/s  ({progress.iteration:,} iterations, {progress.seconds:.0f} s)",
        "skipped steps": f"{progress.skipped}  (non-finite loss or gradient)",
        "pictures": ", ".join(str(folder / name) for name in run_folder.PICTURES),
    }
    print()
    for name, value in rows.items():
        print(f"  {name:<22}{value}")
