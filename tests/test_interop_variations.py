"""Couplings with options that no known project combines: matched exactly, or not patched and unchanged.

The truth is the original layer. A patch that was made wrong on purpose must be refused.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dialects import openai, rosinality
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import glow_kernels as gk
from glow_kernels.interop import examiner
from glow_kernels.interop.patch import Call, Mismatch, options_of
from glow_kernels.interop.probe import Coupling
from glow_kernels.interop.proof import Agreement, _as_accurate
from glow_kernels.interop.scale_map import RAW_VALUES, fit_scale_map

# Scale functions by name: the operators' kinds with random parameters, and others.
SCALES: dict[str, Callable[[Tensor, float, float, float, float], Tensor]] = {
    "sigmoid": lambda u, slope, offset, gain, floor: gain * torch.sigmoid(slope * u + offset) + floor,
    "exp": lambda u, slope, offset, gain, floor: torch.exp(slope * u + offset) + floor,
    "tanh": lambda u, slope, offset, gain, floor: torch.exp(gain * torch.tanh(slope * u + offset)) + floor,
    "atan": lambda u, slope, offset, gain, floor: torch.exp(gain * torch.atan(slope * u + offset)) + floor,
    "softsign": lambda u, slope, offset, gain, floor: torch.exp(gain * F.softsign(slope * u + offset)) + floor,
    "clip": lambda u, slope, offset, gain, floor: torch.exp((slope * u + offset).clip(-gain, gain)),
    "inverse sigmoid": lambda u, slope, offset, gain, floor: 1 / (gain * torch.sigmoid(slope * u + offset) + floor),
    "softplus": lambda u, slope, offset, gain, floor: F.softplus(slope * u + offset) + floor + 1e-3,
    "two bends": lambda u, slope, offset, gain, floor: torch.exp(gain * torch.tanh(slope * u) + 0.1 * torch.sin(u)),
    "of its neighbours": lambda u, slope, offset, gain, floor: torch.exp(0.1 * (u - u.mean(1, keepdim=True))),
}
KNOWN = {"sigmoid", "exp", "tanh", "atan", "softsign", "clip", "inverse sigmoid"}
ORDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "(x + t) s": lambda x, s, t: (x + t) * s,
    "x s + t": lambda x, s, t: x * s + t,
    "(x - t) s": lambda x, s, t: (x - t) * s,
    "(x - t) / s": lambda x, s, t: (x - t) / s,
    "x / s + t": lambda x, s, t: x / s + t,
    "x s + 3 t": lambda x, s, t: x * s + 3 * t,
    "x s + t s s": lambda x, s, t: x * s + t * s * s,
}
INVERSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "(x + t) s": lambda y, s, t: y / s - t,
    "x s + t": lambda y, s, t: (y - t) / s,
    "(x - t) s": lambda y, s, t: y / s + t,
    "(x - t) / s": lambda y, s, t: y * s + t,
    "x / s + t": lambda y, s, t: (y - t) * s,
    "x s + 3 t": lambda y, s, t: (y - 3 * t) / s,
    "x s + t s s": lambda y, s, t: y / s - t * s,
}
HALVES = ("scale first", "shift first", "even scale", "even shift", "mirrored")


def halves(h: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Raw scale and shift."""
    half = h.shape[1] // 2
    return {
        "scale first": (h[:, :half], h[:, half:]),
        "shift first": (h[:, half:], h[:, :half]),
        "even scale": (h[:, 0::2], h[:, 1::2]),
        "even shift": (h[:, 1::2], h[:, 0::2]),
        "mirrored": (h[:, :half], h[:, half:].flip(1)),
    }[layout]


@dataclasses.dataclass(frozen=True)
class Options:
    scale: str
    order: str
    layout: str
    reads_first: bool
    slope: float
    offset: float
    gain: float
    floor: float
    channels: int
    log_det_factor: float

    @property
    def known(self) -> bool:
        """Whether the operators can compute it."""
        inverted_order = self.order in ("(x - t) / s", "x / s + t")
        possible = self.order != "x s + t s s" and not (inverted_order and self.floor and self.scale != "exp")
        layout = self.layout != "mirrored" or self.channels <= 3
        return self.scale in KNOWN and possible and layout and self.log_det_factor == 1.0


class VariedCoupling(nn.Module):
    """rosinality's signature, with any options."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        first = (options.channels + 1) // 2
        read = first if options.reads_first else options.channels - first
        self.sizes = [first, options.channels - first]
        self.net = nn.Conv2d(read, 2 * (options.channels - read), 1)

    def scale_and_shift(self, h: Tensor) -> tuple[Tensor, Tensor]:
        o = self.options
        u, t = halves(h, o.layout)
        return SCALES[o.scale](u, o.slope, o.offset, o.gain, o.floor), t

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, other = x.split(self.sizes, 1)
        return (one, other) if self.options.reads_first else (other, one)

    def join(self, read: Tensor, changed: Tensor) -> Tensor:
        return torch.cat([read, changed] if self.options.reads_first else [changed, read], 1)

    def forward(self, x):
        read, transformed = self.both(x)
        s, t = self.scale_and_shift(self.net(read))
        sign = -1 if " / s" in self.options.order else 1
        log_det = self.options.log_det_factor * sign * torch.log(s).flatten(1).sum(1)
        return self.join(read, ORDERS[self.options.order](transformed, s, t)), log_det

    def reverse(self, y):
        read, transformed = self.both(y)
        s, t = self.scale_and_shift(self.net(read))
        return self.join(read, INVERSES[self.options.order](transformed, s, t))


ROUND = [0.25, 0.5, 0.7, 1.0, 1.3, 2.0]
OPTIONS = st.builds(
    Options,
    scale=st.sampled_from(sorted(SCALES)),
    order=st.sampled_from(sorted(ORDERS)),
    layout=st.sampled_from(HALVES),
    reads_first=st.booleans(),
    slope=st.sampled_from([*ROUND, -1.0, 0.123456789]),
    offset=st.sampled_from([0.0, 2.0, -0.3, 1.7]),
    gain=st.sampled_from(ROUND),
    floor=st.sampled_from([0.0, 1e-6, 1e-3, 0.1]),
    channels=st.integers(2, 7),
    log_det_factor=st.sampled_from([1.0, 1.0, 1.0, 1.01]),
)


def measured(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Results and gradients of both directions."""
    x = x.clone().requires_grad_()
    y, log_det = layer(x)
    back = layer.reverse(x)
    loss = (y * y.detach().cos()).sum() + log_det.sin().sum() + (back * x.detach().sin()).sum()
    return [y, log_det, back, *torch.autograd.grad(loss, [x, *layer.parameters()])]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(options=OPTIONS, trained=st.booleans())
def test_any_options_are_matched_exactly_or_not_patched(options, trained):
    torch.manual_seed(0)
    layer = VariedCoupling(options).double()
    if trained:
        nn.init.normal_(layer.net.weight, 0, 2.0)
    accelerated = copy.deepcopy(layer)
    report = gk.accelerate(accelerated)
    assert [row.kind for row in report.layers] == ["AffineCoupling"]
    assert report.layers[0].patched == bool(report.patched)
    assert report.layers[0].patched or report.layers[0].reason
    x = torch.randn(3, options.channels, 3, 5, dtype=torch.float64)
    for actual, expected in zip(measured(accelerated, x), measured(layer, x), strict=True):
        assert (actual - expected).abs().max() <= 1e-7 * expected.abs().max().clamp_min(1.0)
    if options.known:
        assert report.patched, report.layers[0].reason
    if options.scale not in KNOWN or options.log_det_factor != 1.0:
        assert report.left_alone


@pytest.mark.parametrize("order", ["(x - t) / s", "x / s + t"])
def test_inverted_couplings_are_inverted_in_backward(order):
    torch.manual_seed(0)
    options = Options("tanh", order, "scale first", True, 1.0, 0.5, 0.7, 0.1, channels=4, log_det_factor=1.0)
    steps = nn.ModuleList(VariedCoupling(options) for _ in range(3)).double()
    accelerated = copy.deepcopy(steps)
    report = gk.accelerate(accelerated, memory="invert")
    assert [row.memory for row in report.layers] == ["invert"] * 3
    assert "inverted" in report.layers[0].options
    x = torch.randn(3, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for chain in (steps, accelerated):
        y, total = x, torch.zeros(3, dtype=x.dtype)
        for step in chain:
            y, log_det = step(y)
            total = total + log_det
        results.append(torch.autograd.grad((y * y.detach().cos()).sum() + total.sin().sum(), [x, *chain.parameters()]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


class TakesOnesToo(rosinality.AffineCoupling):
    """Passes a channel of ones to its network along with its half, like a channel of coordinates."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.net[0] = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        first, second = x.chunk(2, 1)
        u, t = self.net(torch.cat([first, torch.ones_like(first[:, :1])], 1)).chunk(2, 1)
        s = torch.sigmoid(u + 2)
        return torch.cat([first, (second + t) * s], 1), torch.log(s).flatten(1).sum(1)

    def reverse(self, y):
        first, second = y.chunk(2, 1)
        u, t = self.net(torch.cat([first, torch.ones_like(first[:, :1])], 1)).chunk(2, 1)
        return torch.cat([first, second / torch.sigmoid(u + 2) - t], 1)


def test_a_coupling_whose_network_takes_more_than_one_half_is_not_patched():
    # It was once proven for 7 channels, with a first half of 4, and then failed when called with its own 6.
    layer = TakesOnesToo()
    report = gk.accelerate(layer)
    assert report.left_alone[-1].reason == "its network takes 4 channels and is given 5"
    layer(torch.randn(2, 6, 4, 4))


WRONG = {
    "offset": lambda c: dataclasses.replace(c, scale_map=dataclasses.replace(c.scale_map, offset=2.0 + 1e-6)),
    "floor": lambda c: dataclasses.replace(c, scale_map=dataclasses.replace(c.scale_map, floor=1e-6)),
    "layout": lambda c: dataclasses.replace(c, layout="chunk_shift_scale"),
    "order": lambda c: dataclasses.replace(c, order="scale_shift"),
    "direction": lambda c: dataclasses.replace(c, inverted=True),
    "half": lambda c: dataclasses.replace(c, read=c.transformed, transformed=c.read),
    "factor": lambda c: dataclasses.replace(c, factor=1.0 + 1e-6),
}


@pytest.mark.parametrize("what", WRONG)
def test_planted_wrong_options_are_refused(what, monkeypatch):
    def wrong(*args: Any) -> Coupling:
        return WRONG[what](find(*args))

    find = examiner.find_coupling
    monkeypatch.setattr(examiner, "find_coupling", wrong)
    layer = rosinality.AffineCoupling(6, 4)
    with torch.no_grad():
        before = layer(torch.ones(1, 6, 2, 2))
    report = gk.accelerate(layer)
    assert [row.patched for row in report.layers if row.kind == "AffineCoupling"] == [False]
    assert "differs" in report.left_alone[-1].reason or "gradient" in report.left_alone[-1].reason
    with torch.no_grad():
        assert torch.equal(layer(torch.ones(1, 6, 2, 2))[0], before[0])


def test_without_verify_a_planted_wrong_patch_is_not_noticed(monkeypatch):
    # So it is the proof that refuses it in the test above, and nothing before the proof.
    find = examiner.find_coupling
    monkeypatch.setattr(examiner, "find_coupling", lambda *args: WRONG["offset"](find(*args)))
    layer = rosinality.AffineCoupling(6, 4)
    assert [row.kind for row in gk.accelerate(layer, verify=False).patched].count("AffineCoupling") == 1


class Rounding(nn.Module):
    """A multiplication in float32 with an error that differs from call to call."""

    def __init__(self, *errors: float) -> None:
        super().__init__()
        self.errors, self.weight, self.count = errors, nn.Parameter(torch.ones(())), 0

    def forward(self, x):
        self.count += 1
        return self.weight * x + (self.errors[self.count - 1] if x.dtype == torch.float32 else 0.0)


def test_accuracy_is_judged_by_more_than_one_draw_of_inputs():
    call = Call("forward", lambda module, x: module(x), ((2, 3),))
    agreement = Agreement(values={"forward": 0.0})
    _as_accurate(call, Rounding(0.0, 1e-4), Rounding(1e-4, 0.0), agreement)  # by turns
    assert min(agreement.rounding) > 100
    exact = (0.0,) * 8
    for errors in ((1e-5,) * 8, (1e-3, *exact[1:]), (float("nan"), *exact[1:])):
        with pytest.raises(Mismatch, match="forward: result 0 is"):
            _as_accurate(call, Rounding(*exact), Rounding(*errors), Agreement(values={"forward": 0.0}))


@pytest.mark.parametrize(("layer", "channels"), [(rosinality.InvConv2dLU, 96), (openai.InvertibleConv1x1, 192)])
def test_wide_rotations_whose_log_determinant_is_only_rounding_error_are_accelerated(layer, channels):
    torch.manual_seed(1)
    assert not gk.accelerate(layer(channels)).left_alone


@torch.no_grad()
def ill_conditioned_step(channels: int) -> nn.Module:
    """A step in which the entries of U's diagonal have very different sizes."""
    step = openai.FlowStep(channels, 4, LU_decomposed=True, style="y0ast")
    factors = step.invconv
    scale = torch.logspace(-1.5, 1.5, channels)[torch.randperm(channels)]
    factors.upper.mul_(scale[:, None])
    factors.log_s.add_(scale.log())
    return step


def test_steps_whose_factors_are_ill_conditioned_are_accelerated_and_invert_them_unrounded():
    torch.manual_seed(0)
    step, z, log_det = ill_conditioned_step(48), torch.randn(2, 48, 4, 4), torch.zeros(2)
    step(z, log_det)  # initialises ActNorm
    own, exact = copy.deepcopy(step), copy.deepcopy(step).double()
    assert not gk.accelerate(step).left_alone
    truth = exact(z.double(), log_det.double(), reverse=True)[0]
    error, before = ((layer(z, log_det, reverse=True)[0] - truth).abs().max() for layer in (step, own))
    assert error <= 2 * before + 32 * 2**-23 * truth.abs().max()


def test_steps_of_rosinality_whose_convolution_is_nearly_singular_are_accelerated():
    torch.manual_seed(0)
    step = rosinality.Flow(24, 4, conv_lu=False)
    left, right = torch.linalg.qr(torch.randn(2, 24, 24, dtype=torch.float64)).Q
    with torch.no_grad():
        step.invconv.weight.copy_((left * torch.logspace(2, -2, 24) @ right).view(24, 24, 1, 1))
    assert not gk.accelerate(step).left_alone


def test_a_step_whose_order_of_layers_was_changed_is_not_patched():
    class Reordered(rosinality.Flow):
        def forward(self, x):
            out, conv_log_det = self.invconv(x)
            out, log_det = self.actnorm(out)
            out, coupling_log_det = self.coupling(out)
            return out, log_det + conv_log_det + coupling_log_det

        def reverse(self, y):
            return self.invconv.reverse(self.actnorm.reverse(self.coupling.reverse(y)))

    step = Reordered(4, filter_size=4)
    report = gk.accelerate(step)
    assert [(row.kind, row.patched) for row in report.layers if row.kind == "Flow"] == [("Flow", False)]
    assert len(report.patched) == len(report.layers) - 1  # its own layers are patched


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_actnorm_with_another_factor_in_the_exponent(factor):
    # pclucas14 and OpenAI store logs divided by a factor.
    class Scaled(openai.ActNorm2d):
        def forward(self, x, logdet=None, reverse=False):
            logs = factor * self.logs
            y = x * torch.exp(-logs) - self.bias if reverse else (x + self.bias) * torch.exp(logs)
            change = logs.sum() * x.shape[2] * x.shape[3] * (-1 if reverse else 1)
            return y, None if logdet is None else logdet + change

    report = gk.accelerate(Scaled(4))
    assert [row.patched for row in report.layers] == [factor == 1.0]


@pytest.mark.parametrize(
    ("scale", "found"),
    [
        (lambda u: torch.sigmoid(u + 2) + 1e-3, gk.ScaleMap("sigmoid", offset=2.0, floor=1e-3)),
        (lambda u: torch.exp(2 * 0.636 * torch.atan(u)), gk.ScaleMap("atan", gain=1.272)),
        (lambda u: torch.exp(2 * torch.tanh(u / 2)), gk.ScaleMap("tanh", slope=0.5, gain=2.0)),
        (lambda u: torch.exp(u.clip(-5, 3)), gk.ScaleMap("clip", low=-5.0, high=3.0)),
        (lambda u: torch.exp(u.clip(max=4)), gk.ScaleMap("clip", high=4.0)),
        (lambda u: torch.sigmoid(u + 2.0 + 1e-7), gk.ScaleMap("sigmoid", offset=2.0 + 1e-7)),
        (lambda u: torch.ones_like(u), None),
        (lambda u: 1 + 1e-12 * torch.sigmoid(u), None),
        (lambda u: torch.exp(torch.sin(u)), None),
        (lambda u: -torch.exp(u), None),
    ],
)
def test_scale_functions_of_known_projects_are_found_with_their_own_numbers(scale, found):
    assert fit_scale_map(RAW_VALUES, scale(RAW_VALUES)) == found


def test_options_name_what_was_found():
    layer = VariedCoupling(Options("sigmoid", "x s + t", "even shift", False, 1.0, 2.0, 1.0, 1e-3, 5, 1.0))
    report = gk.accelerate(layer)
    assert report.layers[0].options == (
        "s = sigmoid(u + 2) + 0.001, interleaved_shift_scale, scale_shift, net reads the second half"
    )
    assert options_of(layer).read == (3, 4)


def test_blocks_whose_many_steps_overflow_on_random_numbers_are_accelerated():
    block = rosinality.Block(1, 6, split=False, conv_lu=False, filter_size=4)
    block(torch.randn(2, 1, 6, 10))
    with torch.no_grad():
        for flow in block.flows:
            flow.invconv.weight.mul_(1e4)
    x = 1e-24 * torch.randn(2, 1, 6, 10)
    expected = block(x)
    report = gk.accelerate(block)
    assert report.layers[0].kind == "Block"
    assert not report.left_alone
    for one, other in zip(block(x), expected, strict=True):
        torch.testing.assert_close(one, other)
