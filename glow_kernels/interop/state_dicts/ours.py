"""The ``state_dict`` of :class:`glow_kernels.models.Glow`."""

from __future__ import annotations

import torch

from glow_kernels.interop.state_dicts.common import Inexact, note_border, note_classes, top_of, without_border
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


class Ours:
    """:class:`glow_kernels.models.Glow`."""

    def read(self, reader: StateReader, inexact: Inexact) -> Weights:
        levels, splits = [], []
        for level in reader.numbers("levels."):
            numbers = reader.numbers(f"levels.{level}.steps.")
            levels.append([self._read_step(reader, f"levels.{level}.steps.{number}.") for number in numbers])
            if reader.has(f"levels.{level}.split.prior.weight"):
                splits.append(halves(self._read_zeros(reader, f"levels.{level}.split.prior.")))
        top = None
        if reader.has("top_prior.common"):
            top = constant_convolution(reader("top_prior.common"), 3 * reader("top_prior.common_log_scale"))
        note_classes(reader, ("top_prior.per_class",), inexact)
        return Weights(levels, splits, top)

    def write(self, weights: Weights, lu: bool, inexact: Inexact) -> State:
        state: State = {}
        for level, steps in enumerate(weights.levels):
            for number, step in enumerate(steps):
                self._write_step(state, f"levels.{level}.steps.{number}.", step.without_signs(), lu, inexact)
        for level, split in enumerate(weights.splits):
            self._write_zeros(state, f"levels.{level}.split.prior.", interleaved(split), inexact)
        top = without_border("top_prior", top_of(weights), inexact)
        state |= {"top_prior.common": top.bias, "top_prior.common_log_scale": top.log_scale / 3}
        return state

    def _read_step(self, reader: StateReader, name: str) -> Step:
        mixing = f"{name}mixing."
        factors = ("permutation", "lower", "upper", "log_diagonal", "diagonal_sign")
        network = f"{name}coupling.network."
        hidden = [
            Convolution(
                reader(f"{network}{part}.weight"),
                reader(f"{network}{part}.actnorm.bias"),
                reader(f"{network}{part}.actnorm.log_scale"),
            )
            for part in ("first", "second")
        ]
        last = self._read_zeros(reader, f"{network}last.")
        for part in ("first", "second"):
            reader(f"{network}{part}.actnorm.initialized")
        return affine_halves(
            Step(
                reader(f"{name}actnorm.log_scale"),
                reader(f"{name}actnorm.bias"),
                read_mixing(reader, mixing + "weight", [mixing + factor for factor in factors]),
                (hidden[0], hidden[1], last),
                initialized=bool(reader(f"{name}actnorm.initialized")),
            )
        )

    def _write_step(self, state: State, name: str, step: Step, lu: bool, inexact: Inexact) -> None:
        step = affine_interleaved(step)
        flag = torch.tensor(step.initialized)
        actnorm, network, mixing = f"{name}actnorm.", f"{name}coupling.network.", f"{name}mixing."
        state |= {f"{actnorm}log_scale": step.log_scale, f"{actnorm}bias": step.bias, f"{actnorm}initialized": flag}
        factors = ("lower", "upper", "log_diagonal", "permutation", "diagonal_sign")
        write_mixing(state, step.mixing, lu, mixing + "weight", [mixing + factor for factor in factors])
        for part, convolution in zip(("first", "second"), step.network, strict=False):
            state[f"{network}{part}.weight"] = convolution.weight
            state[f"{network}{part}.actnorm.log_scale"] = convolution.log_scale
            state[f"{network}{part}.actnorm.bias"] = convolution.bias
            state[f"{network}{part}.actnorm.initialized"] = flag
        self._write_zeros(state, f"{network}last.", step.network[2], inexact)

    def _read_zeros(self, reader: StateReader, name: str) -> Convolution:
        return Convolution(reader(f"{name}weight"), reader(f"{name}bias"), 3 * reader(f"{name}log_scale"))

    def _write_zeros(self, state: State, name: str, convolution: Convolution, inexact: Inexact) -> None:
        note_border(name, convolution, 0.0, inexact)
        state |= {f"{name}weight": convolution.weight, f"{name}bias": convolution.bias}
        state[f"{name}log_scale"] = convolution.log_scale / 3
