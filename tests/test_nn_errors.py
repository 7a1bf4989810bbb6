"""Errors of layers name the argument, what was expected and what was given."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from glow_kernels.nn import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    ChannelPermutation,
    CouplingNetwork,
    FlowStep,
    InvertibleConv1x1,
    SplitPrior,
    Squeeze,
    TopPrior,
    ZeroConv2d,
)

LAYOUTS = "'chunk_scale_shift', 'chunk_shift_scale', 'interleaved_scale_shift', 'interleaved_shift_scale'"

BAD_ARGUMENTS = {
    "channels must be at least 1, got 0": lambda: InvertibleConv1x1(0),
    "channels must be at least 1, got -2": lambda: ActNorm(-2),
    "eps must be finite and at least 0, got nan": lambda: ActNorm(4, eps=math.nan),
    "in_channels must be at least 1, got 0": lambda: CouplingNetwork(0, 4, 8),
    "channels must be at least 1, got -1": lambda: ChannelPermutation(-1),
    "channels must be at least 2 for a coupling, got 1": lambda: FlowStep(1, 8),
    "channels must be at least 2 for a coupling, got 0": lambda: AdditiveCoupling(0, 8),
    "channels must be even and at least 2 to be split, got 3": lambda: SplitPrior(3),
    "channels must be even and at least 2 to be split, got 0": lambda: SplitPrior(0),
    "kind must be one of 'reverse', 'shuffle', got 'swap'": lambda: ChannelPermutation(4, "swap"),
    "condition_on must be one of 'first', 'second', got 'both'": lambda: AffineCoupling(4, 8, condition_on="both"),
    f"layout must be one of {LAYOUTS}, got 'chunk'": lambda: AffineCoupling(4, 8, layout="chunk"),
    "order must be one of 'shift_scale', 'scale_shift', 'unshift_scale', got 'scale'": lambda: AffineCoupling(
        4, 8, order="scale"
    ),
    "scale_map must be a ScaleMap or one of 'sigmoid', 'exp', 'tanh', got 'relu'": lambda: AffineCoupling(
        4, 8, scale_map="relu"
    ),
    "coupling must be one of 'affine', 'additive', got 'spline'": lambda: FlowStep(4, 8, coupling="spline"),
    "mixing must be one of 'lu', 'plain', 'reverse', 'shuffle', got 'qr'": lambda: FlowStep(4, 8, mixing="qr"),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_constructors(message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        BAD_ARGUMENTS[message]()


# Every layer with a fixed number of channels, 4 here, and the name of its inverse's argument.
LAYERS = {
    "ActNorm": (lambda: ActNorm(4), "z"),
    "InvertibleConv1x1": (lambda: InvertibleConv1x1(4), "z"),
    "ChannelPermutation": (lambda: ChannelPermutation(4), "z"),
    "AffineCoupling": (lambda: AffineCoupling(4, 8), "y"),
    "AdditiveCoupling": (lambda: AdditiveCoupling(4, 8), "y"),
    "FlowStep": (lambda: FlowStep(4, 8), "z"),
}


def initialised(name: str) -> nn.Module:
    layer = LAYERS[name][0]()
    layer(torch.randn(8, 4, 2, 2))
    return layer


# One channel would broadcast.
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_wrong_number_of_channels(name, channels):
    layer, x = initialised(name), torch.randn(2, channels, 2, 2)
    for function, argument in [(LAYERS[name][0](), "x"), (layer, "x"), (layer.inverse, LAYERS[name][1])]:
        message = rf"^{argument} must have 4 channels, got shape \(2, {channels}, 2, 2\)$"
        with pytest.raises(ValueError, match=message):
            function(x)


@pytest.mark.parametrize("name", LAYERS)
def test_integers_are_refused(name):
    layer, x = initialised(name), torch.ones(2, 4, 2, 2, dtype=torch.int64)
    for function, argument in [(layer, "x"), (layer.inverse, LAYERS[name][1])]:
        with pytest.raises(TypeError, match=rf"^{argument} must be a floating-point tensor, got int64$"):
            function(x)


BAD_INPUTS = {
    "x must be (B, C, H, W) with even H and W to be squeezed, got shape (2, 3, 4, 5)": (
        lambda: Squeeze()(torch.zeros(2, 3, 4, 5))
    ),
    "x must be (B, C, H, W) with even H and W to be squeezed, got shape (2, 3, 5, 4)": (
        lambda: Squeeze()(torch.zeros(2, 3, 5, 4))
    ),
    "x must be (B, C, H, W) with even H and W to be squeezed, got shape (3, 4, 4)": (
        lambda: Squeeze()(torch.zeros(3, 4, 4))
    ),
    "z must be (B, 4 C, H, W) to be unsqueezed, got shape (2, 6, 2, 2)": (
        lambda: Squeeze().inverse(torch.zeros(2, 6, 2, 2))
    ),
    "z must be (B, 4 C, H, W) to be unsqueezed, got shape (4, 2, 2)": lambda: Squeeze().inverse(torch.zeros(4, 2, 2)),
    "x must be (B, 4, H, W), got shape (2, 6, 2, 2)": lambda: SplitPrior(4)(torch.zeros(2, 6, 2, 2)),
    "x must be (B, 4, H, W), got shape (2, 4)": lambda: SplitPrior(4).encode(torch.zeros(2, 4)),
    "labels must be given: the prior has 3 classes": lambda: TopPrior(4, num_classes=3)(torch.zeros(2, 4, 1, 1)),
    "labels must be int64 of shape (2,), got int64 of shape (1,)": (
        lambda: TopPrior(4, num_classes=3)(torch.zeros(2, 4, 1, 1), torch.zeros(1, dtype=torch.int64))
    ),
    "kept must have 2 channels, got shape (2, 4, 2, 2)": lambda: SplitPrior(4).inverse(torch.zeros(2, 4, 2, 2)),
    "labels must be None: the prior has no classes": (
        lambda: TopPrior(4).decode(torch.zeros(2, 4, 1, 1), torch.zeros(2, dtype=torch.int64))
    ),
    "h must be (B, 2 C, *spatial) for this x = (2, 4, 2, 2), got (2, 3, 2, 2)": (
        lambda: AffineCoupling(4, network=nn.Conv2d(2, 3, 1))(torch.zeros(2, 4, 2, 2))
    ),
    "h must be the shape of y = (2, 2, 2, 2), got (2, 3, 2, 2)": (
        lambda: AdditiveCoupling(4, network=nn.Conv2d(2, 3, 1)).inverse(torch.zeros(2, 4, 2, 2))
    ),
    "temperature must be one number, got a tensor of shape (2,)": (
        lambda: SplitPrior(4).inverse(torch.zeros(2, 2, 2, 2), torch.ones(2))
    ),
    "temperature must be finite and at least 0, got nan": (
        lambda: SplitPrior(4).inverse(torch.zeros(2, 2, 2, 2), math.nan)
    ),
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_inputs(message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        BAD_INPUTS[message]()


BAD_TYPES = {
    "channels must be a whole number, got 'a'": [
        lambda: ActNorm("a"),
        lambda: InvertibleConv1x1("a"),
        lambda: AffineCoupling("a", 8),
        lambda: SplitPrior("a"),
        lambda: TopPrior("a"),
    ],
    "eps must be a number, got None": [lambda: ActNorm(4, eps=None)],
    "out_channels must be a whole number, got 2.5": [lambda: ZeroConv2d(2, 2.5), lambda: CouplingNetwork(2, 2.5, 8)],
    "network must be a torch.nn.Module, got function": [lambda: AffineCoupling(4, network=lambda x: x)],
    "x must be a tensor, got NoneType": [lambda: Squeeze()(None), lambda: SplitPrior(4)(None)],
    "z must be a tensor, got NoneType": [lambda: Squeeze().inverse(None), lambda: TopPrior(4)(None)],
    "kept must be a tensor, got NoneType": [lambda: SplitPrior(4).inverse(None)],
    "eps must be a tensor, got NoneType": [lambda: TopPrior(4).decode(None)],
    "labels must be a tensor, got int": [lambda: TopPrior(4, num_classes=3)(torch.zeros(1, 4, 1, 1), 2)],
    "temperature must be a number, got 'a'": [lambda: SplitPrior(4).inverse(torch.zeros(1, 2, 1, 1), "a")],
}


@pytest.mark.parametrize("message", BAD_TYPES)
def test_types_name_the_argument(message):
    for call in BAD_TYPES[message]:
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            call()


def test_types():
    with pytest.raises(TypeError, match=r"^x must be a tensor, got list$"):
        initialised("FlowStep")([1.0])
    with pytest.raises(TypeError, match=r"^scale_map must be a name or a ScaleMap, got float$"):
        AffineCoupling(4, 8, scale_map=2.0)


def test_descriptions_name_the_options():
    expected = {
        ActNorm(4, eps=0.5): "ActNorm(4, eps=0.5)",
        InvertibleConv1x1(4, lu=False): "InvertibleConv1x1(4, lu=False)",
        ChannelPermutation(4, "shuffle"): "ChannelPermutation(4, kind='shuffle')",
        TopPrior(4, num_classes=3): "TopPrior(4, learned=True, num_classes=3)",
    }
    assert [repr(layer) for layer in expected] == list(expected.values())
    assert "4, condition_on='second'" in repr(AffineCoupling(4, 8, condition_on="second"))
