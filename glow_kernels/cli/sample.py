"""``glow-kernels sample``: draw images from a trained model."""

from __future__ import annotations

import argparse
from typing import Any

from glow_kernels.cli import arguments as common
from glow_kernels.errors import UsageError
from glow_kernels.training import gallery, run_folder


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "sample", help="draw images from a trained model", description="Draw images and write them as one picture."
    )
    common.add_run(parser)
    common.add_device(parser)
    parser.add_argument("-n", type=common.positive, default=64, help="number of images (default: 64)")
    parser.add_argument(
        "--temperature",
        type=common.temperature,
        default=0.7,
        help="1 samples the density; less gives likelier, less varied images (default: 0.7)",
    )
    parser.add_argument("--class", dest="label", type=common.non_negative, help="draw this class only")
    parser.add_argument("--seed", type=common.non_negative, default=0, help="seed of the noise (default: 0)")
    parser.add_argument(
        "--output", type=common.picture, help="picture to write (default: samples.png in the run folder)"
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Write a grid of samples."""
    model, _, _ = run_folder.load_model(arguments.run_folder, common.device(arguments))
    if arguments.label is not None:
        if model.num_classes is None:
            raise UsageError(
                f"--class: the model in {arguments.run_folder} has no classes; train it with --conditional"
            )
        if arguments.label >= model.num_classes:
            raise UsageError(f"--class must be below {model.num_classes}, got {arguments.label}")
    path = arguments.output or arguments.run_folder / "samples.png"
    gallery.draw_samples(
        model,
        path,
        count=arguments.n,
        temperature=arguments.temperature,
        label=arguments.label,
        seed=arguments.seed,
        show_progress=True,
    )
    print(path)
