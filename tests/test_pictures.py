import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from glow_kernels.errors import CheckpointError, MissingDependencyError, UsageError
from glow_kernels.training import pictures


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def random_levels(*shape: int, n_bins: int = 32) -> torch.Tensor:
    return torch.randint(0, n_bins, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("n_bins", "expected"), [(2, [0, 255]), (16, [0, 17, 119, 255]), (256, [0, 7, 100, 255])])
def test_levels_fill_the_range_of_bytes(tmp_path: Path, n_bins: int, expected: list[int]) -> None:
    levels = [round(value * (n_bins - 1) / 255) for value in expected]
    images = torch.tensor(levels, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    pictures.grid(images, tmp_path / "a.png", n_bins=n_bins, columns=len(levels), scale=1, padding=0)
    assert pixels(tmp_path / "a.png")[0, :, 0].tolist() == expected


def test_grid_layout(tmp_path: Path) -> None:
    images = random_levels(5, 3, 4, 6, n_bins=256)
    pictures.grid(images, tmp_path / "a.png", n_bins=256, columns=3, scale=2, padding=1)
    picture = pixels(tmp_path / "a.png")
    assert picture.shape == (2 * 9 + 1, 3 * 13 + 1, 3)
    # The fifth image is in the second row and second column.
    enlarged = images[4].permute(1, 2, 0).numpy().repeat(2, axis=0).repeat(2, axis=1)
    assert (picture[10:18, 14:26] == enlarged).all()
    # Padding and the place of the missing sixth image are gray.
    assert (picture[0] == 128).all()
    assert (picture[10:18, 27:39] == 128).all()


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_channels(tmp_path: Path, channels: int, shown: list[int]) -> None:
    images = random_levels(1, channels, 4, 4, n_bins=256)
    pictures.grid(images, tmp_path / "a.png", n_bins=256, scale=1, padding=0)
    assert (pixels(tmp_path / "a.png") == images[0, shown].permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize(
    ("count", "size", "columns"), [(64, 8, None), (64, 28, None), (16, 32, None), (64, 64, None), (1, 32, None)]
)
def test_small_images_are_enlarged(tmp_path: Path, count: int, size: int, columns: int | None) -> None:
    pictures.grid(random_levels(count, 1, size, size), tmp_path / "a.png", n_bins=32, columns=columns)
    height, width, _ = pixels(tmp_path / "a.png").shape
    assert height == width
    assert 450 <= width <= 850


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (3, 8, 8)])
def test_no_images_is_a_usage_error(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="shape"):
        pictures.grid(torch.zeros(shape), tmp_path / "a.png", n_bins=32)
    assert list(tmp_path.iterdir()) == []


def test_picture_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        pictures.grid(random_levels(1, 1, 4, 4), tmp_path / "none" / "a.png", n_bins=32)


def rows_of_reconstruction(path: Path, original: torch.Tensor, reconstructed: torch.Tensor) -> list[NDArray[np.uint8]]:
    pictures.reconstruction(original, reconstructed, path, n_bins=256, error=0.5)
    picture = pixels(path)
    # With one image, the rows are three squares in a gray frame, between the labels and the margin.
    side = 800 // (3 * original.shape[-1]) * original.shape[-1]
    right = picture.shape[1] - 10 - 2
    return [picture[10 + 2 + row * (side + 2) :][:side, right - side : right] for row in range(3)]


def test_reconstruction_shows_both_and_the_amplified_difference(tmp_path: Path) -> None:
    original = random_levels(1, 3, 64, 64, n_bins=200).float()
    shift = torch.zeros_like(original)
    shift[..., 32:] = 0.01
    first, second, difference = rows_of_reconstruction(tmp_path / "a.png", original, original + shift)
    assert (first == second).all()
    assert first.std() > 10
    half = difference.shape[1] // 2
    assert (difference[:, :half] == 0).all()
    assert (difference[:, half:] > 200).all()


def test_equal_reconstruction_has_a_black_difference(tmp_path: Path) -> None:
    original = random_levels(1, 1, 64, 64)
    *_, difference = rows_of_reconstruction(tmp_path / "a.png", original, original.clone())
    assert (difference == 0).all()


def test_levels_are_not_subtracted_as_bytes(tmp_path: Path) -> None:
    original = torch.full((1, 1, 64, 64), 100, dtype=torch.uint8)
    original[..., :32] = 10
    reconstructed = torch.full_like(original, 60)
    *_, difference = rows_of_reconstruction(tmp_path / "a.png", original, reconstructed)
    half = difference.shape[1] // 2
    assert difference[0, 0, 0] > difference[0, half, 0] > 0


def test_broken_reconstruction_is_bright_and_no_failure(tmp_path: Path) -> None:
    broken = torch.full((1, 1, 64, 64), math.nan)
    *_, difference = rows_of_reconstruction(tmp_path / "a.png", random_levels(1, 1, 64, 64), broken)
    assert (difference == 255).all()


def test_interpolation_has_one_line_per_row(tmp_path: Path) -> None:
    rows = random_levels(3, 10, 1, 40, 40, n_bins=256)
    pictures.interpolation(rows, tmp_path / "a.png", n_bins=256)
    picture = pixels(tmp_path / "a.png")
    assert picture.shape == (3 * 82 + 2, 10 * 82 + 2, 3)
    assert (picture[84:164:2, 2:82:2, 0] == rows[1, 0, 0].numpy()).all()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, for tests to inspect."""
    figures = []
    real = Figure.savefig

    def savefig(self: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(self)
        real(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def training_records(count: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [
        {"step": step, "time": 1.0, "train_bits_per_dim": 3.0 + 2.0 * math.exp(-step / 100)} for step in range(count)
    ]
    for step in range(0, count, 50):
        records.append({"step": step, "time": 1.0, "validation_bits_per_dim": 3.2 + abs(step - 300) / 1000})
    return records


def test_curve_marks_the_best_and_ignores_the_first_huge_values(tmp_path: Path, drawn: list[Figure]) -> None:
    records = training_records(500)
    for record in records[:5]:
        record["train_bits_per_dim"] = 30000.0
    pictures.curve(records, tmp_path / "curve.png")
    (axes,) = drawn[0].axes
    low, high = axes.get_ylim()
    assert 2.8 < low < 3.02
    assert 3.5 < high < 5.0
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["training (smoothed)", "validation", "best validation: 3.2000 at step 300"]
    assert pixels(tmp_path / "curve.png").shape[1] > 600


def test_curve_smooths_training(tmp_path: Path, drawn: list[Figure]) -> None:
    records = [{"step": i, "train_bits_per_dim": 3.0 + (-1) ** i} for i in range(1000)]
    pictures.curve(records, tmp_path / "curve.png")
    raw, smooth = drawn[0].axes[0].get_lines()
    assert np.std(raw.get_ydata()) > 0.9
    assert np.std(smooth.get_ydata()) < 0.1
    assert smooth.get_ydata()[0] == pytest.approx(np.mean(raw.get_ydata()[:21]))  # shorter at the ends


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 0, "time": 0.0, "lr": 0.1}],
        [{"step": 0, "train_bits_per_dim": None, "validation_bits_per_dim": None}],
        [{"step": 0, "train_bits_per_dim": math.nan}],
        [{"step": 5, "train_bits_per_dim": 3.0}],
        [{"step": 5, "validation_bits_per_dim": 3.0}],
        [{"step": 5, "train_bits_per_dim": 3.0}, {"step": 6, "train_bits_per_dim": None}],
        [{"step": 5, "train_bits_per_dim": 3.5}, {"step": 6, "train_bits_per_dim": 3.0}],
    ],
)
def test_curve_of_few_records(tmp_path: Path, drawn: list[Figure], records: list[dict[str, Any]]) -> None:
    pictures.curve(records, tmp_path / "curve.png")
    low, high = drawn[0].axes[0].get_ylim()
    values = [line.get_ydata() for line in drawn[0].axes[0].get_lines()]
    assert all(low < value < high for line in values for value in line)
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_missing_packages_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("PIL", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    remedy = r"pip install 'glow_kernels\[train\]'"
    with pytest.raises(MissingDependencyError, match=f"Pillow: {remedy}"):
        pictures.grid(random_levels(1, 1, 4, 4), tmp_path / "a.png", n_bins=32)
    with pytest.raises(MissingDependencyError, match=f"matplotlib: {remedy}"):
        pictures.curve([], tmp_path / "a.png")
