"""The dialect of rosinality/glow-pytorch and its many copies.

Layers return their own log-determinant: () from ActNorm and the convolutions, (B,) from an affine coupling, None from
an additive one. ``reverse`` returns only the data, and in some copies, such as ArtFlow, so does ``forward``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow_kernels.backends.numerics import wide_dtype
from glow_kernels.interop import steps
from glow_kernels.interop.copies import faithful_copy, set_initialized
from glow_kernels.interop.examiner import Examiner
from glow_kernels.interop.improvements import DOUBLE_INVERSE, NO_SYNC, STABLE
from glow_kernels.interop.memory import initialize, run
from glow_kernels.interop.patch import (
    Call,
    Mismatch,
    Patch,
    Results,
    has_hooks,
    is_set,
    is_unchanged,
    options_of,
    original_class,
    shared_log_det,
)
from glow_kernels.interop.stand_ins import SPATIAL, spatial_of
from glow_kernels.interop.steps import Linear, Parts
from glow_kernels.ops import actnorm_conv1x1, actnorm_conv1x1_inverse, gaussian_log_prob, lu_weight
from glow_kernels.ops.folding import fold


def _calls(channels: int, spatial: tuple[int, ...] = SPATIAL) -> list[Call]:
    shape = (2, channels, *spatial)
    return [
        Call("forward", lambda module, x: module(x), (shape,)),
        Call("reverse", lambda module, y: module.reverse(y), (shape,)),
    ]


def _results(module: nn.Module, channels: int) -> Results:
    x = torch.randn_like(next(module.parameters()).new_empty(2, channels, *SPATIAL))
    try:
        with torch.no_grad():
            return Results(not isinstance(set_initialized(faithful_copy(module), True)(x), Tensor))
    except Exception as error:
        cause = str(error) or type(error).__name__
        raise Mismatch(f"forward fails when it is called as such layers are: {cause}") from error


class ActNorm(Patch):
    """``scale * (x + loc)``; the scale is linear and may be negative."""

    dialect, kind = "rosinality", "ActNorm"

    @classmethod
    def improvements(cls, module: Any, options: Any) -> tuple[str, ...]:
        return (NO_SYNC,) if isinstance(module.initialized, Tensor) else ()

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        names = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
        shape = names.get("loc", ())
        return (
            set(names) == {"loc", "scale"}
            and len(shape) == 4
            and names["scale"] == shape
            and isinstance(getattr(module, "initialized", None), Tensor | bool)
            and hasattr(module, "reverse")
        )

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Results:
        return _results(module, module.loc.shape[1])

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(module.loc.shape[1])

    def forward(self: Any, x: Tensor) -> Any:
        """``y`` and, if the layer returns one, ``log_det`` ()."""
        if not is_set(self, self.initialized) or x.dim() != 4:  # some copies take vectors too
            return original_class(self).forward(self, x)
        y = self.scale * (x + self.loc)
        if not options_of(self).has_log_det:
            return y
        return y, x.shape[2] * x.shape[3] * self.scale.abs().log().sum()


class InvConv2d(Patch):
    """``W x`` with W a parameter (C, C, 1, 1)."""

    dialect, kind = "rosinality", "InvConv2d"
    methods = ("forward", "reverse")
    better = (DOUBLE_INVERSE,)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        names = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
        shape = names.get("weight", ())
        square = len(shape) == 4 and shape[0] == shape[1] and shape[2:] == (1, 1)
        return set(names) == {"weight"} and square and hasattr(module, "reverse")

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Results:
        return _results(module, next(module.parameters()).shape[0])

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(next(module.parameters()).shape[0])

    def forward(self: Any, x: Tensor) -> Any:
        """``y`` and, if the layer returns one, ``log_det`` ()."""
        weight, weight_log_det = _matrix(self)
        zeros = weight.new_zeros(weight.shape[0])
        y, log_det = actnorm_conv1x1(x, zeros, zeros, weight, weight_log_det)
        return (y, shared_log_det(log_det)) if options_of(self).has_log_det else y

    def reverse(self: Any, y: Tensor) -> Tensor:
        """``x``."""
        weight, weight_log_det = _matrix(self, to_invert=True)
        zeros = weight.new_zeros(weight.shape[0])
        return actnorm_conv1x1_inverse(y, zeros, zeros, weight, weight_log_det)[0]


class InvConv2dLU(InvConv2d):
    """``W x`` with ``W = P L (U + diag(s))``."""

    kind = "InvConv2dLU"
    mutable_attributes = ("w_p", "s_sign", "l_mask", "u_mask", "l_eye")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        parameters = {name for name, _ in module.named_parameters(recurse=False)}
        buffers = {name for name, _ in module.named_buffers(recurse=False)}
        return parameters == {"w_l", "w_s", "w_u"} and {"w_p", "s_sign"} <= buffers and hasattr(module, "reverse")


class AffineCoupling(Patch):
    """A coupling, affine or additive."""

    dialect, kind = "rosinality", "AffineCoupling"
    has_network = True
    methods = ("forward", "reverse")

    @classmethod
    def improvements(cls, module: Any, options: Any) -> tuple[str, ...]:
        return (STABLE,) if options.is_sigmoid else ()

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return set(dict(module.named_children())) == {"net"} and hasattr(module, "reverse")

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Any:
        has_log_det = True

        def run(copied: Any, x: Tensor) -> Tensor:
            nonlocal has_log_det
            results = copied(x)
            has_log_det = not isinstance(results, Tensor)
            y: Tensor = results[0] if has_log_det else results
            return y

        found = examiner.find_coupling(module, module.net, run, spatial=_spatial(module)).require_halves()
        return dataclasses.replace(found, forward_has_log_det=has_log_det)

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(options.channels, _spatial(module))

    @classmethod
    def parts(cls, module: Any) -> Parts:
        return Parts(options_of(module), module.net)

    def forward(self: Any, x: Tensor) -> Any:
        """``y`` and, if the layer returns one, ``log_det`` (B,), or None if the coupling is additive."""
        initialize(self, "forward", x)
        y, log_det = run(self, x)
        if not options_of(self).forward_has_log_det:
            return y
        return y, None if options_of(self).scale_map is None else log_det

    def reverse(self: Any, y: Tensor) -> Tensor:
        """``x``."""
        return steps.inverse(AffineCoupling.parts(self), y)[0]


class Flow(Patch):
    """ActNorm and convolution as one operator, then the coupling."""

    dialect, kind = "rosinality", "Flow"
    has_network = True
    methods = ("forward", "reverse")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        children = set(dict(module.named_children()))
        return children == {"actnorm", "invconv", "coupling"} and hasattr(module, "reverse")

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> None:
        examiner.require((module.actnorm, ActNorm), (module.invconv, InvConv2d), (module.coupling, AffineCoupling))

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(module.actnorm.loc.shape[1])

    @classmethod
    def parts(cls, module: Any) -> Parts:
        return Parts(options_of(module.coupling), module.coupling.net, functools.partial(_linear, module))

    def forward(self: Any, x: Tensor) -> Any:
        """``y`` and, if the layers return one, ``log_det`` (B,); () with an additive coupling."""
        initialize(self, "forward", x)
        if not _can_fuse(self):
            return original_class(self).forward(self, x)
        y, log_det = run(self, x)
        if not options_of(self.coupling).forward_has_log_det:
            return y
        return y, shared_log_det(log_det) if options_of(self.coupling).scale_map is None else log_det

    def reverse(self: Any, y: Tensor) -> Tensor:
        """``x``."""
        if not _can_fuse(self):
            result: Tensor = original_class(self).reverse(self, y)
            return result
        return steps.inverse(Flow.parts(self), y)[0]


class Block(Patch):
    """Squeeze, steps and the density of what is factored out."""

    dialect, kind = "rosinality", "Block"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        children = set(dict(module.named_children()))
        return children == {"flows", "prior"} and hasattr(module, "split") and hasattr(module, "reverse")

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> None:
        examiner.require(*((flow, Flow) for flow in module.flows))

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        channels = module.flows[0].actnorm.loc.shape[1] // 4

        def with_two_flows(copied: Any, x: Tensor) -> Any:
            # Each has been compared by itself, and with random parameters many of them overflow.
            copied.flows = copied.flows[:2]
            return copied(x)

        return [Call("forward", with_two_flows, ((2, channels, 2 * SPATIAL[0], 2 * SPATIAL[1]),))]

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The input of the next block, ``log_det``, ``log_p`` (B,) and the latent that is factored out."""
        z = F.pixel_unshuffle(x, 2)
        log_det: Any = 0
        for flow in self.flows:
            z, step_log_det = flow(z)
            log_det = log_det + step_log_det
        if not self.split:
            h = self.prior(torch.zeros_like(z))
            return z, log_det, gaussian_log_prob(z, h, "chunk_mean_log_sd"), z
        kept, dropped = z.chunk(2, 1)
        return kept, log_det, gaussian_log_prob(dropped, self.prior(kept), "chunk_mean_log_sd"), dropped


def _spatial(coupling: Any) -> tuple[int, ...]:
    """Sizes to compare with; not those of vectors: code that halves these may halve the last dimension of any data."""
    return spatial_of(coupling.net) or SPATIAL


def _matrix(convolution: Any, to_invert: bool = False) -> tuple[Tensor, Tensor | None]:
    """W (C, C), and ``log|det W|`` if it is known; zero if the layer returns none, so that W may be singular.

    A product of factors stays in float64 to be inverted.
    """
    if hasattr(convolution, "w_l"):  # checked first: some copies also store a weight computed for sampling
        assemble = steps.lu_weight_to_invert if to_invert else lu_weight
        return assemble(convolution.w_p, convolution.w_l, convolution.w_u, convolution.w_s, convolution.s_sign)
    weight = convolution.weight[:, :, 0, 0]
    return weight, None if options_of(convolution).has_log_det else weight.new_zeros(())


def _can_fuse(step: Any) -> bool:
    layers = (step.actnorm, step.invconv, step.coupling)
    return is_unchanged(*layers) and is_set(step.actnorm, step.actnorm.initialized) and not has_hooks(*layers)


def _linear(step: Any, to_invert: bool) -> Linear:
    # The scale may be negative and have no logarithm, so it is folded into the columns of W.
    weight, weight_log_det = _matrix(step.invconv, to_invert)
    scale = step.actnorm.scale.flatten()
    zeros = torch.zeros_like(scale)
    if weight_log_det is None:
        # Not that of the scaled columns: the gradient 1 / s would be lost in the rounding of a sum.
        _, _, weight_log_det = fold(zeros, zeros, weight, None)
    log_det = weight_log_det + scale.abs().log().sum()
    if to_invert:
        weight = weight.to(wide_dtype(weight.device))
    return zeros, step.actnorm.loc.flatten(), weight * scale, log_det


PATCHES = (ActNorm, InvConv2dLU, InvConv2d, AffineCoupling, Flow, Block)
