"""The variables of openai/glow, the TensorFlow original, under their names in its checkpoints.

Kernels are (k, k, in, out), the 1x1 convolution multiplies row vectors, and exponents are stored divided by three.
3x3 convolutions have one more input channel, which is 1 in the padding and 0 in the image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glow_kernels.interop.state_dicts.common import Inexact, note_classes, top_of
from glow_kernels.interop.weights import (
    Convolution,
    Mixing,
    State,
    StateReader,
    Step,
    Weights,
    affine_halves,
    affine_interleaved,
    constant_convolution,
    halves,
    interleaved,
)


class TensorFlow:
    """``model`` of openai/glow with invertible 1x1 convolutions."""

    def read(self, reader: StateReader, inexact: Inexact) -> Weights:
        levels, splits = [], []
        for level in reader.numbers("model/"):
            numbers = reader.numbers(f"model/{level}/")
            levels.append([self._read_step(reader, f"model/{level}/{number}/", inexact) for number in numbers])
            if reader.has(f"model/pool{level}/conv/W"):
                splits.append(halves(self._read_zeros(reader, f"model/pool{level}/conv/", inexact)))
        top = None
        if reader.has("model/prior/p/b"):
            convolution = self._read_zeros(reader, "model/prior/p/", inexact)
            top = constant_convolution(convolution.bias, convolution.log_scale)
        note_classes(reader, ("model/prior/y_emb/",), inexact)
        return Weights(levels, splits, top)

    def write(self, weights: Weights, lu: bool, inexact: Inexact) -> State:
        state: State = {}
        for level, steps in enumerate(weights.levels):
            for number, step in enumerate(steps):
                self._write_step(state, f"model/{level}/{number}/", step.without_signs())
        for level, split in enumerate(weights.splits):
            self._write_zeros(state, f"model/pool{level}/conv/", interleaved(split))
        top = top_of(weights)
        # Its input is zero, so only the weight of the border channel makes a difference.
        self._write_zeros(state, "model/prior/p/", top)
        channels = len(top.bias)
        edge = state["model/prior/p/W"][:, :, -1:]
        state["model/prior/p/W"] = torch.cat((edge.new_zeros(3, 3, channels, channels), edge), 2)
        return state

    def _read_step(self, reader: StateReader, name: str, inexact: Inexact) -> Step:
        hidden = []
        for layer in ("l_1", "l_2"):
            prefix = f"{name}f1/{layer}/"
            bias, log_scale = _read_actnorm(reader, f"{prefix}actnorm")
            hidden.append(Convolution(_read_kernel(reader, f"{prefix}W", inexact), bias, log_scale))
        bias, log_scale = _read_actnorm(reader, f"{name}actnorm")
        last = self._read_zeros(reader, f"{name}f1/l_last/", inexact)
        return affine_halves(Step(log_scale, bias, Mixing(reader(f"{name}invconv/W").T), (hidden[0], hidden[1], last)))

    def _write_step(self, state: State, name: str, step: Step) -> None:
        step = affine_interleaved(step)
        _write_actnorm(state, f"{name}actnorm", step.bias, step.log_scale)
        state[f"{name}invconv/W"] = step.mixing.matrix().T
        for layer, convolution in zip(("l_1", "l_2"), step.network, strict=False):
            prefix = f"{name}f1/{layer}/"
            state[f"{prefix}W"] = _kernel(convolution)
            _write_actnorm(state, f"{prefix}actnorm", convolution.bias, convolution.log_scale)
        self._write_zeros(state, f"{name}f1/l_last/", step.network[2])

    def _read_zeros(self, reader: StateReader, name: str, inexact: Inexact) -> Convolution:
        bias, log_scale = reader(f"{name}b").flatten(), 3 * reader(f"{name}logs").flatten()
        return Convolution(_read_kernel(reader, f"{name}W", inexact), bias, log_scale)

    def _write_zeros(self, state: State, name: str, convolution: Convolution) -> None:
        state[f"{name}W"] = _kernel(convolution)
        state |= {f"{name}b": convolution.bias[None, None, None], f"{name}logs": convolution.log_scale[None] / 3}


def _read_actnorm(reader: StateReader, name: str) -> tuple[Tensor, Tensor]:
    return reader(f"{name}_center/b").flatten(), 3 * reader(f"{name}_scale/logs").flatten()


def _write_actnorm(state: State, name: str, bias: Tensor, log_scale: Tensor) -> None:
    state[f"{name}_center/b"] = bias[None, None, None]
    state[f"{name}_scale/logs"] = log_scale[None, None, None] / 3


def _read_kernel(reader: StateReader, name: str, inexact: Inexact) -> Tensor:
    weight = reader(name).permute(3, 2, 0, 1)
    if weight.shape[-1] == 1:
        return weight
    if bool(weight[:, -1].any()):
        inexact.append(f"{name}: its last input channel, which marks the border, is left out")
    return weight[:, :-1]


def _kernel(convolution: Convolution) -> Tensor:
    kernel = convolution.weight.permute(2, 3, 1, 0)
    # Padding with a number adds, in the padding, that number times the kernel's sum over the input channels.
    return kernel if kernel.shape[0] == 1 else torch.cat((kernel, convolution.border * kernel.sum(2, True)), 2)
