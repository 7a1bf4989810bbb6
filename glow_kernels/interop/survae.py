"""The dialect of survae_flows (didriknielsen/survae_flows).

``forward`` returns the data and the log-determinant (B,); ``inverse`` returns only the data. The networks of affine
couplings return pairs of numbers in a last dimension.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from glow_kernels.interop import steps
from glow_kernels.interop.examiner import Examiner
from glow_kernels.interop.improvements import DOUBLE_INVERSE, NO_SYNC
from glow_kernels.interop.memory import initialize, run
from glow_kernels.interop.patch import Call, Patch, is_set, options_of, original_class
from glow_kernels.interop.probe import Coupling
from glow_kernels.interop.stand_ins import SPATIAL, VOLUME, spatial_of
from glow_kernels.interop.steps import Parts
from glow_kernels.ops import actnorm_conv1x1, actnorm_conv1x1_inverse

DEVICE = "log|det W| is computed in float64 on the device of the data, not on the CPU"
STABLE = "log s is computed without the scale itself, which may have underflowed"


def _calls(channels: int, spatial: tuple[int, ...]) -> list[Call]:
    shape = (2, channels, *spatial)
    return [
        Call("forward", lambda module, x: module(x), (shape,)),
        Call("inverse", lambda module, z: module.inverse(z), (shape,)),
    ]


def _spatial(rank: int) -> tuple[int, ...]:
    return {0: (), 1: (8,), 2: SPATIAL, 3: VOLUME}[rank]


class ActNorm(Patch):
    """``(x - shift) * exp(-log_scale)``."""

    dialect, kind = "survae", "ActNorm"
    better = (NO_SYNC,)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
        shape = shapes.get("shift", ())
        buffer = isinstance(getattr(module, "initialized", None), Tensor) and hasattr(module, "inverse")
        return set(shapes) == {"shift", "log_scale"} and len(shape) >= 2 and shape[0] == 1 and buffer

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(module.shift.shape[1], _spatial(module.shift.dim() - 2))

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` and ``ldj`` (B,)."""
        if self.training and not is_set(self, self.initialized):
            result: tuple[Tensor, Tensor] = original_class(self).forward(self, x)
            return result
        log_det = -x.shape[2:].numel() * self.log_scale.sum()
        return (x - self.shift) * (-self.log_scale).exp(), log_det.repeat(x.shape[0])


class Conv1x1(Patch):
    """``W x``."""

    dialect, kind = "survae", "Conv1x1"
    better = (DEVICE, DOUBLE_INVERSE)
    methods = ("forward", "inverse")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
        shape = shapes.get("weight", ())
        return set(shapes) == {"weight"} and len(shape) == 2 and shape[0] == shape[1] and hasattr(module, "inverse")

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        rank = next((rank for rank in (1, 3) if f"{rank}d" in type(module).__name__), 2)
        return _calls(module.weight.shape[0], _spatial(rank))

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` and ``ldj`` (B,)."""
        zeros = self.weight.new_zeros(self.weight.shape[0])
        return actnorm_conv1x1(x, zeros, zeros, self.weight)

    def inverse(self: Any, z: Tensor) -> Tensor:
        """``x``."""
        zeros = self.weight.new_zeros(self.weight.shape[0])
        return actnorm_conv1x1_inverse(z, zeros, zeros, self.weight)[0]


class CouplingBijection(Patch):
    """An affine or additive coupling."""

    dialect, kind = "survae", "CouplingBijection"
    has_network = True
    methods = ("forward", "inverse")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return set(dict(module.named_children())) >= {"coupling_net"} and hasattr(module, "inverse")

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Coupling:
        network, spatial = module.coupling_net, spatial_of(module.coupling_net)
        found = examiner.find_coupling(
            module, network, lambda copied, x: copied(x)[0], spatial=spatial
        ).require_halves()
        z = torch.randn(2, found.channels, *spatial, dtype=torch.float64, requires_grad=True)
        has_graph = examiner.replica(module).double().cpu().inverse(z).requires_grad
        return dataclasses.replace(found, inverse_has_graph=has_graph)

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(options.channels, spatial_of(module.coupling_net))

    @classmethod
    def improvements(cls, module: Any, options: Any) -> tuple[str, ...]:
        unbounded = options.scale_map is not None and options.scale_map.kind in ("exp", "sigmoid")
        return (STABLE,) if unbounded else ()

    @classmethod
    def parts(cls, module: Any) -> Parts:
        return Parts(options_of(module), lambda read: _channels(module.coupling_net(read), read))

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` and ``ldj`` (B,)."""
        initialize(self, "forward", x)
        return run(self, x)

    def inverse(self: Any, z: Tensor) -> Tensor:
        """``x``."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and options_of(self).inverse_has_graph):
            return steps.inverse(CouplingBijection.parts(self), z)[0]


def _channels(h: Tensor, x: Tensor) -> Tensor:
    """The network's output, with any pairs in a last dimension rearranged to halves of the channels."""
    return h.movedim(-1, 1).flatten(1, 2) if h.dim() > x.dim() else h


PATCHES = (ActNorm, Conv1x1, CouplingBijection)
