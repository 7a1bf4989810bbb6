"""``glow-kernels interpolate``: walk between real images in latent space."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from glow_kernels.cli import arguments as common
from glow_kernels.errors import UsageError
from glow_kernels.training import gallery, run_folder


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "interpolate",
        help="walk between real images in latent space",
        description="Encode pairs of test images, walk from one latent to the other, and decode. The two ends of a row "
        "are the real images.",
    )
    common.add_run(parser)
    common.add_device(parser)
    common.add_dataset(parser)
    parser.add_argument(
        "--pair",
        nargs=2,
        type=common.non_negative,
        metavar=("FROM", "TO"),
        help="numbers of two test images (default: random pairs)",
    )
    parser.add_argument("--rows", type=common.positive, default=8, help="random pairs to draw (default: 8)")
    parser.add_argument("--count", type=common.positive, default=9, help="images per row, ends included (default: 9)")
    parser.add_argument("--seed", type=common.non_negative, default=0, help="seed of the random pairs (default: 0)")
    parser.add_argument(
        "--output", type=common.picture, help="picture to write (default: interpolation.png in the run folder)"
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Write the picture, with one row per pair."""
    if arguments.count < 2:
        raise UsageError(f"--count must be at least 2, got {arguments.count}")
    model, config, document = run_folder.load_model(arguments.run_folder, common.device(arguments))
    data = common.load_data(arguments.dataset, config, model, document)
    start, end = _pairs(arguments, len(data.test))
    labels = None
    if config.conditional and data.test_labels is not None:
        labels = data.test_labels[start], data.test_labels[end]
    path = arguments.output or arguments.run_folder / "interpolation.png"
    gallery.draw_interpolation(model, data.test[start], data.test[end], labels, path, count=arguments.count)
    print(path)


def _pairs(arguments: argparse.Namespace, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    if arguments.pair is not None:
        if max(arguments.pair) >= images:
            raise UsageError(f"--pair must name two of {images} test images, 0 to {images - 1}, got {arguments.pair}")
        return torch.tensor(arguments.pair[:1]), torch.tensor(arguments.pair[1:])
    order = torch.randperm(images, generator=torch.Generator().manual_seed(arguments.seed))
    # With a single image, both ends are that image.
    rows = min(arguments.rows, max(1, images // 2))
    return order[:rows], order[-rows:]
