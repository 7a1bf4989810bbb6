"""``accelerate`` on models of every dialect: everything is patched, and nothing but the computation changes.

The models of normflows, nflows and FrEIA come from these libraries; the others are written in ``dialects`` from their
conventions. The truth that a patch is compared with is always what the original layer computes. One test proves every
layer; the others compare whole models with ``verify=False``, which halves their time.
"""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from dialects.zoo import EXAMPLES, Example
from torch import Tensor, nn

import glow_kernels as gk

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated", "ignore:torch.triangular_solve is deprecated")


@pytest.fixture(params=EXAMPLES, scope="module")
def example(request: pytest.FixtureRequest) -> Example:
    return EXAMPLES[request.param]


def trained(example: Example, model: nn.Module, steps: int) -> list[float]:
    """Losses of a short training run, the first of which initialises ActNorm.

    In float64 with Adam, in float32 with momentum: Adam turns rounding errors of gradients near zero into full steps,
    so that even runs of the *same* model with different numbers of threads differ by more than is allowed here.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    parameters = list(model.parameters())
    single = dtype == torch.float32
    optimizer = torch.optim.SGD(parameters, 1e-4, momentum=0.9) if single else torch.optim.Adam(parameters, 1e-3)
    losses = []
    for _ in range(steps):
        loss = example.loss(model, images(example, generator).to(dtype))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def images(example: Example, generator: torch.Generator | None = None) -> Tensor:
    """A batch with correlated neighbours, so that there is something to learn."""
    noise = torch.randn(example.shape, generator=generator)
    return 0.2 * noise.cumsum(-1) + 0.02 * torch.randn(example.shape, generator=generator)


def make(example: Example) -> nn.Module:
    torch.manual_seed(0)
    np.random.seed(0)  # FrEIA draws its permutations with numpy
    return example.make()


def test_every_layer_is_patched_and_keeps_parameters_keys_and_types(example):
    model = make(example)
    keys, types = list(model.state_dict()), [tensor.dtype for tensor in model.state_dict().values()]
    parameters, text = list(model.parameters()), repr(model)
    report = gk.accelerate(model)
    assert [(layer.path, layer.reason) for layer in report.left_alone] == []
    assert len(report.patched) == example.layers
    assert list(model.state_dict()) == keys
    assert [tensor.dtype for tensor in model.state_dict().values()] == types
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert repr(model) == text


# In float64, fewer steps are enough.
@pytest.mark.parametrize(("dtype", "part"), [(torch.float32, 1), (torch.float64, 3)], ids=str)
def test_a_training_run_has_the_same_losses(example, dtype, part):
    original, accelerated = make(example).to(dtype), make(example).to(dtype)
    gk.accelerate(accelerated, verify=False)
    steps = example.steps // part
    expected, actual = (trained(example, model, steps) for model in (original, accelerated))
    assert part > 1 or min(expected[5:]) < expected[0]  # it trains
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-4, atol=0.0)


def gradients(example: Example, model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    loss = example.loss(model, x)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, wanted, allow_unused=True))


def test_losses_and_gradients_are_as_accurate_as_the_originals(example):
    model = make(example)
    trained(example, model, 3)
    accelerated, truth = make(example), make(example)
    for other in (accelerated, truth):
        other.load_state_dict(model.state_dict())
    mark_initialized(accelerated, truth)
    truth.double()
    gk.accelerate(accelerated, verify=False)
    x = images(example)
    true_loss, true_gradients = gradients(example, truth, x.double())
    loss, grads = gradients(example, accelerated, x)
    original_loss, original_grads = gradients(example, model, x)
    for actual, eager, true in zip(
        [loss, *grads], [original_loss, *original_grads], [true_loss, *true_gradients], strict=True
    ):
        assert (actual is None) == (eager is None)
        if actual is None:
            continue
        size = true.abs().max().clamp_min(1.0)
        allowed = 2 * (eager.double() - true).abs().max() + 64 * torch.finfo(torch.float32).eps * size
        assert (actual.double() - true).abs().max() <= allowed


def test_checkpoints_go_both_ways(example):
    original, accelerated = make(example), make(example)
    trained(example, original, 2)
    gk.accelerate(accelerated, verify=False)
    x = images(example)
    accelerated.load_state_dict(original.state_dict())
    fresh = make(example)
    fresh.load_state_dict(accelerated.state_dict())
    for model in (original, accelerated, fresh):
        model.train()
    mark_initialized(accelerated, fresh)
    expected = example.loss(original, x).item()
    assert example.loss(accelerated, x).item() == pytest.approx(expected, rel=1e-5)
    assert example.loss(fresh, x).item() == pytest.approx(expected, rel=1e-5)


def mark_initialized(*models: nn.Module) -> None:
    """What users must do after loading a dialect whose flag is not saved."""
    for model in models:
        for layer in model.modules():
            for flag in ("inited", "initialized"):
                if isinstance(getattr(layer, flag, None), bool):
                    setattr(layer, flag, True)
            if isinstance(getattr(layer, "init_on_next_batch", None), bool):
                layer.init_on_next_batch = False


def test_copies_and_pickles_stay_accelerated(example):
    model = make(example)
    trained(example, model, 2)
    picklable = can_be_pickled(model)
    gk.accelerate(model, verify=False)
    copies = [copy.deepcopy(model)]
    if picklable:
        copies.append(pickle.loads(pickle.dumps(model)))
    x = images(example)
    for copied in copies:
        assert len(gk.accelerate(copied, verify=False).patched) == example.layers
        assert all(type(one) is type(other) for one, other in zip(model.modules(), copied.modules(), strict=True))
        with torch.no_grad():
            for parameter in filter(torch.is_floating_point, copied.parameters()):
                parameter.mul_(1.01)  # the copy must use its own parameters
        reference = copy.deepcopy(copied)
        assert gk.restore(reference) == example.layers
        if not has_closures(model):
            assert example.loss(copied, x).item() == pytest.approx(example.loss(reference, x).item(), rel=1e-5)


def can_be_pickled(model: nn.Module) -> bool:
    """Whether the original can be pickled."""
    try:
        pickle.dumps(model)
    except (AttributeError, pickle.PicklingError):
        return False
    return True


def has_closures(model: nn.Module) -> bool:
    """Whether closures in attributes make a deep copy of the original use the original's layers."""
    return any(callable(getattr(layer, "flow_permutation", None)) for layer in model.modules())


def test_restore_undoes_it_and_calling_twice_changes_nothing(example):
    model = make(example)
    types, attributes = [type(layer) for layer in model.modules()], [set(vars(layer)) for layer in model.modules()]
    first = gk.accelerate(model, verify=False)
    patched = [type(layer) for layer in model.modules()]
    second = gk.accelerate(model, verify=False)
    assert [type(layer) for layer in model.modules()] == patched != types
    assert [layer.path for layer in second.patched] == [layer.path for layer in first.patched]
    assert gk.restore(model) == example.layers
    assert gk.restore(model) == 0
    assert [type(layer) for layer in model.modules()] == types
    assert [set(vars(layer)) for layer in model.modules()] == attributes
