"""The ``state_dict`` of normflows."""

from __future__ import annotations

import torch
from torch import Tensor

from glow_kernels.interop.state_dicts.common import (
    Inexact,
    note_border,
    note_classes,
    per_channel,
    top_of,
    without_border,
)
from glow_kernels.interop.weights import (
    Convolution,
    State,
    StateReader,
    Step,
    Weights,
    affine_halves,
    affine_interleaved,
    constant_convolution,
    negated_shift,
    read_mixing,
    write_mixing,
)


class Normflows:
    """``MultiscaleFlow`` of ``GlowBlock`` and ``Squeeze``, with levels and steps in sampling order: deepest first."""

    def read(self, reader: StateReader, inexact: Inexact) -> Weights:
        levels, densities = [], []
        for level in reversed(reader.numbers("flows.")):
            blocks = reversed(reader.numbers(f"flows.{level}."))
            levels.append([self._read_step(reader, f"flows.{level}.{block}.") for block in blocks])
            densities.append(self._read_density(reader, f"q0.{level}.", inexact))
            note_classes(reader, (f"q0.{level}.loc_cc", f"q0.{level}.log_scale_cc"), inexact)
        return Weights(levels, densities[:-1], densities[-1] if densities else None)

    def write(self, weights: Weights, lu: bool, inexact: Inexact) -> State:
        state: State = {}
        for level, steps in enumerate(reversed(weights.levels)):
            for block, step in enumerate(reversed(steps)):
                self._write_step(state, f"flows.{level}.{block}.", step.without_signs(), lu, inexact)
        self._write_density(state, "q0.0.", without_border("q0.0", top_of(weights), inexact))
        for level, split in enumerate(reversed(weights.splits), start=1):
            if split.depends_on_padding:
                inexact.append(f"q0.{level}: the source's prior depends on the channels that are kept")
            self._write_density(state, f"q0.{level}.", split)
        return state

    def _read_step(self, reader: StateReader, name: str) -> Step:
        net, mixing = f"{name}flows.0.flows.1.param_map.net.", f"{name}flows.1."
        with_actnorm = reader.has(f"{net}1.actNorm.s")
        convolutions = []
        for layer in (0, 3, 6) if with_actnorm else (0, 2, 4):
            weight = reader(f"{net}{layer}.weight")
            if with_actnorm and layer != 6:
                actnorm = f"{net}{layer + 1}.actNorm."
                shift, log_scale = (reader(actnorm + part).flatten() for part in ("t", "s"))
                reader(actnorm + "data_dep_init_done")
                convolutions.append(_sampling_actnorm(weight, shift, log_scale))
            else:
                bias = reader(f"{net}{layer}.bias")
                convolutions.append(Convolution(weight, bias, torch.zeros_like(bias)))
        first, second, last = convolutions
        factors = [mixing + factor for factor in ("P", "L", "U", "log_S", "sign_S")]
        step = Step(
            -reader(f"{name}flows.2.s").flatten(),
            -reader(f"{name}flows.2.t").flatten(),
            read_mixing(reader, mixing + "W", factors),
            (first, second, last),
            initialized=bool(reader(f"{name}flows.2.data_dep_init_done")),
        )
        if reader.has(mixing + "eye"):
            reader(mixing + "eye")
        return negated_shift(affine_halves(step))

    def _write_step(self, state: State, name: str, step: Step, lu: bool, inexact: Inexact) -> None:
        step = affine_interleaved(negated_shift(step))
        net, mixing = f"{name}flows.0.flows.1.param_map.net.", f"{name}flows.1."
        for layer, convolution in zip((0, 2, 4), step.network, strict=True):
            folded = convolution.folded()
            state |= {f"{net}{layer}.weight": folded.weight, f"{net}{layer}.bias": folded.bias}
        note_border(f"{net}4.", step.network[2], 0.0, inexact)
        factors = [mixing + factor for factor in ("L", "U", "log_S", "P", "sign_S")]
        write_mixing(state, step.mixing, lu, mixing + "W", factors)
        if mixing + "L" in state:
            lower = state[mixing + "L"]
            state[mixing + "eye"] = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        state |= {f"{name}flows.2.s": per_channel(-step.log_scale), f"{name}flows.2.t": per_channel(-step.bias)}
        state[f"{name}flows.2.data_dep_init_done"] = torch.tensor(float(step.initialized))

    def _read_density(self, reader: StateReader, name: str, inexact: Inexact) -> Convolution:
        mean, log_sd = reader(f"{name}loc"), reader(f"{name}log_scale")
        if reader.has(f"{name}loc_logs"):
            log_scales = [3 * reader(f"{name}{part}").flatten() for part in ("loc_logs", "log_scale_logs")]
            return constant_convolution(torch.cat((mean.flatten(), log_sd.flatten())), torch.cat(log_scales))
        if len(mean) != 1:  # (C, H, W, classes) of ClassCondDiagGaussian
            mean, log_sd = mean.movedim(-1, 0), log_sd.movedim(-1, 0)
        per_channel = torch.cat([tensor.mean((0, 2, 3)) for tensor in (mean, log_sd)])
        if any(bool((tensor != tensor[:1, :, :1, :1]).any()) for tensor in (mean, log_sd)):
            inexact.append(
                f"{name}loc, {name}log_scale: differ between positions or classes, of which the mean is taken"
            )
        return constant_convolution(per_channel, torch.zeros_like(per_channel))

    def _write_density(self, state: State, name: str, density: Convolution) -> None:
        parts = zip(("loc", "log_scale"), density.bias.chunk(2), density.log_scale.chunk(2), strict=True)
        for part, value, log_scale in parts:
            state |= {f"{name}{part}": per_channel(value), f"{name}{part}_logs": per_channel(log_scale / 3)}


def _sampling_actnorm(weight: Tensor, shift: Tensor, log_scale: Tensor) -> Convolution:
    """A convolution and ActNorm ``exp(s) x + t``, which normflows' networks call in their forward direction."""
    return Convolution(weight, shift * (-log_scale).exp(), log_scale)
