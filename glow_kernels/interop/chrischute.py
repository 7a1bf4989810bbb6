"""The dialect of chrischute/glow: that of OpenAI's ports, with the network reading the second half and a learned gain.

Its ActNorm and 1x1 convolution are those of :mod:`glow_kernels.interop.openai`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from glow_kernels.interop.openai import (
    ActNorm2d,
    InvertibleConv1x1,
    added,
    arguments,
    is_initialized,
    matrix,
    signature_calls,
)
from glow_kernels.interop.patch import Call, Patch, has_hooks, once, options_of, own
from glow_kernels.interop.probe import Coupling
from glow_kernels.interop.workshop import Workshop
from glow_kernels.ops import actnorm_conv1x1, actnorm_conv1x1_inverse


@dataclass(frozen=True)
class GainCoupling(Coupling):
    """A coupling whose log-scale is multiplied by a learned number per channel."""

    def describe(self) -> str:
        """For the report."""
        return f"{super().describe()}, learned gain"


class AffineCoupling(Patch):
    """``(x + t) exp(alpha tanh(u))`` with alpha learned per channel."""

    dialect, kind = "chrischute", "Coupling"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        shapes = {name: tensor.dim() for name, tensor in module.named_parameters(recurse=False)}
        return shapes == {"scale": 3} and set(dict(module.named_children())) == {"nn"}

    @classmethod
    def examine(cls, module: Any, workshop: Workshop) -> GainCoupling:
        def run(copied: Any, x: Tensor) -> Tensor:
            y: Tensor = copied(x, x.new_zeros(x.shape[0]))[0]
            return y

        found = workshop.find_coupling(module, module.nn, run, log_scale_gain=lambda copied: copied.scale)
        fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        return GainCoupling(**fields).require_halves()  # type: ignore[return-value]

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return signature_calls(options.channels, without_log_det=False)

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        """``y`` and the new log-determinant."""
        log_det, reverse, known = arguments(self, args, options)
        if not known:
            return own(self).forward(self, x, *args, **options)
        coupling = options_of(self)
        read, transformed = coupling.split(x)
        operator = coupling.inverse if reverse else coupling.forward
        y, change = operator(transformed, coupling.predict(self.nn, read), self.scale.flatten())
        return coupling.join(read, y), added(log_det, change)


class FlowStep(Patch):
    """ActNorm and convolution as one operator, then the coupling."""

    dialect, kind = "chrischute", "FlowStep"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return set(dict(module.named_children())) == {"norm", "conv", "coup"}

    @classmethod
    def examine(cls, module: Any, workshop: Workshop) -> None:
        workshop.require((module.norm, ActNorm2d), (module.conv, InvertibleConv1x1))

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        return signature_calls(module.norm.bias.shape[1], without_log_det=False)

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        """``y`` and the new log-determinant."""
        log_det, reverse, known = arguments(self, args, options)
        if not known or has_hooks(self.norm, self.conv) or not is_initialized(self.norm):
            return own(self).forward(self, x, *args, **options)
        linear = (self.norm.logs.flatten(), self.norm.bias.flatten(), *matrix(self.conv))
        if reverse:
            x, log_det = self.coup(x, log_det, reverse)
            x, change = actnorm_conv1x1_inverse(x, *linear)
            return x, added(log_det, once(change))
        x, change = actnorm_conv1x1(x, *linear)
        return self.coup(x, added(log_det, once(change)), reverse)


PATCHES = (AffineCoupling, FlowStep)
