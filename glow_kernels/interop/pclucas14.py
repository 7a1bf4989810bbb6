"""The dialect of pclucas14/pytorch-glow: ``forward_(x, objective)`` and ``reverse_``, whose calls bypass hooks.

Layers return the data and the objective, with their log-determinant added, or subtracted in reverse. A model is a flat
list of them, so each is patched by itself. The original couplings overwrite views of their input, which current PyTorch
refuses to differentiate: only copies that do not can be patched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glow_kernels.interop import steps
from glow_kernels.interop.copies import faithful_copy
from glow_kernels.interop.examiner import Examiner
from glow_kernels.interop.improvements import DOUBLE, DOUBLE_INVERSE, STABLE
from glow_kernels.interop.memory import initialize, run
from glow_kernels.interop.patch import Call, Mismatch, Patch, options_of, original_class
from glow_kernels.interop.probe import Coupling
from glow_kernels.interop.scale_map import round_number
from glow_kernels.interop.stand_ins import SPATIAL
from glow_kernels.interop.steps import Parts
from glow_kernels.ops import actnorm_conv1x1, actnorm_conv1x1_inverse, gaussian_log_prob

UNDERFLOW = "log|det W| is finite where det W underflows"
Result = tuple[Tensor, Tensor]


def _calls(channels: int) -> list[Call]:
    shapes = ((2, channels, *SPATIAL), (2,))
    # Layers add to the objective in place.
    return [
        Call("forward_", lambda module, x, objective: module.forward_(x, objective + 0), shapes),
        Call("reverse_", lambda module, y, objective: module.reverse_(y, objective + 0), shapes),
    ]


class _Layer(Patch):
    dialect = "pclucas14"
    methods: ClassVar[tuple[str, ...]] = ("forward_", "reverse_")

    @classmethod
    def has_parts(cls, module: nn.Module, children: set[str]) -> bool:
        """Whether ``module`` has this dialect's methods, and the submodules ``children``."""
        return hasattr(module, "forward_") and hasattr(module, "reverse_") and set(module._modules) == children


@dataclass(frozen=True)
class Factor:
    """What ``logs`` is multiplied by."""

    value: float

    def describe(self) -> str:
        """For the report."""
        return "" if self.value == 1.0 else f"scaled by exp({self.value:g} logs)"


class ActNorm(_Layer):
    """``(x + b) * exp(k logs)``."""

    kind = "ActNorm"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        shapes = {name: tensor.dim() for name, tensor in module.named_parameters(recurse=False)}
        return cls.has_parts(module, set()) and shapes == {"b": 3, "logs": 3} and hasattr(module, "initialized")

    @classmethod
    @torch.no_grad()
    def examine(cls, module: Any, examiner: Examiner) -> Factor:
        copied = faithful_copy(module).double().cpu()
        copied.initialized = True
        copied.b.zero_()
        copied.logs.fill_(1.0)
        x = torch.ones(1, copied.b.shape[1], *SPATIAL, dtype=torch.float64)
        y, _ = copied.forward_(x, x.new_zeros(1))
        return Factor(round_number(y.flatten()[0].log().item(), 1e-9))

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(module.b.shape[1])

    def forward_(self: Any, x: Tensor, objective: Any) -> Result:
        """``y`` and the new objective."""
        if not self.initialized:
            result: Result = original_class(self).forward_(self, x, objective)
            return result
        bias, log_scale = _of_images(self, x)
        return (x + bias) * log_scale.exp(), objective + x.shape[2:].numel() * log_scale.sum()

    def reverse_(self: Any, y: Tensor, objective: Any) -> Result:
        """``x`` and the new objective."""
        if not self.initialized:
            result: Result = original_class(self).reverse_(self, y, objective)
            return result
        bias, log_scale = _of_images(self, y)
        return y * (-log_scale).exp() - bias, objective - y.shape[2:].numel() * log_scale.sum()


class Invertible1x1Conv(_Layer):
    """``W x``, with W the weight (C, C, 1, 1) of a convolution."""

    kind = "Invertible1x1Conv"
    better = (DOUBLE, UNDERFLOW, DOUBLE_INVERSE)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        if not cls.has_parts(module, set()) or not isinstance(module, nn.Conv2d) or module.bias is not None:
            return False
        size, *others = module.weight.shape
        return others == [size, 1, 1]

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(module.weight.shape[0])

    def forward_(self: Any, x: Tensor, objective: Any) -> Result:
        """``y`` and the new objective."""
        zeros = self.weight.new_zeros(self.weight.shape[0])
        y, log_det = actnorm_conv1x1(x, zeros, zeros, self.weight[:, :, 0, 0])
        return y, objective + log_det

    def reverse_(self: Any, y: Tensor, objective: Any) -> Result:
        """``x`` and the new objective."""
        zeros = self.weight.new_zeros(self.weight.shape[0])
        x, log_det = actnorm_conv1x1_inverse(y, zeros, zeros, self.weight[:, :, 0, 0])
        return x, objective + log_det


class CouplingLayer(_Layer):
    """An affine or additive coupling."""

    kind = "Coupling"
    has_network = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return cls.has_parts(module, {"NN"})

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Coupling:
        def run(copied: Any, x: Tensor) -> Tensor:
            y: Tensor = copied.forward_(x, x.new_zeros(len(x)))[0]
            return y

        return examiner.find_coupling(module, module.NN, run).require_halves()

    @classmethod
    def improvements(cls, module: Any, options: Any) -> tuple[str, ...]:
        return (STABLE,) if options.is_sigmoid else ()

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return _calls(options.channels)

    @classmethod
    def parts(cls, module: Any) -> Parts:
        return Parts(options_of(module), module.NN)

    def forward_(self: Any, x: Tensor, objective: Any) -> Result:
        """``y`` and the new objective."""
        initialize(self, "forward_", x, objective)
        y, log_det = run(self, x)
        return y, objective if options_of(self).scale_map is None else objective + log_det

    def reverse_(self: Any, y: Tensor, objective: Any) -> Result:
        """``x`` and the new objective."""
        x, log_det = steps.inverse(CouplingLayer.parts(self), y)
        return x, objective if options_of(self).scale_map is None else objective + log_det


class Split(_Layer):
    """Factors out the second half of the channels, whose Gaussian a convolution predicts from the first."""

    kind = "Split"
    methods = ("forward_",)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return cls.has_parts(module, {"conv_zero"})

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        if not isinstance(module.conv_zero, nn.Conv2d):
            raise Mismatch("its prior is not a convolution")
        return _calls(2 * module.conv_zero.in_channels)[:1]

    def forward_(self: Any, x: Tensor, objective: Any) -> Result:
        """The kept half, and the objective plus the log-density of the other."""
        kept, dropped = x.chunk(2, 1)
        return kept, objective + gaussian_log_prob(dropped, self.conv_zero(kept), "interleaved_mean_log_sd")


def _of_images(actnorm: Any, x: Tensor) -> Result:
    """Bias and log-scale of ActNorm, shaped to broadcast with ``x``."""
    shape = (1, -1, *(1,) * (x.dim() - 2))
    return actnorm.b.view(shape), options_of(actnorm).value * actnorm.logs.view(shape)


PATCHES = (ActNorm, Invertible1x1Conv, CouplingLayer, Split)
