"""Chains that recompute states give the gradients of chains that keep everything.

The truth is plain autograd through the same steps, ``memory="store"``, in float64. Then everything that earlier
reversible libraries got wrong: ``torch.autograd.grad``, inputs without gradients, second backwards, hooks, dropout,
autocast, shared and frozen parameters, context.
"""

from __future__ import annotations

import copy
import functools
import gc
import random
import weakref
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from test_nn import ready
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import glow_kernels as gk
from glow_kernels import ReversibleSequential
from glow_kernels.backends import select
from glow_kernels.bench.live_storages import LiveStorages
from glow_kernels.nn import CouplingNetwork, FlowStep, Squeeze
from glow_kernels.reversible.guards import CHECKS
from glow_kernels.reversible.offload import OffloadedAnchors
from glow_kernels.reversible.plain_step import PlainStep
from glow_kernels.training.ema import MovingAverage

RECOMPUTING = ["checkpoint", "anchor", "invert"]
CONTIGUOUS = torch.contiguous_format


class Scaling(nn.Module):
    """A user's layer with log-determinant and inverse in plain PyTorch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.linspace(-0.2, 0.3, channels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp()[:, None, None], self._log_det(x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z * (-self.log_scale).exp()[:, None, None], -self._log_det(z)

    def _log_det(self, x: Tensor) -> Tensor:
        return (self.log_scale.sum() * x[0, 0].numel()).expand(len(x))


class Conditioned(nn.Module):
    """A network that also takes a vector per sample, with optional dropout."""

    def __init__(self, channels: int, outputs: int, context: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.embed = nn.Linear(context, 8) if context else None
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Conv2d(8, outputs, 3, padding=1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.first(x)
        if self.embed is not None and context is not None:
            h = h + self.embed(context)[:, :, None, None]
        return 0.3 * self.last(self.dropout(torch.tanh(h)))


def flow_steps(count: int, channels: int = 6, **options) -> list[nn.Module]:
    return [FlowStep(channels, 8, **options) for _ in range(count)]


def chain(steps: list[nn.Module], x: Tensor, *context: Tensor) -> ReversibleSequential:
    """The steps, initialised and moved off their initial values, in a chain that keeps everything."""
    return ready(ReversibleSequential(steps, "store"), x, *context)


def recomputing(plain: ReversibleSequential, memory: str, **options) -> ReversibleSequential:
    """The same steps in a chain that recomputes states."""
    return ReversibleSequential(list(plain), memory, **options).train(plain.training)


def weighted(results: tuple[Tensor, Tensor], use: str = "both") -> Tensor:
    """A scalar that depends on every element of z and the log-determinant, or of only one of them."""
    z, log_det = results
    weights = torch.linspace(-1.0, 1.0, z.numel(), dtype=z.dtype).view(z.shape)
    parts = {"z": (z * weights + z.square()).sum(), "log_det": (log_det * weights.flatten()[: len(z)]).sum()}
    return parts[use] if use in parts else parts["z"] + parts["log_det"]


def gradients(module: nn.Module, x: Tensor, *context: Tensor, use: str = "both", wrt: str = "all") -> list[Tensor]:
    """Results, then the gradients in x, context and parameters."""
    x = x.detach().requires_grad_(wrt == "all")
    context = tuple(c.detach().requires_grad_(c.is_floating_point()) for c in context)
    leaves = [t for t in (x, *context, *module.parameters()) if t.requires_grad]
    results = module(x, *context)
    grads = torch.autograd.grad(weighted(results, use), leaves, materialize_grads=True)
    return [*(result.detach() for result in results), *grads]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Check the relative L2 difference of all tensors."""
    assert len(actual) == len(expected)
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.isfinite().all(), number
        assert (one - other).norm() <= tolerance * other.norm(), number


LAYOUTS = {
    "contiguous": lambda x: x,
    "permuted": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat((x, x), dim=1)[:, ::2],
}


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("coupling", ["affine", "additive"])
@pytest.mark.parametrize("count", [1, 4, 33])
def test_gradients_are_those_of_autograd(backend, count, coupling, memory):
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    plain = chain(flow_steps(count, coupling=coupling), x)
    assert_same(gradients(recomputing(plain, memory), x), gradients(plain, x), 1e-9)


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("use", ["both", "z", "log_det"])
def test_layouts_of_the_input_and_parts_of_the_output(use, layout, memory):
    x = LAYOUTS[layout](torch.randn(5, 4, 3, 6, dtype=torch.float64))
    plain = chain([*flow_steps(3, x.shape[1]), Scaling(x.shape[1]), *flow_steps(2, x.shape[1], mixing="plain")], x)
    assert_same(gradients(recomputing(plain, memory), x, use=use), gradients(plain, x, use=use), 1e-9)


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("coupling", ["affine", "additive"])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_glow_of_three_levels(steps, coupling, memory):
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64) - 0.5
    options = {"steps": steps, "levels": 3, "hidden_channels": 4, "coupling": coupling}
    plain = ready(gk.models.Glow(1, 8, **options), torch.rand(64, 1, 8, 8, dtype=torch.float64) - 0.5)
    model = gk.models.Glow(1, 8, **options, memory=memory, micro_batches=2).double()
    model.load_state_dict(plain.state_dict())
    results = []
    for one in (model, plain):
        one.zero_grad()
        log_prob = one.log_prob(x)
        log_prob.mean().backward()
        results.append([log_prob.detach(), *(p.grad for p in one.parameters())])
    assert_same(*results, 1e-9)


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_a_level_whose_latent_is_not_used(memory):
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64) - 0.5
    plain = ready(gk.models.Glow(1, 8, steps=3, levels=2, hidden_channels=4), x)
    first = list(plain.levels[0].steps)
    results = []
    for policy in ("store", memory):
        z, log_det = ReversibleSequential(first, policy)(plain.levels[0].squeeze(x)[0])
        loss = z[:, :2].square().sum() + log_det.sum()  # half of the channels are not used
        results.append(torch.autograd.grad(loss, [p for step in first for p in step.parameters()]))
    assert_same(*map(list, results), 1e-9)


@pytest.mark.parametrize("micro_batches", [2, 3, 5, 8])
@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("check", ["off", "replay"])
def test_micro_batches(memory, micro_batches, check):
    x, context = torch.randn(5, 6, 4, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    steps = [FlowStep(6, network=Conditioned(3, 6, context=3)) for _ in range(6)]
    plain = chain(steps, x, context)
    model = recomputing(plain, memory, micro_batches=micro_batches, check=check)
    assert_same(gradients(model, x, context), gradients(plain, x, context), 1e-9)


class Shifting(Scaling):
    """A layer with two shifts, to which autograd gives the same tensor as gradient."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.shifts = nn.ParameterList([torch.zeros(channels, 1, 1), torch.ones(channels, 1, 1)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x)
        return z + (self.shifts[0] + self.shifts[1]), log_det

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return super().inverse(z - (self.shifts[0] + self.shifts[1]))


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_parts_of_gradients_that_are_one_tensor(memory):
    x = torch.randn(4, 6, 4, 5, dtype=torch.float64)
    plain = chain([Shifting(6), Shifting(6)], x)
    assert_same(gradients(recomputing(plain, memory, micro_batches=2), x), gradients(plain, x), 1e-9)


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("check", CHECKS)
def test_an_empty_batch(memory, check):
    x = torch.randn(3, 6, 4, 4)
    model = recomputing(chain(flow_steps(5), x), memory, check=check, anchor_every=2)
    z, log_det = model(x[:0].requires_grad_())
    assert z.shape == (0, 6, 4, 4)
    assert log_det.shape == (0,)
    (z.sum() + log_det.sum()).backward()
    assert all((p.grad == 0).all() for p in model.parameters())


class Scalar(nn.Module):
    """A flow of single numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.log_scale.expand(len(x))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z * (-self.log_scale).exp(), -self.log_scale.expand(len(z))


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("check", CHECKS)
def test_states_that_are_numbers(memory, check):
    x = torch.randn(5, dtype=torch.float64)
    plain = chain([Scalar() for _ in range(4)], x)
    model = recomputing(plain, memory, check=check, anchor_every=2)
    assert_same(gradients(model, x), gradients(plain, x), 1e-9)
    assert all(error < 1e-12 for error in model.drift().values())


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_squeeze_in_a_chain(memory):
    x = torch.randn(3, 2, 8, 4, dtype=torch.float64)
    plain = chain([*flow_steps(2, 2), Squeeze(), *flow_steps(5, 8), Squeeze(), *flow_steps(1, 32)], x)
    assert_same(gradients(recomputing(plain, memory), x), gradients(plain, x), 1e-9)


def test_checkpointed_steps_give_the_same_bits():
    x = torch.randn(3, 6, 4, 5)
    plain = chain(flow_steps(9), x)
    pairs = zip(gradients(recomputing(plain, "checkpoint"), x), gradients(plain, x), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_images_need_no_gradient(memory):
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    plain = chain(flow_steps(5), x)
    assert_same(gradients(recomputing(plain, memory), x, wrt="rest"), gradients(plain, x, wrt="rest"), 1e-9)


@pytest.mark.parametrize("frozen", ["network", "mixing", "actnorm", "first", "last"])
@pytest.mark.parametrize("memory", RECOMPUTING)
def test_frozen_parameters(memory, frozen):
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    plain = chain(flow_steps(5), x)
    if frozen in ("first", "last"):
        plain[0 if frozen == "first" else -1].requires_grad_(False)
    for name, parameter in plain.named_parameters():
        if f".{frozen}." in name:
            parameter.requires_grad_(False)
    for wrt in ("all", "rest"):
        assert_same(gradients(recomputing(plain, memory), x, wrt=wrt), gradients(plain, x, wrt=wrt), 1e-9)


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_tied_steps_and_networks(memory):
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    step, network = FlowStep(6, 8), CouplingNetwork(3, 6, 8)
    steps = [step, FlowStep(6, network=network), step, FlowStep(6, network=network), FlowStep(6, 8), step]
    plain = chain(steps, x)
    assert_same(gradients(recomputing(plain, memory), x), gradients(plain, x), 1e-9)


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_context_gets_its_gradient(memory):
    x, context = torch.randn(3, 6, 4, 5, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    plain = chain([FlowStep(6, network=Conditioned(3, 6, context=3)) for _ in range(5)], x, context)
    assert_same(gradients(recomputing(plain, memory), x, context), gradients(plain, x, context), 1e-9)
    z, log_det = recomputing(plain, memory)(x, context)
    back, inverse_log_det = plain.inverse(z, context)
    assert_same([back, -inverse_log_det], [x, log_det], 1e-9)
    assert_same(gradients(recomputing(plain, memory), x), gradients(plain, x), 1e-9)  # networks that can do without


class Outer(nn.Module):
    """A step that passes its input to a submodule."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = Scaling(channels)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x)

    def inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.inverse(z)


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_operations_can_be_counted(memory):
    # The counter puts hooks on the inputs of modules, including the context.
    x, context = torch.randn(4, 6, 4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    first, last = (FlowStep(6, network=Conditioned(3, 6, context=3)) for _ in range(2))
    plain = chain([first, Outer(6), last], x, context)
    model = recomputing(plain, memory, micro_batches=2)
    expected = gradients(plain, x, context)[2:]
    leaves = [x.requires_grad_(), context.requires_grad_(), *model.parameters()]
    with FlopCounterMode(display=False) as counter:
        weighted(model(x, context)).backward()
    assert_same([tensor.grad for tensor in leaves], expected, 1e-9)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_anomaly_detection_finds_nothing(memory):
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    plain = chain([FlowStep(6, network=Conditioned(3, 6)) for _ in range(3)], x)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        with torch.autograd.set_detect_anomaly(True):
            actual = gradients(recomputing(plain, memory), x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(actual, gradients(plain, x), 1e-9)


class Recurrent(nn.Module):
    """A recurrent network, which also keeps its weights in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.gru(x.flatten(2).transpose(1, 2))
        return h.transpose(1, 2).reshape(len(x), 6, *x.shape[2:])


@pytest.mark.parametrize(
    "network",
    [
        Recurrent,
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3, padding=1)),
        lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6).eval(), nn.LeakyReLU(inplace=True)),
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.GroupNorm(2, 6)),
    ],
    ids=["recurrent", "weight-norm", "batch-norm-in-evaluation", "group-norm"],
)
@pytest.mark.parametrize("memory", RECOMPUTING)
def test_networks_of_users(memory, network):
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    plain = chain([FlowStep(6, network=network()) for _ in range(5)], x)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert_same(gradients(recomputing(plain, memory), x), gradients(plain, x), 1e-9)


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("count", [1, 2])  # a single step folds by itself
def test_layers_of_a_network_may_share_parameters(memory, count):
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    steps = flow_steps(count)
    for step in steps:
        step.coupling.network.second.actnorm = step.coupling.network.first.actnorm
    plain = chain(steps, x)
    assert_same(gradients(recomputing(plain, memory), x), gradients(plain, x), 1e-9)


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_weights_that_parametrizations_cache_have_gradients(memory):
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    network = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3, padding=1))
    plain = chain(flow_steps(5, network=network), x)
    with parametrize.cached():
        actual = gradients(recomputing(plain, memory), x)
    assert_same(actual, gradients(plain, x), 1e-9)


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("draw", [random.random, np.random.random], ids=["python", "numpy"])
def test_numbers_of_other_generators_are_repeated(memory, draw):
    x = torch.randn(4, 6, 4, 5, dtype=torch.float64)
    steps = [FlowStep(6, network=Conditioned(3, 6)) for _ in range(4)]
    plain = chain(steps, x)
    for step in steps:
        step.coupling.network.register_forward_hook(lambda module, args, h: draw() * h)
    results = []
    for one in (plain, recomputing(plain, memory)):
        one(x)  # tried out
        random.seed(5)
        np.random.seed(5)
        results.append([*gradients(one, x), torch.tensor(draw(), dtype=torch.float64)])
    assert_same(*results, 1e-9)


class Differentiating(Scaling):
    """Computes its log-determinant by differentiating itself, even if gradients are disabled outside."""

    @torch.enable_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if x.requires_grad else x.requires_grad_()
        z, _ = super().forward(x)
        (diagonal,) = torch.autograd.grad(z.sum(), x, create_graph=True)
        return z, diagonal.log().flatten(1).sum(1)


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_steps_that_differentiate_themselves(memory, micro_batches):
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    plain = chain([FlowStep(6, 8), Differentiating(6), Differentiating(6)], x)
    model = recomputing(plain, memory, micro_batches=micro_batches)
    assert_same(gradients(model, x), gradients(plain, x), 1e-9)


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_dropout_is_repeated(memory, micro_batches):
    x = torch.randn(4, 6, 4, 5, dtype=torch.float64)
    plain = chain([FlowStep(6, network=Conditioned(3, 6, dropout=0.5)) for _ in range(5)], x)
    model = recomputing(plain, memory, micro_batches=micro_batches)
    model(x)  # tried out
    parameters = list(plain.parameters())
    results = []
    for one in (plain, model) if micro_batches == 1 else (recomputing(plain, "checkpoint", micro_batches=2), model):
        one.train()(x)
        torch.manual_seed(5)
        loss = weighted(one(x))
        one.eval()  # backward must repeat forward in the mode that it had
        results.append(list(torch.autograd.grad(loss, parameters)))
        assert not any(module.training for module in one.modules())
        results[-1].append(torch.rand(3).double())  # the random stream continues as without recomputation
    assert_same(*results, 1e-9)


class Relaid(FlowStep):
    """A step whose inverse returns its result in the other memory format."""

    def inverse(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse(z, *context)
        return x.contiguous(memory_format=CONTIGUOUS if x.stride(1) == 1 else torch.channels_last), log_det


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("format_", [CONTIGUOUS, torch.channels_last])
def test_dropout_is_repeated_for_states_in_another_memory_format(format_, micro_batches, memory):
    # Dropout assigns random numbers to elements in memory order.
    x = torch.randn(5, 6, 4, 5, dtype=torch.float64).contiguous(memory_format=format_)
    # Step 0 keeps its input, and step 2 draws nothing, so nothing fixes the format of the state it restores for step 1.
    plain = chain([Relaid(6, network=Conditioned(3, 6, dropout=dropout)) for dropout in (0.5, 0.5, 0.0, 0.5)], x)
    results = []
    for policy in ("checkpoint", memory):
        one = recomputing(plain, policy, micro_batches=micro_batches, check="flag")
        one.train()(x.requires_grad_())  # tried out
        torch.manual_seed(5)
        results.append(list(torch.autograd.grad(weighted(one(x)), [x, *plain.parameters()])))
    assert_same(*results, 1e-9)
    assert all(error < 1e-9 for error in one.drift().values())


def test_dropout_is_repeated_where_states_are_computed_again_from_an_anchor():
    x = torch.randn(5, 6, 4, 5, dtype=torch.float64)
    plain = chain([FlowStep(6, network=Conditioned(3, 6, dropout=0.5)) for _ in range(3)], x)
    results = []
    for options in ({}, {"check": "replay", "drift_limit": 0.0}):
        one = recomputing(plain, "anchor", **options)
        one.train()(x)  # tried out
        torch.manual_seed(5)
        results.append(list(torch.autograd.grad(weighted(one(x)), list(plain.parameters()))))
    assert_same(*results, 1e-9)


def test_one_leaf_is_differentiated_without_touching_others():
    x = torch.randn(3, 6, 4, 5)
    model = recomputing(chain(flow_steps(5), x), "anchor")
    leaf = model[2].coupling.network.last.weight
    (grad,) = torch.autograd.grad(weighted(model(x)), [leaf])
    assert grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_backward_twice_and_forward_twice(memory):
    x, other = torch.randn(2, 3, 6, 4, 5, dtype=torch.float64)
    plain = chain(flow_steps(5), x)
    model = recomputing(plain, memory)
    loss = weighted(model(x))
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    # Two forwards before their backwards, in the same order, as in gradient accumulation.
    losses = [weighted(model(x)), weighted(model(other))]
    for loss in losses:
        loss.backward()
    expected = torch.autograd.grad(weighted(plain(x)) + weighted(plain(other)), parameters)
    assert_same([p.grad for p in parameters], list(expected), 1e-9)


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("coupling", ["affine", "additive"])
@pytest.mark.parametrize("own_network", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_backward_overwrites_only_its_own_tensors(memory, coupling, own_network, micro_batches):
    # States and gradients between the steps are overwritten by earlier ones, which must not be observable.
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    steps = flow_steps(9, coupling=coupling)
    if not own_network:
        for step in steps:
            step.coupling.network = nn.Conv2d(3, 6 if coupling == "affine" else 3, 3, padding=1)
    plain = chain(steps, x)
    model = recomputing(plain, memory, micro_batches=micro_batches)
    z, log_det = model(x)
    grads = [torch.randn_like(z), torch.randn_like(log_det)]
    theirs = [tensor.detach().clone() for tensor in (x, z, *grads)]
    parameters = list(model.parameters())
    expected = torch.autograd.grad(plain(x), parameters, grads)
    for retain in (True, False):
        found = torch.autograd.grad((z, log_det), parameters, grads, retain_graph=retain)
        assert_same(list(found), list(expected), 1e-9)
        assert all(map(torch.equal, (x, z, *grads), theirs))


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_the_input_is_not_modified(memory):
    x = torch.randn(3, 6, 4, 5)
    model = recomputing(chain(flow_steps(5), x), memory)
    leaf = torch.tanh(x.clone().requires_grad_())  # the backward of tanh needs its output
    z, log_det = model(leaf)
    kept = leaf.detach().clone()
    (weighted((z, log_det)) + (leaf * z).sum()).backward()
    assert torch.equal(leaf.detach(), kept)
    with torch.no_grad():
        model(x)
    model.eval()(x)
    assert x.isfinite().all()


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_without_gradients_nothing_is_linked(memory):
    x = torch.randn(3, 6, 4, 5)
    plain = chain(flow_steps(3), x)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(recomputing(plain, memory)(x), plain(x), strict=True))
    plain.requires_grad_(False)
    z, log_det = recomputing(plain, memory)(x)
    assert not z.requires_grad
    assert not log_det.requires_grad


def test_hooks_run_once_and_see_the_gradient():
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    plain = chain(flow_steps(5), x)
    model = recomputing(plain, "anchor")
    calls: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: calls.update({name: calls.get(name, 0) + 1}) or 2.0 * grad)
    expected = gradients(plain, x)
    calls.clear()
    actual = gradients(model, x)
    assert set(calls.values()) == {1}
    assert len(calls) == len(list(model.parameters()))
    assert_same(actual, expected, 1e-9)


def test_hooks_of_steps_run():
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    plain = chain(flow_steps(5), x)
    model = recomputing(plain, "anchor")
    expected = gradients(plain, x)
    seen = []
    for step in model:
        step.register_forward_pre_hook(lambda module, args: seen.append(("before", len(args))))
        step.register_forward_hook(lambda module, args, output: seen.append(("after", len(args), len(output))))
        step.register_full_backward_hook(
            lambda module, grad_input, grad_output: seen.append(("backward", len(grad_input), len(grad_output)))
        )
    assert_same(gradients(model, x), expected, 1e-9)
    # The hooks get as many arguments and results as without a chain.
    assert seen == [("before", 1), ("after", 1, 2)] * 5 + [("backward", 1, 2)] * 5
    assert not any(step.coupling.network.frugal for step in model)  # the next caller may run backward twice


def test_an_overridden_forward_is_restored_after_hooks():
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    model = recomputing(chain(flow_steps(2), x), "anchor")
    own = model[1].forward = functools.partial(model[1].forward)
    model[1].register_forward_hook(lambda *_: None)
    assert_same(gradients(model, x), gradients(model, x), 1e-9)
    assert model[1].forward is own


def test_a_hook_that_fails_changes_no_later_call():
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    model = recomputing(chain(flow_steps(2), x), "anchor")
    expected = gradients(model, x)
    handle = model[1].register_forward_pre_hook(lambda *_: {}["missing"])
    with pytest.raises(KeyError):
        model(x)
    handle.remove()
    assert "forward" not in model[1].__dict__
    assert_same(gradients(model, x), expected, 1e-9)


class Failing(nn.Module):
    fails = False

    def forward(self, h: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("out of memory")
        return h


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_a_backward_that_fails_leaves_everything_as_it_was(memory):
    """Training may go on, with a smaller batch."""
    network = nn.Sequential(CouplingNetwork(3, 6, 8), Failing(), nn.Dropout(0.5))
    x = torch.randn(3, 6, 4, 5)
    model = recomputing(chain(flow_steps(2, network=network), x), memory).train()

    def state() -> tuple:
        modules = [(module.training, *map(id, module._parameters.values())) for module in model.modules()]
        return modules, network[0].frugal, parametrize._cache_enabled, torch.get_rng_state().tolist()

    loss = weighted(model(x))
    model.eval()
    network[1].fails = True
    before = state()
    with pytest.raises(RuntimeError, match=r"^step 1 \(FlowStep\): out of memory$"), parametrize.cached():
        loss.backward()
    assert state() == before


HOOKS = {
    "input": lambda step: step.register_forward_pre_hook(lambda _, args: 2.0 * args[0]),
    "input in place": lambda step: step.register_forward_pre_hook(lambda _, args: (args[0].mul_(2.0),)),
    "output": lambda step: step.register_forward_hook(lambda _, args, output: (2.0 * output[0], output[1])),
    "output in place": lambda step: step.register_forward_hook(
        lambda _, args, output: (output[0].mul_(2.0), output[1])
    ),
    "log_det": lambda step: step.register_forward_hook(lambda _, args, output: (output[0], 2.0 * output[1])),
    "cast": lambda step: step.register_forward_pre_hook(lambda _, args: args[0].double()),
}


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_that_change_something(memory, hook):
    if memory == "checkpoint" and "in place" in hook:
        pytest.skip("plain autograd, the truth, refuses it")
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    plain = chain(flow_steps(3), x)
    if hook == "cast":  # as FSDP does
        plain[0].register_forward_hook(lambda _, args, output: (output[0].float(), output[1]))
    HOOKS[hook](plain[1])
    model = recomputing(plain, memory)
    if memory == "checkpoint" or hook in ("log_det", "cast"):
        assert_same(gradients(model, x), gradients(plain, x), 1e-6 if hook == "cast" else 1e-9)
    else:
        with pytest.raises(RuntimeError, match=r"^step 1 \(FlowStep\): a hook changes its input or its output, which"):
            model(x)


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("network", [None, Conditioned])
def test_backward_computes_with_the_backend_of_forward(backend, monkeypatch, memory, network):
    asked = []
    owner, name = (network, "forward") if network else (PlainStep, "backward")
    original = getattr(owner, name)

    def watched(*args):
        asked.append(select())
        return original(*args)

    x = torch.randn(3, 6, 4, 5)
    options = {"network": network(3, 6)} if network else {}
    z, log_det = recomputing(chain(flow_steps(3, **options), x), memory)(x)
    monkeypatch.setattr(owner, name, watched)
    with gk.use_backend("reference" if backend != "reference" else gk.available_backends()[0]):
        weighted((z, log_det)).backward()
    assert set(asked) == {backend}


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_modules_changed_between_forward_and_backward_do_not_matter(memory):
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    plain = chain(flow_steps(5), x)
    model = recomputing(plain, memory)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(weighted(plain(x)), parameters)
    loss = weighted(model(x))
    model[1].coupling.network.register_forward_hook(lambda *_: None)
    model[2].coupling.network = CouplingNetwork(3, 6, 8)
    model[3].coupling.network.second.weight = nn.Parameter(torch.zeros(8, 8, 1, 1, dtype=torch.float64))
    assert_same(list(torch.autograd.grad(loss, parameters)), list(expected), 1e-9)


def test_a_dropped_output_is_freed_at_once():
    x = torch.randn(3, 6, 4, 5)
    model = recomputing(chain(flow_steps(5), x), "checkpoint")
    gc.collect()
    gc.disable()
    try:
        z, log_det = model(x)
        nodes = [weakref.ref(z), weakref.ref(log_det), weakref.ref(z.untyped_storage())]
        del z, log_det
        assert all(node() is None for node in nodes)
    finally:
        gc.enable()


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_a_dropped_chain_is_freed(memory):
    x = torch.randn(3, 6, 4, 5)
    model = recomputing(chain([*flow_steps(2), Scaling(6)], x), memory)
    weighted(model(x)).backward()
    node = weakref.ref(model)
    del model
    gc.collect()
    assert node() is None


@pytest.mark.parametrize("options", [{}, {"micro_batches": "auto", "memory_budget": 1e9}])
def test_only_the_first_call_tries_steps_out(options):
    x = torch.randn(3, 6, 4, 5)
    model = recomputing(chain(flow_steps(3, network=Conditioned(3, 6)), x), "anchor", **options)
    model(x)
    with patch.object(Conditioned, "forward", autospec=True, side_effect=Conditioned.forward) as calls:
        model(x)
    assert calls.call_count == 3


def test_copies_and_pickles_are_chains_of_their_own(tmp_path):
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    model = recomputing(chain(flow_steps(5), x), "anchor")
    expected = gradients(model, x)
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "chain.pt")
    loaded = torch.load(tmp_path / "chain.pt", weights_only=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    del model
    assert_same(gradients(twin, x), expected, 1e-12)
    assert_same(gradients(loaded, x), expected, 1e-12)


def test_parts_and_sums_are_chains_with_the_same_options():
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    plain = chain([*flow_steps(3), Scaling(6)], x)
    options = {"anchor_every": 2, "micro_batches": 2, "check": "flag", "offload_anchors": True, "drift_limit": 0.5}
    model = recomputing(plain, "anchor", **options)
    parts = [model[:2], model[:1] + model[1:], model * 2, 2 * model, model[:0:-1]]
    for part, indices in zip(parts, ([0, 1], range(4), [*range(4)] * 2, [*range(4)] * 2, [3, 2, 1]), strict=True):
        assert list(part) == [model[index] for index in indices]
        assert all(getattr(part, name) == value for name, value in {"memory": "anchor", **options}.items())
        expected = ReversibleSequential(list(part), "store")
        assert_same(gradients(part, x), gradients(expected, x), 1e-9)
    grown = model[:1]
    grown += model[1:2]
    grown.append(model[3]).insert(2, model[2]).extend(model[:1])
    grown[4] = model[1]
    assert list(grown) == [model[index] for index in (0, 1, 2, 3, 1)]
    assert_same(gradients(grown, x), gradients(ReversibleSequential(list(grown), "store"), x), 1e-9)


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_the_first_training_forward_initialises(memory):
    x = 2.0 + 3.0 * torch.randn(8, 6, 4, 5)
    plain = ReversibleSequential(flow_steps(5), "store")
    model = ReversibleSequential([copy.deepcopy(step) for step in plain], memory)
    for one in (plain, model):
        weighted(one(x)).backward()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    assert_same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()], 1e-5)


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_a_budget_initialises_from_the_whole_batch(memory):
    x = 2.0 + 3.0 * torch.randn(8, 6, 4, 5)
    plain = ReversibleSequential(flow_steps(2), "store")
    model = ReversibleSequential(copy.deepcopy(list(plain)), memory, micro_batches="auto", memory_budget=1e9)
    for one, other in zip(model(x), plain(x), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("memory", RECOMPUTING)
def test_autocast_is_repeated_in_backward(memory, backward_inside):
    x = torch.randn(4, 6, 8, 8)
    plain = chain(flow_steps(6), x)
    model = recomputing(plain, memory)

    def run(module: nn.Module) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            results = module(leaf)
            if backward_inside:
                return list(torch.autograd.grad(weighted(results), [leaf, *module.parameters()]))
        assert all(result.dtype == torch.float32 for result in results)
        return list(torch.autograd.grad(weighted(results), [leaf, *module.parameters()]))

    exact = gradients(plain, x)[2:]
    # Both round alike, but inverted states differ in the last place, which flips a few roundings to bfloat16.
    actual, expected = run(model), run(plain)
    assert_same(actual, expected, 1e-6 if memory == "checkpoint" else 2e-2)
    assert any((one - other).norm() > 1e-3 * other.norm() for one, other in zip(expected, exact, strict=True))


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_autocast_around_backward_alone_changes_nothing(memory):
    x = torch.randn(4, 6, 8, 8, requires_grad=True)
    model = recomputing(chain(flow_steps(6), x), memory)
    loss = weighted(model(x))
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(loss, [x, *model.parameters()])
    assert_same(actual, torch.autograd.grad(weighted(model(x)), [x, *model.parameters()]), 1e-7)


def test_gradient_scaler():
    x = torch.randn(4, 6, 8, 8)
    plain = chain(flow_steps(5), x)
    model = recomputing(plain, "anchor")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(weighted(model(x))).backward()
    expected = gradients(plain, x, wrt="rest")[2:]
    assert_same([p.grad / 1024.0 for p in model.parameters()], expected, 1e-5)


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_accumulated_steps_and_their_moving_average(memory):
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64) - 0.5
    start = ready(gk.models.Glow(2, 8, steps=3, levels=2, hidden_channels=4), x)
    averages = []
    for policy in ("store", memory):
        model = gk.models.Glow(2, 8, steps=3, levels=2, hidden_channels=4, memory=policy).double()
        model.load_state_dict(start.state_dict())
        average = MovingAverage(model, 0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for update in range(3):
            optimizer.zero_grad()
            for half in x.chunk(2):
                (model.bits_per_dim(half).mean() / 2).backward()
            optimizer.step()
            average.update(model, update)
        assert not torch.equal(average.model.log_prob(x), model.log_prob(x))
        averages.append([average.model.log_prob(x).detach(), *(p.detach() for p in average.model.parameters())])
    assert_same(*averages, 1e-9)


@pytest.mark.parametrize("options", [{"memory": "anchor"}, {"memory": "checkpoint"}, {"check": "replay"}])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_offloaded_anchors_give_the_same_bits(options, micro_batches):
    x = torch.randn(3, 6, 4, 5)
    plain = chain([*flow_steps(9), Scaling(6), *flow_steps(3)], x)
    options = {"memory": "anchor", "micro_batches": micro_batches, **options}
    expected = gradients(recomputing(plain, **options), x)
    actual = gradients(recomputing(plain, **options, offload_anchors=True), x)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_nothing_but_anchors_is_offloaded(monkeypatch):
    x = torch.randn(3, 6, 4, 5)
    moved: list[Tensor] = []
    calls: list[str] = []
    store, start_fetch = OffloadedAnchors.store, OffloadedAnchors._start_fetch

    def watched_store(self: OffloadedAnchors, state: Tensor) -> int:
        moved.append(state)
        return store(self, state)

    def watched_start_fetch(self: OffloadedAnchors, number: int):
        calls.append(f"fetch {number}")
        return start_fetch(self, number)

    monkeypatch.setattr(OffloadedAnchors, "store", watched_store)
    monkeypatch.setattr(OffloadedAnchors, "_start_fetch", watched_start_fetch)
    model = recomputing(chain(flow_steps(13), x), "anchor", offload_anchors=True)
    states = [x]
    with torch.no_grad():
        for step in model:
            states.append(step(states[-1])[0])
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        results = model(x)
    # Steps 3, 7 and 11 are anchors. Autograd keeps no state but the output of the chain.
    assert len(moved) == 3
    assert all(torch.equal(state, states[index]) for state, index in zip(moved, (3, 7, 11), strict=True))
    assert [t for t in saved if t.shape == x.shape and not torch.equal(t, results[0])] == []
    for retained in (True, False):
        calls.clear()
        torch.autograd.grad(weighted(results), list(model.parameters()), retain_graph=retained)
        assert calls == ["fetch 2", "fetch 1", "fetch 0"]
    calls.clear()
    offloaded = OffloadedAnchors(x.device)
    assert [offloaded.store(state) for state in states[:3]] == [0, 1, 2]
    kept = states[2].clone()
    states[2].zero_()
    offloaded.fetch(2).zero_()
    assert calls == ["fetch 2", "fetch 1"]  # one ahead
    assert torch.equal(offloaded.fetch(2), kept)


@pytest.mark.parametrize("memory", ["store", *RECOMPUTING])
@pytest.mark.parametrize("own_network", [True, False])
def test_a_loss_that_is_kept_keeps_no_states_after_backward(memory, own_network):
    # In a training loop it lives until the next forward has ended.
    options = {} if own_network else {"network": Conditioned(3, 6)}
    plain = chain(flow_steps(5, **options), torch.randn(3, 6, 4, 5))
    for offload in {False, memory in ("checkpoint", "anchor")}:
        model = recomputing(plain, memory, anchor_every=2, offload_anchors=offload)
        with LiveStorages([model]) as storages:
            x = torch.randn(3, 6, 4, 5)
            loss = weighted(model(x))
            torch.autograd.grad(loss, list(model.parameters()))
        assert storages.now == x.nbytes + loss.nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_offloaded_anchors_leave_the_gpu():
    x = torch.randn(16, 6, 64, 64, device="cuda")
    plain = chain(flow_steps(41), x.cpu()[:2].double()).float().cuda()
    kept, grads = [], []
    for offload in (False, True):
        model = recomputing(plain, "anchor", offload_anchors=offload)
        before = torch.cuda.memory_allocated()
        z, log_det = model(x)
        torch.cuda.synchronize()
        kept.append(torch.cuda.memory_allocated() - before)
        grads.append(torch.autograd.grad(z.square().sum() - log_det.sum(), list(model.parameters())))
    assert kept[0] - kept[1] >= 9 * x.nbytes
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_checkpointing_by_pytorch_works_with_the_operators(backend):
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    plain = chain(flow_steps(3, mixing="plain"), x)

    def checkpointed(x: Tensor) -> tuple[Tensor, Tensor]:
        results: tuple[Tensor, Tensor] = torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=False)
        return results

    x.requires_grad_()
    parameters = list(plain.parameters())
    actual, expected = (torch.autograd.grad(weighted(f(x)), parameters) for f in (checkpointed, plain))
    assert_same(list(actual), list(expected), 1e-12)


def test_checkpointing_by_pytorch_goes_around_a_chain_that_has_not_been_used_yet():
    model = ReversibleSequential([Scaling(6), Scaling(6)])
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    z, log_det = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    actual = torch.autograd.grad(weighted((z, log_det)), list(model.parameters()))
    assert_same(list(actual), list(torch.autograd.grad(weighted(model(x)), list(model.parameters()))), 1e-12)


def test_foreign_steps_run_in_a_chain_on_the_meta_device():
    with torch.device("meta"):
        x = torch.randn(3, 6, 4, 5, requires_grad=True)
        z, log_det = ReversibleSequential([Scaling(6), Scaling(6)], memory="invert")(x)
    (z.sum() + log_det.sum()).backward()
    assert x.grad.shape == x.shape
