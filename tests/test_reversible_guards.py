"""What a chain refuses, with an error that names the step, and what it warns about or accepts.

Steps that cannot be recomputed, changes between forward and backward, singular matrices, wrong options and arguments.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from test_nn import ready
from test_reversible import (
    RECOMPUTING,
    Conditioned,
    Scaling,
    assert_same,
    chain,
    flow_steps,
    gradients,
    recomputing,
    weighted,
)
from torch import nn

import glow_kernels as gk
from glow_kernels import ReversibleSequential
from glow_kernels.models import Glow
from glow_kernels.nn import FlowStep


class WrongInverse(Scaling):
    def inverse(self, z):
        return super().inverse(z)[0] * 1.01, -self._log_det(z)


class InPlace(Scaling):
    def forward(self, x):
        x.mul_(self.log_scale.exp()[:, None, None])
        return x, self._log_det(x)


class InPlaceInverse(Scaling):
    def inverse(self, z):
        return z.mul_((-self.log_scale).exp()[:, None, None]), -self._log_det(z)


class Counting(Scaling):
    """Changes with every call, though no tensor of it changes."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.log_scale.exp()[:, None, None] + 0.01 * self.calls, self._log_det(x)


class CountingLogDet(Scaling):
    """Like :class:`Counting`, but only the log-determinant changes."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        z, log_det = super().forward(x)
        return z, log_det + 0.01 * self.calls


class Lazy(Scaling):
    """Sets its parameter in the first forward."""

    done = False

    def forward(self, x):
        if not self.done:
            with torch.no_grad():
                self.log_scale.copy_(-x.std((0, 2, 3)).log())
        return super().forward(x)


class WithGenerator(Scaling):
    """Draws from its own generator, which a chain cannot rewind."""

    generator = torch.Generator()

    def forward(self, x):
        noise = torch.rand(x.shape, generator=self.generator, dtype=x.dtype)
        return x * self.log_scale.exp()[:, None, None] + 0.1 * noise, self._log_det(x)


class Storing(Scaling):
    """Stores a tensor that a loss may use."""

    def forward(self, x):
        z, log_det = super().forward(x)
        self.seen = [self.kept(z)]
        return z, log_det

    def kept(self, z):
        return z.abs().mean()


class StoringNumbers(Storing):
    def kept(self, z):
        return z.abs().mean().detach()


class OneResult(Scaling):
    def forward(self, x):
        return super().forward(x)[0]


class OneInverse(Scaling):
    def inverse(self, z):
        return super().inverse(z)[0]


class OneNumber(Scaling):
    def forward(self, x):
        return super().forward(x)[0], 0.0


class Borrowing(Scaling):
    """Uses a parameter that is not its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.borrowed = [nn.Parameter(torch.full((channels, 1, 1), 0.1))]

    def forward(self, x):
        z, log_det = super().forward(x)
        return z + self.borrowed[0].to(x.dtype), log_det

    def inverse(self, z):
        return super().inverse(z - self.borrowed[0].to(z.dtype))


REFUSED = {
    WrongInverse: "its inverse does not return its input: an error of 1.0e-02",
    InPlace: "it modifies its input in place in forward",
    InPlaceInverse: "it modifies its input in place in inverse",
    Counting: "it gives different results for the same input",
    CountingLogDet: "it gives different results for the same input",
    Lazy: "it modifies log_scale in place in forward",
    WithGenerator: "it gives different results for the same input",
    Storing: "it stores a result, seen, which has no gradients when it is recomputed: detach it, or use memory='store'",
    OneResult: r"it must return z and log_det of shape \(B,\), which is zero .* got a tensor \(2, 6, 4, 4\)",
    OneInverse: r"its inverse must return x and log_det of shape \(B,\), which is zero .* got a tensor \(2, 6, 4, 4\)",
    OneNumber: r"it must return z and log_det .* got \(a tensor \(2, 6, 4, 4\), float\)",
    Borrowing: r"it uses a tensor of shape \(6, 1, 1\) that requires a gradient and is neither a parameter of it nor",
}


@pytest.mark.parametrize("layer", REFUSED)
def test_layers_that_cannot_be_recomputed_are_refused(layer):
    x = torch.randn(4, 6, 4, 4, dtype=torch.float64)
    kept = x.clone()
    steps = [FlowStep(6, 8), layer(6), FlowStep(6, 8)]
    steps[0](x.float())
    steps[2](x.float())
    model = ReversibleSequential(steps, "anchor").double()
    with pytest.raises((RuntimeError, TypeError), match=rf"^step 1 \({layer.__name__}\): {REFUSED[layer]}"):
        weighted(model(x)).backward()
    assert torch.equal(x, kept)
    assert all(p.grad is None for p in steps[0].parameters())


def test_a_lone_tensor_is_not_unpacked_into_two_samples():
    x = torch.randn(2, 6, 4, 4)
    with pytest.raises(TypeError, match=r"^step 0: it must return z and log_det .* got a tensor"):
        ReversibleSequential([OneResult(6)], "store")(x)
    with pytest.raises(TypeError, match=r"^step 1: its inverse must return x and log_det .* got a tensor"):
        ReversibleSequential([Scaling(6), OneInverse(6)]).inverse(x)


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_numbers_and_weights_may_be_stored(memory):
    x = torch.randn(4, 6, 4, 4, dtype=torch.float64)
    with pytest.warns(FutureWarning):  # the older weight_norm, which stores a weight with an autograd graph
        network = nn.utils.weight_norm(nn.Conv2d(3, 6, 1))
    plain = chain([StoringNumbers(6), FlowStep(6, network=network)], x)
    assert_same(gradients(recomputing(plain, memory), x), gradients(plain, x), 1e-9)


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_a_layer_that_worked_is_checked_again(memory):
    x = torch.randn(4, 6, 4, 4, dtype=torch.float64)
    layer = Borrowing(6)
    layer.borrowed[0].requires_grad_(False)
    model = recomputing(chain([layer, Scaling(6)], x), memory)
    weighted(model(x)).backward()
    layer.borrowed[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match=rf"^step 0 \(Borrowing\): {REFUSED[Borrowing]}"):
        weighted(model(x)).backward()
    model[1] = Counting(6).double().train(model[1].training)
    with pytest.raises(RuntimeError, match=rf"^step 1 \(Counting\): {REFUSED[Counting]}"):
        model(x)


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("path", ["coupling.network.last", "mixing", "actnorm"])
def test_a_weight_in_place_of_a_parameter_is_an_error_and_not_a_missing_gradient(path, memory):
    x = torch.randn(4, 6, 4, 4, dtype=torch.float64)
    model = recomputing(chain([FlowStep(6, 8)], x), memory)
    module = model[0].get_submodule(path)
    name, weight = next(module.named_parameters())
    delattr(module, name)
    setattr(module, name, 2.0 * weight)
    with pytest.raises(RuntimeError, match=r"^step 0 \(FlowStep\): it uses a tensor .* that requires a gradient"):
        weighted(model(x)).backward()


class Sharing(Scaling):
    """Mixes the log-determinants of all samples in training."""

    def forward(self, x):
        z, log_det = super().forward(x)
        return z, log_det + x.sum() if self.training else log_det


def test_parts_of_a_batch_need_log_determinants_of_their_own_and_training_is_tried_out_too():
    x = torch.randn(4, 6, 4, 4)
    divided = ReversibleSequential([Sharing(6)], "checkpoint", micro_batches=2)
    divided.eval()(x)
    with pytest.raises(RuntimeError, match=r"^step 0 .* result for a sample depends on the others"):
        divided.train()(x)


def test_steps_that_are_replayed_together_have_no_hooks():
    x = torch.randn(4, 6, 4, 4)
    model = ReversibleSequential([Scaling(6), Scaling(6)], "anchor", check="replay")
    model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"^check='replay' runs several steps as one, without their hooks"):
        model(x)


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_parts_of_a_batch_need_steps_that_mix_no_samples(dropout, memory):
    x = torch.randn(5, 6, 4, 4, dtype=torch.float64)
    norms = [nn.GroupNorm(1, 3), nn.BatchNorm2d(3, track_running_stats=False)]
    steps = [FlowStep(6, network=nn.Sequential(norm, nn.Dropout(dropout), nn.Conv2d(3, 6, 1))) for norm in norms]
    plain = chain(steps, x).train()
    divided = recomputing(plain, memory, micro_batches=2)
    divided(x[:1])  # which has no parts
    with pytest.raises(
        RuntimeError, match=r"^step 1 .* result for a sample depends on the others .* use micro_batches=1$"
    ):
        divided(x)
    weighted(recomputing(plain, memory)(x)).backward()
    weighted(recomputing(plain[:1], memory, micro_batches=2)(x)).backward()


def test_checkpointed_layers_need_no_right_inverse():
    x = torch.randn(4, 6, 4, 4, dtype=torch.float64)
    plain = chain([WrongInverse(6), FlowStep(6, 8)], x)
    model = recomputing(plain, "checkpoint")
    assert_same(gradients(model, x), gradients(plain, x), 1e-9)
    model.memory = "invert"
    with pytest.raises(RuntimeError, match=REFUSED[WrongInverse]):
        model(x)


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_batch_norm_in_training_is_refused(memory):
    x = torch.randn(4, 6, 4, 4)
    steps = [FlowStep(6, network=nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 1))) for _ in range(2)]
    plain = chain(steps, x).train()
    message = r"^step 0 \(FlowStep\): it modifies coupling.network.0.num_batches_tracked in place in forward"
    with pytest.raises(RuntimeError, match=message):
        recomputing(plain, memory)(x)


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_parameters_changed_before_backward(memory):
    x = torch.randn(4, 6, 4, 4)
    model = recomputing(chain(flow_steps(5), x), memory)
    loss = weighted(model(x))
    with torch.no_grad():
        model[3].coupling.network.last.bias += 1.0
    with pytest.raises(RuntimeError, match=r"^step 3 \(FlowStep\): its parameters, .* were modified in place between"):
        loss.backward()


@pytest.mark.parametrize("memory", ["anchor", "invert"])
def test_output_modified_before_backward(memory):
    x = torch.randn(4, 6, 4, 4)
    model = recomputing(chain(flow_steps(3), x), memory)
    z, log_det = model(x)
    loss = z.sum() + log_det.sum()
    z.detach().add_(1.0)
    with pytest.raises(RuntimeError, match=r"^step 2 .* the state kept for it were modified in place"):
        loss.backward()


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_an_uninitialised_actnorm_in_evaluation(memory):
    model = ReversibleSequential(flow_steps(2), memory).eval()
    with pytest.raises(RuntimeError, match=r"^step 0 \(FlowStep\): ActNorm of 6 channels is not initialised"):
        model(torch.randn(4, 6, 4, 4))


@pytest.mark.parametrize("memory", ["anchor", "invert"])
def test_a_singular_matrix_is_named(memory):
    x = torch.randn(4, 6, 4, 4)
    model = recomputing(chain(flow_steps(3, mixing="plain"), x), memory)
    with torch.no_grad():
        model[1].mixing.weight[0] = 0.0
    with pytest.raises(ValueError, match=r"^step 1 \(FlowStep\): weight must be invertible, got a singular \(6, 6\)"):
        weighted(model(x)).backward()


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_second_derivatives_are_refused(memory):
    x = torch.randn(4, 6, 4, 4)
    model = recomputing(chain(flow_steps(3), x), memory)
    with pytest.raises(RuntimeError, match=r"^step 2 .* second derivatives with memory='store'"):
        torch.autograd.grad(weighted(model(x)), list(model.parameters()), create_graph=True)


def test_torch_func_is_refused():
    x = torch.randn(4, 6, 4, 4)
    model = recomputing(chain(flow_steps(3), x), "anchor")
    with pytest.raises(RuntimeError, match=r"use memory='store'$"):
        torch.func.grad(lambda x: weighted(model(x)))(x)


def replica(module):
    """A replica as DataParallel makes it for a device: parameters are copies with a graph, in plain attributes."""
    result = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        result._modules[name] = replica(child)
    for name, parameter in module._parameters.items():
        result.__dict__[name] = None if parameter is None else parameter.clone()
    return result


def test_data_parallel_needs_memory_store_and_initialised_layers():
    x = torch.randn(4, 6, 4, 4)
    model = chain(flow_steps(3), x)
    leaves = list(model.parameters())
    expected = torch.autograd.grad(weighted(model(x)), leaves)
    assert_same(torch.autograd.grad(weighted(replica(model)(x)), leaves), expected, 0.0)
    replicated = replica(recomputing(model, "anchor"))
    with pytest.raises(RuntimeError, match=r"^memory='anchor' cannot train in DataParallel: .* or memory='store'$"):
        replicated(x)
    with torch.no_grad():
        assert_same(replicated(x), model(x), 0.0)
    with pytest.raises(RuntimeError, match=r"^ActNorm .* cannot be initialised under DataParallel .*initialize"):
        replica(FlowStep(6, 4))(x)


BAD_OPTIONS = {
    "memory must be one of 'store', 'checkpoint', 'anchor', 'invert', got 'less'": {"memory": "less"},
    "check must be one of 'off', 'flag', 'raise', 'replay', got 'on'": {"check": "on"},
    "anchor_every must be at least 1, got 0": {"anchor_every": 0},
    "anchor_every must be a whole number, got 2.5": {"anchor_every": 2.5},
    "micro_batches other than 'auto' must be at least 1, got -2": {"micro_batches": -2},
    "micro_batches other than 'auto' must be a whole number, got 1.5": {"micro_batches": 1.5},
    "micro_batches other than 'auto' must be a whole number, got 'all'": {"micro_batches": "all"},
    "micro_batches must be 1 with memory='store', got 2": {"memory": "store", "micro_batches": 2},
    "memory_budget must be given with micro_batches='auto' and only then, got None": {"micro_batches": "auto"},
    "memory_budget must be given with micro_batches='auto' and only then, got 5": {"memory_budget": 5},
    "memory_budget must be at least 1 byte, got 0": {"micro_batches": "auto", "memory_budget": 0},
    "memory must be 'anchor' or 'checkpoint' with offload_anchors=True, got 'invert'": {
        "memory": "invert",
        "offload_anchors": True,
    },
    "memory_budget must be a number, got '1 GB'": {"micro_batches": "auto", "memory_budget": "1 GB"},
    "drift_limit must be at least 0, got nan": {"drift_limit": math.nan},
    "drift_limit must be a number, got 'low'": {"drift_limit": "low"},
    "steps must have at least one step, got none": {"steps": []},
    "steps must be modules with an inverse, got Scaling": {"steps": Scaling(2)},
    "step 1 must be a module with an inverse, got Conv2d": {"steps": [Scaling(2), nn.Conv2d(2, 2, 1)]},
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_options(message):
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        ReversibleSequential(**{"steps": [Scaling(2)], **BAD_OPTIONS[message]})


def test_what_is_no_tensor_is_refused():
    model = ReversibleSequential([Scaling(2)])
    with pytest.raises(TypeError, match=r"^x must be a tensor, got NoneType$"):
        model(None)
    with pytest.raises(TypeError, match=r"^z must be a tensor, got list$"):
        model.inverse([1.0])


def test_only_steps_can_be_added():
    model = ReversibleSequential([Scaling(2)])
    for add in (
        model.append,
        lambda step: model.insert(0, step),
        lambda step: model.extend([step]),
        lambda step: model.__iadd__(nn.Sequential(step)),
        lambda step: model + nn.Sequential(step),
        lambda step: model.__setitem__(0, step),
    ):
        with pytest.raises(TypeError, match=r"^step [01] must be a module with an inverse, got ReLU$"):
            add(nn.ReLU())
    with pytest.raises(ValueError, match=r"^steps must have at least one step, got none$"):
        _ = model[:0]
    assert len(model) == 1


def test_context_needs_the_batch():
    x = torch.randn(4, 6, 4, 4)
    model = recomputing(chain([FlowStep(6, network=Conditioned(3, 6, context=3))], x, torch.randn(4, 3)), "anchor")
    with pytest.raises(
        ValueError, match=r"^context 0 must be a tensor whose first dimension is the batch of x, 4, got \(1, 3\)$"
    ):
        model(x, torch.randn(1, 3))
    with pytest.raises(ValueError, match=r"^context 0 must be a tensor .* got int$"):
        model(x, 3)


def test_reconstruction_error_names_steps_and_matrices():
    x = torch.randn(4, 3, 8, 8)
    model = ready(Glow(3, 8, steps=3, levels=2, hidden_channels=8, mixing="plain", memory="anchor"), x)
    report = gk.reconstruction_error(model, x)
    assert set(report.steps) == {f"levels.{level}.steps.{step}" for level in range(2) for step in range(3)}
    assert 0 < max(report.steps.values()) < 1e-5
    assert max(report.steps.values()) <= report.error < 1e-5
    assert report.ill_conditioned == {}
    before = report.steps["levels.0.steps.1"]
    with torch.no_grad():
        rows = model.levels[0].steps[1].mixing.weight
        rows[0] = rows[1] + 1e-5 * rows[0]
    report = gk.reconstruction_error(model, x)
    assert list(report.ill_conditioned) == ["levels.0.steps.1.mixing"]
    assert 1e4 < report.ill_conditioned["levels.0.steps.1.mixing"] < 1e8
    assert report.steps["levels.0.steps.1"] > 10 * before
    assert "ill-conditioned: levels.0.steps.1.mixing (" in str(report)
    with pytest.raises(ValueError, match=r"^x must be \(B, C, H, W\)"):
        gk.reconstruction_error(model, x[:, :2])
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"^model must have a ReversibleSequential, got one without$"):
        gk.reconstruction_error(nn.Linear(2, 2), x)
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got int$"):
        gk.reconstruction_error(3, x)
    with pytest.raises(TypeError, match=r"^condition_limit must be a number, got 'low'$"):
        gk.reconstruction_error(model, x, condition_limit="low")


def test_forward_mode_derivatives_are_refused_by_name():
    chain = ReversibleSequential([FlowStep(4, 8), FlowStep(4, 8)])
    x = torch.randn(2, 4, 4, 4)
    chain(x)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"does not support forward-mode differentiation: use memory='store'"),
    ):
        chain(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
