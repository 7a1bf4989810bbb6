"""The dialect of jaywalnut310/glow-tts and its copies: sequences with masks, a convolution shared by channel groups.

Layers are called as ``layer(x, x_mask=None, reverse=False, ...)`` and return the data and the log-determinant (B,). In
reverse it is None or, in NATSpeech, PortaSpeech and IMS-Toucan, that of the inverse.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from glow_kernels.interop.copies import faithful_copy
from glow_kernels.interop.examiner import Examiner
from glow_kernels.interop.memory import initialize, run_alone
from glow_kernels.interop.patch import Call, Mismatch, Patch, Results, options_of, original_class, shared_log_det
from glow_kernels.interop.probe import Coupling
from glow_kernels.interop.stand_ins import OPAQUE_CONTEXT
from glow_kernels.ops import actnorm_conv1x1, actnorm_conv1x1_inverse

LENGTH = 8
Result = tuple[Tensor, "Tensor | None"]


def _calls(channels: int, speaker: int = 0) -> list[Call]:
    """The calls of a layer whose network reads ``speaker`` channels of ``g``; with 0, the layer may not use ``g``."""
    shape, speakers = (2, channels, LENGTH), [(2, speaker, 1)] if speaker else []

    def mask(x: Tensor) -> Tensor:
        lengths = torch.tensor([[LENGTH], [LENGTH - 3]], device=x.device)
        return (torch.arange(LENGTH, device=x.device) < lengths).unsqueeze(1).to(x.dtype)

    def masked(module: Any, x: Tensor, reverse: bool) -> Any:
        return module(x * mask(x), mask(x), reverse=reverse)

    def with_speaker(module: Any, x: Tensor, g: Any = OPAQUE_CONTEXT) -> Any:
        return module(x * mask(x), mask(x), g=g)

    return [
        Call("forward", lambda module, x: masked(module, x, False), (shape,)),
        Call("reverse", lambda module, x: masked(module, x, True), (shape,)),
        Call("without mask", lambda module, x: module(x), (shape,), optional=True),
        Call("with g", with_speaker, (shape, *speakers), optional=True, opaque_context=not speaker),
    ]


def _has_inverse_log_det(module: Any, channels: int) -> bool:
    x = next(module.parameters()).new_zeros(1, channels, LENGTH)
    with torch.no_grad():
        return faithful_copy(module)(x, torch.ones_like(x[:, :1]), reverse=True)[1] is not None


class InvConvNear(Patch):
    """``W x`` with one W (n, n) for all groups of n channels, which take n / 2 from each half of the channels."""

    dialect, kind = "glow-tts", "InvConvNear"
    better = ("log|det W| is finite for a negative determinant too",)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
        split = getattr(module, "n_split", getattr(module, "num_splits", None))  # the latter is coqui's
        return shapes == {"weight": (split, split)} and hasattr(module, "channels")

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Results:
        if getattr(module, "no_jacobian", False):
            raise Mismatch("it leaves its log-determinant out")
        return Results(_has_inverse_log_det(module, module.channels))

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(module.channels)

    def forward(self: Any, x: Tensor, x_mask: Any = None, reverse: bool = False, g: Any = None) -> Any:
        """``z`` and ``logdet`` (B,), or None in reverse."""
        if getattr(self, "weight_inv", None) is not None:
            return original_class(self).forward(self, x, x_mask, reverse=reverse)
        batch, channels, length = x.shape
        split = len(self.weight)
        groups, half = channels // split, split // 2
        grouped = x.view(batch, 2, groups, half, length).transpose(2, 3).reshape(batch, split, groups, length)
        zeros = self.weight.new_zeros(split)
        operator = actnorm_conv1x1_inverse if reverse else actnorm_conv1x1
        z, log_det = operator(grouped, zeros, zeros, self.weight)
        z = z.view(batch, 2, half, groups, length).transpose(2, 3).reshape(batch, channels, length)
        if x_mask is not None:
            # Counted for every position that the mask keeps; one mask may serve all samples.
            z, log_det = z * x_mask, shared_log_det(log_det) * (x_mask.sum([1, 2]) / length)
        return z, None if reverse and not options_of(self).has_log_det else log_det


class CouplingBlock(Patch):
    """``(m + exp(logs) x) * mask``, with m and logs from a gated network of dilated convolutions."""

    dialect, kind = "glow-tts", "CouplingBlock"
    has_network = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return set(dict(module.named_children())) == {"start", "wn", "end"}

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Coupling:
        def run(copied: Any, x: Tensor) -> Tensor:
            y: Tensor = copied(x, torch.ones_like(x[:, :1]))[0]
            return y

        network, skipped = module.end, {module.start: False, module.wn: False}
        channels = 2 * module.start.in_channels
        found = examiner.find_coupling(
            module, network, run, channels=channels, spatial=(LENGTH,), skipped=skipped
        ).require_halves()
        if found.scale_map is None or found.scale_map.kind != "exp" or found.scale_map.offset or found.scale_map.floor:
            raise Mismatch("its scale is not one where the mask is zero")
        return dataclasses.replace(found, inverse_has_log_det=_has_inverse_log_det(module, channels))

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        speaker = getattr(getattr(module.wn, "cond_layer", None), "in_channels", 0)
        return _calls(options.channels, speaker=speaker)

    def forward(self: Any, x: Tensor, x_mask: Any = None, reverse: bool = False, g: Any = None) -> Any:
        """``z`` and ``logdet`` (B,), or None in reverse."""
        initialize(self, "forward", x, x_mask, reverse, g)
        y, log_det = run_alone(self, functools.partial(_couple, self, options_of(self), reverse), x, x_mask, g)
        return y, None if reverse and not options_of(self).inverse_has_log_det else log_det


def _couple(block: Any, coupling: Coupling, reverse: bool, x: Tensor, x_mask: Any, g: Any) -> tuple[Tensor, Tensor]:
    x_mask = 1 if x_mask is None else x_mask
    read, transformed = coupling.split(x)
    # Where the mask is zero, the network's output is too: scale one, shift zero.
    h = block.end(block.wn(block.start(read) * x_mask, x_mask, g)) * x_mask
    operator = coupling.inverse if reverse else coupling.forward
    y, log_det = operator(transformed * x_mask, h)
    return coupling.join(read, y), log_det


PATCHES = (InvConvNear, CouplingBlock)
