"""``accelerate(model, memory=...)``: the same gradients with a fraction of the memory, whatever code runs the steps."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import nflows.transforms
import numpy as np
import pytest
import torch
from dialects import chrischute, openai, rosinality
from dialects.zoo import EXAMPLES, Example, normflows_glow, normflows_loss
from test_interop import can_be_pickled, images, make, mark_initialized, trained
from test_reversible_guards import replica
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import glow_kernels as gk
from glow_kernels.bench.live_storages import LiveStorages
from glow_kernels.interop import steps
from glow_kernels.interop.patch import memory_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated", "ignore:torch.triangular_solve is deprecated")
POLICIES = ("checkpoint", "anchor", "invert")
# One model of each dialect, and special cases: additive and inverted couplings; chrischute's have a learned gain.
CHOSEN = (
    "rosinality",
    "rosinality_additive",
    "chaiyujin",
    "y0ast_reverse",
    "pclucas14",
    "normflows",
    "normflows_sigmoid_inv",
    "nflows",
    "FrEIA",
    "FrEIA later",
    "chrischute",
    "survae",
)


def prepared(example: Example) -> nn.Module:
    """A model that has been trained for a few steps."""
    model = make(example)
    trained(example, model, 3)
    return model


def twin(example: Example, model: nn.Module) -> nn.Module:
    """Another model with the same state; not a deep copy, which does not work for closures."""
    other = make(example)
    other.load_state_dict(model.state_dict())
    mark_initialized(other)
    return other


def gradients(example: Example, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Loss, and gradients of data and parameters, by a backward of the whole model."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    loss = example.loss(model, x)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    return [loss.detach(), x.grad, *grads]


@pytest.mark.parametrize("name", CHOSEN)
def test_every_dialect_has_the_same_gradients_with_every_policy(name):
    example = EXAMPLES[name]
    model = prepared(example)
    others = [twin(example, model) for _ in POLICIES]
    x = images(example).double()
    expected = gradients(example, model.double(), x)
    for policy, other in zip(POLICIES, others, strict=True):
        keys = list(other.state_dict())
        # All are compared below; with one policy, verify shows that every step can be proven.
        report = gk.accelerate(other, memory=policy, anchor_every=2, verify=policy == "anchor")
        assert not report.left_alone
        rows = [row for row in report.layers if row.memory]
        assert [(row.path, row.memory_reason) for row in rows if row.memory != policy] == []
        assert rows
        assert list(other.state_dict()) == keys
        actual = gradients(example, other.double(), x)
        for one, two in zip(actual, expected, strict=True):
            # 1e-7: some layers round their log-determinant to float32 whatever their type.
            assert (one - two).abs().max() <= 1e-7 * two.abs().max().clamp_min(1.0)
        assert gk.restore(other) == example.layers
        assert all(memory_of(layer) is None for layer in other.modules())


class Shifted(nn.Module):
    """A network that adds a function of the context."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x, context=None):
        return self.layer(x) + (0.0 if context is None else self.read(context))

    read: Callable[[Any], Tensor]


CONTEXTS = {
    "a dictionary": (lambda c: {"scale": 2.0, "shift": c}, lambda context: context["scale"] * context["shift"]),
    "a pair": (lambda c: (c, c.exp()), lambda context: context[0] + context[1]),
    "an object": (lambda c: SimpleNamespace(shift=c), lambda context: context.shift),
    "the same for all": (lambda c: c[:1], lambda context: context),
    "of other things than samples": (lambda c: torch.cat([c, c]), lambda context: context.mean(0)),
    "samples second": (lambda c: torch.stack([c, 2 * c, c * c]), lambda context: context.mean(0)),
    "a number": (lambda c: c.sum(), lambda context: context),
}


@pytest.mark.parametrize("memory", ["checkpoint", "invert"])
@pytest.mark.parametrize("kind", CONTEXTS)
def test_networks_get_a_context_of_any_kind(kind, memory):
    make, read = CONTEXTS[kind]
    original = nflows.transforms.CompositeTransform(
        [nflows.transforms.AffineCouplingTransform([order, 1 - order] * 2, Shifted) for order in (0, 1)]
    ).double()
    for network in original.modules():
        if isinstance(network, Shifted):
            network.read = read
    accelerated = copy.deepcopy(original)
    assert not gk.accelerate(accelerated, memory=memory, micro_batches=2).left_alone
    x, c = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    results = []
    for model in (original, accelerated):
        leaves = [x.clone().requires_grad_(), c.clone().requires_grad_(), *model.parameters()]
        z, log_det = model(leaves[0], make(leaves[1]))
        loss = z.square().sum() - log_det.sum()
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "read",
    [lambda context: context.setdefault("cached", context["shift"].exp()), lambda context: context["shift"].exp_()],
    ids=["the dictionary", "a tensor"],
)
def test_a_network_that_changes_its_context_is_an_error(read):
    layer = nflows.transforms.AffineCouplingTransform([0, 1, 0, 1], Shifted)
    layer.transform_net.read = read
    gk.accelerate(layer, memory="anchor")
    with pytest.raises(RuntimeError, match="changes its context: use memory='store'"):
        layer(torch.randn(5, 4), {"shift": torch.randn(5, 4)})


@pytest.mark.parametrize("name", CHOSEN)
def test_a_training_run_from_the_first_batch_has_the_same_losses(name):
    example = EXAMPLES[name]
    original, accelerated = make(example).double(), make(example).double()
    gk.accelerate(accelerated, memory="anchor", anchor_every=2, micro_batches=2, verify=False)
    expected, actual = (trained(example, model, 6) for model in (original, accelerated))
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-6, atol=0.0)


def rosinality_glow(steps: int = 8) -> nn.Module:
    return rosinality.Glow(3, steps, 2, filter_size=64)


@pytest.mark.parametrize("memory", ["store", "anchor"])
@pytest.mark.parametrize("name", ["rosinality", "chaiyujin", "normflows", "nflows", "chrischute"])
def test_data_of_another_dtype_are_promoted_as_by_actnorm(name, memory):
    example = EXAMPLES[name]
    model = prepared(example)
    original = twin(example, model).double()
    gk.accelerate(model.double(), memory=memory, verify=False)
    x = images(example)
    for actual, expected in zip(gradients(example, model, x), gradients(example, original, x), strict=True):
        # normflows sums its log-determinants in the type of the data.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, check_dtype=name != "normflows")
    if name != "normflows" and name != "nflows":  # these two refuse integers
        x = (9 * x).long()
        torch.testing.assert_close(example.loss(model, x), example.loss(original, x))


def activation_bytes(model: nn.Module, loss, x: Tensor, **options) -> tuple[int, int]:
    """Bytes kept by the forward, and the peak of a training step; gradients of parameters do not count."""
    loss(model, x)
    if options:
        assert not gk.accelerate(model, verify=False, **options).left_alone
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    loss(model, x).backward()
    with LiveStorages([model]) as storages:
        value = loss(model, x)
        kept = storages.now
        value.backward()
    return kept, storages.peak


@pytest.mark.parametrize(
    ("build", "loss"),
    [(rosinality_glow, rosinality.loss), (lambda: normflows_glow(8, 2, 64, (3, 32, 32)), normflows_loss)],
    ids=["rosinality", "normflows"],
)
def test_anchors_take_a_fifth_of_the_activation_memory(build, loss):
    x = torch.randn(16, 3, 32, 32)
    original_kept, original_peak = activation_bytes(build(), loss, x)
    kept, peak = activation_bytes(build(), loss, x, memory="anchor")
    assert kept <= original_kept / 20
    assert peak <= original_peak / 5


def test_memory_grows_by_the_anchors_only():
    x = torch.randn(4, 3, 32, 32)
    kept = {
        (policy, steps): activation_bytes(rosinality_glow(steps), rosinality.loss, x, memory=policy)[0]
        for policy in POLICIES
        for steps in (4, 8)
    }
    # Besides states, every step keeps C x C tensors from folding its matrices.
    states = x.numel() * 4 * (1 + 1 / 2)
    small = 4 * 2 * 12 * 24 * 24 * 4
    for policy, number in (("checkpoint", 4), ("anchor", 1), ("invert", 0)):
        grown = kept[policy, 8] - kept[policy, 4]
        assert number * states <= grown <= number * states + small


def test_micro_batches_take_less_while_a_step_works():
    x = torch.randn(8, 3, 32, 32)
    working = []
    for parts in (1, 4):
        options = {"memory": "invert", "micro_batches": parts}
        kept, peak = activation_bytes(rosinality_glow(2), rosinality.loss, x, **options)
        working.append(peak - kept)
    assert working[1] < 0.5 * working[0]


def flows(number: int = 3, **options) -> nn.ModuleList:
    """Initialised steps whose networks do not start at zero."""
    chain = nn.ModuleList(rosinality.Flow(4, filter_size=4, **options) for _ in range(number))
    x = torch.randn(8, 4, 6, 6)
    for flow in chain:
        nn.init.normal_(flow.coupling.net[-1].conv.weight, 0, 0.1)
        x, _ = flow(x)
    return chain


@pytest.mark.parametrize("memory", POLICIES)
def test_a_loss_that_is_kept_keeps_no_state_after_its_backward(memory):
    chain = flows()
    gk.accelerate(chain, memory=memory, verify=False)
    x = torch.randn(4, 4, 6, 6)
    with LiveStorages([chain]) as storages:
        storages.ignore(x.detach())
        loss = weighted(in_turn(chain, x))
        torch.autograd.grad(loss, list(chain.parameters()))
        assert storages.now < x.nbytes


def in_turn(chain, x: Tensor) -> tuple[Tensor, Tensor]:
    total = 0
    for flow in chain:
        x, log_det = flow(x)
        total = total + log_det
    return x, total


def weighted(results: tuple[Tensor, Tensor]) -> Tensor:
    z, log_det = results
    return (z * z.detach().cos()).sum() + log_det.sin().sum()


def parameter_gradients(chain: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(weighted(in_turn(chain, x)), list(chain.parameters())))


def assert_equal(actual, expected) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_happens_to_a_state_between_steps_ends_the_chain():
    original = flows()
    x = torch.randn(4, 4, 6, 6)

    def interrupted(chain):
        y, one = chain[0](x)
        y, two = chain[1](2 * y)
        aside = chain[2](y)[0]  # a state that is used twice
        y, three = chain[2](y)
        return y + aside, one + two + three

    expected = torch.autograd.grad(weighted(interrupted(original)), list(original.parameters()))
    gk.accelerate(original, memory="invert", verify=False)
    actual = torch.autograd.grad(weighted(interrupted(original)), list(original.parameters()))
    assert_equal(actual, expected)


def test_a_state_that_is_modified_in_place_is_an_error_and_not_a_wrong_gradient():
    chain = flows(1)
    gk.accelerate(chain, memory="invert", verify=False)
    y, log_det = chain[0](torch.randn(4, 4, 6, 6))
    y.add_(1.0)
    with pytest.raises(RuntimeError, match=r"modified in place: use memory='checkpoint'"):
        log_det.sum().backward()


def test_a_state_that_is_modified_without_a_graph_before_the_next_step_is_an_error_too():
    chain = flows()
    gk.accelerate(chain, memory="invert", verify=False)
    y, _ = chain[0](torch.randn(4, 4, 6, 6))
    with torch.no_grad():
        y.add_(1.0)
    with pytest.raises(RuntimeError, match=r"modified in place: use memory='checkpoint'"):
        weighted(chain[1](y)).backward()


def test_a_missing_state_is_an_error_and_not_a_wrong_gradient():
    chain = flows(2)
    gk.accelerate(chain, memory="invert", verify=False)
    y, log_det = chain[0](torch.randn(4, 4, 6, 6))
    chain[1](y)  # has no part in the loss
    with pytest.raises(RuntimeError, match=r"is not part of what is differentiated: use memory='checkpoint'"):
        log_det.sum().backward()
    gk.accelerate(chain, memory="checkpoint", verify=False)
    y, log_det = chain[0](torch.randn(4, 4, 6, 6))
    chain[1](y)
    log_det.sum().backward()


@pytest.mark.parametrize("memory", POLICIES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_steps_that_the_model_itself_checkpoints(memory, use_reentrant):
    original = flows()
    accelerated = copy.deepcopy(original)
    gk.accelerate(accelerated, memory=memory, anchor_every=2, verify=False)
    results = []
    for chain in (original, accelerated):
        x = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        checkpointed = [functools.partial(checkpoint, step, use_reentrant=use_reentrant) for step in chain]
        weighted(in_turn([*checkpointed, chain[0]], x)).backward()
        results.append([x.grad, *(parameter.grad for parameter in chain.parameters())])
    assert_equal(*results)


def test_backward_twice_and_second_derivatives():
    chain = flows()
    gk.accelerate(chain, memory="anchor", anchor_every=2, verify=False)
    x = torch.randn(4, 4, 6, 6, requires_grad=True)
    loss = weighted(in_turn(chain, x))
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(once, again)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again: .* memory='store'"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_hooks_inside_of_a_step_see_every_call_once():
    chain = flows()
    expected = parameter_gradients(chain, x := torch.randn(4, 4, 6, 6))
    gk.accelerate(chain, memory="invert", verify=False)
    seen = []
    handle = chain[1].coupling.net[0].register_forward_hook(lambda *_: seen.append(1))
    assert_equal(parameter_gradients(chain, x), expected)
    assert len(seen) == 1
    handle.remove()
    assert_equal(parameter_gradients(chain, x), expected)
    layers = []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: layers.append(layer))
    try:
        assert_equal(parameter_gradients(chain, x), expected)
    finally:
        handle.remove()
    assert layers.count(chain[1].coupling.net[0]) == 1


class Counter(nn.Module):
    """Counts its calls in a buffer while ``counts`` is set."""

    counts = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.counts:
            self.calls += 1
        return x


@pytest.mark.parametrize("memory", POLICIES)
def test_a_buffer_that_changes_later_is_an_error_and_does_not_change_twice(memory):
    chain = flows()
    chain[1].coupling.net = nn.Sequential(nn.Conv2d(2, 4, 1), Counter())
    gk.accelerate(chain, memory=memory, verify=False)
    chain[1].coupling.net[1].counts = True
    with pytest.raises(RuntimeError, match=r"^it modifies module\.coupling\.net\.1\.calls in place in forward"):
        in_turn(chain, torch.randn(4, 4, 6, 6))


def test_running_statistics_change_once_and_random_numbers_are_the_same():
    chain = flows()
    for flow in chain:
        layers = [nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(8, 4, 1)]
        flow.coupling.net = nn.Sequential(*layers)
    other = copy.deepcopy(chain)
    x = torch.randn(4, 4, 6, 6)
    torch.manual_seed(3)
    expected = parameter_gradients(chain, x)
    report = gk.accelerate(other, memory="anchor", anchor_every=2)
    assert {row.memory for row in report.layers if row.memory} == {"anchor"}
    torch.manual_seed(3)
    assert_equal(parameter_gradients(other, x), expected)
    assert_equal(other.state_dict().values(), chain.state_dict().values())


class Stranger(nn.Conv2d):
    """A network with a parameter that is not its own."""

    def forward(self, x):
        return super().forward(x) * self.others[0]


class Moody(nn.Conv2d):
    """A network that computes something different in every call."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) * self.calls


class Storing(nn.Conv2d):
    """A network that stores a result that a loss may use."""

    def forward(self, x):
        result = super().forward(x)
        self.seen = [result.square().mean()]
        return result


@pytest.mark.parametrize(
    ("network", "options", "reason"),
    [
        (Stranger(2, 4, 1), {}, "its network uses parameters that are not its own"),
        (Moody(2, 4, 1), {}, "its network gives different results for the same input"),
        (Storing(2, 4, 1), {}, "its network stores its seen"),
        (
            nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)),
            {"micro_batches": 2},
            "its network changes its buffers, as BatchNorm does, which allows no micro-batches",
        ),
    ],
    ids=["stranger", "moody", "storing", "micro-batches"],
)
def test_networks_that_cannot_be_evaluated_again_keep_their_activations(network, options, reason):
    chain = flows(1)
    network.others = [nn.Parameter(torch.tensor(2.0))]
    chain[0].coupling.net = network
    report = gk.accelerate(chain, memory="invert", **options)
    row = next(row for row in report.layers if row.kind == "Flow")
    assert (row.patched, row.memory, row.memory_reason) == (True, "store", reason)
    assert f"keeps its activations: {reason}" in str(report)


class Excited(nn.Module):
    """A network for images whose first layer is one for vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.excite, self.last = nn.Linear(2, 2), nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x):
        return self.last(x * torch.sigmoid(self.excite(x.mean((2, 3))))[:, :, None, None])


def test_networks_are_evaluated_again_on_data_that_they_have_run_on():
    chain = flows(1)
    chain[0].coupling.net = Excited()
    report = gk.accelerate(chain, memory="anchor", micro_batches=2, verify=False)
    row = next(row for row in report.layers if row.kind == "Flow")
    assert (row.memory, row.memory_reason) == ("anchor", "")


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.ReLU()])
def test_networks_that_are_normalised_later_keep_their_activations_until_they_are_examined(layer):
    original = flows(2)
    for flow in original:
        flow.coupling.net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), copy.deepcopy(layer), nn.Conv2d(4, 4, 1))
    accelerated = copy.deepcopy(original)
    gk.accelerate(accelerated, memory="invert", verify=False)
    x = torch.randn(4, 4, 6, 6)
    assert_equal(parameter_gradients(accelerated, x), parameter_gradients(original, x))
    for chain in (original, accelerated):
        torch.manual_seed(0)
        for flow in chain:
            parametrizations.spectral_norm(flow.coupling.net[0])
    assert_equal(parameter_gradients(accelerated, x), parameter_gradients(original, x))
    report = gk.accelerate(accelerated, memory="invert", verify=False)
    reasons = {row.memory_reason for row in report.layers if row.kind == "Flow"}
    assert reasons == {"its network gives different results for the same input"}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.(weight|spectral)_norm` is deprecated")
@pytest.mark.parametrize(
    ("normalise", "reason"),
    [
        (nn.utils.weight_norm, ""),
        (parametrizations.weight_norm, ""),
        (nn.utils.spectral_norm, "its network gives different results for the same input"),
        (parametrizations.spectral_norm, "its network gives different results for the same input"),
    ],
)
def test_networks_with_normalised_weights_keep_little_if_they_compute_the_same_twice(normalise, reason):
    chains = []
    for _ in range(2):
        torch.manual_seed(0)
        chain = flows(2)
        for flow in chain:
            normalise(flow.coupling.net[0])
        chains.append(chain.double())
    original, accelerated = chains
    report = gk.accelerate(accelerated, memory="invert", micro_batches=2)
    assert {row.memory_reason for row in report.layers if row.kind == "Flow"} == {reason}
    x = torch.randn(4, 4, 6, 6, dtype=torch.float64)
    assert_equal(parameter_gradients(accelerated, x), parameter_gradients(original, x))


def test_a_weight_that_is_no_longer_a_parameter_is_an_error_and_not_a_missing_gradient():
    (flow,) = chain = flows(1)
    gk.accelerate(chain, memory="invert", verify=False)
    convolution = flow.coupling.net[0]
    weight = nn.Parameter(convolution.weight.detach().clone())
    del convolution.weight
    convolution.weight = 2 * weight
    with pytest.raises(RuntimeError, match=r"uses a tensor .* that requires a gradient"):
        weighted(flow(torch.randn(4, 4, 6, 6))).backward()
    gk.accelerate(chain, verify=False)
    weighted(flow(torch.randn(4, 4, 6, 6))).backward()
    assert weight.grad is not None


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_wrong_backward_is_not_used(monkeypatch, wrong):
    right = steps.backward_from_output

    def planted(*args):
        x, grad_x, grads = right(*args)
        return x, grad_x * wrong, grads

    monkeypatch.setattr(steps, "backward_from_output", planted)
    report = gk.accelerate(flows(1), memory="invert")
    row = next(row for row in report.layers if row.kind == "Flow")
    assert (row.patched, row.memory) == (True, "store")
    assert "gradient of" in row.memory_reason


def test_a_chain_with_wrong_states_is_not_used(monkeypatch):
    right = steps.backward_from_output

    def planted(*args):
        x, grad_x, grads = right(*args)
        return x + 1e-3, grad_x, grads  # only the step before sees the error

    monkeypatch.setattr(steps, "backward_from_output", planted)
    report = gk.accelerate(flows(3), memory="invert")
    rows = [row for row in report.layers if row.kind == "Flow"]
    assert {(row.patched, row.memory) for row in rows} == {(True, "store")}
    assert all(row.memory_reason.startswith("the chain of steps: gradient of") for row in rows)


def test_the_last_call_decides_and_the_same_call_changes_nothing():
    chain = flows()
    for policy in ("store", "anchor", "anchor", "invert", "store"):
        report = gk.accelerate(chain, memory=policy, verify=False)
        assert {row.memory for row in report.layers if row.memory} == {policy}
        kept = {None if memory is None else memory.policy for memory in map(memory_of, chain)}
        assert kept == {None if policy == "store" else policy}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "none"}, "memory must be one of"),
        ({"memory": "anchor", "anchor_every": 0}, "anchor_every must be at least 1, got 0"),
        ({"memory": "anchor", "micro_batches": 0.5}, "micro_batches must be a whole number, got 0.5"),
        ({"micro_batches": 2}, "micro_batches must be 1 with memory='store', got 2"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        gk.accelerate(flows(1), **options)


def test_numbers_may_be_those_of_numpy():
    chain = flows()
    gk.accelerate(chain, memory="anchor", anchor_every=np.int64(2), micro_batches=np.int64(2), verify=False)
    x = torch.randn(3, 4, 6, 6)
    actual = parameter_gradients(chain, x)
    assert gk.restore(chain)
    assert_equal(actual, parameter_gradients(chain, x))


@pytest.mark.parametrize("name", ["rosinality", "normflows", "chaiyujin"])
def test_copies_and_pickles_keep_as_little(name):
    example = EXAMPLES[name]
    model = prepared(example)
    picklable = can_be_pickled(model)
    gk.accelerate(model, memory="anchor", anchor_every=2, verify=False)
    x = images(example)
    expected = gradients(example, model, x)
    copies = [copy.deepcopy(model), *([pickle.loads(pickle.dumps(model))] if picklable else [])]
    for copied in copies:
        assert {memory_of(layer) for layer in copied.modules()} == {memory_of(layer) for layer in model.modules()}
        for one, other in zip(gradients(example, copied, x), expected, strict=True):
            assert torch.equal(one, other)


def test_compiled_steps_keep_their_inputs():
    chain = flows()
    x = torch.randn(4, 4, 6, 6)
    expected = parameter_gradients(chain, x)
    gk.accelerate(chain, memory="anchor", verify=False)
    in_turn(chain, x)  # reads the flags of its ActNorms
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: in_turn(chain, x), backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(weighted(compiled(x)), list(chain.parameters()))
    assert_equal(actual, expected)


def test_replicas_of_data_parallel_and_frozen_parameters():
    chain = flows()
    chain[1].coupling.requires_grad_(False)
    wanted = [parameter for parameter in chain.parameters() if parameter.requires_grad]
    x = torch.randn(4, 4, 6, 6)
    expected = torch.autograd.grad(weighted(in_turn(chain, x)), wanted)
    gk.accelerate(chain, memory="invert", verify=False)
    assert_equal(torch.autograd.grad(weighted(in_turn(chain, x)), wanted), expected)
    for layer in chain.modules():
        layer._is_replica = True  # parameters of replicas are not in named_parameters()
    assert_equal(torch.autograd.grad(weighted(in_turn(chain, x)), wanted), expected)


def test_replicas_of_data_parallel_initialise_themselves():
    original = chrischute.Glow(4, 8, 2)
    accelerated = copy.deepcopy(original)
    gk.accelerate(accelerated, memory="anchor", verify=False)
    x, results = torch.randn(4, 1, 8, 8), []
    for model in (accelerated, original):
        loss = chrischute.loss(replica(model), x)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert_equal(*results)


class Slow(nn.Conv2d):
    """A network that gives another thread half a second to run while backward evaluates it."""

    in_backward, resumed = threading.Event(), threading.Event()
    watched: threading.Thread | None = None

    def forward(self, x):
        if threading.current_thread() is self.watched and torch.is_grad_enabled():
            self.in_backward.set()
            self.resumed.wait(0.5)
        return super().forward(x)


@pytest.mark.parametrize("memory", POLICIES)
def test_several_threads_train_a_model(monkeypatch, memory):
    chain = flows()
    chain[1].coupling.net = Slow(2, 4, 1)
    batches = torch.randn(2, 4, 4, 6, 6)
    parameters = list(chain.parameters())
    expected = [parameter_gradients(chain, x) for x in batches]
    gk.accelerate(chain, memory=memory, verify=False)
    actual = {}

    def train(number):
        if number == 1:
            Slow.in_backward.wait(10)
        loss = weighted(in_turn(chain, batches[number]))
        Slow.resumed.set()
        actual[number] = torch.autograd.grad(loss, parameters)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    monkeypatch.setattr(Slow, "watched", threads[0])
    monkeypatch.setattr(Slow, "in_backward", threading.Event())
    monkeypatch.setattr(Slow, "resumed", threading.Event())
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert_equal(actual[number], expected[number])
    assert all(one is other for one, other in zip(chain.parameters(), parameters, strict=True))


def test_autocast_is_the_same_in_forward_and_backward():
    chain = flows()
    x = torch.randn(4, 4, 6, 6)
    gk.accelerate(chain, verify=False)
    with torch.autocast("cpu", torch.bfloat16):
        results = in_turn(chain, x)
    expected = torch.autograd.grad(weighted(results), list(chain.parameters()))
    gk.accelerate(chain, memory="checkpoint", verify=False)
    with torch.autocast("cpu", torch.bfloat16):
        results = in_turn(chain, x)
    actual = torch.autograd.grad(weighted(results), list(chain.parameters()))
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-5


def test_the_first_batch_initialises_without_keeping_activations():
    torch.manual_seed(0)
    model = openai.Glow(3, 64, 4, 1)
    x = torch.randn(8, 3, 16, 16)
    original = copy.deepcopy(model)
    gk.accelerate(model, memory="invert", verify=False)
    with LiveStorages([model]) as storages:
        loss = openai.loss(model, x)
        kept = storages.now
    with LiveStorages([original]) as storages:
        expected = openai.loss(original, x)
        original_kept = storages.now
    torch.testing.assert_close(loss, expected)
    assert kept < original_kept / 10
    for (name, one), other in zip(model.state_dict().items(), original.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["rosinality", "normflows"])
def test_moving_averages_of_models_that_keep_little(name):
    example = EXAMPLES[name]
    model = prepared(example)
    original = twin(example, model)
    report = gk.accelerate(model, memory="anchor", anchor_every=2, verify=False)
    averages = [AveragedModel(trainee, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for trainee in (original, model)]
    x = images(example)
    for trainee, average in zip((original, model), averages, strict=True):
        optimizer = torch.optim.SGD(trainee.parameters(), 1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            example.loss(trainee, x).backward()
            optimizer.step()
            average.update_parameters(trainee)
    kept, expected = averages[1].module, averages[0].module
    assert len(gk.accelerate(kept, memory="anchor", anchor_every=2, verify=False).patched) == len(report.patched)
    assert {memory_of(layer) for layer in kept.modules()} == {memory_of(layer) for layer in model.modules()}
    # The average computes with weights of its own.
    with torch.no_grad():
        losses = [example.loss(trained_or_averaged, x) for trained_or_averaged in (model, kept, expected)]
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[1], losses[2], rtol=1e-5, atol=0.0)
    assert_equal(gradients(example, kept, x)[2:], gradients(example, expected, x)[2:])
