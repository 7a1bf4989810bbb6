"""Reference of ``actnorm_statistics``."""

from __future__ import annotations

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, without_autocast


@without_autocast
def forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance (C,) of ``x`` (B, C, *spatial), over samples and positions."""
    dimensions = [dimension for dimension in range(x.dim()) if dimension != 1]
    if x.numel() == 0:  # torch.var_mean warns
        mean = x.new_full((x.shape[1],), torch.nan, dtype=compute_dtype(x))
        return mean, mean.clone()
    variance, mean = torch.var_mean(x.to(compute_dtype(x)), dim=dimensions, correction=0)
    return mean, variance
