"""Bits per dimension and reconstruction error of a trained model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from glow_kernels.models import Glow
from glow_kernels.ops._checks import check_whole
from glow_kernels.progress import with_progress
from glow_kernels.reversible import reconstruction_error
from glow_kernels.training.distributed import SINGLE_PROCESS, Ranks

RECONSTRUCTION_BATCH = 16
MAX_BATCH, MAX_BATCH_IMAGE_SIDE = 256, 64
CONDITION_LIMIT = 1e4


@dataclass(frozen=True)
class BitsPerDim:
    """Mean over images, its standard error, and the numbers of images and of noise draws per image."""

    mean: float
    standard_error: float
    images: int
    draws: int

    def __str__(self) -> str:
        # A single image has no standard error.
        error = f" +- {self.standard_error:.4f}" if math.isfinite(self.standard_error) else ""
        return f"{self.mean:.4f}{error}"


def draws_for(levels: Tensor, images: int) -> int:
    """How many noise draws per image of ``levels`` keep the noise below the differences between models.

    Enough to evaluate as many values as ``images`` images of 8x8 have, since a larger image averages more noise.
    """
    return max(1, min(images, images * 64 // levels[0].numel()) // len(levels))


def batch_size_for(image_size: tuple[int, int]) -> int:
    """How many images of this size to process at once without gradients: 256, or fewer if larger than 64x64 pixels.

    This bounds the working memory of the networks, so that evaluation needs little more than reversible training.
    """
    height, width = image_size
    return max(1, min(MAX_BATCH, MAX_BATCH * MAX_BATCH_IMAGE_SIDE**2 // (height * width)))


@torch.no_grad()
def evaluate(
    model: Glow,
    levels: Tensor,
    labels: Tensor | None = None,
    *,
    draws: int = 1,
    batch_size: int | None = None,
    seed: int = 0,
    ranks: Ranks = SINGLE_PROCESS,
    show_progress: bool = False,
) -> BitsPerDim:
    """Bits per dimension of images, averaged over ``draws`` of the dequantisation noise.

    Args:
        model: in evaluation mode, on any device.
        levels: ``(N, C, H, W)`` integer pixel levels, N at least 1.
        labels: ``(N,)`` classes for a model that has classes.
        draws: noise draws per image; more make the estimate of the bound less noisy.
        batch_size: images per call of the model; :func:`batch_size_for` by default.
        seed: seed of the noise.
        ranks: the processes that share the work; all call this with equal arguments and get the same result.
        show_progress: show a progress bar if standard error is a terminal.

    Raises:
        TypeError, ValueError: ``draws`` or ``batch_size`` is not a whole number of at least 1, or the model refuses its
            input.
    """
    check_whole("draws", draws, 1)
    batch_size = batch_size_for(model.image_size) if batch_size is None else batch_size
    check_whole("batch_size", batch_size, 1)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    total = torch.zeros(len(levels), dtype=torch.float64)
    starts = [*range(0, len(levels), batch_size)] * draws
    for start in with_progress(starts, "evaluating", "batches", is_shown=show_progress and ranks.is_writer):
        part = slice(start, start + batch_size)
        # Every rank draws the noise of the whole batch, as one process would.
        x = model.dequantize(levels[part].to(device), generator)
        mine = ranks.share(len(x))
        part_labels = None if labels is None else labels[part][mine].to(device)
        total[part][mine] += model.bits_per_dim(x[mine], part_labels).double().cpu()
    per_image = ranks.sum(total) / draws
    count = len(per_image)
    standard_error = per_image.std().item() / math.sqrt(count) if count > 1 else math.nan
    return BitsPerDim(per_image.mean().item(), standard_error, count, draws)


@torch.no_grad()
def reconstruct(model: Glow, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, float]:
    """``decode(encode(x))`` for ``x`` (B, C, H, W), and its largest absolute difference from ``x``."""
    reconstructed = model.decode(model.encode(x, labels), labels)
    return reconstructed, (reconstructed - x).abs().max().item()


def check_reconstruction(
    model: Glow, levels: Tensor, labels: Tensor | None, ranks: Ranks = SINGLE_PROCESS
) -> tuple[float, str]:
    """Reconstruction error on the first few images, and a warning that names nearly singular matrices.

    The error is infinite if a matrix is singular. ``levels`` and ``labels`` are as in :func:`evaluate`.
    """
    device = next(model.parameters()).device
    few = slice(min(RECONSTRUCTION_BATCH, batch_size_for(model.image_size)))
    x = model.dequantize(levels[few].to(device), torch.Generator(device).manual_seed(0))
    inputs = (x,) if labels is None else (x, labels[few].to(device))
    # Condition numbers need whole matrices, and sharded ones are whole only while their step runs.
    limit = None if ranks.fsdp else CONDITION_LIMIT
    try:
        report = reconstruction_error(model, *inputs, condition_limit=limit)
    except ValueError:
        return math.inf, ""
    names = ", ".join(f"{name} ({number:.0e})" for name, number in report.ill_conditioned.items())
    return report.error, f"; nearly singular: {names}" if names else ""


@torch.no_grad()
def interpolate(
    model: Glow, start: Tensor, end: Tensor, count: int, labels: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Images along the great circle between the latents of two batches of images.

    Standard normal latents lie near a sphere; a straight line would cut through its improbable interior.

    Args:
        start, end: ``(R, C, H, W)`` images as :meth:`Glow.dequantize` makes them.
        count: images per row, including both ends, at least 2.
        labels: classes (R,) of start and end for a model that has classes; decoding switches classes half way.

    Returns:
        ``(R, count, C, H, W)``.

    Raises:
        TypeError, ValueError: ``count`` is not a whole number of at least 2, or the model refuses its input.
    """
    check_whole("count", count, 2)
    first_labels, last_labels = labels if labels is not None else (None, None)
    first, last = model.encode(start, first_labels), model.encode(end, last_labels)
    angle = _angle(first, last)
    # The ends are the images themselves: rounding in the model could move a pixel to the next level.
    images = [start]
    for position in torch.linspace(0.0, 1.0, count).tolist()[1:-1]:
        latents = [_slerp(a, b, angle, position) for a, b in zip(first, last, strict=True)]
        images.append(model.decode(latents, first_labels if position < 0.5 else last_labels))
    return torch.stack([*images, end], dim=1)


def _angle(first: list[Tensor], last: list[Tensor]) -> Tensor:
    a = torch.cat([latent.flatten(1) for latent in first], dim=1)
    b = torch.cat([latent.flatten(1) for latent in last], dim=1)
    cosine = torch.nn.functional.cosine_similarity(a, b)
    # Clamped away from 0 and pi, where the weights in _slerp would not be finite; near 0 an arc is a straight line.
    return cosine.clamp(-0.9999, 0.9999).acos()[:, None, None, None]


def _slerp(a: Tensor, b: Tensor, angle: Tensor, position: float) -> Tensor:
    return (((1.0 - position) * angle).sin() * a + (position * angle).sin() * b) / angle.sin()
