"""Exponential moving average of the weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class MovingAverage(Generic[Module]):
    """A copy of ``model`` whose parameters follow it slowly: ``average += (1 - d) * (model - average)``.

    After n updates the decay d is ``min(decay, (1 + n) / (10 + n))``, so the random initial weights are soon forgotten.
    """

    def __init__(self, model: Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: Module, updates: int) -> None:
        """Update from ``model`` after ``updates`` earlier updates. Buffers are constant in a Glow and not averaged."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        averages: list[Tensor] = list(self.model.parameters())
        values: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, values, 1.0 - decay)

    @torch.no_grad()
    def update_unless(self, bad: Tensor, model: Module, updates: Tensor) -> None:
        """:meth:`update` unless ``bad`` is 1; ``bad`` and ``updates`` are scalars on the device, so nothing waits."""
        decay = torch.clamp((1 + updates) / (10 + updates), max=self.decay)
        averages: list[Tensor] = list(self.model.parameters())
        # torch._foreach_lerp_ does not take one weight on the device for all tensors.
        steps = torch._foreach_sub(list(model.parameters()), averages)
        torch._foreach_mul_(steps, (1.0 - decay) * (1.0 - bad))
        torch._foreach_add_(averages, steps)
