"""Accelerated models that keep no activations, in DistributedDataParallel: two processes give the gradients of one.

Two gloo processes on the CPU run every case of this file; the parent compares them with the original in one process.
"""

from __future__ import annotations

import pytest
import torch
from dialects.zoo import EXAMPLES, Example
from ranks import DDP, RANKS, run
from test_interop import make, trained
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import glow_kernels as gk

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
DIALECTS = ("rosinality", "normflows")
CASES = [("rosinality", mode) for mode in DDP] + [(name, "default") for name in DIALECTS[1:]]


class Loss(nn.Module):
    """What scripts wrap in DistributedDataParallel, which only works through ``forward``."""

    def __init__(self, example: Example, model: nn.Module) -> None:
        super().__init__()
        self.example, self.model = example, model

    def forward(self, x: Tensor) -> Tensor:
        return self.example.loss(self.model, x)


def build(name: str) -> tuple[Loss, Tensor]:
    """The same initialised model and batch in every process."""
    model = make(EXAMPLES[name]).double()
    trained(EXAMPLES[name], model, 2)
    return Loss(EXAMPLES[name], model), torch.randn(4, 3, 8, 8, dtype=torch.float64)


def gradients(module: nn.Module, loss: Loss, x: Tensor) -> dict[str, Tensor]:
    """Gradients of the second of two steps, to reveal what a first backward leaves behind."""
    for _ in range(2):
        module.zero_grad()
        module(x).backward()
    return {key: p.grad for key, p in loss.named_parameters() if p.grad is not None}


def work(rank: int) -> dict[tuple[str, str], dict[str, Tensor]]:
    """All cases in one process."""
    results = {}
    for name, mode in CASES:
        loss, x = build(name)
        gk.accelerate(loss, memory="anchor", anchor_every=2, verify=False)
        module = DistributedDataParallel(loss, **DDP[mode])
        results[name, mode] = gradients(module, loss, x[rank::RANKS])
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[tuple[str, str], dict[str, Tensor]]]:
    return run(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", DIALECTS)
def test_two_processes_give_the_gradients_of_one(results, name):
    loss, x = build(name)
    expected = gradients(loss, loss, x)
    for result in results:
        for case in CASES:
            if case[0] != name:
                continue
            assert set(result[case]) == set(expected), case
            for key, value in result[case].items():
                # 1e-7: some layers round their log-determinant to float32 whatever their type.
                assert (value - expected[key]).norm() <= 1e-7 * expected[key].norm() + 1e-12, (case, key)
