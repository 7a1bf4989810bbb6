"""``accelerate`` on models built as in the examples of normflows, nflows and FrEIA."""

from __future__ import annotations

import copy
from collections.abc import Callable

import FrEIA.framework
import FrEIA.modules
import nflows.distributions
import nflows.flows
import nflows.nn.nets
import nflows.transforms
import normflows
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dialects.zoo import small_net
from torch import Tensor, nn

import glow_kernels as gk

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated", "ignore:torch.triangular_solve is deprecated")


def normflows_of_vectors() -> nn.Module:
    flows = []
    for _ in range(2):
        flows.append(normflows.flows.AffineCouplingBlock(normflows.nets.MLP([3, 8, 6])))
        flows += [normflows.flows.Permute(6, mode="swap"), normflows.flows.ActNorm((6,))]
    return normflows.NormalizingFlow(normflows.distributions.base.DiagGaussian(6), flows)


def normflows_of_classes() -> nn.Module:
    block = normflows.flows.GlowBlock(12, 8)
    base = normflows.distributions.ClassCondDiagGaussian((12, 4, 4), 10)
    return normflows.MultiscaleFlow([base], [[block, normflows.flows.Squeeze()]], [])


def nflows_with_context() -> nn.Module:
    def net(inputs, outputs):
        return nflows.nn.nets.ResidualNet(inputs, outputs, hidden_features=8, context_features=3)

    transforms = nflows.transforms
    layers = []
    for _ in range(2):
        coupling = transforms.AffineCouplingTransform(torch.arange(6) % 2, net)
        layers += [transforms.ActNorm(6), transforms.RandomPermutation(6), coupling, transforms.LULinear(6)]
    transform = transforms.CompositeTransform(layers)
    return nflows.flows.Flow(transform, nflows.distributions.StandardNormal([6]))


def nflows_with_context_of_images() -> nn.Module:
    def net(inputs, outputs):
        return nflows.nn.nets.ConvResidualNet(inputs, outputs, hidden_channels=4, context_channels=3, num_blocks=1)

    coupling = nflows.transforms.AffineCouplingTransform([0, 1, 0], net)
    return nflows.flows.Flow(coupling, nflows.distributions.StandardNormal([3, 8, 8]))


def nflows_of_many_scales() -> nn.Module:
    transforms = nflows.transforms

    def net(inputs, outputs):
        return nflows.nn.nets.ConvResidualNet(inputs, outputs, hidden_channels=4, num_blocks=1)

    scales, shape = transforms.MultiscaleCompositeTransform(2), (3, 8, 8)
    for _ in range(2):
        squeeze = transforms.SqueezeTransform()
        channels, *sizes = squeeze.get_output_shape(*shape)
        coupling = transforms.AffineCouplingTransform([1] * (channels // 2) + [-1] * (channels // 2), net)
        step = [transforms.ActNorm(channels), transforms.OneByOneConvolution(channels), coupling]
        shape = scales.add_transform(transforms.CompositeTransform([squeeze, *step]), (channels, *sizes))
    return nflows.flows.Flow(scales, nflows.distributions.StandardNormal([192]))


def freia_of_vectors() -> nn.Module:
    def net(inputs, outputs):
        return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, outputs))

    model = FrEIA.framework.SequenceINN(6)
    for _ in range(2):
        model.append(FrEIA.modules.AllInOneBlock, subnet_constructor=net, permute_soft=True)
    return model


def freia_graph() -> nn.Module:
    framework, modules = FrEIA.framework, FrEIA.modules
    condition = framework.ConditionNode(4, 4, 4)
    nodes = [framework.InputNode(3, 8, 8)]
    nodes.append(framework.Node(nodes[-1], modules.IRevNetDownsampling, {}))
    options = {"subnet_constructor": small_net, "clamp": 1.2}
    nodes.append(framework.Node(nodes[-1], modules.GLOWCouplingBlock, options, conditions=condition))
    nodes.append(framework.Node(nodes[-1], modules.PermuteRandom, {"seed": 0}))
    return framework.GraphINN([*nodes, framework.OutputNode(nodes[-1]), condition])


def of_latents(z: Tensor, log_det: Tensor) -> Tensor:
    return (0.5 * z.square().flatten(1).sum(1) - log_det).mean()


VECTORS, IMAGES = (16, 6), (4, 3, 8, 8)
# How to build each model, its loss, the shape of a batch, and the number of recognised layers.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], tuple[int, ...], int]] = {
    "normflows, vectors": (normflows_of_vectors, lambda m, x: m.forward_kld(x), VECTORS, 4),
    "normflows, classes": (normflows_of_classes, lambda m, x: m.forward_kld(x, torch.arange(4)), IMAGES, 5),
    "nflows, context": (nflows_with_context, lambda m, x: -m.log_prob(x, x[:, :3]).mean(), VECTORS, 4),
    "nflows, images as context": (nflows_with_context_of_images, lambda m, x: -m.log_prob(x, x).mean(), IMAGES, 1),
    "nflows, many scales": (nflows_of_many_scales, lambda m, x: -m.log_prob(x).mean(), IMAGES, 8),
    "FrEIA, vectors": (freia_of_vectors, lambda m, x: of_latents(*m(x)), VECTORS, 2),
    "FrEIA, graph": (freia_graph, lambda m, x: of_latents(*m(x, c=[F.pixel_unshuffle(x, 2)[:, :4]])), IMAGES, 3),
}


@pytest.mark.parametrize("memory", ["store", "anchor"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_patched_and_trains_the_same(name, memory):
    build, loss, shape, layers = MODELS[name]
    torch.manual_seed(0)
    np.random.seed(0)  # FrEIA draws its permutations with numpy
    original = build().double()
    accelerated = copy.deepcopy(original)
    report = gk.accelerate(accelerated, memory=memory)
    reasons = [(row.path, row.reason or row.memory_reason) for row in report.layers]
    assert [line for line in reasons if line[1]] == []
    assert len(report.patched) == layers
    optimizers = [torch.optim.Adam(model.parameters(), 1e-3) for model in (original, accelerated)]
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64)
        losses = []
        for model, optimizer in zip((original, accelerated), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(loss(model, x))
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-7, atol=0.0)


@torch.no_grad()
@pytest.mark.parametrize("library", ["normflows", "nflows"])
def test_layers_whose_factors_are_ill_conditioned_are_accelerated(library):
    torch.manual_seed(0)
    scale = torch.logspace(-1.5, 1.5, 96)[torch.randperm(96)]
    if library == "normflows":
        layer = normflows.flows.GlowBlock(96, 4)
        factors = layer.flows[1]
        factors.U.mul_(scale[:, None])
        factors.log_S.add_(scale.log())
    else:
        factors = nflows.transforms.OneByOneConvolution(96)
        layer = nflows.transforms.CompositeTransform([nflows.transforms.ActNorm(96), factors])
        for entries in (factors.lower_entries, factors.upper_entries):
            entries.copy_(torch.randn_like(entries) / 96**0.5)
        factors.unconstrained_upper_diag.copy_(scale.expm1().log())
    assert not gk.accelerate(layer).left_alone


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("use_lu", [True, False])
def test_matrices_of_normflows_that_multiply_vectors_are_not_patched(use_lu, verify):
    layer, x = normflows.flows.mixing.InvertibleAffine(4, use_lu), torch.randn(2, 4)
    expected = layer.inverse(x)
    (row,) = gk.accelerate(layer, verify=verify).layers
    assert row.reason.startswith("it does not take images")
    torch.testing.assert_close(layer.inverse(x), expected)


@pytest.mark.parametrize("channels", [3, 5])
def test_additive_couplings_of_an_odd_number_of_channels(channels):
    """Their networks return as many channels as those of affine couplings with fewer channels."""
    report = gk.accelerate(normflows.flows.GlowBlock(channels, 8, scale=False))
    assert report.patched
    assert not report.left_alone


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
@pytest.mark.parametrize("name", ["AffineCouplingOneSided", "GLOWCouplingBlock", "AllInOneBlock"])
def test_blocks_of_freia_made_without_conditions_ignore_given_ones(name, memory):
    block = getattr(FrEIA.modules, name)([(4, 2, 2)], subnet_constructor=lambda *sizes: nn.Conv2d(*sizes, 1))
    x, condition = torch.randn(2, 4, 2, 2), torch.randn(2, 3, 2, 2)
    calls = [{"c": c, "rev": rev} for c in (None, [condition]) for rev in (False, True)]
    expected = [block([x], **call) for call in calls]
    assert gk.accelerate(block, memory=memory, verify=False).layers[0].patched
    torch.testing.assert_close([block([x], **call) for call in calls], expected)
