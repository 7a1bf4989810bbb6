"""Every layer: the log-determinant is that of the Jacobian, the inverse undoes the forward, dtypes are preserved.

The Jacobian is autograd's, in float64, and every weight is moved off its initial value: a network that starts at zero
proves nothing. The helpers of the other tests of layers and models are also here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glow_kernels as gk
from glow_kernels.nn import ActNorm, AdditiveCoupling, AffineCoupling, ChannelPermutation, FlowStep, InvertibleConv1x1
from glow_kernels.nn.step import COUPLINGS, MIXINGS
from glow_kernels.ops.affine_coupling import LAYOUTS, ORDERS

HALVES = ("first", "second")

SCALE_MAPS: dict[str, str | gk.ScaleMap] = {
    "exp": "exp",
    "tanh": "tanh",
    "floor": gk.ScaleMap("sigmoid", offset=2.0, gain=0.9, floor=0.1),
    "clip": gk.ScaleMap("clip", low=-0.2, high=0.2),
}


def _cases() -> dict[str, tuple[int, Callable[[int], nn.Module]]]:
    cases: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
        "ActNorm": (4, ActNorm),
        "InvertibleConv1x1-lu": (4, lambda c: InvertibleConv1x1(c, lu=True)),
        "InvertibleConv1x1-plain": (4, lambda c: InvertibleConv1x1(c, lu=False)),
        "ChannelPermutation-reverse": (4, lambda c: ChannelPermutation(c, "reverse")),
        "ChannelPermutation-shuffle": (4, lambda c: ChannelPermutation(c, "shuffle")),
        "Squeeze": (3, lambda _: gk.nn.Squeeze()),
    }
    for half, channels in itertools.product(HALVES, (2, 4, 5)):
        name = f"{half}-{channels}"
        cases[f"AffineCoupling-{name}"] = (channels, lambda c, h=half: AffineCoupling(c, 8, condition_on=h))
        cases[f"AdditiveCoupling-{name}"] = (channels, lambda c, h=half: AdditiveCoupling(c, 8, condition_on=h))
    for layout, order in itertools.product(LAYOUTS, ORDERS):
        options = {"layout": layout, "order": order}
        cases[f"AffineCoupling-{layout}-{order}"] = (4, lambda c, o=options: AffineCoupling(c, 8, **o))
    for name, scale_map in SCALE_MAPS.items():
        cases[f"AffineCoupling-{name}"] = (4, lambda c, m=scale_map: AffineCoupling(c, 8, scale_map=m))
        cases[f"FlowStep-{name}"] = (4, lambda c, m=scale_map: FlowStep(c, 8, scale_map=m))
    for coupling, mixing in itertools.product(COUPLINGS, MIXINGS):
        options = {"coupling": coupling, "mixing": mixing}
        cases[f"FlowStep-{coupling}-{mixing}"] = (4, lambda c, o=options: FlowStep(c, 8, **o))
    cases["FlowStep-odd"] = (5, lambda c: FlowStep(c, 8))
    return cases


CASES = _cases()


def moved(layer: nn.Module, amount: float = 0.03) -> nn.Module:
    """The layer with random numbers added to every parameter."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += amount * torch.randn_like(parameter)
    return layer


def ready(layer: nn.Module, *inputs: Any) -> nn.Module:
    """The layer in the dtype of its first input, initialised from the inputs, moved, and in evaluation mode."""
    layer.to(inputs[0].dtype).train()(*inputs)
    return moved(layer).eval()


def log_abs_det(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The logarithm of the absolute determinant of autograd's Jacobian of ``function``, per sample (B,)."""
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x).flatten(1).sum(0), x)
    return torch.linalg.slogdet(jacobian.flatten(2).transpose(0, 1)).logabsdet


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """The standard normal log-density, per sample (B,)."""
    return (-0.5 * (z.square() + math.log(2 * math.pi))).flatten(1).sum(1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Check shape and dtype, and that no element differs by more than ``tolerance``."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0.0)


def draw(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A layer with moved weights, and an input for it (3, C, 4, 2)."""
    channels, make = CASES[name]
    x = torch.randn(3, channels, 4, 2, dtype=dtype)
    return ready(make(channels), x), x


@pytest.mark.parametrize("name", CASES)
def test_log_det_is_that_of_the_jacobian(backend, name):
    layer, x = draw(name)
    z, log_det = layer(x)
    assert_close(log_det, log_abs_det(lambda x: layer(x)[0], x), 1e-9)
    _, inverse_log_det = layer.inverse(z)
    assert_close(inverse_log_det, log_abs_det(lambda z: layer.inverse(z)[0], z), 1e-9)
    assert_close(log_det + inverse_log_det, torch.zeros_like(log_det), 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_inverse_undoes_forward_and_forward_undoes_inverse(backend, name):
    layer, x = draw(name)
    assert_close(layer.inverse(layer(x)[0])[0], x, 1e-12)
    z = torch.randn_like(layer(x)[0])
    assert_close(layer(layer.inverse(z)[0])[0], z, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_types_and_sizes(backend, name, dtype):
    layer, x = draw(name, dtype)
    for batch in (3, 1, 0):
        z, log_det = layer(x[:batch])
        back, inverse_log_det = layer.inverse(z)
        assert z.dtype == back.dtype == log_det.dtype == inverse_log_det.dtype == dtype
        assert z.numel() == back.numel()
        assert back.shape == (batch, *x.shape[1:])
        assert log_det.shape == inverse_log_det.shape == (batch,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if "Coupling" not in name and "FlowStep" not in name])
def test_low_precision_is_rounded_once(backend, name, dtype):
    # The weights stay in float32, and so must the arithmetic; only the result has the dtype of the input.
    layer, x = draw(name, torch.float32)
    x = x.to(dtype)
    for function in (layer, layer.inverse):
        data = x if function is layer else layer(x)[0]
        result, log_det = function(data)
        truth, true_log_det = function(data.double())
        assert result.dtype == dtype
        assert log_det.dtype == torch.float32
        assert_close(log_det.double(), true_log_det, 32 * torch.finfo(torch.float32).eps)
        float32_error = 32 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert ((result.double() - truth).abs() <= torch.finfo(dtype).eps / 2 * truth.abs() + float32_error).all()


def test_squeeze_makes_channels_of_blocks():
    x = torch.randn(2, 3, 4, 6)
    z, log_det = gk.nn.Squeeze()(x)
    assert z.shape == (2, 12, 2, 3)
    assert torch.equal(log_det, torch.zeros(2))
    for c, i, j in itertools.product(range(3), range(2), range(2)):
        assert torch.equal(z[:, 4 * c + 2 * i + j], x[:, c, i::2, j::2])


class RecordingNetwork(nn.Module):
    """A 1x1 convolution that records its input and its output."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.input, self.output = x, self.convolution(x)
        return self.output


@pytest.mark.parametrize("channels", [2, 4, 5])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("make", [AffineCoupling, AdditiveCoupling])
def test_a_coupling_reads_one_half_and_changes_the_other(make, half, channels):
    first, second = slice(0, (channels + 1) // 2), slice((channels + 1) // 2, None)
    kept, changed = (first, second) if half == "first" else (second, first)
    x = torch.randn(2, channels, 3, 3)
    outputs = make.outputs_per_channel * x[:, changed].shape[1]
    network = RecordingNetwork(x[:, kept].shape[1], outputs)
    coupling = make(channels, network=network, condition_on=half)
    y, log_det = coupling(x)
    assert torch.equal(network.input, x[:, kept])
    assert torch.equal(y[:, kept], x[:, kept])
    operator = gk.affine_coupling if make is AffineCoupling else gk.additive_coupling
    expected, expected_log_det = operator(x[:, changed], network.output)
    assert torch.equal(y[:, changed], expected)
    assert torch.equal(log_det, expected_log_det)
    default = make(channels, 8, condition_on=half).network
    assert default.first.weight.shape == (8, x[:, kept].shape[1], 3, 3)
    assert default.last.weight.shape == (outputs, 8, 3, 3)


@pytest.mark.parametrize("scale_map", SCALE_MAPS.values(), ids=SCALE_MAPS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_options_reach_the_operator(layout, order, scale_map):
    network = RecordingNetwork(2, 4)
    coupling = AffineCoupling(4, network=network, layout=layout, order=order, scale_map=scale_map)
    x = torch.randn(2, 4, 3, 3)
    y, log_det = coupling(x)
    expected, expected_log_det = gk.affine_coupling(x[:, 2:], network.output, scale_map, layout, order)
    assert torch.equal(y[:, 2:], expected)
    assert torch.equal(log_det, expected_log_det)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_step_uses_the_network_it_is_given(coupling):
    network = RecordingNetwork(2, 4 if coupling == "affine" else 2)
    FlowStep(4, coupling=coupling, network=network)(torch.randn(8, 4, 3, 3))
    assert network.output.shape[0] == 8


def test_couplings_start_close_to_the_identity():
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    y, log_det = AdditiveCoupling(4, 8).double()(x)
    assert torch.equal(y, x)
    y, log_det = AffineCoupling(4, 8).double()(x)
    scale = torch.sigmoid(torch.tensor(2.0, dtype=torch.float64))
    assert_close(y, torch.cat((x[:, :2], scale * x[:, 2:]), dim=1), 1e-15)
    assert_close(log_det, (18 * scale.log()).expand(2), 1e-13)
