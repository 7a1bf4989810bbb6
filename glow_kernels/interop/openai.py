"""The dialect of OpenAI's Glow in PyTorch: chaiyujin/glow-pytorch, y0ast/Glow-PyTorch, SRFlow and many copies.

Layers are called as ``layer(x, logdet=None, reverse=False)``, with any name for the second argument, and return the
data and the given log-determinant plus their own; None stays None.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from glow_kernels.interop import steps
from glow_kernels.interop.examiner import Examiner
from glow_kernels.interop.improvements import DOUBLE, DOUBLE_INVERSE, NO_SYNC, STABLE
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
    patch_of,
    shared_log_det,
)
from glow_kernels.interop.stand_ins import SPATIAL
from glow_kernels.interop.steps import Linear, Parts
from glow_kernels.ops import actnorm_conv1x1, actnorm_conv1x1_inverse, gaussian_log_prob, lu_weight

COPIES = "deep copies of a step use their own 1x1 convolution, also where a closure kept the original's"

NETWORKS = ("f", "block")
PERMUTATIONS = ("invconv", "reverse", "shuffle")
# Names of L and U in different copies.
TRIANGLES = (("l", "u"), ("lower", "upper"))


def signature_calls(channels: int, *, without_log_det: bool = True) -> list[Call]:
    """The calls of a layer with this dialect's signature."""
    shape, batch = (2, channels, *SPATIAL), (2,)
    calls = [
        Call("forward", lambda module, x, log_det: module(x, log_det), (shape, batch)),
        Call("reverse", lambda module, x, log_det: module(x, log_det, reverse=True), (shape, batch)),
    ]
    if without_log_det:
        calls.append(Call("forward without logdet", lambda module, x: module(x), (shape,), optional=True))
        calls.append(Call("reverse without logdet", lambda module, x: module(x, reverse=True), (shape,), optional=True))
    return calls


def added(log_det: Any, change: Tensor) -> Any:
    """The log-determinant to return, or None if none was passed."""
    return None if log_det is None else log_det + change


def arguments(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, bool, bool]:
    """The log-determinant and the direction that a layer was called with, and whether there is nothing else."""
    names, defaults = _signature(original_class(module))
    given = dict(zip(names, args, strict=False)) | options
    log_det, reverse = (given.pop(name, default) for name, default in zip(names[:2], defaults, strict=False))
    known = len(args) <= len(names) and all(value is None for value in given.values())
    return log_det, bool(reverse), known


def _require_signature(module: Any) -> None:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    names = [parameter.name for parameter in parameters]
    directions = [parameter.name for parameter in parameters if parameter.default is False]
    if len(names) < 2 or names[0] == "reverse" or directions[:1] not in ([], names[1:2]):
        raise Mismatch("its arguments are not the data, a log-determinant and the direction")


@functools.cache
def _signature(original: type[nn.Module]) -> tuple[tuple[str, ...], tuple[Any, Any]]:
    """Names of the arguments after the data, and the defaults of the first two."""
    parameters = list(inspect.signature(original.forward).parameters.values())[2:]
    empty = inspect.Parameter.empty
    defaults = [None if parameter.default is empty else parameter.default for parameter in parameters[:2]]
    return tuple(parameter.name for parameter in parameters), (*defaults, None, False)[:2]  # type: ignore[return-value]


class ActNorm2d(Patch):
    """``(x + bias) * exp(logs)``."""

    dialect, kind = "openai", "ActNorm2d"

    @classmethod
    def improvements(cls, module: Any, options: Any) -> tuple[str, ...]:
        return (NO_SYNC,) if isinstance(getattr(module, str(_flag(module))), Tensor) else ()

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
        shape = shapes.get("bias", ())
        per_channel = len(shape) == 4 and shape[0] == 1 and shape[2:] == (1, 1)
        return set(shapes) == {"bias", "logs"} and per_channel and shapes["logs"] == shape and bool(_flag(module))

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> None:
        if not getattr(module, "return_ldj", True):
            raise Mismatch("it returns no log-determinant, as chrischute's in networks")
        _require_signature(module)

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return signature_calls(module.bias.shape[1])

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        """``y`` and the new log-determinant."""
        logdet, reverse, known = arguments(self, args, options)
        fits = x.dim() == 4 and x.shape[1] == self.bias.shape[1]  # most originals refuse to broadcast
        if not known or not fits or not is_initialized(self):
            return original_class(self).forward(self, x, *args, **options)
        change = x.shape[2] * x.shape[3] * self.logs.sum()
        if reverse:
            return x * (-self.logs).exp() - self.bias, added(logdet, -change)
        return (x + self.bias) * self.logs.exp(), added(logdet, change)


class InvertibleConv1x1(Patch):
    """``W x``, with W a parameter (C, C) or ``P L (U + diag(s))``."""

    dialect, kind = "openai", "InvertibleConv1x1"
    mutable_attributes = ("p", "sign_s", "l_mask", "eye")

    @classmethod
    def improvements(cls, module: Any, options: Any) -> tuple[str, ...]:
        if "weight" in module._parameters:
            return (DOUBLE,)
        return (DOUBLE_INVERSE,) if hasattr(module, "lower") else ()  # chaiyujin's is in float64 already

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
        if set(shapes) == {"weight"}:
            shape, foreign = shapes["weight"], type(module).__module__.startswith("torch.nn.")
            has_direction = len(inspect.signature(type(module).forward).parameters) >= 4
            return len(shape) == 2 and shape[0] == shape[1] and has_direction and not foreign
        factors = any(set(shapes) == {lower, upper, "log_s"} for lower, upper in TRIANGLES)
        return factors and all(isinstance(getattr(module, name, None), Tensor) for name in ("p", "sign_s"))

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> None:
        _require_signature(module)

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        weight = next(tensor for tensor in module.parameters() if tensor.dim() == 2)
        return signature_calls(weight.shape[0])

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        """``y`` and the new log-determinant."""
        logdet, reverse, known = arguments(self, args, options)
        if not known or x.dim() != 4:  # some originals multiply vectors from the other side
            return original_class(self).forward(self, x, *args, **options)
        weight, weight_log_det = matrix(self, to_invert=reverse)
        zeros = weight.new_zeros(weight.shape[0])
        operator = actnorm_conv1x1_inverse if reverse else actnorm_conv1x1
        y, change = operator(x, zeros, zeros, weight, weight_log_det)
        return y, added(logdet, shared_log_det(change))


class FlowStep(Patch):
    """ActNorm and convolution as one operator, then the coupling, whose network is a submodule."""

    dialect, kind = "openai", "FlowStep"
    has_network = True

    @classmethod
    def improvements(cls, module: Any, options: Any) -> tuple[str, ...]:
        closures = any(callable(value) for value in module.__dict__.values())
        return ((STABLE,) if options.is_sigmoid else ()) + ((COPIES,) if closures else ())

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        children = set(dict(module.named_children()))
        networks, permutations = children & set(NETWORKS), children & set(PERMUTATIONS)
        return "actnorm" in children and len(networks) == len(permutations) == 1 and len(children) == 3

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Any:
        if _references_other_modules(module):
            raise Mismatch("a function of its own uses another step's layers, as in a deep copy: accelerate, then copy")
        permutation = _child(module, PERMUTATIONS)
        learned = isinstance(getattr(module, "invconv", None), nn.Module)
        examiner.require((module.actnorm, ActNorm2d), *([(permutation, InvertibleConv1x1)] if learned else []))

        def run(copied: Any, x: Tensor) -> Tensor:
            y: Tensor = copied(x, x.new_zeros(x.shape[0]))[0]
            return y

        return examiner.find_coupling(
            module,
            _child(module, NETWORKS),
            run,
            channels=module.actnorm.bias.shape[1],
            skipped={module.actnorm: True, permutation: learned},
        ).require_halves()

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return signature_calls(options.channels)

    @classmethod
    def parts(cls, module: Any) -> Parts:
        return Parts(options_of(module), _child(module, NETWORKS), functools.partial(_linear, module))

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        """``y`` and the new log-determinant."""
        logdet, reverse, known = arguments(self, args, options)
        initialize(self, "forward", x, *args, **options)
        if not known or logdet is None or not _can_fuse(self):
            return original_class(self).forward(self, x, *args, **options)
        y, change = steps.inverse(FlowStep.parts(self), x) if reverse else run(self, x)
        return y, logdet + (shared_log_det(change) if options_of(self).scale_map is None else change)


class Split2d(Patch):
    """Factors out the second half of the channels, whose Gaussian a convolution predicts from the first."""

    dialect, kind = "openai", "Split2d"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return set(dict(module.named_children())) == {"conv"} and hasattr(module, "split2d_prior")

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        convolution = getattr(module.conv, "conv", module.conv)
        shape = (2, 2 * convolution.in_channels, *SPATIAL)
        run = lambda module, x, log_det: module(x, log_det)  # noqa: E731
        return [Call("forward", run, (shape, (2,)))]

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        """The kept half, and ``logdet`` plus the log-density of the other."""
        logdet, reverse, known = arguments(self, args, options)
        if reverse or not known:
            return original_class(self).forward(self, x, *args, **options)
        kept, dropped = x.chunk(2, 1)
        return kept, gaussian_log_prob(dropped, self.conv(kept), "interleaved_mean_log_sd") + logdet


def is_initialized(actnorm: Any) -> bool:
    """Whether the parameters of ActNorm have been set from data."""
    return is_set(actnorm, getattr(actnorm, str(_flag(actnorm))))


def _flag(actnorm: Any) -> str | None:
    return next((name for name in ("inited", "is_initialized", "initialized") if hasattr(actnorm, name)), None)


def matrix(convolution: Any, to_invert: bool = False) -> tuple[Tensor, Tensor | None]:
    """W (C, C), and ``log|det W|`` if it is known; a product of factors stays in float64 to be inverted."""
    lower, upper = next((names for names in TRIANGLES if hasattr(convolution, names[0])), ("", ""))
    if not lower:
        return convolution.weight, None
    factors = getattr(convolution, lower), getattr(convolution, upper)
    # In earlier revisions of chaiyujin's code these are plain attributes, which do not move with the layer.
    permutation, signs = convolution.p.to(factors[0]), convolution.sign_s.to(factors[0])
    assemble = steps.lu_weight_to_invert if to_invert else lu_weight
    return assemble(permutation, *factors, convolution.log_s, signs)


def _can_fuse(step: Any) -> bool:
    layers = step.actnorm, _child(step, PERMUTATIONS)
    learned = layers if hasattr(step, "invconv") else layers[:1]
    return is_unchanged(*learned) and is_initialized(step.actnorm) and not has_hooks(*layers)


def _linear(step: Any, to_invert: bool) -> Linear:
    """ActNorm and the matrix that mixes the channels."""
    log_scale, bias, mixing = step.actnorm.logs.flatten(), step.actnorm.bias.flatten(), _child(step, PERMUTATIONS)
    if patch_of(mixing) is InvertibleConv1x1:
        return (log_scale, bias, *matrix(mixing, to_invert))
    # The matrix of a fixed permutation has its results for the unit vectors as columns.
    units = torch.eye(len(bias), dtype=bias.dtype, device=bias.device)[:, :, None, None]
    return log_scale, bias, mixing(units, False)[:, :, 0, 0].T.contiguous(), bias.new_zeros(())


def _references_other_modules(step: nn.Module) -> bool:
    """Whether a function stored on ``step`` has a module in its closure that is not part of ``step``."""
    closures = (getattr(value, "__closure__", None) or () for value in vars(step).values())
    held = [cell.cell_contents for closure in closures for cell in closure]
    return any(isinstance(value, nn.Module) and value not in set(step.modules()) for value in held)


def _child(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next(child for name, child in module.named_children() if name in names)


PATCHES = (ActNorm2d, InvertibleConv1x1, FlowStep, Split2d)
