"""What ``accelerate`` claims to do better than the original, for every dialect: claimed exactly where it is true.

Each claim is tested on the original, which has the fault, and on the accelerated model, which has not.
"""

from __future__ import annotations

import copy

import pytest
import torch
from dialects import audio, chrischute, openai, pclucas14, rosinality, survae
from dialects.zoo import EXAMPLES, normflows_glow
from normflows.flows.mixing import Invertible1x1Conv
from test_interop import images, make
from torch import Tensor, nn

import glow_kernels as gk
from glow_kernels.bench.live_storages import LiveStorages

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated", "ignore:torch.triangular_solve is deprecated")

# Words by which each claim is found in the report.
NO_SYNC = "does not wait for the device"
STABLE = "which may have underflowed"
SIGMOID = "not as the log of a sigmoid"
DOUBLE = "log|det W| is computed in float64"
INVERSE = "the inverse of the 1x1 convolution is computed in float64"
COPIES = "deep copies of a step use their own 1x1 convolution"
UNDERFLOW = "log|det W| is finite where det W underflows"
IN_PLACE = "leaky ReLUs overwrite their input"
ALL = (NO_SYNC, STABLE, SIGMOID, DOUBLE, UNDERFLOW, INVERSE, COPIES, IN_PLACE)
CLAIMS = {
    "rosinality": {NO_SYNC, SIGMOID, INVERSE},
    "rosinality_plain": {NO_SYNC, SIGMOID, INVERSE},
    "rosinality_additive": {NO_SYNC, INVERSE},
    "chaiyujin": {SIGMOID, DOUBLE},
    "chaiyujin_lu": {SIGMOID},
    "chaiyujin_additive": set(),
    "y0ast": {SIGMOID, DOUBLE, COPIES},
    "y0ast_reverse": {SIGMOID, COPIES},
    "pclucas14": {SIGMOID, DOUBLE, UNDERFLOW, INVERSE},
    "pclucas14_additive": {DOUBLE, UNDERFLOW, INVERSE},
    "normflows": {NO_SYNC, SIGMOID, IN_PLACE},
    "normflows_plain_exp": {NO_SYNC, DOUBLE, IN_PLACE},
    "normflows_sigmoid_inv": {NO_SYNC},
    "normflows_additive": {NO_SYNC, IN_PLACE},
    "nflows": {NO_SYNC},
    "FrEIA": set(),
    "FrEIA later": {NO_SYNC},
    "chrischute": {NO_SYNC, DOUBLE},
    "survae": {NO_SYNC, STABLE, DOUBLE, INVERSE},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_claimed_improvements_are_those_of_the_dialect_and_only_originals_read_flags(name, monkeypatch):
    example = EXAMPLES[name]
    original, accelerated = make(example), make(example)
    lines = [line for line in str(gk.accelerate(accelerated, verify=False)).splitlines() if line.startswith("better: ")]
    assert {claim for claim in ALL if any(claim in line for line in lines)} == CLAIMS[name]
    assert len(lines) == len(CLAIMS[name])
    x = images(example)
    for model in (original, accelerated):
        for _ in range(2):  # the second call reads the flag that the first has set
            example.loss(model, x)

    def refuse(*_):
        raise InterruptedError

    for reading in ("__bool__", "item", "tolist"):
        monkeypatch.setattr(Tensor, reading, refuse)
    if NO_SYNC in CLAIMS[name]:
        with pytest.raises(InterruptedError):
            example.loss(original, x)
    else:
        example.loss(original, x)
    example.loss(accelerated, x)


def last_convolution(network: nn.Module) -> nn.Conv2d:
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)][-1]


UNDERFLOWING = {
    "rosinality": (lambda: rosinality.AffineCoupling(4, 4), lambda m: m.net, lambda m, x: m(x)),
    "chaiyujin": (lambda: openai.FlowStep(4, 4), lambda m: m.f, lambda m, x: m(x, x.new_zeros(2))),
    "y0ast": (lambda: openai.FlowStep(4, 4, style="y0ast"), lambda m: m.block, lambda m, x: m(x, x.new_zeros(2))),
    "pclucas14": (
        lambda: pclucas14.AffineCoupling(4, 4),
        lambda m: m.NN,
        lambda m, x: m.forward_(x, x.new_zeros(2)),
    ),
    "normflows": (
        lambda: normflows_glow(1, 1).flows[0][0].flows[0],
        lambda m: m.flows[1].param_map,
        lambda m, x: m.inverse(x),
    ),
    "survae": (lambda: survae.Flow(4).transforms[1], lambda m: m.coupling_net, lambda m, x: m(x)),
}


@pytest.mark.parametrize("name", UNDERFLOWING)
def test_log_determinants_of_scales_that_underflow_are_finite(name):
    make_layer, network, run = UNDERFLOWING[name]
    torch.manual_seed(0)
    layer = make_layer()
    x = torch.randn(2, 12 if name == "normflows" else 4, 4, 4)
    run(layer, x)
    with torch.no_grad():
        last_convolution(network(layer)).bias.fill_(-200.0)
        assert not run(layer, x)[1].isfinite().all()
        assert not gk.accelerate(layer).left_alone
        log_det = run(layer, x)[1]
    assert log_det.isfinite().all()
    assert (log_det < -1000).all()


LOG_DETERMINANTS = {
    "chaiyujin": (lambda: openai.InvertibleConv1x1(32), lambda m, x: m(x, x.new_zeros(()))[1]),
    "y0ast": (lambda: openai.InvertibleConv1x1(32, style="y0ast"), lambda m, x: m(x, x.new_zeros(()))[1]),
    "pclucas14": (lambda: pclucas14.Invertible1x1Conv(32), lambda m, x: m.forward_(x, x.new_zeros(()))[1]),
    "chrischute": (lambda: chrischute.InvConv(32), lambda m, x: m(x, x.new_zeros(()))[1]),
    "normflows": (lambda: Invertible1x1Conv(32), lambda m, x: m.inverse(x)[1]),
    "survae": (lambda: survae.Conv1x1(32), lambda m, x: m(x)[1]),
}


@pytest.mark.parametrize("name", LOG_DETERMINANTS)
def test_log_determinants_of_uneven_matrices_are_more_accurate(name):
    make_layer, run = LOG_DETERMINANTS[name]
    original, accelerated = pair(make_layer, uneven_weight)
    x = torch.randn(2, 32, 4, 4)
    truth = run(copy.deepcopy(original).double(), x.double())
    before, after = ((run(layer, x) - truth).abs().max() for layer in (original, accelerated))
    assert after < 0.5 * before


def test_log_determinants_of_small_matrices_are_finite():
    original, accelerated = pair(lambda: pclucas14.Invertible1x1Conv(32), lambda layer: layer.weight.mul_(0.01))
    x = torch.randn(2, 32, 4, 4)
    before, after = (layer.forward_(x, torch.zeros(2))[1] for layer in (original, accelerated))
    assert before.isinf().all()
    torch.testing.assert_close(after, torch.full((2,), 16 * 32 * torch.tensor(0.01).log().item()), rtol=1e-6, atol=0.0)


def uneven_weight(layer: nn.Module) -> None:
    weight = next(layer.parameters())
    weight.copy_(uneven(32, 5.0).view_as(weight))


def uneven_factors(layer: nn.Module) -> None:
    diagonal = layer.w_s if hasattr(layer, "w_s") else layer.log_s
    diagonal.copy_(torch.linspace(0, -1, 32).roll(7))


INVERSES = {
    "rosinality": (lambda: rosinality.InvConv2d(32), uneven_weight, lambda m, x: m.reverse(m(x)[0])),
    "rosinality, LU": (lambda: rosinality.InvConv2dLU(32), uneven_factors, lambda m, x: m.reverse(m(x)[0])),
    "y0ast, LU": (
        lambda: openai.InvertibleConv1x1(32, LU_decomposed=True, style="y0ast"),
        uneven_factors,
        lambda m, x: m(m(x)[0], reverse=True)[0],
    ),
    "pclucas14": (
        lambda: pclucas14.Invertible1x1Conv(32),
        uneven_weight,
        lambda m, x: m.reverse_(m.forward_(x, x.new_zeros(()))[0], x.new_zeros(()))[0],
    ),
    "survae": (lambda: survae.Conv1x1(32), uneven_weight, lambda m, x: m.inverse(m(x)[0])),
}


@pytest.mark.parametrize("name", INVERSES)
def test_inverses_are_more_accurate(name):
    make_layer, change, round_trip = INVERSES[name]
    original, accelerated = pair(make_layer, change)
    x = torch.randn(16, 32, 8, 8)
    before, after = ((round_trip(layer, x) - x).norm() for layer in (original, accelerated))
    assert after < 0.8 * before


@torch.no_grad()
def pair(make_layer, change) -> tuple[nn.Module, nn.Module]:
    """A layer and its accelerated copy, with weights that reveal differences in precision."""
    torch.manual_seed(0)
    original = make_layer()
    accelerated = copy.deepcopy(original)
    assert len(gk.accelerate(accelerated).patched) == 1
    for layer in (original, accelerated):
        change(layer)
    return original.requires_grad_(False), accelerated.requires_grad_(False)


def uneven(channels: int, decades: float) -> Tensor:
    """A matrix (C, C) whose singular values span ``decades``."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64, generator=generator)).Q for _ in range(2)
    )
    return (left * torch.logspace(0, -decades, channels, dtype=torch.float64) @ right).float()


def test_leaky_activations_are_kept_once():
    torch.manual_seed(0)
    layer = normflows_glow(1, 1, hidden=128).flows[0][0].flows[0]
    x = torch.randn(4, 12, 16, 16)
    kept = []
    for accelerated in (False, True):
        if accelerated:
            assert IN_PLACE in str(gk.accelerate(layer))
        with LiveStorages([layer]) as storages:
            results = layer.inverse(x)
            kept.append(storages.now)
        del results
    hidden = 4 * 128 * 16 * 16 * 4
    assert kept[0] > 4 * hidden
    assert kept[1] < kept[0] - 1.7 * hidden


def test_log_determinants_of_glow_tts_survive_a_negative_determinant():
    layer = audio.InvConvNear(8)
    gk.accelerate(layer)
    original = audio.InvConvNear(8)
    with torch.no_grad():
        layer.weight[0] *= -1
        original.weight.copy_(layer.weight)
    x = torch.randn(2, 8, 5)
    assert original(x)[1].isnan().all()
    torch.testing.assert_close(layer(x)[1], torch.zeros(2), atol=1e-5, rtol=0.0)
