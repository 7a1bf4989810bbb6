"""The ``state_dict`` of rosinality/glow-pytorch."""

from __future__ import annotations

import torch

from glow_kernels.interop.state_dicts.common import Inexact, note_border, per_channel, top_of
from glow_kernels.interop.weights import (
    Convolution,
    State,
    StateReader,
    Step,
    Weights,
    read_mixing,
    swapped,
    write_mixing,
)


class Rosinality:
    """``Glow`` of rosinality/glow-pytorch."""

    def read(self, reader: StateReader, inexact: Inexact) -> Weights:
        blocks = reader.numbers("blocks.")
        levels, priors = [], []
        for block in blocks:
            numbers = reader.numbers(f"blocks.{block}.flows.")
            levels.append([self._read_step(reader, f"blocks.{block}.flows.{number}.") for number in numbers])
            priors.append(self._read_zeros(reader, f"blocks.{block}.prior."))
        return Weights(levels, priors[:-1], priors[-1] if priors else None)

    def write(self, weights: Weights, lu: bool, inexact: Inexact) -> State:
        state: State = {}
        for block, steps in enumerate(weights.levels):
            # The original does not pass its LU option on to its last block.
            decomposed = True if block == len(weights.levels) - 1 else lu
            for number, step in enumerate(steps):
                self._write_step(state, f"blocks.{block}.flows.{number}.", step, decomposed, inexact)
        for block, prior in enumerate([*weights.splits, top_of(weights)]):
            self._write_zeros(state, f"blocks.{block}.prior.", prior, inexact)
        return state

    def _read_step(self, reader: StateReader, name: str) -> Step:
        net, mixing = f"{name}coupling.net.", f"{name}invconv."
        hidden = []
        for layer in (0, 2):
            bias = reader(f"{net}{layer}.bias")
            hidden.append(Convolution(reader(f"{net}{layer}.weight"), bias, torch.zeros_like(bias)))
        scale = reader(f"{name}actnorm.scale").flatten()
        factors = [mixing + factor for factor in ("w_p", "w_l", "w_u", "w_s", "s_sign")]
        found = Step(
            scale.abs().log(),
            reader(f"{name}actnorm.loc").flatten(),
            read_mixing(reader, mixing + "weight", factors),
            (hidden[0], hidden[1], self._read_zeros(reader, f"{net}4.")),
            sign=scale.sign(),
            initialized=bool(reader(f"{name}actnorm.initialized")),
        )
        for mask in ("u_mask", "l_mask", "l_eye"):
            if reader.has(mixing + mask):
                reader(mixing + mask)
        return found.with_last(swapped(found.network[2])) if found.is_affine else found

    def _write_step(self, state: State, name: str, step: Step, lu: bool, inexact: Inexact) -> None:
        if step.is_affine:
            step = step.with_last(swapped(step.network[2]))
        net, mixing = f"{name}coupling.net.", f"{name}invconv."
        scale = step.log_scale.exp() if step.sign is None else step.sign * step.log_scale.exp()
        state[f"{name}actnorm.loc"] = per_channel(step.bias)
        state[f"{name}actnorm.scale"] = per_channel(scale)
        state[f"{name}actnorm.initialized"] = torch.tensor(step.initialized, dtype=torch.uint8)
        factors = [mixing + factor for factor in ("w_l", "w_u", "w_s", "w_p", "s_sign")]
        write_mixing(state, step.mixing, lu, mixing + "weight", factors)
        if mixing + "weight" in state:
            state[mixing + "weight"] = state[mixing + "weight"][:, :, None, None]
        else:
            ones = torch.ones_like(state[mixing + "w_l"])
            state |= {mixing + "u_mask": ones.triu(1), mixing + "l_mask": ones.tril(-1)}
            state[mixing + "l_eye"] = torch.eye(len(ones), dtype=ones.dtype, device=ones.device)
        for layer, convolution in zip((0, 2), step.network, strict=False):
            folded = convolution.folded()
            state |= {f"{net}{layer}.weight": folded.weight, f"{net}{layer}.bias": folded.bias}
        self._write_zeros(state, f"{net}4.", step.network[2], inexact)

    def _read_zeros(self, reader: StateReader, name: str) -> Convolution:
        weight, bias = reader(f"{name}conv.weight"), reader(f"{name}conv.bias")
        return Convolution(weight, bias, 3 * reader(f"{name}scale").flatten(), border=1.0)

    def _write_zeros(self, state: State, name: str, convolution: Convolution, inexact: Inexact) -> None:
        note_border(name, convolution, 1.0, inexact)
        state |= {f"{name}conv.weight": convolution.weight, f"{name}conv.bias": convolution.bias}
        state[f"{name}scale"] = per_channel(convolution.log_scale / 3)
