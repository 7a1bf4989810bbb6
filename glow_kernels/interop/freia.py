"""The dialect of FrEIA (vislearn/FrEIA), of release 0.2 and of later code.

Modules are called as ``module((x,), c=[], rev=False, jac=True)`` and return a tuple or list of one tensor, and the
log-determinant J of the direction that was evaluated: (B,) from couplings, (B,) or (1,) from ActNorm, () from the fixed
convolution.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow_kernels.interop import steps
from glow_kernels.interop.examiner import Examiner
from glow_kernels.interop.improvements import NO_SYNC
from glow_kernels.interop.memory import initialize, run, run_alone
from glow_kernels.interop.patch import Call, Mismatch, Patch, is_set, options_of, original_class, shared_log_det
from glow_kernels.interop.probe import Coupling
from glow_kernels.interop.stand_ins import SPATIAL, VOLUME
from glow_kernels.interop.steps import Parts
from glow_kernels.ops import actnorm_conv1x1

Result = tuple[Any, Any]


def _spatial(module: Any) -> tuple[int, ...]:
    rank = len(module.dims_in[0]) - 1
    return {0: (), 1: (8,), 2: SPATIAL, 3: VOLUME}[rank]


def _calls(channels: int, spatial: tuple[int, ...], conditions: tuple[int, ...] = ()) -> list[Call]:
    shapes = tuple((2, count, *spatial) for count in (channels, *conditions))

    def call(module: Any, x: Tensor, *c: Tensor, rev: bool) -> Any:
        return module((x,), c=list(c), rev=rev) if c else module((x,), rev=rev)

    return [
        Call("forward", lambda module, *x: call(module, *x, rev=False), shapes),
        Call("inverse", lambda module, *x: call(module, *x, rev=True), shapes),
    ]


def _conditions(module: Any) -> tuple[int, ...]:
    return tuple(dims[0] for dims in module.dims_c)


def _used_conditions(module: Any, c: Any) -> Any:
    """The conditions ``c`` that ``module`` reads: a block made without conditions ignores those that it is given."""
    return c if module.dims_c else ()


class ActNorm(Patch):
    """``x * exp(scale) + bias`` of release 0.2."""

    dialect, kind = "FrEIA", "ActNorm"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        names = {name for name, _ in module.named_parameters(recurse=False)}
        return names == {"scale", "bias"} and hasattr(module, "init_on_next_batch") and hasattr(module, "dims_in")

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(module.dims_in[0], tuple(module.dims_in[1:]))

    def forward(self: Any, x: Any, rev: bool = False, jac: bool = True) -> Result:
        """``[y]`` and J (B,)."""
        if self.init_on_next_batch:
            result: Result = original_class(self).forward(self, x, rev=rev, jac=jac)
            return result
        log_det = (self.scale.sum() * math.prod(self.dims_in[1:])).repeat(x[0].shape[0])
        if rev:
            return [(x[0] - self.bias) / self.scale.exp()], -log_det
        return [torch.addcmul(self.bias, x[0], self.scale.exp())], log_det


class LaterActNorm(Patch):
    """``(x - loc) / exp(log_scale)`` after release 0.2."""

    dialect, kind = "FrEIA", "ActNorm"
    better = (NO_SYNC,)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        names = {name for name, _ in module.named_parameters(recurse=False)}
        flag = isinstance(getattr(module, "is_initialized", None), Tensor)
        return names == {"log_scale", "loc"} and flag and hasattr(module, "dims_in")

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(module.loc.shape[1], _spatial(module))

    def forward(self: Any, x_or_z: Any, c: Any = None, rev: bool = False, jac: bool = True) -> Result:
        """``(y,)`` and J (1,)."""
        if not is_set(self, self.is_initialized):
            result: Result = original_class(self).forward(self, x_or_z, c, rev=rev, jac=jac)
            return result
        x = x_or_z[0]
        log_det = x.shape[2:].numel() * self.log_scale.sum().view(1)
        if rev:
            return (torch.addcmul(self.loc, x, self.log_scale.exp()),), log_det
        return ((x - self.loc) * (-self.log_scale).exp(),), -log_det


class Fixed1x1Conv(Patch):
    """``M x`` with a fixed M."""

    dialect, kind = "FrEIA", "Fixed1x1Conv"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        shapes = {name: tensor.dim() for name, tensor in module.named_parameters(recurse=False)}
        return shapes == {"M": 4, "M_inv": 4, "logDetM": 0}

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(module.M.shape[0], SPATIAL)

    def forward(self: Any, x: Any, rev: bool = False, jac: bool = True) -> Result:
        """``(y,)`` and J ()."""
        matrix, log_det = (self.M_inv, -self.logDetM) if rev else (self.M, self.logDetM)
        zeros = matrix.new_zeros(matrix.shape[0])
        y, total = actnorm_conv1x1(x[0], zeros, zeros, matrix[:, :, 0, 0], log_det)
        return (y,), shared_log_det(total)


class AffineCouplingOneSided(Patch):
    """An affine coupling, optionally conditioned on further channels."""

    dialect, kind = "FrEIA", "AffineCouplingOneSided"
    has_network = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        children = {name for name, child in module.named_children() if name != "f_clamp"}
        return children == {"subnet"} and hasattr(module, "split_len1") and hasattr(module, "dims_in")

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Coupling:
        return _find(module, module.subnet, examiner)

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(options.channels, _spatial(module), _conditions(module))

    def forward(self: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Result:
        """``(y,)`` and J (B,)."""
        if rev:
            y, log_det = steps.inverse(AffineCouplingOneSided.parts(self), x[0], *_used_conditions(self, c))
        else:
            initialize(self, "forward", x, c=c, rev=rev, jac=jac)
            y, log_det = run(self, x[0], *_used_conditions(self, c))
        return (y,), log_det

    @classmethod
    def parts(cls, module: Any) -> Parts:
        def network(read: Tensor, *conditions: Tensor) -> Any:
            return module.subnet(torch.cat([read, *conditions], 1) if conditions else read)

        return Parts(options_of(module), network)


@dataclass(frozen=True)
class Halves:
    """The couplings of a block that transforms one half and then the other.

    Attributes:
        first: transforms the first half, given the second.
        second: the other way round.
    """

    first: Coupling
    second: Coupling

    def describe(self) -> str:
        """For the report."""
        return f"{self.first.describe()}; and the other way round"


class GLOWCouplingBlock(Patch):
    """Two affine couplings, of the first half and then of the second."""

    dialect, kind = "FrEIA", "GLOWCouplingBlock"
    has_network = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        children = {name for name, child in module.named_children() if name != "f_clamp"}
        return children == {"subnet1", "subnet2"} and hasattr(module, "split_len1") and hasattr(module, "dims_in")

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Halves:
        first = _find(module, module.subnet2, examiner, zeroed=module.subnet1)
        second = _find(module, module.subnet1, examiner, zeroed=module.subnet2)
        if first.reads_first or not second.reads_first:
            raise Mismatch("its networks read the halves in another order")
        return Halves(first, second)

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(options.first.channels, _spatial(module), _conditions(module))

    def forward(self: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Result:
        """``(y,)`` and J (B,)."""
        initialize(self, "forward", x, c=c, rev=rev, jac=jac)
        couple = functools.partial(_couple_halves, self, options_of(self), rev)
        y, log_det = run_alone(self, couple, x[0], *_used_conditions(self, c))
        return (y,), log_det


class AllInOneBlock(Patch):
    """A coupling, then a scale and an offset per channel and a fixed mixing of the channels as one operator."""

    dialect, kind = "FrEIA", "AllInOneBlock"
    has_network = True
    mutable_attributes = ("w_perm", "w_perm_inv")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        names = {name for name, _ in module.named_parameters(recurse=False)}
        return {"global_scale", "global_offset"} <= names and isinstance(getattr(module, "subnet", None), nn.Module)

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Coupling:
        if getattr(module, "GIN", False):
            raise Mismatch("its coupling keeps the volume (GIN)")
        if getattr(module, "householder", 0):
            raise Mismatch("it learns Householder reflections")

        def neutral(copied: Any) -> None:
            copied._permute = lambda x, rev=False: (x, 0.0)
            copied._pre_permute = lambda x, rev=False: x

        return _find(module, module.subnet, examiner, prepare=neutral)

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(options.channels, _spatial(module), _conditions(module))

    def forward(self: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Result:
        """``(y,)`` and J (B,)."""
        initialize(self, "forward", x, c=c, rev=rev, jac=jac)
        compute = functools.partial(_all_in_one, self, options_of(self), rev)
        y, log_det = run_alone(self, compute, x[0], *_used_conditions(self, c))
        return (y,), log_det


def _find(
    module: Any, network: nn.Module, examiner: Examiner, *, zeroed: nn.Module | None = None, prepare: Any = None
) -> Coupling:
    conditions, spatial = _conditions(module), _spatial(module)

    def run(copied: Any, x: Tensor) -> Tensor:
        if prepare is not None:
            prepare(copied)
        c = [x.new_zeros(x.shape[0], count, *spatial) for count in conditions]
        y: Tensor = copied((x,), c=c)[0][0]
        return y

    channels = module.dims_in[0][0]
    found = examiner.find_coupling(
        module, network, run, channels=channels, spatial=spatial, zeroed=[zeroed] if zeroed else []
    )
    return found.require_halves()


def _couple_halves(block: Any, halves: Halves, rev: bool, x: Tensor, *c: Tensor) -> tuple[Tensor, Tensor]:
    second, first = halves.first.split(x)
    if rev:
        second, log_det = _couple(halves.second, second, block.subnet1, first, c, rev)
        first, other = _couple(halves.first, first, block.subnet2, second, c, rev)
    else:
        first, log_det = _couple(halves.first, first, block.subnet2, second, c, rev)
        second, other = _couple(halves.second, second, block.subnet1, first, c, rev)
    return torch.cat((first, second), 1), log_det + other


def _all_in_one(block: Any, coupling: Coupling, rev: bool, x: Tensor, *c: Tensor) -> tuple[Tensor, Tensor]:
    if rev:
        x, linear_log_det = _global_linear_inverse(block, x)
    elif block.reverse_pre_permute:
        x = block._pre_permute(x, rev=False)
    read, transformed = coupling.split(x)
    y, log_det = _couple(coupling, transformed, block.subnet, read, c, rev)
    y = coupling.join(read, y)
    if not rev:
        y, linear_log_det = _global_linear(block, y)
    elif block.reverse_pre_permute:
        y = block._pre_permute(y, rev=True)
    return y, log_det + linear_log_det


def _couple(
    coupling: Coupling, transformed: Tensor, network: nn.Module, read: Tensor, conditions: Any, rev: bool
) -> tuple[Tensor, Tensor]:
    if len(conditions):
        read = torch.cat([read, *conditions], 1)
    h = coupling.predict(network, read)
    return coupling.inverse(transformed, h) if rev else coupling.forward(transformed, h)


def _global_linear(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """``W (s x + o)``."""
    scale, offset = _scale_and_offset(block)
    return actnorm_conv1x1(x, scale.log(), offset / scale, _mixing(block.w_perm, scale), scale.new_zeros(()))


def _global_linear_inverse(block: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """``(W' z - o) / s``, where W' is the inverse of W that the block stores: its transpose, exact up to rounding."""
    scale, offset = _scale_and_offset(block)
    inverse = _mixing(block.w_perm_inv, scale) / scale[:, None]
    zeros = torch.zeros_like(scale)
    x, log_det = actnorm_conv1x1(z, zeros, zeros, inverse, -scale.log().sum())
    return x.sub_((offset / scale).view(-1, *(1,) * (z.dim() - 2))), log_det


def _scale_and_offset(block: Any) -> tuple[Tensor, Tensor]:
    return block.global_scale_activation(block.global_scale).flatten(), block.global_offset.flatten()


def _mixing(matrix: Tensor, scale: Tensor) -> Tensor:
    """W (C, C), with ``|det W| = 1``, from a matrix or, after release 0.2, from the index of every channel."""
    if matrix.dim() == 1:
        matrix = F.one_hot(matrix.long(), matrix.numel())
    return matrix.reshape(scale.numel(), scale.numel()).to(scale.dtype)


PATCHES = (ActNorm, LaterActNorm, Fixed1x1Conv, AffineCouplingOneSided, GLOWCouplingBlock, AllInOneBlock)
