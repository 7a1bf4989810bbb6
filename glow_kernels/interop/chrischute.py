"""The dialect of chrischute/glow: like OpenAI's ports, but networks read the second half and log-scales have a gain.

Its ActNorm and 1x1 convolution are those of :mod:`glow_kernels.interop.openai`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from glow_kernels.interop import steps
from glow_kernels.interop.examiner import Examiner
from glow_kernels.interop.memory import initialize, run
from glow_kernels.interop.openai import (
    ActNorm2d,
    InvertibleConv1x1,
    added,
    arguments,
    is_initialized,
    matrix,
    signature_calls,
)
from glow_kernels.interop.patch import Call, Patch, has_hooks, is_unchanged, options_of, original_class
from glow_kernels.interop.probe import Coupling
from glow_kernels.interop.steps import Linear, Parts


@dataclass(frozen=True)
class GainCoupling(Coupling):
    """A coupling whose log-scale is multiplied by a learned number per channel."""

    def describe(self) -> str:
        """For the report."""
        return f"{super().describe()}, learned gain"


class AffineCoupling(Patch):
    """``(x + t) exp(alpha tanh(u))`` with alpha learned per channel."""

    dialect, kind = "chrischute", "Coupling"
    has_network = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        shapes = {name: tensor.dim() for name, tensor in module.named_parameters(recurse=False)}
        return shapes == {"scale": 3} and set(dict(module.named_children())) == {"nn"}

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> GainCoupling:
        def run(copied: Any, x: Tensor) -> Tensor:
            y: Tensor = copied(x, x.new_zeros(x.shape[0]))[0]
            return y

        found = examiner.find_coupling(module, module.nn, run, log_scale_gain=lambda copied: copied.scale)
        fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        return GainCoupling(**fields).require_halves()  # type: ignore[return-value]

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return signature_calls(options.channels, without_log_det=False)

    @classmethod
    def parts(cls, module: Any) -> Parts:
        return Parts(options_of(module), module.nn, gain=lambda: module.scale.flatten())

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        """``y`` and the new log-determinant."""
        log_det, reverse, known = arguments(self, args, options)
        if not known:
            return original_class(self).forward(self, x, *args, **options)
        initialize(self, "forward", x, *args, **options)
        y, change = steps.inverse(AffineCoupling.parts(self), x) if reverse else run(self, x)
        return y, added(log_det, change)


class FlowStep(Patch):
    """ActNorm and convolution as one operator, then the coupling."""

    dialect, kind = "chrischute", "FlowStep"
    has_network = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return set(dict(module.named_children())) == {"norm", "conv", "coup"}

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> None:
        examiner.require((module.norm, ActNorm2d), (module.conv, InvertibleConv1x1), (module.coup, AffineCoupling))

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return signature_calls(module.norm.bias.shape[1], without_log_det=False)

    @classmethod
    def parts(cls, module: Any) -> Parts:
        def linear(to_invert: bool) -> Linear:
            return (module.norm.logs.flatten(), module.norm.bias.flatten(), *matrix(module.conv, to_invert))

        return AffineCoupling.parts(module.coup)._replace(linear=linear)

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        """``y`` and the new log-determinant."""
        log_det, reverse, known = arguments(self, args, options)
        initialize(self, "forward", x, *args, **options)
        layers = (self.norm, self.conv, self.coup)
        if not known or has_hooks(*layers) or not is_unchanged(*layers) or not is_initialized(self.norm):
            return original_class(self).forward(self, x, *args, **options)
        y, change = steps.inverse(FlowStep.parts(self), x) if reverse else run(self, x)
        return y, added(log_det, change)


PATCHES = (AffineCoupling, FlowStep)
