"""Pictures of a run as PNG files: grids of images, reconstructions, interpolations and the training curve."""

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glow_kernels.errors import MissingDependencyError, UsageError
from glow_kernels.training.checkpoint import write_atomically

if TYPE_CHECKING:
    import PIL.Image

# The names of the values that curve() reads from the records of a run.
TRAIN_KEY = "train_bits_per_dim"
VALIDATION_KEY = "validation_bits_per_dim"

_LARGEST_SIDE = 800
_GRAY = 128
_FONT_SIZE = 15
_MARGIN = 10


def grid(
    images: Tensor,
    path: Path,
    *,
    n_bins: int,
    columns: int | None = None,
    scale: int | None = None,
    padding: int = 2,
) -> None:
    """Write images side by side, row by row.

    Args:
        images: Levels from 0 to ``n_bins - 1``, shape (N, C, H, W). With three or more channels the first three
            are red, green and blue; with fewer the first is drawn in gray.
        path: The PNG file to write.
        n_bins: The number of levels.
        columns: Images per row; by default about as many as there are rows.
        scale: Each pixel becomes a square of this side; if not given, small images are enlarged until the
            longer side of the picture is around 500 to 800 pixels.
        padding: Pixels between the images and around them.

    Raises:
        CheckpointError: the file cannot be written.
        MissingDependencyError: Pillow is not installed.
        UsageError: there are no images.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    picture = _tile(images, n_bins, columns, scale, padding)
    with _needs("Pillow"):
        from PIL import Image
    _write(Image.fromarray(picture.numpy()), path)


def reconstruction(original: Tensor, reconstructed: Tensor, path: Path, *, n_bins: int, error: float) -> None:
    """Write three rows: the original images, their reconstructions and the absolute differences.

    The differences are amplified until the largest is bright; the picture states the factor.

    Args:
        original: Levels from 0 to ``n_bins - 1``, not necessarily whole numbers, shape (N, C, H, W).
        reconstructed: Levels of the images after a round trip through the model; same shape.
        path: The PNG file to write.
        n_bins: The number of levels.
        error: The largest absolute error for the caption, in the caller's units.

    Raises:
        CheckpointError: the file cannot be written.
        MissingDependencyError: Pillow is not installed.
        UsageError: there are no images.
    """
    top = n_bins - 1
    before, after = original.detach().cpu().double(), reconstructed.detach().cpu().double()
    difference = (before - after).abs().nan_to_num(nan=top, posinf=top).clamp(max=top)
    largest = difference.max().item() if len(difference) else 0.0
    # One significant digit keeps the label short.
    factor = float(f"{top / largest:.0e}") if largest else 1.0
    rows = torch.cat([before, after, difference * factor])
    tiles = _tile(rows, n_bins, columns=len(before), scale=None, padding=2)
    amplified = f"difference x {factor:,.0f}" if largest else "no difference"
    labels = ["original", "reconstructed", amplified]
    _write(_with_labels(tiles, labels, f"max |error| = {error:.2g}"), path)


def interpolation(rows: Tensor, path: Path, *, n_bins: int) -> None:
    """Write one row per interpolation; each runs from one real image to another.

    Args:
        rows: Levels from 0 to ``n_bins - 1``, shape (R, N, C, H, W): R rows of N images.
        path: The PNG file to write.
        n_bins: The number of levels.

    Raises:
        CheckpointError: the file cannot be written.
        MissingDependencyError: Pillow is not installed.
        UsageError: there are no images.
    """
    grid(rows.flatten(0, 1), path, n_bins=n_bins, columns=rows.shape[1])


def curve(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the training curve: bits per dimension over steps, with the best validation result marked.

    The scale fits the later part of the run; the first values, far larger, may be cut off.

    Args:
        records: What :func:`glow_kernels.training.metrics.read` returns. A record counts for training if it
            has ``train_bits_per_dim`` and for validation if it has ``validation_bits_per_dim``; values that are
            None or not finite are left out.
        path: The PNG file to write.

    Raises:
        CheckpointError: the file cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    with _needs("matplotlib"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("training step")
    axes.set_ylabel("bits per dimension")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    steps, raw = _series(records, TRAIN_KEY)
    smooth = _smoothed(raw)
    validation_steps, validation = _series(records, VALIDATION_KEY)
    if raw:
        axes.plot(steps, raw, color="tab:blue", alpha=0.25, linewidth=0.8)
        # A line through few points is hard to see, and a line through one point is invisible.
        marker = "o" if len(raw) < 20 else ""
        axes.plot(
            steps, smooth, color="tab:blue", linewidth=1.8, marker=marker, markersize=4, label="training (smoothed)"
        )
    if validation:
        axes.plot(validation_steps, validation, "o-", color="tab:orange", markersize=4, label="validation")
        best = min(validation)
        step = validation_steps[validation.index(best)]
        label = f"best validation: {best:.4f} at step {step:,}"
        axes.plot(step, best, "*", color="tab:red", markersize=14, markeredgecolor="white", label=label)
    if raw or validation:
        axes.set_ylim(_limits([raw, validation]))
        axes.legend(loc="upper right", frameon=False)
    else:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no records yet", transform=axes.transAxes, ha="center", color="0.5")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _series(records: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def _smoothed(values: list[float]) -> list[float]:
    """The mean over a centred window, shorter at the ends: unlike a running mean, the curve does not lag behind."""
    if not values:
        return []
    reach = len(values) // 50
    curve = torch.tensor([values], dtype=torch.float64)
    smooth: list[float] = F.avg_pool1d(curve, 2 * reach + 1, 1, reach, count_include_pad=False)[0].tolist()
    return smooth


def _limits(curves: Sequence[list[float]]) -> tuple[float, float]:
    """Limits of the y axis around all curves, without their first tenth and the highest 5% of the rest.

    The first values of a run are often far higher than the others, and so are those of a step that went wrong.
    """
    highest, lowest = [], []
    for values in filter(None, curves):
        first = math.ceil(len(values) / 10) if len(values) > 2 else 0
        later = sorted(values[first:])
        highest.append(later[round(0.95 * (len(later) - 1))])
        lowest.append(later[0])
    margin = 0.08 * (max(highest) - min(lowest)) or 0.05
    return min(lowest) - margin, max(highest) + margin


def _tile(images: Tensor, n_bins: int, columns: int, scale: int | None, padding: int) -> Tensor:
    """The images as one picture: bytes of shape (height, width, 3)."""
    if images.dim() != 4 or not images.numel():
        raise UsageError(f"a picture needs images of shape (N, C, H, W), got {tuple(images.shape)}")
    colors = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    levels = colors.detach().cpu().double().nan_to_num() * (255 / (n_bins - 1))
    pixels = levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    count, height, width, _ = pixels.shape
    rows = math.ceil(count / columns)
    scale = scale or max(1, _LARGEST_SIDE // max(columns * width, rows * height))
    pixels = pixels.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    height, width = height * scale, width * scale
    size = (rows * (height + padding) + padding, columns * (width + padding) + padding, 3)
    picture = torch.full(size, _GRAY, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        picture[top : top + height, left : left + width] = image
    return picture


def _with_labels(picture: Tensor, labels: Sequence[str], caption: str) -> "PIL.Image.Image":
    """A white page with one label to the left of each row of ``picture`` and a caption below."""
    with _needs("Pillow"):
        from PIL import Image, ImageDraw, ImageFont
    font = ImageFont.load_default(size=_FONT_SIZE)
    column = math.ceil(max(font.getlength(label) for label in labels)) + 2 * _MARGIN
    height, width, _ = picture.shape
    below = _FONT_SIZE + 2 * _MARGIN
    page_width = column + max(width, math.ceil(font.getlength(caption))) + _MARGIN
    page = Image.new("RGB", (page_width, _MARGIN + height + below), "white")
    page.paste(Image.fromarray(picture.numpy()), (column, _MARGIN))
    draw = ImageDraw.Draw(page)
    for row, label in enumerate(labels):
        middle = _MARGIN + round((row + 0.5) * height / len(labels))
        draw.text((column - _MARGIN, middle), label, fill="black", font=font, anchor="rm")
    draw.text((column, _MARGIN + height + below // 2), caption, fill="black", font=font, anchor="lm")
    return page


def _write(picture: "PIL.Image.Image", path: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


@contextlib.contextmanager
def _needs(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(f"pictures need {package}: pip install 'glow_kernels[train]'") from error
