"""Changes made to layers after ``accelerate``, and what layers do besides their formula: nothing is silently lost."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import random
import types

import pytest
import torch
from dialects import chrischute, openai, rosinality
from dialects.zoo import IgnoresContext
from FrEIA.modules import AffineCouplingOneSided
from nflows.nn.nets import ResidualNet
from nflows.transforms import ActNorm, AffineCouplingTransform, OneByOneConvolution
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import glow_kernels as gk
from glow_kernels.interop.patch import is_unchanged, patch_of

X = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))


class Coupling(rosinality.AffineCoupling):
    """With an option, a condition and a buffer that are read at every call."""

    alpha, condition = 1.0, None

    def __init__(self) -> None:
        super().__init__(4, 8)
        nn.init.normal_(self.net[-1].conv.weight, 0, 0.1)
        self.options = {"offset": 2.0}
        self.register_buffer("clamp", torch.tensor(3.0))

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        read, transformed = x.chunk(2, 1)
        h = self.run_network(read if self.condition is None else read + self.condition)
        raw, shift = h.chunk(2, 1)
        return read, transformed, self.alpha * torch.tanh(raw + self.options["offset"]) * self.clamp, self.shift(shift)

    def run_network(self, read: Tensor) -> Tensor:
        return self.net(read)

    def shift(self, shift: Tensor) -> Tensor:
        return shift

    def forward(self, x):
        read, transformed, log_s, shift = self.halves(x)
        return torch.cat([read, transformed * log_s.exp() + shift], 1), log_s.flatten(1).sum(1)

    def reverse(self, y):
        read, transformed, log_s, shift = self.halves(y)
        return torch.cat([read, (transformed - shift) * (-log_s).exp()], 1)


def flow(coupling: nn.Module | None = None) -> rosinality.Flow:
    """An initialised step."""
    step = rosinality.Flow(4, filter_size=8)
    step.coupling = Coupling() if coupling is None else coupling
    step(X)
    return step


def assert_same(one: nn.Module, other: nn.Module, x: Tensor = X) -> None:
    for actual, expected in zip(one(x), other(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


CHANGES = {
    "option": lambda step: setattr(step.coupling, "alpha", 0.1),
    "condition": lambda step: setattr(step.coupling, "condition", torch.ones(4, 2, 4, 4)),
    "item": lambda step: step.coupling.options.update(offset=1.0),
    "buffer": lambda step: step.coupling.clamp.fill_(2.0),
    "checkpoint": lambda step: step.load_state_dict(step.state_dict() | {"coupling.clamp": torch.tensor(2.0)}),
    "another layer": lambda step: setattr(step, "coupling", rosinality.AffineCoupling(4, 8)),
    "method": lambda step: setattr(
        step.coupling, "forward", types.MethodType(lambda self, x: (3 * x, x.flatten(1).sum(1)), step.coupling)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copy"])
def test_later_changes_take_effect(change, copied):
    original = flow()
    accelerated = copy.deepcopy(original)
    assert not gk.accelerate(accelerated, verify=False).left_alone
    if copied:
        accelerated = copy.deepcopy(accelerated)
    assert_same(accelerated, original)
    for step in (original, accelerated):
        torch.manual_seed(0)
        CHANGES[change](step)
    assert_same(accelerated, original)
    if change not in ("method", "condition"):
        assert not gk.accelerate(accelerated, verify=False).left_alone  # finds the new options
        assert all(patch_of(layer) is not None for layer in (accelerated, accelerated.coupling))
        assert is_unchanged(accelerated, accelerated.coupling)
        assert_same(accelerated, original)


def test_masks_loaded_from_a_checkpoint_take_effect():
    def make(mask):
        return AffineCouplingTransform(torch.tensor(mask), lambda inputs, outputs: ResidualNet(inputs, outputs, 8))

    fresh, trained = make([1, 0, 1, 0, 0, 1]), make([0, 1, 1, 0, 1, 0])
    gk.accelerate(fresh, verify=False)
    fresh.load_state_dict(trained.state_dict())
    assert_same(fresh, trained, torch.randn(3, 6))


class Storing(Coupling):
    def forward(self, x):
        y, self.log_det = super().forward(x)
        return y, self.log_det


class Checkpointing(Coupling):
    def run_network(self, read):
        return checkpoint(self.net, read, use_reentrant=False)


class WithoutAutocast(Coupling):
    def run_network(self, read):
        with torch.autocast("cpu", enabled=False):
            return self.net(read)


class WithAutocast(Coupling):
    def run_network(self, read):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(read).to(read.dtype)


class Verbose(Coupling):
    def forward(self, x):
        return (*super().forward(x), x)


class Refusing(rosinality.ActNorm):
    def forward(self, x):
        raise NotImplementedError


class WithScale(Coupling):
    """With a network that takes another argument too."""

    def __init__(self):
        super().__init__()
        self.net = ScaledNetwork(self.net)

    def run_network(self, read):
        return self.net(read, scale=self.alpha + 1.0)


class ScaledNetwork(nn.Sequential):
    def forward(self, x, scale=1.0):
        return scale * super().forward(x)


class BoundedShift(Coupling):
    def shift(self, shift):
        return shift.clamp(-10, 10)


class BoundedData(Coupling):
    def forward(self, x):
        return super().forward(x.clamp(-30, 30))


class BoundedInverse(rosinality.AffineCoupling):
    def reverse(self, y):
        return super().reverse(y).clamp(-30, 30)


class BoundedInverseScale(rosinality.AffineCoupling):
    def reverse(self, y):
        read, transformed = y.chunk(2, 1)
        raw, shift = self.net(read).chunk(2, 1)
        return torch.cat((read, transformed / torch.sigmoid(raw + 2).clamp(min=0.1) - shift), 1)


class BoundedLogDet(rosinality.AffineCoupling):
    def forward(self, x):
        scale = torch.sigmoid(self.net(x.chunk(2, 1)[0]).chunk(2, 1)[0] + 2)
        return super().forward(x)[0], scale.clamp(min=0.1).log().flatten(1).sum(1)


class BoundedInverseOfConvolution(openai.InvertibleConv1x1):
    def forward(self, x, logdet=None, reverse=False):
        z, logdet = super().forward(x, logdet, reverse)
        return z.clamp(-30, 30) if reverse else z, logdet


class BoundedActNorm(rosinality.ActNorm):
    def forward(self, x):
        scale = self.scale.clamp(min=0.05)
        return scale * (x + self.loc), x.shape[2] * x.shape[3] * scale.log().sum()


class ClippedConvolution(openai.InvertibleConv1x1):
    """As in a copy of SRFlow, which bounds the weight's singular values below; at first the bound has no effect."""

    def forward(self, x, logdet=None, reverse=False):
        with torch.no_grad():
            u, values, v = torch.linalg.svd(self.weight.double(), full_matrices=False)
            self.weight.copy_((u @ torch.diag(values.clamp(min=1e-3)) @ v).float())
        return super().forward(x, logdet, reverse)


class DecayingActNorm(rosinality.ActNorm):
    def forward(self, x):
        result = super().forward(x)
        self.loc.data.mul_(0.9)  # does not raise its version counter
        return result


class ActNormThatReturnsZero(openai.ActNorm2d):
    def forward(self, x, logdet=None, reverse=False):
        y, logdet = super().forward(x, logdet, reverse)
        return y, 0.0 if logdet is None else logdet


class UndefinedActNorm(rosinality.ActNorm):
    def forward(self, x):
        y, log_det = super().forward(x)
        return y, log_det.detach() * torch.nan


class WithoutGradientOfOffset(rosinality.ActNorm):
    def forward(self, x):
        height, width = x.shape[2:]
        return self.scale * (x + self.loc.detach()), height * width * self.scale.abs().log().sum()


class WithoutGradientOfLogDet(rosinality.ActNorm):
    def forward(self, x):
        y, log_det = super().forward(x)
        return y, log_det.detach()


class OtherInEvaluation(rosinality.ActNorm):
    def forward(self, x):
        y, log_det = super().forward(x)
        return y if self.training else 2 * y, log_det


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Verbose, "forward returns (Tensor, Tensor, Tensor), where such a layer would return (Tensor, Tensor)"),
        (lambda: Refusing(4), "forward fails when it is called as such layers are: NotImplementedError"),
        (Storing, "it stores its log_det"),
        (lambda: ClippedConvolution(4), "it changes its weight when it is called"),
        (lambda: DecayingActNorm(4), "it changes its loc when it is called"),
        (lambda: ActNormThatReturnsZero(4), "forward without logdet returns (Tensor, float), where such"),
        (Checkpointing, "it runs its network again in backward"),
        (WithoutAutocast, "it switches autocast on or off for its network"),
        (WithAutocast, "it switches autocast on or off for its network"),
        (WithScale, "its network is given more than some of the channels"),
        (BoundedShift, "the shift is not added"),
        (BoundedData, "forward with large numbers"),
        (lambda: BoundedInverse(4), "reverse with large numbers"),
        (lambda: BoundedInverseScale(4), "reverse with large network outputs"),
        (lambda: BoundedLogDet(4), "forward with large network outputs"),
        (lambda: BoundedInverseOfConvolution(4), "reverse with large numbers"),
        (lambda: BoundedActNorm(4), "forward with large numbers"),
        (lambda: UndefinedActNorm(4), "forward: result 1 of the original layer is not finite"),
        (lambda: WithoutGradientOfOffset(4), "forward: gradient of loc is there, and was not before"),
        (lambda: WithoutGradientOfLogDet(4), "forward: gradient of scale differs"),
        (lambda: OtherInEvaluation(4), "forward: result 0 differs"),
    ],
)
def test_layers_that_do_more_than_their_patch_are_not_patched(make, reason):
    row = gk.accelerate(make()).layers[0]
    assert not row.patched
    assert row.reason.startswith(reason)


def square(log_det: Tensor, x: Tensor) -> Tensor:
    """``log_det`` as computed by code that takes the height for the width."""
    return log_det * x.shape[2] / x.shape[3]


class SquareActNorm(rosinality.ActNorm):
    def forward(self, x):
        y, log_det = super().forward(x)
        return y, square(log_det, x)


class SquareFlowStep(openai.FlowStep):
    def normal_flow(self, x, logdet):
        y, changed = super().normal_flow(x, logdet)
        return y, logdet + square(changed - logdet, x)


class SquareCoupling(AffineCouplingTransform):
    def forward(self, inputs, context=None):
        outputs, log_det = super().forward(inputs)
        return outputs, square(log_det, inputs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SquareActNorm(4),
        lambda: SquareFlowStep(4, 8),
        lambda: SquareCoupling([0, 0, 1, 1], lambda inputs, outputs: nn.Conv2d(inputs, outputs, 1)),
    ],
    ids=["rosinality", "openai", "nflows"],
)
def test_layers_that_assume_square_images_are_not_patched(make):
    layer = make()
    row = next(row for row in gk.accelerate(layer).layers if row.path == "")
    assert row.reason.startswith("forward: result 1 differs by")


class ConditionalActNorm(ActNorm):
    def forward(self, inputs, context=None):
        outputs, log_det = super().forward(inputs)
        return outputs if context is None else outputs + context, log_det


class ConditionalCoupling(AffineCouplingTransform):
    def forward(self, inputs, context=None):
        return super().forward(inputs if context is None else inputs * context.exp(), context)


class TensorConditionalCoupling(AffineCouplingTransform):
    def forward(self, inputs, context=None):
        return super().forward(inputs + context.mean() if torch.is_tensor(context) else inputs, context)


class DictionaryActNorm(ActNorm):
    def forward(self, inputs, context=None):
        return super().forward(inputs + context["shift"] if isinstance(context, dict) else inputs)


class NamedCoupling(AffineCouplingTransform):
    def forward(self, inputs, context=None):
        return super().forward(inputs + context.shift if hasattr(context, "shift") else inputs, context)


class UnconditionalCoupling(AffineCouplingTransform):
    def forward(self, inputs, context=None):
        return super().forward(inputs)


def ignoring_context(inputs: int, outputs: int) -> nn.Module:
    return IgnoresContext(nn.Conv2d(inputs, outputs, 1))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (ConditionalActNorm(4), "it uses its context itself"),
        (ConditionalCoupling([0, 0, 1, 1], ignoring_context), "it uses its context itself"),
        (TensorConditionalCoupling([0, 0, 1, 1], ignoring_context), "it uses its context itself"),
        (DictionaryActNorm(4), "it uses its context itself"),
        (NamedCoupling([0, 0, 1, 1], ignoring_context), "it uses its context itself"),
        (UnconditionalCoupling([0, 0, 1, 1], ignoring_context), "forward: result 0 differs by"),
    ],
    ids=["actnorm", "coupling", "coupling of tensors", "actnorm of dictionaries", "coupling of names", "without"],
)
def test_layers_that_use_a_context_otherwise_are_not_patched(layer, reason):
    (row,) = gk.accelerate(layer).layers
    assert reason in row.reason


def test_convolutions_of_nflows_with_a_cache_are_accelerated_after_it_was_used():
    layer = OneByOneConvolution(4, using_cache=True).eval()
    expected, _ = layer(X)
    (row,) = gk.accelerate(layer).layers
    assert row.patched, row.reason
    layer.cache.weight.data.mul_(2)  # the cache is still used
    torch.testing.assert_close(layer(X)[0], 2 * expected)


class DirectedConv1x1(nn.Module):
    """As in wolf and MACOW, where ``inverse`` is a flag for the density direction."""

    def __init__(self, inverse=False):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(4, 4)).Q)
        self.inverse = inverse

    def forward(self, x):
        return torch.einsum("oc,bchw->bohw", self.weight, x), torch.slogdet(self.weight)[1]

    def backward(self, y):
        return torch.einsum("oc,bchw->bohw", self.weight.inverse(), y), -torch.slogdet(self.weight)[1]


@pytest.mark.parametrize("verify", [True, False])
def test_layers_with_a_square_matrix_but_another_signature_are_not_recognised(verify):
    assert not gk.accelerate(DirectedConv1x1(), verify=verify).layers


class HalfTheLogDet(openai.FlowStep):
    def normal_flow(self, x, logdet):
        y, changed = super().normal_flow(x, logdet)
        return y, logdet + 0.5 * (changed - logdet)


@pytest.mark.parametrize("style", ["chaiyujin", "y0ast"])
def test_steps_that_hold_closures_are_compared_too(style):
    step = HalfTheLogDet(4, 8, style=style)
    assert style == "chaiyujin" or callable(step.flow_permutation)
    (row,) = (row for row in gk.accelerate(step).layers if row.kind == "FlowStep")
    assert row.reason.startswith("forward: result 1 differs by")


@pytest.mark.parametrize("permutation", ["invconv", "shuffle"])
def test_reason_for_deep_copies_of_steps_is_that_they_use_layers_of_the_original(permutation):
    original = openai.FlowStep(4, 8, permutation, style="y0ast")
    report = gk.accelerate(copy.deepcopy(original))
    (row,) = (row for row in report.layers if row.kind == "FlowStep")
    assert row.reason == "a function of its own uses another step's layers, as in a deep copy: accelerate, then copy"
    assert "FlowStep" in {row.kind for row in gk.accelerate(original).layers if row.patched}


def test_global_hooks_see_no_copies_and_do_not_prevent_comparison():
    step = HalfTheLogDet(4, 8)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module), always_call=True)
    try:
        report = gk.accelerate(step)
        assert seen == []
        step(X, X.new_zeros(4))
        assert seen[-1] is step
    finally:
        handle.remove()
    assert "FlowStep" in {row.kind for row in report.left_alone}


class Unknown(nn.Module):
    """A layer that no dialect has."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x):
        return x + self.bias, None

    def reverse(self, y):
        return y - self.bias


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Unknown, "its Unknown is not patched: it is not a known layer"),
        (BoundedShift, "its BoundedShift is not patched: the shift is not added"),
        (lambda: rosinality.ActNorm(4), "its ActNorm is rosinality's ActNorm"),
    ],
)
def test_reason_for_a_step_names_the_layer_that_was_not_patched(make, reason):
    (row,) = (row for row in gk.accelerate(flow(make())).layers if row.kind == "Flow")
    assert not row.patched
    assert row.reason.startswith(reason)


class Conditional(rosinality.Flow):
    def forward(self, x, condition=None):
        y, log_det = super().forward(x)
        return (y if condition is None else y + condition), log_det

    def reverse(self, y, temperature=1.0):
        return super().reverse(temperature * y)


def test_arguments_are_those_of_the_original():
    original = Conditional(4, filter_size=8)
    original(X)
    accelerated = copy.deepcopy(original)
    assert not gk.accelerate(accelerated, verify=False).left_alone
    for call in (
        lambda step: step(x=X)[0],
        lambda step: step(X, None)[0],
        lambda step: step(X, condition=2.0)[0],
        lambda step: step(X, 2.0)[0],
        lambda step: step.reverse(y=X),
        lambda step: step.reverse(X, 0.5),
    ):
        torch.testing.assert_close(call(accelerated), call(original), rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match=r"forward\(\) got an unexpected keyword argument 'other'"):
        accelerated(X, other=1)
    step = openai.FlowStep(4, 8)
    step(X, X.new_zeros(4))
    gk.accelerate(step, verify=False)
    assert torch.equal(step(x=X, logdet=X.new_zeros(4))[1], step(X, X.new_zeros(4))[1])


class Logging(AffineCouplingOneSided):
    def forward(self, *args, **options):
        return super().forward(*args, **options)


@pytest.mark.parametrize("verify", [True, False])
def test_positional_arguments_are_not_lost(verify):
    layer = Logging([(4, 4, 6)], subnet_constructor=lambda inputs, outputs: nn.Conv2d(inputs, outputs, 1))
    x = torch.randn(2, 4, 4, 6)
    (expected,), _ = layer((x,), (), True)
    (row,) = gk.accelerate(layer, verify=verify).layers
    assert row.reason.startswith("its forward takes *args")
    assert torch.equal(layer((x,), (), True)[0][0], expected)


class WithFactor(rosinality.ActNorm):
    def forward(self, x, **options):
        y, log_det = super().forward(x)
        return options.get("factor", 1) * y, log_det


def test_arbitrary_keyword_arguments_take_effect():
    original = WithFactor(4)
    original(X)
    accelerated = copy.deepcopy(original)
    assert not gk.accelerate(accelerated).left_alone
    for options in ({}, {"factor": 2}):
        torch.testing.assert_close(accelerated(X, **options)[0], original(X, **options)[0])


def put_closure(layer: nn.Module) -> None:
    plain = layer.forward

    @functools.wraps(plain)
    def forward(*args, doubled=False, **options):
        return plain(*args, **options)

    layer.forward = forward


@pytest.mark.parametrize(
    "put", [put_closure, lambda layer: setattr(layer, "forward", torch.no_grad()(torch.no_grad()(layer.forward)))]
)
@pytest.mark.parametrize(
    "step", [rosinality.Flow(4, filter_size=8), openai.FlowStep(4, 8)], ids=["rosinality", "openai"]
)
def test_layers_with_a_forward_of_their_own_are_not_patched_and_never_run(step, put):
    step = copy.deepcopy(step)
    put(step.actnorm)
    put(step)
    before = copy.deepcopy(step.state_dict())
    reasons = [row.reason for row in gk.accelerate(step).layers if row.path in ("", "actnorm")]
    assert reasons == ["its forward is not that of its class, but was put on this layer"] * 2
    for name, value in step.state_dict().items():
        assert torch.equal(value, before[name])


def test_networks_with_a_forward_of_their_own_are_run_as_copies():
    coupling = rosinality.AffineCoupling(4, 8)
    coupling.net = nn.Sequential(nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    put_closure(coupling.net)
    (row,) = gk.accelerate(coupling).layers
    assert row.patched, row.reason
    assert coupling.net[1].num_batches_tracked == 0


def test_transforms_of_functions_and_batches_of_gradients():
    original = flow(rosinality.AffineCoupling(4, 8))
    nn.init.normal_(original.coupling.net[-1].conv.weight, 0, 0.1)
    accelerated = copy.deepcopy(original)
    gk.accelerate(accelerated, verify=False)
    results = []
    for step in (original, accelerated):

        def loss(x, step=step):
            y, log_det = step(x)
            return y.square().sum() - log_det.sum()

        x = X.clone().requires_grad_()
        y = step(x)[0]
        both = torch.autograd.grad(y, x, torch.stack([y.detach(), X]), is_grads_batched=True)[0]
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(X, X))).tangent
        results.append([grad(loss)(X), jvp(loss, (X,), (X,))[1], vmap(loss)(X[:, None]), both, tangent])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


class Scaled(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


@pytest.mark.parametrize("make", [lambda: rosinality.InvConv2d(4), lambda: openai.InvertibleConv1x1(4)])
def test_parametrizations_of_accelerated_layers_survive_restore(make):
    layer = make()
    arguments = (X, X.new_zeros(4)) if isinstance(layer, openai.InvertibleConv1x1) else (X,)
    original = copy.deepcopy(layer)
    gk.accelerate(layer, verify=False)
    for module in (layer, original):
        parametrize.register_parametrization(module, "weight", Scaled())
    for _ in range(2):
        for actual, expected in zip(layer(*arguments), original(*arguments), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        gk.restore(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is type(make())


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_scaled_convolutions_whose_weight_is_computed_are_not_patched(norm, verify):
    layer = rosinality.ZeroConv2d(4, 6)
    nn.init.normal_(layer.conv.weight)
    norm(layer.conv)
    layer.eval()
    expected = layer(X)
    (row,) = gk.accelerate(layer, verify=verify).layers
    assert row.reason == "the weight of its convolution is computed, as by weight_norm"
    torch.testing.assert_close(layer(X), expected)


class Halved(nn.Conv2d):
    def forward(self, x):
        return 0.5 * super().forward(x)


def with_stride(conv: nn.Conv2d) -> nn.Conv2d:
    conv.stride = (2, 2)
    return conv


INNER = {
    "class": lambda conv: Halved(4, 6, 3, padding=conv.padding, bias=conv.bias is not None),
    "wrapper": lambda conv: nn.Sequential(conv, nn.Tanh()),
    "option": with_stride,
}


@pytest.mark.parametrize("change", INNER)
@pytest.mark.parametrize(
    "make",
    [rosinality.ZeroConv2d, openai.InnerConv2dZeros, functools.partial(openai.InnerConv2d, kernel_size=3)],
    ids=["rosinality", "zeros", "actnorm"],
)
def test_replacing_the_convolution_inside_a_layer_takes_effect(make, change):
    layer = make(4, 6)
    nn.init.normal_(layer.conv.weight)
    layer(X)
    original = copy.deepcopy(layer)
    assert not gk.accelerate(layer, verify=False).left_alone
    for module in (original, layer):
        torch.manual_seed(0)
        module.conv = INNER[change](module.conv)
    torch.testing.assert_close(layer(X), original(X))
    gk.accelerate(layer)  # examines it again
    torch.testing.assert_close(layer(X), original(X), rtol=1e-4, atol=1e-4)
    gk.restore(layer)
    torch.testing.assert_close(layer(X), original(X))


def keep(layer: nn.Module, *, with_gradient: bool) -> list[Tensor]:
    """The tensors that ``layer`` will return or, in backward, the gradients of its inputs: the very objects."""
    seen: list[Tensor] = []
    if with_gradient:
        layer.register_full_backward_hook(lambda module, grads, _: seen.extend(grads))
    else:
        layer.register_forward_hook(lambda module, _, result: seen.append(result[0]))
    return seen


def keep_by_forward(layer: nn.Module) -> list[Tensor]:
    """The tensors that ``layer`` will return, by replacing the forward of the instance, as some tools do."""
    seen: list[Tensor] = []
    plain = layer.forward

    def forward(x):
        seen.append(plain(x))
        return seen[-1]

    layer.forward = forward
    return seen


WATCHED = {
    "result of an actnorm": (openai.InnerConv2d, lambda net: keep(net[0].actnorm, with_gradient=False)),
    "gradient of a convolution": (openai.InnerConv2d, lambda net: keep(net[2].conv, with_gradient=True)),
    "forward of a layer": (openai.InnerConv2d, lambda net: keep_by_forward(net[0])),
    "forward of a convolution": (functools.partial(nn.Conv2d, padding="same"), lambda net: keep_by_forward(net[0])),
}


@pytest.mark.parametrize("watched", WATCHED)
def test_tensors_that_are_observed_inside_a_network_are_not_overwritten(watched):
    make, watch = WATCHED[watched]
    original = rosinality.AffineCoupling(4, 8)
    original.net = nn.Sequential(make(2, 8, 3), nn.ReLU(), make(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    accelerated = copy.deepcopy(original)
    assert not gk.accelerate(accelerated, verify=False).left_alone
    results = []
    for coupling in (original, accelerated):
        coupling.net[0](X[:, :2])
        seen = watch(coupling.net)
        coupling(X.detach().requires_grad_())[0].square().sum().backward()
        results.append(seen)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_graph", [False, True])
def test_relu_of_minus_infinity_is_zero(with_graph):
    coupling = rosinality.AffineCoupling(4, 8)
    with torch.no_grad():
        coupling.net[0].bias.fill_(-torch.inf)
    assert not gk.accelerate(coupling, verify=False).left_alone
    with torch.set_grad_enabled(with_graph):
        assert coupling(X)[0].isfinite().all()


def test_replacing_the_forward_of_an_activation_takes_effect():
    original = rosinality.AffineCoupling(4, 8)
    nn.init.normal_(original.net[-1].conv.weight, 0, 0.1)
    accelerated = copy.deepcopy(original)
    assert not gk.accelerate(accelerated, verify=False).left_alone
    for coupling in (original, accelerated):
        coupling.net[1].forward = torch.tanh
    assert_same(accelerated, original)


class Raising(nn.Module):
    @property
    def reverse(self):
        raise LookupError


def test_models_that_are_hard_to_walk_through():
    model = nn.Sequential(flow(), nn.LazyLinear(3), nn.Embedding(8, 8), Raising())
    paths = {row.path.partition(".")[0] for row in gk.accelerate(model, verify=False).patched}
    assert paths == {"0"}
    coupling = model[0].coupling
    gk.accelerate(coupling.net[:3], verify=False)
    new = type(coupling)()
    assert patch_of(new) is None
    assert_same(new, copy.deepcopy(new))
    gk.accelerate(new, verify=False)
    assert type(new) is type(coupling)


def test_default_device_and_random_numbers_of_python_do_not_matter():
    random.seed(0)
    expected = random.random()

    class Drawing(Coupling):
        def run_network(self, read):
            random.random()
            return self.net(read)

    step, actnorm = flow(Drawing()), rosinality.ActNorm(4)
    random.seed(0)
    with torch.device("meta"):
        assert not gk.accelerate(step, verify=False).left_alone
        assert not gk.accelerate(actnorm).left_alone
    assert random.random() == expected


def test_autocast_of_the_caller_does_not_matter():
    with torch.autocast("cpu", torch.bfloat16):
        assert not gk.accelerate(flow()).left_alone


def precisions() -> list[object]:
    """The precision of float32 products: the newer settings, and the older ones if they can be read."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    places = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul, mkldnn.conv, mkldnn.matmul)
    told: list[object] = [place.fp32_precision for place in places]
    for older in (torch.get_float32_matmul_precision, lambda: cudnn.allow_tf32):
        with contextlib.suppress(RuntimeError):
            told.append(older())
    return told


@pytest.fixture(params=["as they are", "older", "newer", "both"])
def low_precision(request):
    newer = (torch.backends.cuda.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul)
    before = [place.fp32_precision for place in newer]
    if request.param in ("older", "both"):
        torch.set_float32_matmul_precision("medium")
    if request.param in ("newer", "both"):
        torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.mkldnn.conv.fp32_precision = "bf16"
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    for place, precision in zip(newer, before, strict=True):
        place.fp32_precision = precision


@pytest.mark.usefixtures("low_precision")
def test_layers_are_compared_in_full_float32_whatever_the_matmul_precision():
    seen = []

    class Convolution(rosinality.InvConv2d):
        def forward(self, x):
            seen.append(precisions()[:5])
            return super().forward(x)

    before = precisions()
    assert not gk.accelerate(Convolution(4)).left_alone
    assert seen.count(["ieee"] * 5) == len(seen) > 0
    assert precisions() == before


def network(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), *layers, nn.Conv2d(8, 4, 3, padding=1))


class Average(nn.Module):
    """Keeps averages in two buffers: one changes without raising its version counter, the other is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.zeros(8))
        self.register_buffer("other", torch.zeros(8))

    def forward(self, x):
        mean = x.detach().mean((0, 2, 3))
        if self.training:
            self.one.data.lerp_(mean, 0.1)
            self.other = self.other.lerp(mean, 0.1)
        return x


def both_ways(steps: nn.Module, between=lambda step: None) -> list[Tensor]:
    """Gradients and buffers after one training step."""
    torch.manual_seed(0)
    y, log_det = steps(X)
    between(steps)
    (y.square().sum() - log_det.sum()).backward()
    return [parameter.grad for parameter in steps.parameters()] + [buffer.clone() for buffer in steps.buffers()]


@pytest.mark.parametrize("between", [lambda step: None, lambda step: step.eval()], ids=["training", "evaluation"])
def test_networks_run_again_as_in_forward_and_change_their_buffers_once(between):
    original = rosinality.AffineCoupling(4, 8)
    original.net = network(Average(), nn.BatchNorm2d(8), nn.Dropout(0.3), nn.ReLU())
    accelerated = copy.deepcopy(original)
    assert gk.accelerate(accelerated, memory="anchor").layers[0].memory == "anchor"
    expected, actual = (both_ways(step, between) for step in (original, accelerated))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def with_another_option(step: nn.Module) -> None:
    step.coupling.alpha = 0.1
    if patch_of(step) is not None:
        gk.accelerate(step, memory="checkpoint", verify=False)


@pytest.mark.parametrize("memory", ["checkpoint", "invert"])
@pytest.mark.parametrize("between", [gk.restore, with_another_option])
def test_patching_or_restoring_a_step_after_its_forward_does_not_affect_its_backward(between, memory):
    original = flow()
    accelerated = copy.deepcopy(original)
    gk.accelerate(accelerated, memory=memory, verify=False)
    expected, actual = (both_ways(step, between) for step in (original, accelerated))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "memory"),
    [(nn.BatchNorm2d(8, track_running_stats=False), "store"), (nn.Dropout(0.3), "anchor"), (nn.ReLU(), "anchor")],
)
def test_networks_that_mix_samples_allow_no_micro_batches(layer, memory):
    coupling = rosinality.AffineCoupling(4, 8)
    coupling.net = network(layer)
    row = gk.accelerate(coupling, memory="anchor", micro_batches=2).layers[0]
    assert row.memory == memory
    assert ("its network mixes samples" in row.memory_reason) == (memory == "store")


def test_the_first_batch_changes_statistics_once():
    original = chrischute.Glow(4, 8, 2)
    accelerated = copy.deepcopy(original)
    gk.accelerate(accelerated, memory="anchor", verify=False)
    for model in (original, accelerated):
        chrischute.loss(model, torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))).backward()
    for actual, expected in zip(accelerated.buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_states_of_a_chain_can_be_saved():
    step = flow()
    gk.accelerate(step, memory="anchor", verify=False)
    state, _ = step(X)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False), state)


def test_note_for_models_without_steps_says_that_memory_has_no_effect():
    report = gk.accelerate(rosinality.ActNorm(4), memory="anchor")
    assert report.note == "no step was found that memory='anchor' applies to"
