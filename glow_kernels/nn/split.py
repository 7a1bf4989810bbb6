"""Priors: the split prior between levels, and the top prior."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow_kernels.backends.numerics import is_autocast_enabled, without_autocast
from glow_kernels.nn.network import ZeroConv2d
from glow_kernels.ops import gaussian_log_prob, gaussian_sample, gaussian_standardize
from glow_kernels.ops._checks import (
    check_below,
    check_channels,
    check_labels,
    check_tensor,
    check_whole,
    checked_temperature,
)


class SplitPrior(nn.Module):
    """Factor out the second half of the channels, with a Gaussian that a convolution predicts from the first half.

    Kingma and Dhariwal, "Glow", 2018, section 3.6. The convolution runs without autocast: a rounded mean would shift
    the density.

    Args:
        channels: C, even.

    Raises:
        TypeError, ValueError: ``channels`` is not an even whole number of at least 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_whole("channels", channels)
        if channels < 2 or channels % 2:
            raise ValueError(f"channels must be even and at least 2 to be split, got {channels}")
        self.channels = channels
        self.prior = ZeroConv2d(channels // 2, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` (B, C, H, W) to the kept half (B, C/2, H, W) and the log-density (B,) of the other half given it."""
        kept, dropped = self._halves(x)
        return kept, gaussian_log_prob(dropped, self._distribution(kept))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` (B, C, H, W) to the kept half and the standardised other half, both (B, C/2, H, W)."""
        kept, dropped = self._halves(x)
        return kept, gaussian_standardize(dropped, self._distribution(kept))

    def decode(self, kept: Tensor, eps: Tensor) -> Tensor:
        """The inverse of :meth:`encode`: ``kept`` and ``eps`` to ``x``; standard normal ``eps`` makes a sample."""
        return torch.cat((kept, gaussian_sample(eps, self._distribution(kept))), dim=1)

    def inverse(self, kept: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """The kept half (B, C/2, H, W) to ``x`` with the other half sampled, and minus its log-density (B,).

        Raises:
            TypeError, ValueError: ``kept`` has the wrong type or shape, or ``temperature`` is invalid, as for
                :meth:`glow_kernels.models.Glow.sample`.
        """
        h = self._distribution(kept)
        temperature = checked_temperature(temperature)
        sample = gaussian_sample(temperature * torch.randn_like(kept), h)
        return torch.cat((kept, sample), dim=1), -gaussian_log_prob(sample, h)

    def extra_repr(self) -> str:
        return str(self.channels)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_tensor("x", x)
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (B, {self.channels}, H, W), got shape {tuple(x.shape)}")
        return x[:, : self.channels // 2], x[:, self.channels // 2 :]

    def _distribution(self, kept: Tensor) -> Tensor:
        check_channels("kept", kept, self.channels // 2)
        if is_autocast_enabled(kept.device.type):
            kept = kept.to(self.prior.weight.dtype)  # under autocast, data may be of another type than the weights
        return _predicted(kept, self.prior)


@without_autocast
def _predicted(kept: Tensor, prior: nn.Module) -> Tensor:
    h: Tensor = prior(kept)
    return h


class TopPrior(nn.Module):
    """Gaussian of the deepest latent: a learned mean and standard deviation per channel, and per class if any.

    Glow's published code writes this as a convolution of a zero image. Its result is a constant per channel, which is
    learned directly here.

    Args:
        channels: C of the deepest latent.
        learned: whether the part that all classes share is learned; otherwise it is a standard normal.
        num_classes: number of classes to condition on, or None.

    Raises:
        TypeError, ValueError: ``channels`` or ``num_classes`` is not a whole number of at least 1.
    """

    def __init__(self, channels: int, learned: bool = True, num_classes: int | None = None) -> None:
        super().__init__()
        check_whole("channels", channels, 1)
        self.channels = channels
        self.learned = learned
        self.num_classes = num_classes
        if learned:
            self.common = nn.Parameter(torch.zeros(2 * channels))
            self.common_log_scale = nn.Parameter(torch.zeros(2 * channels))
        if num_classes is not None:
            check_whole("num_classes", num_classes, 1)
            self.per_class = nn.Parameter(torch.zeros(num_classes, 2 * channels))
            self.per_class_log_scale = nn.Parameter(torch.zeros(2 * channels))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log-density (B,) of ``z`` (B, C, H, W), given ``labels`` (B,) int64 where there are classes."""
        return gaussian_log_prob(z, self._distribution("z", z, labels), "chunk_mean_log_sd")

    def encode(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """The standardised ``z`` (B, C, H, W)."""
        return gaussian_standardize(z, self._distribution("z", z, labels), "chunk_mean_log_sd")

    def decode(self, eps: Tensor, labels: Tensor | None = None) -> Tensor:
        """The inverse of :meth:`encode`; standard normal ``eps`` makes a sample."""
        return gaussian_sample(eps, self._distribution("eps", eps, labels), "chunk_mean_log_sd")

    def extra_repr(self) -> str:
        return f"{self.channels}, learned={self.learned}, num_classes={self.num_classes}"

    def _distribution(self, name: str, z: Tensor, labels: Tensor | None) -> Tensor:
        check_channels(name, z, self.channels)
        h = z.new_zeros(1, 2 * self.channels)
        if self.learned:
            h = h + self.common * (3.0 * self.common_log_scale).exp()
        if self.num_classes is not None:
            if labels is None:
                raise ValueError(f"labels must be given: the prior has {self.num_classes} classes")
            check_labels(labels, z)
            check_below("labels", labels, self.num_classes, f" for a prior of {self.num_classes} classes")
            h = h + F.embedding(labels, self.per_class) * (3.0 * self.per_class_log_scale).exp()
        elif labels is not None:
            raise ValueError("labels must be None: the prior has no classes")
        return h[:, :, None, None].expand(z.shape[0], -1, *z.shape[2:])
