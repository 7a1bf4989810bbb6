"""The pictures in a run folder: samples, reconstructions, interpolations and the training curve."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from glow_kernels.models import Glow
from glow_kernels.progress import with_progress
from glow_kernels.training import metrics, pictures
from glow_kernels.training.evaluation import batch_size_for, interpolate, reconstruct

RECONSTRUCTED = 8


def draw_samples(
    model: Glow,
    path: Path | None,
    *,
    count: int = 64,
    temperature: float = 0.7,
    label: int | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> None:
    """Draw a grid of samples; a model with classes samples every class in turn, or only class ``label``.

    Without a ``path`` nothing is written: with sharded weights, every rank must compute and only one writes.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    parts = []
    batch_size = batch_size_for(model.image_size)
    for start in with_progress(range(0, count, batch_size), "sampling", "batches", is_shown=show_progress):
        numbers = torch.arange(start, min(start + batch_size, count), device=device)
        labels = None
        if model.num_classes is not None:
            labels = numbers % model.num_classes if label is None else torch.full_like(numbers, label)
        parts.append(model.quantize(model.sample(len(numbers), temperature, labels, generator)).cpu())
    if path is not None:
        pictures.grid(torch.cat(parts), path, n_bins=model.n_bins)


def draw_reconstruction(model: Glow, levels: Tensor, labels: Tensor | None, path: Path | None) -> float:
    """Draw the first images of ``levels`` (N, C, H, W), their reconstructions and the differences.

    As in :func:`draw_samples`, ``path`` may be None. Returns the largest absolute difference.
    """
    device = next(model.parameters()).device
    few = slice(min(RECONSTRUCTED, batch_size_for(model.image_size)))
    x = model.dequantize(levels[few].to(device), torch.Generator(device).manual_seed(0))
    part_labels = None if labels is None else labels[few].to(device)
    reconstructed, error = reconstruct(model, x, part_labels)
    if path is None:
        return error
    before, after = (x + 0.5) * model.n_bins, (reconstructed + 0.5) * model.n_bins
    pictures.reconstruction(before, after, path, n_bins=model.n_bins, error=error)
    return error


def draw_interpolation(
    model: Glow, start: Tensor, end: Tensor, labels: tuple[Tensor, Tensor] | None, path: Path | None, *, count: int = 9
) -> None:
    """Draw a row of ``count`` images for each pair of images in ``start`` and ``end``, both (R, C, H, W) levels.

    As in :func:`draw_samples`, ``path`` may be None.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    first = model.dequantize(start.to(device), generator)
    last = model.dequantize(end.to(device), generator)
    moved = None if labels is None else (labels[0].to(device), labels[1].to(device))
    rows = interpolate(model, first, last, count, moved)
    if path is not None:
        pictures.interpolation(model.quantize(rows).cpu(), path, n_bins=model.n_bins)


def draw_curve(folder: Path, path: Path) -> None:
    """Draw bits per dimension against iterations, from the metrics in ``folder``."""
    pictures.curve(metrics.read(folder), path)
