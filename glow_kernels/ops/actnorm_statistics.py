"""Statistics for the data-dependent initialisation of ActNorm.

Per channel, the mean and the population standard deviation over all samples and positions, and over all ranks if a
process group is initialised (Kingma and Dhariwal, "Glow", 2018, section 3.1, after Salimans and Kingma, "Weight
Normalization", 2016, section 3). The variance is the mean of squared deviations, never ``E[x^2] - E[x]^2``; ranks are
combined as in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm", 1979.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, wide_dtype
from glow_kernels.ops._checks import check_image, positions
from glow_kernels.ops._registry import Operator


def actnorm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of every channel. Not differentiable.

    Args:
        x: ``(B, C, *spatial)`` with 0 to 3 spatial dimensions, any floating-point type. With an initialised process
            group every rank must call this; ranks may differ in B and in the number of positions.

    Returns:
        ``mean`` and ``std``, both ``(C,)`` and float32 (float64 for float64 ``x``); equal on all ranks.

    Raises:
        TypeError, ValueError: ``x`` has the wrong type or shape, or, on a single rank, no samples or no positions.
    """
    check_image("x", x)
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    count = x.shape[0] * positions(x)
    if count == 0 and not distributed:
        raise ValueError(f"x must have at least one sample and one position, got shape {tuple(x.shape)}")
    mean, variance = _forward(x.detach())
    if distributed:
        mean, variance = _over_all_ranks(mean, variance, count)
    return mean, variance.sqrt_()


def _over_all_ranks(mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(mean.device)
    counts = torch.full_like(mean, count, dtype=wide)
    # The statistics of a rank without samples are NaN: zeros, which get no weight, replace them.
    if count == 0:
        mean, variance = torch.zeros_like(mean), torch.zeros_like(variance)
    mine = torch.stack((counts, mean.to(wide), variance.to(wide)))
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    counts, means, variances = torch.stack(gathered, dim=1)
    share = counts / counts.sum(0)
    joint_mean = (share * means).sum(0)
    joint_variance = (share * (variances + (means - joint_mean).square())).sum(0)
    return joint_mean.to(mean.dtype), joint_variance.to(mean.dtype)


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    statistic = x.new_empty(x.shape[1], dtype=compute_dtype(x))
    return statistic, torch.empty_like(statistic)


_forward = Operator("actnorm_statistics", "forward", "(Tensor x) -> (Tensor, Tensor)", fake=_fake)
