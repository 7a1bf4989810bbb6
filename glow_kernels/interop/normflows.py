"""The dialect of normflows (VincentStimper/normalizing-flows).

``forward`` samples; the density direction is ``inverse``. Both return the data and the log-determinant of their own
direction: () from ActNorm and the 1x1 convolution, (B,) from couplings and blocks.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import Tensor, nn

from glow_kernels.interop import steps
from glow_kernels.interop.copies import faithful_copy
from glow_kernels.interop.examiner import Examiner
from glow_kernels.interop.improvements import DOUBLE, NO_SYNC, STABLE
from glow_kernels.interop.memory import initialize, run
from glow_kernels.interop.patch import (
    Call,
    Mismatch,
    Patch,
    has_hooks,
    is_set,
    is_unchanged,
    options_of,
    original_class,
    shared_log_det,
)
from glow_kernels.interop.stand_ins import SPATIAL, spatial_of
from glow_kernels.interop.steps import Linear, Parts
from glow_kernels.ops import actnorm_conv1x1, actnorm_conv1x1_inverse, lu_weight


def _calls(*shape: int) -> list[Call]:
    return [
        Call("inverse", lambda module, x: module.inverse(x), ((2, *shape),)),
        Call("forward", lambda module, z: module(z), ((2, *shape),)),
    ]


class ActNorm(Patch):
    """``(x - t) * exp(-s)`` in the density direction."""

    dialect, kind = "normflows", "ActNorm"
    better = (NO_SYNC,)
    methods = ("forward", "inverse")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        names = {name for name, _ in module.named_parameters(recurse=False)}
        attributes = ("data_dep_init_done", "batch_dims", "inverse")
        return names == {"s", "t"} and all(hasattr(module, name) for name in attributes)

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        sizes = (size if size > 1 or index == 1 else SPATIAL[index % 2] for index, size in enumerate(module.s.shape))
        return _calls(*list(sizes)[1:])

    def forward(self: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` and ``log_det`` ()."""
        if not is_set(self, self.data_dep_init_done):
            result: tuple[Tensor, Tensor] = original_class(self).forward(self, z)
            return result
        return z * self.s.exp() + self.t, _repetitions(self, z) * self.s.sum()

    def inverse(self: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` and ``log_det`` ()."""
        if not is_set(self, self.data_dep_init_done):
            result: tuple[Tensor, Tensor] = original_class(self).inverse(self, z)
            return result
        return (z - self.t) * (-self.s).exp(), -_repetitions(self, z) * self.s.sum()


class Invertible1x1Conv(Patch):
    """``W x`` in the density direction, with W a parameter or ``P L (U + diag(S))``."""

    dialect, kind = "normflows", "Invertible1x1Conv"
    methods = ("forward", "inverse")
    mutable_attributes = ("P", "sign_S")

    @classmethod
    def improvements(cls, module: Any, options: Any) -> tuple[str, ...]:
        return () if module.use_lu else (DOUBLE,)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        names = {name for name, _ in module.named_parameters(recurse=False)}
        return names in ({"W"}, {"L", "U", "log_S"}) and hasattr(module, "use_lu") and hasattr(module, "inverse")

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> None:
        like = next(module.parameters())
        try:
            faithful_copy(module).inverse(like.new_zeros(1, module.num_channels, 1, 1))
        except Exception as error:  # such as InvertibleAffine's, which computes x W for vectors
            raise Mismatch(f"it does not take images: {error}") from error

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(module.num_channels, *SPATIAL)

    def forward(self: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` and ``log_det`` ()."""
        weight, weight_log_det = _matrix(self, to_invert=True)
        zeros = weight.new_zeros(weight.shape[0])
        x, log_det = actnorm_conv1x1_inverse(z, zeros, zeros, weight, weight_log_det)
        return x, shared_log_det(log_det)

    def inverse(self: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` and ``log_det`` ()."""
        weight, weight_log_det = _matrix(self)
        zeros = weight.new_zeros(weight.shape[0])
        z, log_det = actnorm_conv1x1(z, zeros, zeros, weight, weight_log_det)
        return z, shared_log_det(log_det)


class AffineCouplingBlock(Patch):
    """Split, coupling and merge."""

    dialect, kind = "normflows", "AffineCouplingBlock"
    has_network = True
    methods = ("forward", "inverse")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        flows = _flows(module)
        return len(flows) == 3 and hasattr(flows[1], "param_map") and not list(flows[0].parameters())

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Any:
        network = module.flows[1].param_map
        spatial = spatial_of(network)
        found = examiner.find_coupling(module, network, lambda copied, x: copied.inverse(x)[0], spatial=spatial)
        return found.require_halves()

    @classmethod
    def improvements(cls, module: Any, options: Any) -> tuple[str, ...]:
        return (STABLE,) if options.is_sigmoid else ()

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(options.channels, *spatial_of(module.flows[1].param_map))

    @classmethod
    def inner(cls, module: Any) -> list[nn.Module]:
        return list(module.flows)

    @classmethod
    def parts(cls, module: Any) -> Parts:
        return Parts(options_of(module), module.flows[1].param_map)

    def forward(self: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` and ``log_det`` (B,)."""
        if has_hooks(*self.flows):
            result: tuple[Tensor, Tensor] = original_class(self).forward(self, z)
            return result
        return steps.inverse(AffineCouplingBlock.parts(self), z)

    def inverse(self: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` and ``log_det`` (B,)."""
        initialize(self, "inverse", z)
        return run(self, z)


class GlowBlock(Patch):
    """Coupling, 1x1 convolution and ActNorm in sampling order; the last two as one operator."""

    dialect, kind = "normflows", "GlowBlock"
    has_network = True
    methods = ("forward", "inverse")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        flows = _flows(module)
        return len(flows) == 3 and Invertible1x1Conv.matches(flows[1]) and ActNorm.matches(flows[2])

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> None:
        coupling, convolution, actnorm = module.flows
        examiner.require((coupling, AffineCouplingBlock), (convolution, Invertible1x1Conv), (actnorm, ActNorm))

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(module.flows[1].num_channels, *SPATIAL)

    @classmethod
    def parts(cls, module: Any) -> Parts:
        coupling, convolution, actnorm = module.flows
        return AffineCouplingBlock.parts(coupling)._replace(linear=functools.partial(_linear, actnorm, convolution))

    def forward(self: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` and ``log_det`` (B,)."""
        if not _can_fuse(self) or has_hooks(*self.flows, *self.flows[0].flows):
            result: tuple[Tensor, Tensor] = original_class(self).forward(self, z)
            return result
        return steps.inverse(GlowBlock.parts(self), z)

    def inverse(self: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` and ``log_det`` (B,)."""
        initialize(self, "inverse", z)
        if not _can_fuse(self):
            result: tuple[Tensor, Tensor] = original_class(self).inverse(self, z)
            return result
        return run(self, z)


def _flows(module: nn.Module) -> list[Any]:
    flows = getattr(module, "flows", None)
    only = set(dict(module.named_children())) == {"flows"}
    return list(flows) if only and isinstance(flows, nn.ModuleList) and hasattr(module, "inverse") else []


def _repetitions(actnorm: Any, z: Tensor) -> int:
    """Number of elements of one sample to which each parameter is applied."""
    return math.prod(z.shape[dimension] for dimension in actnorm.batch_dims[1:])


def _matrix(convolution: Any, to_invert: bool = False) -> tuple[Tensor, Tensor | None]:
    """W (C, C), and ``log|det W|`` if it is known; a product of factors stays in float64 to be inverted."""
    if not convolution.use_lu:
        return convolution.W, None
    assemble = steps.lu_weight_to_invert if to_invert else lu_weight
    return assemble(convolution.P, convolution.L, convolution.U, convolution.log_S, convolution.sign_S)


def _can_fuse(block: Any) -> bool:
    coupling, _, actnorm = flows = block.flows
    found = is_unchanged(*flows) and is_unchanged(*coupling.flows)
    return found and actnorm.s.dim() == 4 and is_set(actnorm, actnorm.data_dep_init_done)


def _linear(actnorm: Any, convolution: Any, to_invert: bool) -> Linear:
    return (-actnorm.s.flatten(), -actnorm.t.flatten(), *_matrix(convolution, to_invert))


PATCHES = (ActNorm, Invertible1x1Conv, GlowBlock, AffineCouplingBlock)
