"""A chain folds the linear maps of all its steps in one call if possible, and computes what single steps compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from test_nn import ready
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from glow_kernels import ReversibleSequential
from glow_kernels.nn import FlowStep
from glow_kernels.nn.step import MIXINGS

POLICIES = ("store", "checkpoint", "anchor", "invert")
FOLDING = ("fold", "fold_inverse", "lu_weight", "fold_backward", "lu_weight_backward")


class Calls(TorchDispatchMode):
    """Counts the calls of this package's operators, by name without module and backend."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = function.name().split("::")
        if namespace == "glow_kernels":
            name = name.split(".")[0].removeprefix("actnorm_conv1x1_").rpartition("_")[0]
            self.count[name] = self.count.get(name, 0) + 1
        return function(*args, **(kwargs or {}))

    @property
    def single_steps(self) -> int:
        """The number of steps that fold by themselves; the native backend folds and applies in one call."""
        return self.count.get("fold", 0) + self.count.get("forward", 0)


def chain(memory: str = "store", count: int = 5, **options: Any) -> tuple[ReversibleSequential, Tensor]:
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    model = ReversibleSequential([FlowStep(6, 8, **options) for _ in range(count)], memory, anchor_every=2)
    return ready(model, x), x


def one_by_one(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    total = x.new_zeros(len(x))
    for step in model:
        x, log_det = step(x)
        total = total + log_det
    return x, total


def gradients(results: tuple[Tensor, Tensor], inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    generator = torch.Generator(results[0].device).manual_seed(1)
    total = sum((r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results)
    return torch.autograd.grad(total, inputs, allow_unused=True)


def assert_equal_to_single_steps(model: ReversibleSequential, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    actual, expected = model(x), one_by_one(model, x)
    inputs = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    pairs = list(zip((*actual, *gradients(actual, inputs)), (*expected, *gradients(expected, inputs)), strict=True))
    back, log_det = model.inverse(actual[0])
    for one, other in (*pairs, (back, x), (log_det, -actual[1])):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("memory", POLICIES)
def test_a_chain_equals_its_steps(backend, memory, mixing):
    assert_equal_to_single_steps(*chain(memory, mixing=mixing))


@pytest.mark.parametrize("memory", POLICIES)
@pytest.mark.parametrize("count", [2, 5])
def test_the_number_of_folding_calls_does_not_grow_with_the_steps(memory, count):
    model, x = chain(memory, count)
    with Calls() as calls:
        z, log_det = model(x)
        (z.sum() + log_det.sum()).backward()
    # Chains that recompute fold again in backward, once for all steps; some need the inverses.
    again = memory != "store"
    inverts = memory in ("anchor", "invert")
    folding = {name: calls.count.get(name, 0) for name in FOLDING}
    assert folding == {
        "fold": 1 + again,
        "lu_weight": 1 + again,
        "fold_inverse": int(inverts),
        "fold_backward": 1,
        "lu_weight_backward": 1,
    }
    with torch.no_grad(), Calls() as calls:
        model.inverse(z)
    assert {name: calls.count.get(name, 0) for name in FOLDING[:3]} == {"fold": 0, "fold_inverse": 1, "lu_weight": 1}


def _hooked(model: nn.Module) -> None:
    model[1].register_forward_pre_hook(lambda *_: None)


def _parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model[1].mixing, "lower", nn.Identity())


def _patched(model: nn.Module) -> None:
    step = model[1]
    forward = step.forward
    step.forward = lambda x, *context: forward(x, *context)


def _mixed(model: nn.Module) -> None:
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    model[1] = ready(FlowStep(6, 8, mixing="plain"), x)


def _derived(model: nn.Module) -> None:
    class Step(FlowStep):
        pass

    model[1].__class__ = Step


@pytest.mark.parametrize("memory", ["store", "invert"])
@pytest.mark.parametrize("change", [_hooked, _parametrized, _patched, _mixed, _derived])
def test_steps_that_differ_are_folded_one_by_one(change, memory):
    model, x = chain(memory)
    change(model)
    assert_equal_to_single_steps(model, x)
    with torch.no_grad(), Calls() as calls:
        model(x)
    assert calls.single_steps == 5


@pytest.mark.parametrize("memory", ["store", "invert"])
def test_tied_and_frozen_steps_are_folded_together(memory):
    model, x = chain(memory)
    model[3] = model[1]
    model[2].requires_grad_(False)
    model[4].actnorm.requires_grad_(False)
    assert_equal_to_single_steps(model, x)
    assert_equal_to_single_steps(copy.deepcopy(model), x)


def test_the_batch_that_initialises_goes_through_single_steps():
    x = torch.randn(8, 6, 4, 4)
    model = ReversibleSequential([FlowStep(6, 8) for _ in range(3)], "store")
    expected = one_by_one(copy.deepcopy(model), x)
    with Calls() as calls:
        actual = model(x)
    assert calls.single_steps == 3
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("memory", ["checkpoint", "invert"])
def test_a_linear_map_that_changes_before_backward_is_noticed(memory):
    model, x = chain(memory)
    z, log_det = model(x)
    with torch.no_grad():
        model[2].mixing.lower += 1.0
    with pytest.raises(RuntimeError, match=r"^step 2 \(FlowStep\): its parameters, .* were modified in place between"):
        (z.sum() + log_det.sum()).backward()


def test_a_singular_matrix_is_named_by_the_inverse():
    model, x = chain(mixing="plain")
    with torch.no_grad():
        model[3].mixing.weight[0] = 0.0
        with pytest.raises(
            ValueError, match=r"^step 3 \(FlowStep\): weight must be invertible, got a singular \(6, 6\)"
        ):
            model.inverse(x)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("memory", ["store", "anchor"])
def test_what_a_compiled_chain_folds(memory):
    torch._dynamo.reset()
    model, x = chain(memory)
    targets: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    parameters = list(model.parameters())
    actual, expected = (gradients(run(x), parameters) for run in (compiled, model))
    # A chain that recomputes folds inside its opaque steps, so the graph has no matrices to keep.
    assert sum("_fold_" in target and "backward" not in target for target in targets) == (memory == "store")
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
