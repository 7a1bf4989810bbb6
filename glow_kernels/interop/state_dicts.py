"""What the ``state_dict`` of a Glow looks like in each dialect: read into :class:`Weights`, written from them."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from glow_kernels.interop.weights import (
    Convolution,
    Keys,
    State,
    Step,
    Weights,
    affine_halves,
    affine_interleaved,
    constant,
    halves,
    interleaved,
    negated_shift,
    read_mixing,
    swapped,
    write_mixing,
)

# Lines about what of the source the target does not express, which begin with a name in the target.
Inexact = list[str]


class Dialect(Protocol):
    """Names and spellings of one implementation."""

    def read(self, keys: Keys, inexact: Inexact) -> Weights:
        """The model; a KeyError names what is missing."""
        ...

    def write(self, weights: Weights, lu: bool | None, inexact: Inexact) -> State:
        """The same under this dialect's names; ``lu`` as for :func:`glow_kernels.interop.convert`."""
        ...


class _Ours:
    """:class:`glow_kernels.models.Glow`."""

    def read(self, keys: Keys, inexact: Inexact) -> Weights:
        levels, splits = [], []
        for level in keys.numbers("levels."):
            numbers = keys.numbers(f"levels.{level}.steps.")
            levels.append([self._read_step(keys, f"levels.{level}.steps.{number}.") for number in numbers])
            if keys.has(f"levels.{level}.split.prior.weight"):
                splits.append(halves(self._read_zeros(keys, f"levels.{level}.split.prior.")))
        top = None
        if keys.has("top_prior.common"):
            top = constant(keys("top_prior.common"), 3 * keys("top_prior.common_log_scale"))
        return Weights(levels, splits, top)

    def write(self, weights: Weights, lu: bool | None, inexact: Inexact) -> State:
        state: State = {}
        for level, steps in enumerate(weights.levels):
            for number, step in enumerate(steps):
                self._write_step(state, f"levels.{level}.steps.{number}.", step.without_signs(), lu, inexact)
        for level, split in enumerate(weights.splits):
            self._write_zeros(state, f"levels.{level}.split.prior.", interleaved(split), inexact)
        top = _without_border("top_prior", _top_of(weights), inexact)
        state |= {"top_prior.common": top.bias, "top_prior.common_log_scale": top.log_scale / 3}
        return state

    def _read_step(self, keys: Keys, name: str) -> Step:
        mixing = f"{name}mixing."
        factors = ("permutation", "lower", "upper", "log_diagonal", "diagonal_sign")
        network = f"{name}coupling.network."
        hidden = [
            Convolution(
                keys(f"{network}{part}.weight"),
                keys(f"{network}{part}.actnorm.bias"),
                keys(f"{network}{part}.actnorm.log_scale"),
            )
            for part in ("first", "second")
        ]
        last = self._read_zeros(keys, f"{network}last.")
        for part in ("first", "second"):
            keys(f"{network}{part}.actnorm.initialized")
        return affine_halves(
            Step(
                keys(f"{name}actnorm.log_scale"),
                keys(f"{name}actnorm.bias"),
                read_mixing(keys, mixing + "weight", [mixing + factor for factor in factors]),
                (hidden[0], hidden[1], last),
                initialized=bool(keys(f"{name}actnorm.initialized")),
            )
        )

    def _write_step(self, state: State, name: str, step: Step, lu: bool | None, inexact: Inexact) -> None:
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

    def _read_zeros(self, keys: Keys, name: str) -> Convolution:
        return Convolution(keys(f"{name}weight"), keys(f"{name}bias"), 3 * keys(f"{name}log_scale"))

    def _write_zeros(self, state: State, name: str, convolution: Convolution, inexact: Inexact) -> None:
        _note_border(name, convolution, 0.0, inexact)
        state |= {f"{name}weight": convolution.weight, f"{name}bias": convolution.bias}
        state[f"{name}log_scale"] = convolution.log_scale / 3


class _Rosinality:
    """``Glow`` of rosinality/glow-pytorch."""

    def read(self, keys: Keys, inexact: Inexact) -> Weights:
        blocks = keys.numbers("blocks.")
        levels, priors = [], []
        for block in blocks:
            numbers = keys.numbers(f"blocks.{block}.flows.")
            levels.append([self._read_step(keys, f"blocks.{block}.flows.{number}.") for number in numbers])
            priors.append(self._read_zeros(keys, f"blocks.{block}.prior."))
        return Weights(levels, priors[:-1], priors[-1] if priors else None)

    def write(self, weights: Weights, lu: bool | None, inexact: Inexact) -> State:
        state: State = {}
        for block, steps in enumerate(weights.levels):
            # The original does not pass the option on to its last block.
            decomposed = True if block == len(weights.levels) - 1 else lu
            for number, step in enumerate(steps):
                self._write_step(state, f"blocks.{block}.flows.{number}.", step, decomposed, inexact)
        for block, prior in enumerate([*weights.splits, _top_of(weights)]):
            self._write_zeros(state, f"blocks.{block}.prior.", prior, inexact)
        return state

    def _read_step(self, keys: Keys, name: str) -> Step:
        net, mixing = f"{name}coupling.net.", f"{name}invconv."
        hidden = []
        for layer in (0, 2):
            bias = keys(f"{net}{layer}.bias")
            hidden.append(Convolution(keys(f"{net}{layer}.weight"), bias, torch.zeros_like(bias)))
        scale = keys(f"{name}actnorm.scale").flatten()
        factors = [mixing + factor for factor in ("w_p", "w_l", "w_u", "w_s", "s_sign")]
        found = Step(
            scale.abs().log(),
            keys(f"{name}actnorm.loc").flatten(),
            read_mixing(keys, mixing + "weight", factors),
            (hidden[0], hidden[1], self._read_zeros(keys, f"{net}4.")),
            sign=scale.sign(),
            initialized=bool(keys(f"{name}actnorm.initialized")),
        )
        for mask in ("u_mask", "l_mask", "l_eye"):
            if keys.has(mixing + mask):
                keys(mixing + mask)
        return found.with_last(swapped(found.network[2])) if found.is_affine else found

    def _write_step(self, state: State, name: str, step: Step, lu: bool | None, inexact: Inexact) -> None:
        if step.is_affine:
            step = step.with_last(swapped(step.network[2]))
        net, mixing = f"{name}coupling.net.", f"{name}invconv."
        scale = step.log_scale.exp() if step.sign is None else step.sign * step.log_scale.exp()
        state[f"{name}actnorm.loc"] = _per_channel(step.bias)
        state[f"{name}actnorm.scale"] = _per_channel(scale)
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

    def _read_zeros(self, keys: Keys, name: str) -> Convolution:
        weight, bias = keys(f"{name}conv.weight"), keys(f"{name}conv.bias")
        return Convolution(weight, bias, 3 * keys(f"{name}scale").flatten(), border=1.0)

    def _write_zeros(self, state: State, name: str, convolution: Convolution, inexact: Inexact) -> None:
        _note_border(name, convolution, 1.0, inexact)
        state |= {f"{name}conv.weight": convolution.weight, f"{name}conv.bias": convolution.bias}
        state[f"{name}scale"] = _per_channel(convolution.log_scale / 3)


class _OpenAI:
    """``Glow`` of chaiyujin/glow-pytorch, or of y0ast/Glow-PyTorch."""

    def __init__(self, network: str, inner: str, triangles: tuple[str, str], top: str) -> None:
        self.network, self.inner, self.triangles, self.top = network, inner, triangles, top

    def read(self, keys: Keys, inexact: Inexact) -> Weights:
        levels: list[list[Step]] = [[]]
        splits = []
        for layer in keys.numbers("flow.layers."):
            name = f"flow.layers.{layer}."
            if keys.has(f"{name}actnorm.bias"):
                levels[-1].append(self._read_step(keys, name))
            else:
                splits.append(halves(self._read_zeros(keys, f"{name}conv.")))
                levels.append([])
        top = None
        if keys.has(f"{self.top}.logs"):
            convolution = self._read_zeros(keys, f"{self.top}.")
            top = constant(convolution.bias, convolution.log_scale)
        return Weights(levels if levels[0] else [], splits, top)

    def write(self, weights: Weights, lu: bool | None, inexact: Inexact) -> State:
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
            top = _without_border(self.top, weights.top, inexact)
            # Its input of zeros has as many channels as its output.
            weight = top.weight.new_zeros(len(top.bias), len(top.bias), 3, 3)
            self._write_zeros(state, f"{self.top}.", dataclasses.replace(top, weight=weight), inexact)
        return state

    def _read_step(self, keys: Keys, name: str) -> Step:
        mixing, net = f"{name}invconv.", f"{name}{self.network}."
        factors = ("p", *self.triangles, "log_s", "sign_s")
        hidden = [
            Convolution(
                keys(f"{net}{layer}.{self.inner}weight"),
                keys(f"{net}{layer}.actnorm.bias").flatten(),
                keys(f"{net}{layer}.actnorm.logs").flatten(),
            )
            for layer in (0, 2)
        ]
        return affine_halves(
            Step(
                keys(f"{name}actnorm.logs").flatten(),
                keys(f"{name}actnorm.bias").flatten(),
                read_mixing(keys, mixing + "weight", [mixing + factor for factor in factors]),
                (hidden[0], hidden[1], self._read_zeros(keys, f"{net}4.")),
            )
        )

    def _write_step(self, state: State, name: str, step: Step, lu: bool | None, inexact: Inexact) -> None:
        step = affine_interleaved(step)
        mixing, net = f"{name}invconv.", f"{name}{self.network}."
        state[f"{name}actnorm.bias"] = _per_channel(step.bias)
        state[f"{name}actnorm.logs"] = _per_channel(step.log_scale)
        factors = [mixing + factor for factor in (*self.triangles, "log_s", "p", "sign_s")]
        write_mixing(state, step.mixing, lu, mixing + "weight", factors)
        for layer, convolution in zip((0, 2), step.network, strict=False):
            state[f"{net}{layer}.{self.inner}weight"] = convolution.weight
            state[f"{net}{layer}.actnorm.bias"] = _per_channel(convolution.bias)
            state[f"{net}{layer}.actnorm.logs"] = _per_channel(convolution.log_scale)
        self._write_zeros(state, f"{net}4.", step.network[2], inexact)

    def _read_zeros(self, keys: Keys, name: str) -> Convolution:
        logs = 3 * keys(f"{name}logs").flatten()
        return Convolution(keys(f"{name}{self.inner}weight"), keys(f"{name}{self.inner}bias"), logs)

    def _write_zeros(self, state: State, name: str, convolution: Convolution, inexact: Inexact) -> None:
        _note_border(name, convolution, 0.0, inexact)
        state[f"{name}{self.inner}weight"] = convolution.weight
        state[f"{name}{self.inner}bias"] = convolution.bias
        state[f"{name}logs"] = (convolution.log_scale / 3)[:, None, None]


class _Normflows:
    """``MultiscaleFlow`` of ``GlowBlock`` and ``Squeeze``; its first level is the deepest, its last step the first."""

    def read(self, keys: Keys, inexact: Inexact) -> Weights:
        levels, densities = [], []
        for level in reversed(keys.numbers("flows.")):
            blocks = reversed(keys.numbers(f"flows.{level}."))
            levels.append([self._read_step(keys, f"flows.{level}.{block}.") for block in blocks])
            densities.append(self._read_density(keys, f"q0.{level}.", inexact))
        splits = [_without_condition(density) for density in densities[:-1]]
        return Weights(levels, splits, densities[-1] if densities else None)

    def write(self, weights: Weights, lu: bool | None, inexact: Inexact) -> State:
        state: State = {}
        for level, steps in enumerate(reversed(weights.levels)):
            for block, step in enumerate(reversed(steps)):
                self._write_step(state, f"flows.{level}.{block}.", step.without_signs(), lu, inexact)
        self._write_density(state, "q0.0.", _without_border("q0.0", _top_of(weights), inexact))
        for level, split in enumerate(reversed(weights.splits), start=1):
            if split.notices_border:
                inexact.append(f"q0.{level}: the source's prior depends on the channels that are kept")
            self._write_density(state, f"q0.{level}.", split)
        return state

    def _read_step(self, keys: Keys, name: str) -> Step:
        net, mixing = f"{name}flows.0.flows.1.param_map.net.", f"{name}flows.1."
        with_actnorm = keys.has(f"{net}1.actNorm.s")
        convolutions = []
        for layer in (0, 3, 6) if with_actnorm else (0, 2, 4):
            weight = keys(f"{net}{layer}.weight")
            if with_actnorm and layer != 6:
                actnorm = f"{net}{layer + 1}.actNorm."
                shift, log_scale = (keys(actnorm + part).flatten() for part in ("t", "s"))
                keys(actnorm + "data_dep_init_done")
                convolutions.append(_sampling_actnorm(weight, shift, log_scale))
            else:
                bias = keys(f"{net}{layer}.bias")
                convolutions.append(Convolution(weight, bias, torch.zeros_like(bias)))
        first, second, last = convolutions
        factors = [mixing + factor for factor in ("P", "L", "U", "log_S", "sign_S")]
        step = Step(
            -keys(f"{name}flows.2.s").flatten(),
            -keys(f"{name}flows.2.t").flatten(),
            read_mixing(keys, mixing + "W", factors),
            (first, second, last),
            initialized=bool(keys(f"{name}flows.2.data_dep_init_done")),
        )
        if keys.has(mixing + "eye"):
            keys(mixing + "eye")
        return negated_shift(affine_halves(step))

    def _write_step(self, state: State, name: str, step: Step, lu: bool | None, inexact: Inexact) -> None:
        step = affine_interleaved(negated_shift(step))
        net, mixing = f"{name}flows.0.flows.1.param_map.net.", f"{name}flows.1."
        for layer, convolution in zip((0, 2, 4), step.network, strict=True):
            folded = convolution.folded()
            state |= {f"{net}{layer}.weight": folded.weight, f"{net}{layer}.bias": folded.bias}
        _note_border(f"{net}4.", step.network[2], 0.0, inexact)
        factors = [mixing + factor for factor in ("L", "U", "log_S", "P", "sign_S")]
        write_mixing(state, step.mixing, lu, mixing + "W", factors)
        if mixing + "L" in state:
            lower = state[mixing + "L"]
            state[mixing + "eye"] = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        state |= {f"{name}flows.2.s": _per_channel(-step.log_scale), f"{name}flows.2.t": _per_channel(-step.bias)}
        state[f"{name}flows.2.data_dep_init_done"] = torch.tensor(float(step.initialized))

    def _read_density(self, keys: Keys, name: str, inexact: Inexact) -> Convolution:
        mean, log_sd = keys(f"{name}loc"), keys(f"{name}log_scale")
        if keys.has(f"{name}loc_logs"):
            log_scales = [3 * keys(f"{name}{part}").flatten() for part in ("loc_logs", "log_scale_logs")]
            return constant(torch.cat((mean.flatten(), log_sd.flatten())), torch.cat(log_scales))
        per_channel = torch.cat([tensor[0].flatten(1).mean(1) for tensor in (mean, log_sd)])
        if any(bool((tensor != tensor[:, :, :1, :1]).any()) for tensor in (mean, log_sd)):
            inexact.append(f"{name}loc, {name}log_scale: differ between positions, of which the mean is taken")
        return constant(per_channel, torch.zeros_like(per_channel))

    def _write_density(self, state: State, name: str, density: Convolution) -> None:
        parts = zip(("loc", "log_scale"), density.bias.chunk(2), density.log_scale.chunk(2), strict=True)
        for part, value, log_scale in parts:
            state |= {f"{name}{part}": _per_channel(value), f"{name}{part}_logs": _per_channel(log_scale / 3)}


DIALECTS: dict[str, Dialect] = {
    "glow_kernels": _Ours(),
    "rosinality": _Rosinality(),
    "chaiyujin": _OpenAI("f", "", ("l", "u"), "learn_top"),
    "y0ast": _OpenAI("block", "conv.", ("lower", "upper"), "learn_top_fn"),
    "normflows": _Normflows(),
}


def _sampling_actnorm(weight: Tensor, shift: Tensor, log_scale: Tensor) -> Convolution:
    """A convolution and ActNorm ``exp(s) x + t``, which normflows' networks call in their forward direction."""
    return Convolution(weight, shift * (-log_scale).exp(), log_scale)


def _without_condition(density: Convolution) -> Convolution:
    # What is factored out has as many channels as what is kept.
    return dataclasses.replace(density, weight=density.bias.new_zeros(len(density.bias), len(density.bias) // 2, 3, 3))


def _top_of(weights: Weights) -> Convolution:
    """The top prior, or a standard normal."""
    if weights.top is not None:
        return weights.top
    channels = len(weights.levels[-1][0].bias)
    zeros = weights.levels[-1][0].bias.new_zeros(2 * channels)
    return constant(zeros, zeros)


def _without_border(name: str, top: Convolution, inexact: Inexact) -> Convolution:
    """A top prior that is the same at every position."""
    if top.border and top.notices_border:
        inexact.append(f"{name}: the source's prior differs at the border, which it pads with {top.border:g}")
    return constant(top.bias, top.log_scale)


def _note_border(name: str, convolution: Convolution, border: float, inexact: Inexact) -> None:
    if convolution.border != border and convolution.notices_border:
        inexact.append(f"{name}: pads its input with {border:g}, the source with {convolution.border:g}")


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)
