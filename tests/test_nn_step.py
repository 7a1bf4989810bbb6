"""A flow step and its network equal plainly written formulas, also under autocast and torch.compile.

The formulas use convolutions and autograd only, in float64, with the weights of the layer under test.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_nn import assert_close, ready
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from glow_kernels.nn import CouplingNetwork, FlowStep, ZeroConv2d
from glow_kernels.nn import network as network_module
from glow_kernels.nn.step import COUPLINGS, MIXINGS


def plain_actnorm(x: Tensor, actnorm: nn.Module) -> Tensor:
    return (x + actnorm.bias.view(1, -1, 1, 1)) * actnorm.log_scale.view(1, -1, 1, 1).exp()


def plain_zero_conv(x: Tensor, conv: ZeroConv2d) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, padding=1) * torch.exp(3 * conv.log_scale.view(1, -1, 1, 1))


def plain_network(x: Tensor, network: CouplingNetwork) -> Tensor:
    x = F.relu(plain_actnorm(F.conv2d(x, network.first.weight, padding=1), network.first.actnorm))
    x = F.relu(plain_actnorm(F.conv2d(x, network.second.weight), network.second.actnorm))
    return plain_zero_conv(x, network.last)


def plain_weight(mixing: nn.Module) -> Tensor:
    if not getattr(mixing, "lu", False):
        return mixing.weight
    lower = torch.tril(mixing.lower, -1) + torch.eye(mixing.channels, dtype=torch.float64)
    upper = torch.triu(mixing.upper, 1) + torch.diag(mixing.diagonal_sign * mixing.log_diagonal.exp())
    return mixing.permutation @ lower @ upper


def plain_step(x: Tensor, step: FlowStep) -> tuple[Tensor, Tensor]:
    """A step of Glow with the weights of ``step``: ``z`` (B, C, H, W) and ``log_det`` (B,)."""
    weight = plain_weight(step.mixing)
    x = F.conv2d(plain_actnorm(x, step.actnorm), weight[:, :, None, None])
    linear = x[0, 0].numel() * (step.actnorm.log_scale.sum() + torch.slogdet(weight).logabsdet)
    first, second = x.chunk(2, dim=1)
    h = plain_network(first, step.coupling.network)
    if h.shape == second.shape:
        return torch.cat((first, second + h), dim=1), linear.expand(len(x))
    shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2)
    z = torch.cat((first, (second + shift) * scale), dim=1)
    return z, linear + scale.log().sum(dim=(1, 2, 3))


def gradients(results: tuple[Tensor, Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random combination of the results."""
    generator = torch.Generator().manual_seed(1)
    total = sum((r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results)
    return torch.autograd.grad(total, inputs)


class Conversions(TorchDispatchMode):
    """Records the shapes of tensors that are converted outside this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


class WithoutAutocast(nn.Module):
    """A network with autocast disabled."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.network(x)


@pytest.mark.parametrize("channels", [2, 5, 12])
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_step_equals_the_formulas(backend, coupling, mixing, channels):
    x = torch.randn(3, channels, 4, 5, dtype=torch.float64, requires_grad=True)
    step = ready(FlowStep(channels, 8, coupling=coupling, mixing=mixing), x.detach())
    actual, expected = step(x), plain_step(x, step)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, 1e-9)
    inputs = [x, *step.parameters()]
    for one, other in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        assert_close(one, other, 1e-9)


def test_network_equals_the_formulas():
    x = torch.randn(3, 4, 5, 3, dtype=torch.float64)
    network = ready(CouplingNetwork(4, 6, 16), x)
    assert_close(network(x), plain_network(x, network), 1e-12)


def test_only_a_frugal_network_overwrites_the_gradients_that_it_gets(monkeypatch):
    monkeypatch.setattr(network_module, "_LARGE", 0)
    network = ready(CouplingNetwork(2, 4, 8), x := torch.randn(3, 2, 4, 5))
    seen = []
    h = network.second(network.first(x.requires_grad_()))
    h.register_hook(lambda grad: seen.extend((grad, grad.clone())))
    network.last(h).sum().backward()
    assert torch.equal(*seen)


@pytest.mark.parametrize("frugal", [False, True])
def test_network_is_the_same_where_bias_and_relu_are_one_pass(backend, monkeypatch, frugal):
    monkeypatch.setattr(network_module, "adds_bias_separately", lambda x: True)
    monkeypatch.setattr(network_module, "LARGE_ON_GPU", 0)
    x = torch.randn(3, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    network = ready(CouplingNetwork(4, 6, 16), x.detach())
    network.frugal = frugal
    inputs = [x, *network.parameters()]
    actual, expected = network(x), plain_network(x, network)
    assert_close(actual, expected, 1e-12)
    grad = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(y, inputs, grad) for y in (actual, expected)), strict=True):
        assert_close(one, other, 1e-9)


@pytest.mark.parametrize("apart", [False, True])
def test_autocast_converts_the_folded_weights_only(monkeypatch, apart):
    monkeypatch.setattr(network_module, "adds_bias_separately", lambda x: apart)
    network = ready(CouplingNetwork(4, 6, 16), torch.randn(3, 4, 5, 3))
    expected = network(torch.ones(2, 4, 5, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16), Conversions() as conversions:
        actual = network(torch.ones(2, 4, 5, 3))
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)
    # Only the input is converted; the weights are made in the dtype of the network.
    assert conversions.shapes == [(2, 4, 5, 3)]


def test_network_starts_small_and_ends_in_zero():
    network = CouplingNetwork(4, 6, 64)
    assert torch.equal(network(torch.randn(3, 4, 5, 3)), torch.zeros(3, 6, 5, 3))
    for weight in (network.first.weight, network.second.weight):
        # Within five standard deviations of the mean, and of the standard deviation, of that many normal numbers.
        assert abs(weight.mean().item()) < 5 * 0.05 / weight.numel() ** 0.5
        assert abs(weight.std().item() / 0.05 - 1) < 5 / (2 * weight.numel()) ** 0.5


def test_default_width_is_that_of_the_paper():
    assert FlowStep(2).coupling.network.second.weight.shape == (512, 512, 1, 1)


@pytest.mark.parametrize("mixing", ["lu", "plain"])
def test_autocast_does_not_touch_the_flow_path(backend, mixing):
    x = torch.randn(4, 12, 8, 8)
    step = FlowStep(12, 16, mixing=mixing, network=WithoutAutocast(CouplingNetwork(6, 12, 16)))
    ready(step, x)
    expected = [*step(x), *step.inverse(x)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = [*step(x), *step.inverse(x)]
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("mixing", ["lu", "plain"])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_autocast_of_the_network_keeps_the_step_invertible(backend, coupling, mixing):
    x = torch.randn(4, 12, 8, 8)
    step = ready(FlowStep(12, 16, coupling=coupling, mixing=mixing), x)
    exact, _ = step(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert step.coupling.network(x[:, :6]).dtype == torch.bfloat16
        z, log_det = step(x)
        back, inverse_log_det = step.inverse(z)
    assert z.dtype == log_det.dtype == back.dtype == torch.float32
    assert not torch.equal(z, exact)
    assert (back - x).abs().max() < 1e-5
    # 384 logarithms of scales of size one, with an error of eps each.
    assert_close(inverse_log_det, -log_det, 384 * torch.finfo(torch.float32).eps)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    ("coupling", "mixing"), [("affine", "lu"), ("affine", "plain"), ("additive", "lu"), ("additive", "reverse")]
)
def test_step_compiles_into_one_graph(backend, coupling, mixing):
    x = torch.randn(3, 4, 4, 4)
    step = ready(FlowStep(4, 8, coupling=coupling, mixing=mixing), x)
    for function in (step.forward, step.inverse):
        in_one_graph = compiled(function)
        in_one_graph(x.clone().requires_grad_())
        with torch.compiler.set_stance("fail_on_recompile"):
            other = torch.randn_like(x).requires_grad_()
            actual, expected = in_one_graph(other), function(other)
            assert all(torch.equal(one, two) for one, two in zip(actual, expected, strict=True))
            inputs = [other, *step.parameters()]
            pairs = zip(gradients(actual, inputs), gradients(expected, inputs), strict=True)
            assert all(torch.equal(one, two) for one, two in pairs)


def test_the_initialising_forward_compiles_too(backend):
    step = FlowStep(4, 8)
    twin = copy.deepcopy(step)
    x = 3.0 + 2.0 * torch.randn(8, 4, 4, 4)
    in_one_graph = compiled(step)
    for _ in range(2):  # the first initialises, the second is compiled again without that
        assert all(torch.equal(one, other) for one, other in zip(in_one_graph(x), twin(x), strict=True))
        assert all(torch.equal(value, twin.state_dict()[name]) for name, value in step.state_dict().items())
    with torch.compiler.set_stance("fail_on_recompile"):
        in_one_graph(torch.randn_like(x))
    assert_close(step.actnorm(x)[0].mean((0, 2, 3)).detach(), torch.zeros(4), 1e-6)
