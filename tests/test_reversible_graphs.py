"""A whole training step waits for nothing and depends on no value, so a CUDA graph can capture it.

Without a GPU, every operator of forward, backward and optimizer is inspected, also inside this package's reference
operators. With a GPU, a captured step is replayed on other data.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operators import MODULES
from test_nn import ready
from torch.utils._python_dispatch import TorchDispatchMode

import glow_kernels as gk
from glow_kernels import backends
from glow_kernels.backends.reference import actnorm_conv1x1
from glow_kernels.models import Glow

POLICIES = {
    "store": {"memory": "store"},
    "checkpoint": {"memory": "checkpoint"},
    "anchor": {"memory": "anchor"},
    "invert": {"memory": "invert"},
    "micro-batches": {"memory": "anchor", "micro_batches": 2},
    "flag": {"memory": "invert", "check": "flag"},
}


class NeverWaiting(TorchDispatchMode):
    """Raises an error if the host would have to wait for a value: it reads one, or a shape depends on one."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags):
            raise AssertionError(f"{function} waits for the device")
        namespace, name = function.name().split("::")
        name = name.split(".")[0]
        if namespace == "glow_kernels" and name.endswith("_reference"):
            module = next(module for module in MODULES if name.startswith(module))
            implementation = getattr(
                backends.implementation("reference", module), name.removeprefix(f"{module}_").removesuffix("_reference")
            )
            with self:
                return implementation(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def glow(**options: Any) -> Glow:
    return Glow(3, 8, steps=6, levels=2, hidden_channels=8, **options)


def train(model: Glow, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    loss = model.bits_per_dim(x).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
    optimizer.step()


def prepared(x: torch.Tensor, **options: Any) -> tuple[Glow, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = ready(glow(**options), x.cpu().double()).float().to(x.device)
    model.zero_grad(set_to_none=True)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_training_step_never_waits(policy, monkeypatch):
    # This check is skipped anyway while a CUDA graph is captured.
    monkeypatch.setattr(actnorm_conv1x1, "_check_invertible", lambda *_: None)
    x = torch.rand(4, 3, 8, 8) - 0.5
    model, optimizer = prepared(x, **POLICIES[policy])
    with gk.use_backend("reference"), NeverWaiting():
        train(model, optimizer, x)


@pytest.mark.parametrize("check", ["raise", "replay"])
def test_checks_that_raise_or_replay_wait_for_the_device(check):
    x = torch.rand(4, 3, 8, 8) - 0.5
    model, optimizer = prepared(x, memory="invert", check=check)
    with pytest.raises(AssertionError, match="waits for the device"), NeverWaiting():
        train(model, optimizer, x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("policy", POLICIES)
def test_a_captured_step_is_replayed_on_other_data(policy):
    x, other = torch.rand(2, 4, 3, 8, 8, device="cuda") - 0.5
    model, optimizer = prepared(x, **POLICIES[policy])
    expected, expected_optimizer = prepared(x, **POLICIES[policy])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            train(model, optimizer, x)
    torch.cuda.current_stream().wait_stream(stream)
    model.load_state_dict(expected.state_dict())
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        train(model, optimizer, x)
    x.copy_(other)
    graph.replay()
    train(expected, expected_optimizer, other)
    for one, two in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, two)
