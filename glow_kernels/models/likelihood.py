"""From integer pixel levels to a density and back: dequantisation, and bits per dimension.

Pixels ``k`` in ``{0 .. n_bins - 1}`` become ``x = (k + u) / n_bins - 1/2`` with ``u`` uniform on [0, 1): noise of width
``a = 1 / n_bins`` on data in [-1/2, 1/2). By Jensen's inequality ``-E log p(x) + c`` with
``c = -M log a = M log n_bins`` bounds the negative log-likelihood of the M pixel values from above (Theis et al.,
"A note on the evaluation of generative models", 2016, section 3.1; Kingma and Dhariwal, "Glow", 2018, equation 2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glow_kernels.backends.numerics import wide_dtype
from glow_kernels.ops._checks import check_below, check_tensor, check_whole


def dequantize(levels: Tensor, n_bins: int, generator: torch.Generator | None = None) -> Tensor:
    """``(levels + u) / n_bins - 1/2`` with fresh uniform noise ``u``; ``levels`` is not modified.

    Args:
        levels: ``(B, C, H, W)``, an integer type, values in ``0 .. n_bins - 1``.
        n_bins: number of levels, at least 2; 256 for 8-bit images.
        generator: source of the noise, on the device of ``levels``.

    Returns:
        ``(B, C, H, W)`` in ``[-1/2, 1/2)``, of the default floating-point type.

    Raises:
        TypeError: ``levels`` is not a tensor of an integer type, or ``n_bins`` is not a whole number.
        ValueError: ``n_bins`` is below 2, or ``levels`` are not in ``0 .. n_bins - 1``. The latter is checked only on
            the CPU: on a GPU it would wait for the device.
    """
    check_tensor("levels", levels)
    if levels.is_floating_point() or levels.is_complex() or levels.dtype == torch.bool:
        raise TypeError(f"levels must be of an integer type, got {str(levels.dtype).removeprefix('torch.')}")
    check_whole("n_bins", n_bins, 2)
    # PyTorch implements few operations, not even max, for unsigned types of more than 8 bits.
    wide = levels.to(wide_dtype(levels.device))
    if levels.dtype != torch.uint8 or n_bins < 256:  # otherwise every byte is valid
        check_below("levels", wide, n_bins, f" with n_bins = {n_bins}")
    # Not rand: with a generator argument, even None, it accepts no symbolic sizes under torch.compile.
    noise = torch.empty(levels.shape, device=levels.device).uniform_(generator=generator)
    x = ((wide + noise.to(wide.dtype)) / n_bins - 0.5).to(noise.dtype)
    # Rounding may have moved x to the next level, by less than one unit in the last place.
    return torch.nextafter(x, (x - (_level(x, n_bins) - wide)).to(x.dtype))


def quantize(x: Tensor, n_bins: int) -> Tensor:
    """The level ``floor((x + 1/2) * n_bins)`` of every pixel, clamped to ``0 .. n_bins - 1``; NaN becomes 0.

    Args:
        x: ``(B, C, H, W)``, floating-point, in the range of :func:`dequantize`.
        n_bins: number of levels, 2 to 256.

    Returns:
        ``(B, C, H, W)`` uint8.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, or ``n_bins`` is not a whole number.
        ValueError: ``n_bins`` is not in 2 .. 256.
    """
    check_tensor("x", x)
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {str(x.dtype).removeprefix('torch.')}")
    check_whole("n_bins", n_bins, 2)
    if n_bins > 256:
        raise ValueError(f"n_bins must be at most 256 for 8-bit pictures, got {n_bins}")
    return _level(x, n_bins).nan_to_num(0.0).clamp(0, n_bins - 1).to(torch.uint8)


def bits_per_dim(log_prob: Tensor, dimensions: int, n_bins: int) -> Tensor:
    """``(-log_prob + M log n_bins) / (M log 2)`` with M = ``dimensions``: bits per pixel value (per subpixel).

    Args:
        log_prob: log-densities in nats of images from :func:`dequantize`, any shape.
        dimensions: M = C H W, including the channels.
        n_bins: number of levels, at least 2.

    Raises:
        TypeError, ValueError: ``dimensions`` is not a whole number of at least 1, or ``n_bins`` not one of at least 2.
    """
    check_whole("dimensions", dimensions, 1)
    check_whole("n_bins", n_bins, 2)
    return (math.log(n_bins) - log_prob / dimensions) / math.log(2.0)


def _level(x: Tensor, n_bins: int) -> Tensor:
    return ((x.to(wide_dtype(x.device)) + 0.5) * n_bins).floor()
