"""The ``state_dict`` of chaiyujin/glow-pytorch and y0ast/Glow-PyTorch."""

from __future__ import annotations

import dataclasses

from glow_kernels.interop.state_dicts.common import Inexact, note_border, note_classes, per_channel, without_border
from glow_kernels.interop.weights import (
    Convolution,
    State,
    StateReader,
    Step,
    Weights,
    affine_halves,
    affine_interleaved,
    constant_convolution,
    halves,
    interleaved,
    read_mixing,
    write_mixing,
)


class OpenAI:
    """``Glow`` of chaiyujin/glow-pytorch, or of y0ast/Glow-PyTorch."""

    def __init__(self, network: str, inner: str, triangles: tuple[str, str], top: str) -> None:
        self.network, self.inner, self.triangles, self.top = network, inner, triangles, top

    def read(self, reader: StateReader, inexact: Inexact) -> Weights:
        levels: list[list[Step]] = [[]]
        splits = []
        expected = 1  # after the squeeze, which has no tensors
        for layer in reader.sparse_numbers("flow.layers."):
            if layer != expected:
                raise KeyError(f"flow.layers.{expected}")
            name = f"flow.layers.{layer}."
            if reader.has(f"{name}actnorm.bias"):
                levels[-1].append(self._read_step(reader, name))
                expected = layer + 1
            else:
                splits.append(halves(self._read_zeros(reader, f"{name}conv.")))
                levels.append([])
                expected = layer + 2
        note_classes(reader, ("project_ycond.",), inexact)
        top = None
        if reader.has(f"{self.top}.logs"):
            convolution = self._read_zeros(reader, f"{self.top}.")
            top = constant_convolution(convolution.bias, convolution.log_scale)
        return Weights(levels if levels[0] else [], splits, top)

    def write(self, weights: Weights, lu: bool, inexact: Inexact) -> State:
        state: State = {}
        layer = 0
        for level, steps in enumerate(weights.levels):
            layer += 1  # the squeeze
            for step in steps:
                self._write_step(state, f"flow.layers.{layer}.", step.without_signs(), lu, inexact)
                layer += 1
            if level < len(weights.splits):
                self._write_zeros(state, f"flow.layers.{layer}.conv.", interleaved(weights.splits[level]), inexact)
                layer += 1
        if weights.top is not None:
            top = without_border(self.top, weights.top, inexact)
            # Its input of zeros has as many channels as its output.
            weight = top.weight.new_zeros(len(top.bias), len(top.bias), 3, 3)
            self._write_zeros(state, f"{self.top}.", dataclasses.replace(top, weight=weight), inexact)
        return state

    def _read_step(self, reader: StateReader, name: str) -> Step:
        mixing, net = f"{name}invconv.", f"{name}{self.network}."
        factors = ("p", *self.triangles, "log_s", "sign_s")
        hidden = [
            Convolution(
                reader(f"{net}{layer}.{self.inner}weight"),
                reader(f"{net}{layer}.actnorm.bias").flatten(),
                reader(f"{net}{layer}.actnorm.logs").flatten(),
            )
            for layer in (0, 2)
        ]
        return affine_halves(
            Step(
                reader(f"{name}actnorm.logs").flatten(),
                reader(f"{name}actnorm.bias").flatten(),
                read_mixing(reader, mixing + "weight", [mixing + factor for factor in factors]),
                (hidden[0], hidden[1], self._read_zeros(reader, f"{net}4.")),
            )
        )

    def _write_step(self, state: State, name: str, step: Step, lu: bool, inexact: Inexact) -> None:
        step = affine_interleaved(step)
        mixing, net = f"{name}invconv.", f"{name}{self.network}."
        state[f"{name}actnorm.bias"] = per_channel(step.bias)
        state[f"{name}actnorm.logs"] = per_channel(step.log_scale)
        factors = [mixing + factor for factor in (*self.triangles, "log_s", "p", "sign_s")]
        write_mixing(state, step.mixing, lu, mixing + "weight", factors)
        for layer, convolution in zip((0, 2), step.network, strict=False):
            state[f"{net}{layer}.{self.inner}weight"] = convolution.weight
            state[f"{net}{layer}.actnorm.bias"] = per_channel(convolution.bias)
            state[f"{net}{layer}.actnorm.logs"] = per_channel(convolution.log_scale)
        self._write_zeros(state, f"{net}4.", step.network[2], inexact)

    def _read_zeros(self, reader: StateReader, name: str) -> Convolution:
        logs = 3 * reader(f"{name}logs").flatten()
        return Convolution(reader(f"{name}{self.inner}weight"), reader(f"{name}{self.inner}bias"), logs)

    def _write_zeros(self, state: State, name: str, convolution: Convolution, inexact: Inexact) -> None:
        note_border(name, convolution, 0.0, inexact)
        state[f"{name}{self.inner}weight"] = convolution.weight
        state[f"{name}{self.inner}bias"] = convolution.bias
        state[f"{name}logs"] = (convolution.log_scale / 3)[:, None, None]
