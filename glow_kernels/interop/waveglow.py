"""The dialect of NVIDIA/waveglow: a 1x1 convolution of sequences, whose log-determinant covers the whole batch.

WaveGlow's couplings are written out in the model's own ``forward``, with unreduced log-scales as its results, and stay
as they are; their networks, which hold nearly all activations, need not keep them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glow_kernels.interop.memory import run_alone
from glow_kernels.interop.patch import Call, Mismatch, Patch, has_hooks, own
from glow_kernels.interop.workshop import Workshop
from glow_kernels.ops import actnorm_conv1x1, actnorm_conv1x1_inverse


class Invertible1x1Conv(Patch):
    """``W x`` with W the weight (C, C, 1) of a convolution without bias."""

    dialect, kind = "waveglow", "Invertible1x1Conv"
    better = (
        "the inverse of the 1x1 convolution follows its weight, instead of the one at the first inverse call",
        "log|det W| is finite for a negative determinant too",
    )

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        convolution = getattr(module, "conv", None)
        only = set(dict(module.named_children())) == {"conv"} and not list(module.parameters(recurse=False))
        if not only or not isinstance(convolution, nn.Conv1d) or convolution.bias is not None:
            return False
        size, *kernel = convolution.weight.shape
        return kernel == [size, 1]

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        shape = (2, module.conv.in_channels, 8)
        return [
            Call("forward", lambda module, z: module(z), (shape,)),
            Call("reverse", _fresh_inverse, (shape,)),
        ]

    def forward(self: Any, z: Tensor, reverse: bool = False) -> Any:
        """``z`` and ``log_det`` () of all samples; in reverse ``z`` alone."""
        if has_hooks(self.conv):
            return own(self).forward(self, z, reverse)
        weight = self.conv.weight[:, :, 0]
        zeros = weight.new_zeros(weight.shape[0])
        if reverse:
            return actnorm_conv1x1_inverse(z, zeros, zeros, weight)[0]
        z, log_det = actnorm_conv1x1(z, zeros, zeros, weight)
        return z, log_det.sum()


class WN(Patch):
    """The network of a coupling, called with a pair of half of the channels and the conditions (B, n, T)."""

    dialect, kind = "waveglow", "WN"
    has_network = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        lists = ("in_layers", "res_skip_layers")
        single = ("start", "end")
        return all(isinstance(getattr(module, name, None), nn.ModuleList) for name in lists) and all(
            isinstance(getattr(module, name, None), nn.Conv1d) for name in single
        )

    @classmethod
    def examine(cls, module: Any, workshop: Workshop) -> None:
        if workshop.memory is None:
            raise Mismatch("only another memory than 'store' changes it")

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        conditions = getattr(module, "cond_layer", None)
        if conditions is None:
            conditions = module.cond_layers[0]
        shapes = tuple((2, layer.in_channels, 8) for layer in (module.start, conditions))
        return [Call("forward", lambda module, x, condition: module((x, condition)), shapes)]

    def forward(self: Any, forward_input: Any) -> Any:
        """(B, outputs, T)."""

        def function(x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
            output = own(self).forward(self, (x, condition))
            return output, output.new_zeros(len(output))

        return run_alone(self, function, *forward_input)[0]


class WaveGlow(Patch):
    """The model, for the report."""

    dialect, kind = "waveglow", "WaveGlow"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return {"WN", "convinv"} <= set(dict(module.named_children())) and hasattr(module, "n_early_every")

    @classmethod
    def examine(cls, module: Any, workshop: Workshop) -> None:
        raise Mismatch("its couplings are written out in its forward, and return every log-scale")


def _fresh_inverse(module: Any, z: Tensor) -> Tensor:
    # Without the inverse of a weight that has changed since.
    module.__dict__.pop("W_inverse", None)
    x: Tensor = module(z, reverse=True)
    return torch.as_tensor(x)


PATCHES = (Invertible1x1Conv, WN, WaveGlow)
