"""What the dialects share: their interface, and notes on what the target cannot express."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from glow_kernels.interop.weights import Convolution, State, StateReader, Weights, constant_convolution

# Lines that say what the target cannot express; each begins with the name concerned.
Inexact = list[str]


class Dialect(Protocol):
    """Names and conventions of one implementation."""

    def read(self, reader: StateReader, inexact: Inexact) -> Weights:
        """The model's weights; a KeyError names what is missing."""
        ...

    def write(self, weights: Weights, lu: bool, inexact: Inexact) -> State:
        """``weights`` under this dialect's names; ``lu``: whether 1x1 convolutions are decomposed, if they can be."""
        ...


def top_of(weights: Weights) -> Convolution:
    """The top prior, or a standard normal."""
    if weights.top is not None:
        return weights.top
    channels = len(weights.levels[-1][0].bias)
    zeros = weights.levels[-1][0].bias.new_zeros(2 * channels)
    return constant_convolution(zeros, zeros)


def without_border(name: str, top: Convolution, inexact: Inexact) -> Convolution:
    """``top`` made the same at every position, with a note if it was not."""
    if top.border and top.depends_on_padding:
        inexact.append(f"{name}: the source's prior differs at the border, which it pads with {top.border:g}")
    return constant_convolution(top.bias, top.log_scale)


def note_border(name: str, convolution: Convolution, border: float, inexact: Inexact) -> None:
    if convolution.border != border and convolution.depends_on_padding:
        inexact.append(f"{name}: pads its input with {border:g}, the source with {convolution.border:g}")


def note_classes(reader: StateReader, prefixes: tuple[str, ...], inexact: Inexact) -> None:
    """Note that priors depend on classes, which is left out, if unread tensors under ``prefixes`` are not zero."""
    inexact += [
        f"{name}: what the source's prior makes of classes is left out"
        for name in reader.unread()
        if name.removeprefix("module.").startswith(prefixes) and bool(reader.tensors[name].any())
    ]


def per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)
