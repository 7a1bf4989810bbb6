"""Chains in DistributedDataParallel and FSDP2: two processes with half a batch each get the gradients of the whole.

Two gloo processes on the CPU run every case of this file; the parent process compares with a single process.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import DDP, RANKS, run
from test_nn import ready
from torch import Tensor, nn

from glow_kernels.models import Glow

FSDP = {
    "whole": (False, True),
    "whole-without-resharding": (False, False),
    "per-step": (True, True),
    "per-step-without-resharding": (True, False),
}
CASES = [*DDP, *FSDP, "initialisation"]


def build() -> tuple[Glow, Tensor]:
    """A model with moved weights and a batch, the same in every process."""
    torch.manual_seed(0)
    x = torch.rand(6, 1, 8, 8, dtype=torch.float64) - 0.5
    model = Glow(1, 8, steps=5, levels=2, hidden_channels=8, memory="anchor")
    ready(model, torch.rand(32, 1, 8, 8, dtype=torch.float64) - 0.5)
    return model, x


def wrap(name: str, model: Glow) -> nn.Module:
    if name in DDP:
        return nn.parallel.DistributedDataParallel(model, **DDP[name])
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    per_step, reshard = FSDP[name]
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    for step in [step for level in model.levels for step in level.steps] if per_step else []:
        fully_shard(step, mesh=mesh, reshard_after_forward=reshard)
        register_fsdp_forward_method(step, "inverse")
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


def gradients(module: nn.Module, model: Glow, x: Tensor) -> dict[str, Tensor]:
    """Gradients of the second of two steps, to reveal any state that the first backward leaves behind."""
    for _ in range(2):
        module.zero_grad()
        module(x).mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


def work(rank: int) -> dict[str, dict[str, Tensor]]:
    """All cases in one process."""
    results: dict[str, dict[str, Tensor]] = {}
    half = slice(3 * rank, 3 * rank + 3)
    for name in CASES:
        model, x = build()
        if name == "initialisation":
            torch.manual_seed(1)
            model = Glow(1, 8, steps=2, levels=2, hidden_channels=8, memory="anchor").double()
            model(x[half]).mean().backward()
            results[name] = {key: value.clone() for key, value in model.state_dict().items()}
        else:
            results[name] = gradients(wrap(name, model), model, x[half])
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    return run(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [*DDP, *FSDP])
def test_two_processes_give_the_gradients_of_one(results, name):
    model, x = build()
    expected = gradients(model, model, x)
    for result in results:
        assert set(result[name]) == set(expected)
        for key, value in result[name].items():
            assert (value - expected[key]).norm() <= 1e-9 * expected[key].norm(), key


def test_actnorm_is_initialised_from_all_ranks(results):
    torch.manual_seed(1)
    model = Glow(1, 8, steps=2, levels=2, hidden_channels=8, memory="anchor").double()
    model(build()[1])
    for result in results:
        for key, value in model.state_dict().items():
            assert torch.allclose(result["initialisation"][key], value, rtol=1e-9, atol=1e-12), key
