"""Bits per dimension are means over images and draws, and paths in latent space run from one real image to another."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from glow_kernels.models import Glow
from glow_kernels.training import gallery
from glow_kernels.training.evaluation import (
    BitsPerDim,
    batch_size_for,
    check_reconstruction,
    draws_for,
    evaluate,
    interpolate,
    reconstruct,
)


def random_images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def make_model(channels: int = 1, size: int = 4, num_classes: int | None = None, spread: float = 0.1) -> Glow:
    """A Glow of two levels in evaluation mode, with its weights moved at random by ``spread``."""
    model = Glow(channels, size, 1, 2, 4, num_classes=num_classes)
    labels = None if num_classes is None else torch.arange(64) % num_classes
    model.initialize(torch.rand(64, channels, size, size) - 0.5, labels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model.eval()


def tiles(path: Path, columns: int, size: int) -> Tensor:
    """The square images in a picture at their own resolution: (rows, columns, 3, size, size)."""
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture))[2:, 2:]
    # Each image is enlarged by a whole factor and followed by 2 pixels of padding.
    side = pixels.shape[1] // columns
    separate = pixels.view(-1, side, columns, side, 3).permute(0, 2, 4, 1, 3)
    step = (side - 2) // size
    return separate[..., : side - 2 : step, : side - 2 : step]


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_bits_per_dim_is_the_mean_over_images_and_draws(draws: int, num_classes: int | None) -> None:
    model, levels = make_model(num_classes=num_classes), random_images(10, 1, 4, 4)
    labels = None if num_classes is None else torch.arange(10) % num_classes
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        bits = torch.stack([model.bits_per_dim(model.dequantize(levels, noise), labels) for _ in range(draws)])
    per_image = bits.mean(dim=0)
    result = evaluate(model, levels, labels, draws=draws, seed=5)
    assert result.mean == pytest.approx(per_image.mean().item(), rel=1e-6)
    assert result.standard_error == pytest.approx(np.std(per_image.numpy(), ddof=1) / math.sqrt(10), rel=1e-5)
    assert (result.images, result.draws) == (10, draws)


@pytest.mark.parametrize(
    ("size", "count"), [((8, 8), 256), ((64, 64), 256), ((128, 64), 128), ((256, 256), 16), ((2048, 2048), 1)]
)
def test_large_images_have_smaller_batches(size: tuple[int, int], count: int) -> None:
    assert batch_size_for(size) == count


@pytest.mark.parametrize("batch_size", [1, 3, 10, 99])
def test_batches_change_nothing_but_the_noise(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, levels, labels = make_model(num_classes=3), random_images(10, 1, 4, 4), torch.arange(10) % 3
    monkeypatch.setattr(model, "dequantize", lambda part, _: (part + 0.5) / 256 - 0.5)
    with torch.no_grad():
        expected = model.bits_per_dim((levels + 0.5) / 256 - 0.5, labels).mean().item()
    assert evaluate(model, levels, labels, batch_size=batch_size).mean == pytest.approx(expected, rel=1e-6)
    others = evaluate(model, levels, labels.roll(1), batch_size=batch_size).mean
    assert others != pytest.approx(expected, rel=1e-6)


def test_the_seed_alone_decides_the_noise() -> None:
    model, levels = make_model(), random_images(10, 1, 4, 4)
    torch.manual_seed(1)
    first = evaluate(model, levels, seed=7)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert evaluate(model, levels, seed=7) == first
    assert evaluate(model, levels, seed=8) != first
    torch.manual_seed(1)
    evaluate(model, levels, seed=7)
    assert torch.equal(torch.get_rng_state(), state)


def test_more_draws_make_the_mean_less_noisy() -> None:
    model, levels = make_model(), random_images(4, 1, 4, 4)
    spread = {
        draws: np.std([evaluate(model, levels, draws=draws, seed=s).mean for s in range(20)]) for draws in (1, 16)
    }
    assert 1.5 < spread[1] / spread[16] < 12


@pytest.mark.parametrize(
    ("shape", "draws"),
    [((100, 1, 8, 8), 10), ((297, 1, 8, 8), 3), ((2000, 1, 8, 8), 1), ((2, 1, 4, 4), 512), ((1, 3, 64, 64), 5)],
)
def test_few_images_get_several_draws_and_large_ones_fewer(shape: tuple[int, ...], draws: int) -> None:
    """A thousand draws of one photograph would take hours."""
    assert draws_for(torch.zeros(shape, dtype=torch.uint8), 1024) == draws


def test_one_image_has_no_standard_error() -> None:
    result = evaluate(make_model(), random_images(1, 1, 4, 4))
    assert math.isfinite(result.mean)
    assert math.isnan(result.standard_error)
    assert str(result) == f"{result.mean:.4f}"


def test_counts_below_what_makes_sense_are_refused() -> None:
    model, levels = make_model(), random_images(2, 1, 4, 4)
    for call, message in (
        (lambda: evaluate(model, levels, draws=0), "draws must be at least 1, got 0"),
        (lambda: evaluate(model, levels, batch_size=-1), "batch_size must be at least 1, got -1"),
        (lambda: interpolate(model, levels / 256 - 0.5, levels / 256 - 0.5, 1), "count must be at least 2, got 1"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            call()


def test_result_reads_well() -> None:
    assert str(BitsPerDim(3.14159, 0.00123, 10, 1)) == "3.1416 +- 0.0012"


@pytest.mark.parametrize("num_classes", [None, 3])
def test_reconstruction_error_is_the_largest_difference(num_classes: int | None) -> None:
    model = make_model(num_classes=num_classes)
    x, labels = torch.rand(5, 1, 4, 4) - 0.5, None if num_classes is None else torch.arange(5) % 3
    reconstructed, error = reconstruct(model, x, labels)
    assert error == (reconstructed - x).abs().max().item()
    assert 0 < error < 1e-4


def test_reconstruction_error_shows_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda latents, labels: decode(latents, labels) - 0.25)
    assert reconstruct(model, torch.rand(5, 1, 4, 4) - 0.5)[1] == pytest.approx(0.25, rel=1e-3)


def test_a_singular_matrix_has_an_infinite_error() -> None:
    model = make_model()
    with torch.no_grad():
        model.levels[0].steps[0].mixing.log_diagonal[0] = -math.inf
    assert check_reconstruction(model, random_images(5, 1, 4, 4), None) == (math.inf, "")


def flat_latents(model: Glow, x: Tensor, labels: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return torch.cat([latent.flatten(1) for latent in model.encode(x, labels)], dim=1).double()


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_path_is_the_great_circle_between_the_latents(count: int, num_classes: int | None) -> None:
    model = make_model(num_classes=num_classes)
    start, end = (torch.rand(2, 4, 1, 4, 4) - 0.5).unbind()
    labels = None if num_classes is None else (torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 1, 0]))
    path = interpolate(model, start, end, count, labels)
    assert path.shape == (4, count, 1, 4, 4)
    first_labels, last_labels = labels or (None, None)
    a, b = flat_latents(model, start, first_labels), flat_latents(model, end, last_labels)
    omega = torch.acos((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)))[:, None]
    for index in range(count):
        t = index / (count - 1)
        expected = (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / torch.sin(omega)
        # The class switches half way.
        got = flat_latents(model, path[:, index], first_labels if t < 0.5 else last_labels)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_path_between_equal_images_stays_there() -> None:
    model, x = make_model(), torch.rand(3, 1, 4, 4) - 0.5
    path = interpolate(model, x, x, 5)
    torch.testing.assert_close(path, x[:, None].expand_as(path), rtol=0, atol=1e-2)


def test_path_between_opposite_latents_is_finite() -> None:
    model, x = make_model(), torch.rand(3, 1, 4, 4) - 0.5
    with torch.no_grad():
        opposite = model.decode([-latent for latent in model.encode(x)])
    assert interpolate(model, x, opposite, 5).isfinite().all()


def test_ends_of_a_drawn_path_are_the_images_to_the_last_level(tmp_path: Path) -> None:
    """Rounding in the model must not move any of many pixels to the next level."""
    model = make_model(channels=3, size=32, spread=0.04)
    start, end = random_images(16, 3, 32, 32), random_images(16, 3, 32, 32)
    gallery.draw_interpolation(model, start, end, None, tmp_path / "path.png", count=2)
    drawn = tiles(tmp_path / "path.png", columns=2, size=32)
    assert torch.equal(drawn[:, 0], start)
    assert torch.equal(drawn[:, 1], end)
