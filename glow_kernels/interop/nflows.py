"""The dialect of nflows (bayesiains/nflows).

Transforms are called as ``transform(inputs, context=None)`` or ``transform.inverse(inputs, context=None)``; both return
the data and the log-determinant (B,) of their own direction. Data are vectors (B, C) or images.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn

from glow_kernels.backends.numerics import wide_dtype
from glow_kernels.interop import steps
from glow_kernels.interop.examiner import Examiner
from glow_kernels.interop.improvements import NO_SYNC
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
)
from glow_kernels.interop.stand_ins import OPAQUE_CONTEXT, SPATIAL, spatial_of
from glow_kernels.interop.steps import Parts
from glow_kernels.ops import actnorm_conv1x1, actnorm_conv1x1_inverse

Result = tuple[Tensor, Tensor]


def _calls(channels: int, *spatials: tuple[int, ...], opaque_context: bool = False) -> list[Call]:
    calls = []
    for spatial in spatials:
        shape = (2, channels, *spatial)
        calls += _both_directions(shape, shape, "" if spatial else " of vectors", opaque_context)
    return calls


def _both_directions(
    before: tuple[int, ...], after: tuple[int, ...], suffix: str = "", opaque_context: bool = False
) -> list[Call]:
    context = OPAQUE_CONTEXT if opaque_context else None
    return [
        Call("forward" + suffix, lambda module, x: module(x, context), (before,), opaque_context=opaque_context),
        Call("inverse" + suffix, lambda module, z: module.inverse(z, context), (after,), opaque_context=opaque_context),
    ]


class ActNorm(Patch):
    """``exp(log_scale) * x + shift``."""

    dialect, kind = "nflows", "ActNorm"
    better = (NO_SYNC,)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        shapes = {name: tensor.dim() for name, tensor in module.named_parameters(recurse=False)}
        return shapes == {"log_scale": 1, "shift": 1} and hasattr(module, "initialized") and hasattr(module, "inverse")

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(len(module.shift), SPATIAL, (), opaque_context=True)

    def forward(self: Any, inputs: Tensor, context: Any = None) -> Result:
        """``outputs`` and ``logabsdet`` (B,)."""
        if (self.training and not is_set(self, self.initialized)) or inputs.dim() not in (2, 4):
            result: Result = original_class(self).forward(self, inputs, context)
            return result
        shape = (1, -1, *(1,) * (inputs.dim() - 2))
        outputs = self.log_scale.exp().view(shape) * inputs + self.shift.view(shape)
        positions = inputs.shape[2:].numel()
        return outputs, (positions * self.log_scale.sum()).repeat(inputs.shape[0])


class OneByOneConvolution(Patch):
    """``L U x[permutation] + bias``."""

    dialect, kind = "nflows", "OneByOneConvolution"
    methods = ("forward", "inverse")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        names = {name for name, _ in module.named_parameters(recurse=False)}
        factors = {"bias", "lower_entries", "upper_entries", "unconstrained_upper_diag"}
        return names == factors and isinstance(getattr(module, "permutation", None), nn.Module)

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(len(module.bias), SPATIAL, opaque_context=True)

    def forward(self: Any, inputs: Tensor, context: Any = None) -> Result:
        """``outputs`` and ``logabsdet`` (B,)."""
        if not _can_fuse_convolution(self, inputs):
            result: Result = original_class(self).forward(self, inputs, context)
            return result
        weight, weight_log_det = _matrix(self)
        zeros = weight.new_zeros(weight.shape[0])
        outputs, log_det = actnorm_conv1x1(inputs, zeros, zeros, weight, weight_log_det)
        return outputs.add_(self.bias[:, None, None]), log_det

    def inverse(self: Any, inputs: Tensor, context: Any = None) -> Result:
        """``inputs`` and ``logabsdet`` (B,)."""
        if not _can_fuse_convolution(self, inputs):
            result: Result = original_class(self).inverse(self, inputs, context)
            return result
        weight, weight_log_det = _matrix(self, to_invert=True)
        zeros = weight.new_zeros(weight.shape[0])
        return actnorm_conv1x1_inverse(inputs - self.bias[:, None, None], zeros, zeros, weight, weight_log_det)


class AffineCouplingTransform(Patch):
    """An affine or additive coupling of chosen channels."""

    dialect, kind = "nflows", "AffineCouplingTransform"
    has_network = True
    methods = ("forward", "inverse")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        buffers = {name for name, _ in module.named_buffers(recurse=False)}
        network = isinstance(getattr(module, "transform_net", None), nn.Module)
        return network and buffers == {"identity_features", "transform_features"} and hasattr(module, "inverse")

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Any:
        if getattr(module, "unconditional_transform", None) is not None:
            raise Mismatch("the channels that the network reads are transformed too")
        network = module.transform_net
        # By either name, the networks of nflows itself tell how many context channels they take.
        contexts = (getattr(network, name, None) for name in ("context_features", "context_channels"))
        found = examiner.find_coupling(
            module,
            network,
            lambda copied, x: copied(x)[0],
            channels=len(module.identity_features) + len(module.transform_features),
            inputs=len(module.identity_features),
            context=next((size for size in contexts if size), 0),
            spatial=spatial_of(network),
        )
        if list(found.read) != module.identity_features.tolist():
            raise Mismatch("its network does not read identity_features in their order")
        return found

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        sizes = options.channels, spatial_of(module.transform_net)
        return [*_calls(*sizes), *_calls(*sizes, opaque_context=True)[:1]]

    @classmethod
    def parts(cls, module: Any) -> Parts:
        return Parts(options_of(module), module.transform_net)

    def forward(self: Any, inputs: Tensor, context: Any = None) -> Result:
        """``outputs`` and ``logabsdet`` (B,)."""
        if inputs.dim() not in (2, 4) or inputs.shape[1] != options_of(self).channels:
            result: Result = original_class(self).forward(self, inputs, context)
            return result
        initialize(self, "forward", inputs, context)
        return run(self, inputs, context)

    def inverse(self: Any, inputs: Tensor, context: Any = None) -> Result:
        """``inputs`` and ``logabsdet`` (B,)."""
        if inputs.dim() not in (2, 4) or inputs.shape[1] != options_of(self).channels:
            result: Result = original_class(self).inverse(self, inputs, context)
            return result
        return steps.inverse(AffineCouplingTransform.parts(self), inputs, context)


class CompositeTransform(Patch):
    """A chain of transforms in which ActNorm followed by a 1x1 convolution is one operator."""

    dialect, kind = "nflows", "CompositeTransform"
    methods = ("forward", "inverse")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        transforms = getattr(module, "_transforms", None)
        chain = isinstance(transforms, nn.ModuleList) and hasattr(module, "_cascade")
        return chain and any(_is_pair(*pair) for pair in itertools.pairwise(transforms))  # type: ignore[arg-type]

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> None:
        for actnorm, convolution in zip(module._transforms, module._transforms[1:], strict=False):
            if _is_pair(actnorm, convolution):
                examiner.require((actnorm, ActNorm), (convolution, OneByOneConvolution))

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        transforms = list(module._transforms)
        first = next(index for index, layer in enumerate(transforms) if ActNorm.matches(layer))
        before: tuple[int, ...] = (len(transforms[first].shift), *SPATIAL)
        after = before
        for squeeze in filter(_is_squeeze, transforms[:first]):
            before = _squeezed(before, 1 / squeeze.factor)
        for squeeze in filter(_is_squeeze, transforms[first:]):
            after = _squeezed(after, squeeze.factor)
        return _both_directions((2, *before), (2, *after))

    def forward(self: Any, inputs: Tensor, context: Any = None) -> Result:
        """``outputs`` and ``logabsdet`` (B,)."""
        return original_class(self)._cascade(inputs, _fused(list(self._transforms), inputs), context)  # type: ignore[no-any-return]

    def inverse(self: Any, inputs: Tensor, context: Any = None) -> Result:
        """``inputs`` and ``logabsdet`` (B,)."""
        steps = _fused(list(self._transforms), inputs)
        return original_class(self)._cascade(inputs, [step.inverse for step in reversed(steps)], context)  # type: ignore[no-any-return]


class _Pair:
    """ActNorm followed by a 1x1 convolution."""

    def __init__(self, actnorm: Any, convolution: Any) -> None:
        self.actnorm, self.convolution = actnorm, convolution

    def __call__(self, inputs: Tensor, context: Any = None) -> Result:
        outputs, log_det = steps.apply_linear(inputs, self._linear())
        return outputs.add_(self.convolution.bias[:, None, None]), log_det

    def inverse(self, inputs: Tensor, context: Any = None) -> Result:
        return actnorm_conv1x1_inverse(inputs - self.convolution.bias[:, None, None], *self._linear(to_invert=True))

    def _linear(self, to_invert: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # exp(a) x + c = exp(a) (x + c exp(-a))
        log_scale, shift = self.actnorm.log_scale, self.actnorm.shift
        return log_scale, shift * (-log_scale).exp(), *_matrix(self.convolution, to_invert)


def _fused(transforms: list[Any], inputs: Tensor) -> list[Any]:
    """``transforms``, with a pair in place of every two that can be computed together."""
    steps: list[Any] = []
    for transform in transforms:
        before = steps[-1] if steps else None
        fusable = isinstance(before, nn.Module) and _is_pair(before, transform) and _can_fuse(before, transform, inputs)
        steps[-1 if fusable else len(steps) :] = [_Pair(before, transform) if fusable else transform]
    return steps


def _is_squeeze(transform: Any) -> bool:
    return isinstance(getattr(transform, "factor", None), int) and hasattr(transform, "get_output_shape")


def _squeezed(shape: tuple[int, ...], factor: float) -> tuple[int, ...]:
    """(C, H, W) after a squeeze by ``factor``; a factor below 1 undoes one."""
    channels, *sizes = shape
    return round(channels * factor**2), *(round(size / factor) for size in sizes)


def _is_pair(first: Any, second: Any) -> bool:
    return ActNorm.matches(first) and OneByOneConvolution.matches(second)


def _can_fuse(actnorm: Any, convolution: Any, inputs: Tensor) -> bool:
    ready = not actnorm.training or is_set(actnorm, actnorm.initialized)
    fits = is_unchanged(actnorm) and _can_fuse_convolution(convolution, inputs)
    return ready and fits and not has_hooks(actnorm, convolution)


def _can_fuse_convolution(convolution: Any, inputs: Tensor) -> bool:
    cached = convolution.using_cache and not convolution.training
    free = not cached and not has_hooks(convolution.permutation)
    return inputs.dim() == 4 and free and is_unchanged(convolution)


def _matrix(convolution: Any, to_invert: bool = False) -> tuple[Tensor, Tensor]:
    """W (C, C) and ``log|det W|``; to be inverted W stays in float64, as the original inverts its factors."""
    lower, upper = convolution._create_lower_upper()
    wide = wide_dtype(lower.device)
    product = lower.to(wide) @ upper.to(wide)
    weight = product if to_invert else product.to(lower.dtype)
    return weight.index_select(1, convolution.permutation._inverse_permutation), convolution.upper_diag.log().sum()


PATCHES = (ActNorm, OneByOneConvolution, AffineCouplingTransform, CompositeTransform)
