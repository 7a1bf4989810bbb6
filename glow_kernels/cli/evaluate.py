"""``glow-kernels evaluate``: bits per dimension of a trained model."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from glow_kernels.cli import arguments as common
from glow_kernels.training import distributed, evaluation, run_folder

SPLITS = ("test", "validation", "train")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "evaluate",
        help="bits per dimension of a trained model",
        description="Bits per dimension of a trained model on images that it was not trained on, with its standard "
        "error over images.",
    )
    common.add_run(parser)
    common.add_device(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="which images (default: test)")
    common.add_dataset(parser)
    parser.add_argument(
        "--draws", type=common.positive, default=4, help="draws of the dequantisation noise (default: 4)"
    )
    parser.add_argument(
        "--batch-size",
        type=common.positive,
        help="images at a time (default: 256, fewer if they are larger than 64x64)",
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Print bits per dimension and the reconstruction error; processes started by torchrun share the images."""
    with distributed.connected() as ranks:
        _evaluate(arguments, ranks)


def _evaluate(arguments: argparse.Namespace, ranks: distributed.Ranks) -> None:
    model, config, document = run_folder.load_model(arguments.run_folder, common.device(arguments))
    data = common.load_data(arguments.dataset, config, model, document)
    levels = getattr(data, arguments.split)
    labels = getattr(data, f"{arguments.split}_labels") if config.conditional else None
    batch_size = arguments.batch_size or evaluation.batch_size_for(data.image_size)
    result = evaluation.evaluate(
        model,
        levels,
        labels,
        draws=arguments.draws,
        batch_size=batch_size,
        ranks=ranks,
        show_progress=True,
    )
    if not ranks.is_writer:
        return
    few = slice(0, batch_size)
    device = next(model.parameters()).device
    x = model.dequantize(levels[few].to(device), torch.Generator(device).manual_seed(0))
    _, error = evaluation.reconstruct(model, x, None if labels is None else labels[few].to(device))
    print(f"{result} bits/dim on {result.images:,} {arguments.split} images of {data.name}, {result.draws} draws each")
    print(f"{error:.1e} largest |decode(encode(x)) - x|")
