"""Flow steps define a density: on points in the plane it integrates to one, before and after training.

The integral is numerical, so it needs none of our formulas, only the results of ``forward`` at every point.
"""

from __future__ import annotations

import math

import pytest
import torch
from test_nn import moved, standard_normal_log_prob
from torch import Tensor, nn

from glow_kernels.nn import FlowStep


def smooth_network() -> nn.Module:
    """A smooth and bounded network, so the density has no heavy tails outside the square; it does not start at zero."""
    return nn.Sequential(nn.Conv2d(1, 32, 1), nn.Tanh(), nn.Conv2d(32, 2, 1))


class Flow2d(nn.Module):
    """Four flow steps on points in the plane (B, 2, 1, 1), to a standard normal."""

    def __init__(self, mixing: str) -> None:
        super().__init__()
        self.steps = nn.ModuleList(FlowStep(2, mixing=mixing, network=smooth_network()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        log_prob = x.new_zeros(len(x))
        for step in self.steps:
            x, log_det = step(x)
            log_prob = log_prob + log_det
        return log_prob + standard_normal_log_prob(x)


def two_moons(count: int) -> Tensor:
    angle = math.pi * torch.rand(count)
    upper = torch.rand(count) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return (torch.stack((x, y), dim=1) + 0.1 * torch.randn(count, 2)).view(count, 2, 1, 1)


@torch.no_grad()
def integral(flow: Flow2d, radius: float = 6.0, points: int = 300) -> float:
    """The integral of the density over a square, by the midpoint rule."""
    width = 2 * radius / points
    axis = (torch.arange(points) + 0.5) * width - radius
    grid = torch.cartesian_prod(axis, axis).view(-1, 2, 1, 1)
    return sum(flow(part).double().exp().sum().item() for part in grid.split(10000)) * width**2


@pytest.mark.parametrize("mixing", ["lu", "plain"])
def test_density_integrates_to_one(mixing):
    flow = Flow2d(mixing)
    flow(two_moons(1024))
    moved(flow)
    assert integral(flow) == pytest.approx(1.0, abs=1e-5)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3, fused=True)
    losses = []
    for _ in range(200):
        loss = -flow(two_moons(256)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert integral(flow) == pytest.approx(1.0, abs=1e-5)
