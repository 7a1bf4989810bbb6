"""Squeeze: space to depth."""

from __future__ import annotations

from torch import Tensor, nn

from glow_kernels.backends.numerics import compute_dtype
from glow_kernels.ops._checks import check_tensor


class Squeeze(nn.Module):
    """Turn 2x2 blocks of pixels into 4 channels, ``4 c + 2 i + j`` (Dinh et al., "Real NVP", 2017, section 3.6)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` (B, C, H, W) with even H and W to ``z`` (B, 4 C, H/2, W/2) and ``log_det`` (B,) of zeros.

        Raises:
            TypeError, ValueError: ``x`` is not a tensor, not four-dimensional, or its height or width is odd.
        """
        check_tensor("x", x)
        if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"x must be (B, C, H, W) with even H and W to be squeezed, got shape {tuple(x.shape)}")
        # Not F.pixel_unshuffle, which gives an empty batch the wrong shape.
        batch, channels, height, width = x.shape
        blocks = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        return blocks.reshape(batch, 4 * channels, height // 2, width // 2), _zero_log_det(x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` (B, 4 C, H, W) to ``x`` (B, C, 2 H, 2 W) and ``log_det`` (B,) of zeros.

        Raises:
            TypeError, ValueError: ``z`` is not a tensor, not four-dimensional, or its channels not divisible by 4.
        """
        check_tensor("z", z)
        if z.dim() != 4 or z.shape[1] % 4:
            raise ValueError(f"z must be (B, 4 C, H, W) to be unsqueezed, got shape {tuple(z.shape)}")
        batch, channels, height, width = z.shape
        blocks = z.reshape(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        return blocks.reshape(batch, channels // 4, 2 * height, 2 * width), _zero_log_det(z)


def _zero_log_det(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], dtype=compute_dtype(x))
