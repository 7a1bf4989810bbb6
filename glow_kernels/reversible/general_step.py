"""What a step consists of: its modules, its parameters, and whether it is this package's own."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from glow_kernels.nn import ActNorm, AdditiveCoupling, AffineCoupling, CouplingNetwork, FlowStep
from glow_kernels.nn.conv1x1 import ChannelPermutation, InvertibleConv1x1
from glow_kernels.nn.network import HiddenConv2d, ZeroConv2d
from glow_kernels.nn.step import LinearMap

_COUPLINGS = (AffineCoupling, AdditiveCoupling)
_OWN = {
    ActNorm,
    HiddenConv2d,
    ChannelPermutation,
    CouplingNetwork,
    FlowStep,
    InvertibleConv1x1,
    ZeroConv2d,
    *_COUPLINGS,
}

# Held while parameters are substituted, and while reading the parameters of a step that another thread may be
# substituting.
SUBSTITUTION = threading.RLock()


@dataclass
class GeneralStep:
    """The modules and parameters of a step, found in one traversal.

    This is done for every step at every call, and the traversals of ``nn.Module`` are slow.

    Attributes:
        module: the step.
        modules: the step and all its submodules.
        slots: the places where each parameter is stored; a shared parameter has several.
        linear: the linear map of a flow step if the chain has folded it, by the field names of
            :class:`~glow_kernels.nn.step.LinearMap`. Matrix and shift are then the first parameters, in place of those
            that they are folded from.
        inverse_map: the inverse of the linear map, if backward needs it.
    """

    module: nn.Module
    modules: list[nn.Module]
    slots: list[list[tuple[dict[str, Any], str]]]
    linear: dict[str, Any]
    inverse_map: LinearMap | None = None

    @classmethod
    def of(cls, step: nn.Module, linear: Sequence[Tensor] = (), inverse: LinearMap | None = None) -> GeneralStep:
        """``step`` as it is now; ``linear`` is the folded matrix and shift, or empty."""
        modules = {id(step): step}
        slots: dict[int, list[tuple[dict[str, Any], str]]] = {}
        named = dict(zip(LinearMap._fields, linear, strict=False))
        folded = (step.actnorm, step.mixing) if named else ()
        stack = [step]
        while stack:
            module = stack.pop()
            for key, parameter in module._parameters.items() if module not in folded else ():
                if parameter is not None:
                    slots.setdefault(id(parameter), []).append((module._parameters, key))
            for child in module._modules.values():
                if child is not None and id(child) not in modules:
                    modules[id(child)] = child
                    stack.append(child)
        return cls(
            step, list(modules.values()), [*([(named, name)] for name in named), *slots.values()], named, inverse
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters, each once, in the order of :attr:`slots`."""
        return [places[0][0][places[0][1]] for places in self.slots]

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters and buffers."""
        owners = [owner for module in self.modules for owner in (module._parameters, module._buffers)]
        return [tensor for owner in owners for tensor in owner.values() if tensor is not None]

    @property
    def forward(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The forward of the step, without hooks; its log-determinant leaves out that of :attr:`linear`, if any."""
        function = self.module.forward
        return functools.partial(function, linear=LinearMap(**self.linear)) if self.linear else function

    @property
    def inverse(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The inverse of the step; under FSDP without gathering the weights, which the step's autograd node does."""
        return functools.partial(self._inverse, linear=self.inverse_map) if self.linear else self._inverse

    @property
    def _inverse(self) -> Any:
        inverse: Any = self.module.inverse
        if "inverse" in self.module.__dict__ and hasattr(self.module, "_get_fsdp_state"):
            inverse = inverse.__wrapped__
        return inverse

    @functools.cached_property
    def is_flow_step(self) -> bool:
        """Whether the step is a :class:`~glow_kernels.nn.FlowStep` whose forward and inverse are not overridden."""
        step = self.module
        if not isinstance(step, FlowStep) or type(step.coupling) not in _COUPLINGS:
            return False
        inverse = getattr(self._inverse, "__func__", None)
        own_forward = type(step).forward is FlowStep.forward and "forward" not in step.__dict__
        if not own_forward or inverse is not FlowStep.inverse:
            return False
        parts = (step.actnorm.__dict__, step.mixing.__dict__, step.coupling.__dict__)
        return not any(name in part for part in parts for name in ("forward", "inverse", "matrix"))

    @functools.cached_property
    def is_standard(self) -> bool:
        """Whether it consists of this package's own layers only, so has no side effects and draws no random numbers."""
        for module in self.modules:
            if module is not self.module and (
                type(module) not in _OWN
                or "forward" in module.__dict__
                or module._forward_hooks
                or module._forward_pre_hooks
                # A computed weight in place of a parameter.
                or any(isinstance(value, Tensor) for value in module.__dict__.values())
            ):
                return False
        return self.is_flow_step

    @contextmanager
    def substituted(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Let the modules compute with ``tensors`` in place of :attr:`parameters`.

        Not ``torch.func.functional_call``, which reaches only the ``forward`` of a layer.
        """
        if len(self.slots) != len(tensors):
            raise RuntimeError(f"it had {len(tensors)} parameters in forward and has {len(self.slots)} in backward")
        recurrent = [module for module in self.modules if isinstance(module, nn.RNNBase)]
        with SUBSTITUTION:
            originals = self.parameters
            try:
                self._fill(tensors, recurrent)
                yield
            finally:
                self._fill(originals, recurrent)

    def _fill(self, tensors: Sequence[Tensor], recurrent: Sequence[nn.RNNBase]) -> None:
        for places, tensor in zip(self.slots, tensors, strict=True):
            for owner, key in places:
                owner[key] = tensor
        for module in recurrent:  # they keep a second list of their weights
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


@contextmanager
def in_modes(modes: Sequence[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Set the training flag of each module to the given value inside the ``with`` block."""
    changed = [module for module, training in modes if module.training != training]
    _flip(changed)
    try:
        yield
    finally:
        _flip(changed)


def _flip(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        module.training = not module.training
