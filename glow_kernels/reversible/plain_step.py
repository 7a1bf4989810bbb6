"""Plain steps: flow steps of only this package's own layers, run without autograd and without calling their modules.

Most steps are plain. The overhead of a general step (inspecting its modules, substituting its parameters, building a
graph) is a tenth of a training step of a small Glow.

In a chain of plain steps only, on a backend that has an operator for it, every step ends after the linear map of the
next step instead of before it (:mod:`glow_kernels.nn.boundary_node`). The states between steps, and so the anchors, are
then inputs of couplings; their number stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from glow_kernels.backends.numerics import compute_dtype
from glow_kernels.nn import AdditiveCoupling, AffineCoupling, FlowStep
from glow_kernels.nn import network_passes as passes
from glow_kernels.nn.boundary_node import is_boundary_node
from glow_kernels.nn.coupling_node import (
    Kind,
    Overwritable,
    couple,
    couple_backward,
    couple_reversible_backward,
    own_parameters,
)
from glow_kernels.nn.step import LinearMap
from glow_kernels.ops.actnorm_conv1x1 import apply, apply_backward, apply_reversible_backward
from glow_kernels.ops.coupling_conv1x1 import backward as boundary_backward
from glow_kernels.ops.coupling_conv1x1 import forward as boundary_forward


class Span(NamedTuple):
    """Which operations a plain step consists of.

    Attributes:
        kind: the kind of its coupling.
        begins: whether it begins with its own linear map; otherwise the step before it has applied that.
        ends: whether it ends with the linear map of the next step.
    """

    kind: Kind
    begins: bool = True
    ends: bool = False

    def maps(self, number: int) -> range:
        """The indices, among the chain's linear maps, of those that step ``number`` applies."""
        return range(number + (not self.begins), number + 1 + self.ends)


class PlainStep(NamedTuple):
    """A plain step, as a collection of tensors.

    Attributes:
        span: the operations it consists of.
        parameters: matrix and shift of each of its linear maps, folded by the chain, then the network's parameters.
        inverses: the inverses of the linear maps, or None where backward does not need them.
    """

    span: Span
    parameters: Sequence[Tensor]
    inverses: Sequence[LinearMap | None] = ()

    @classmethod
    def of(
        cls, step: nn.Module, x: Tensor, linear: LinearMap | None, following: LinearMap | None = None
    ) -> PlainStep | None:
        """``step`` as a plain step for data ``x``; None if it is not plain.

        Args:
            linear: the folded linear map that it begins with, if any.
            following: the folded linear map that it ends with, if any.
        """
        coupling: Any = cast(FlowStep, step).coupling
        if type(coupling) not in (AffineCoupling, AdditiveCoupling) or coupling.condition_on != "first":
            return None
        kind = coupling._kind()
        own = None if passes.is_overridden_or_hooked(coupling) else own_parameters(x, kind, coupling.network)
        if own is None:
            return None
        span = Span(kind, linear is not None, following is not None)
        return cls(span, [*(linear or ()), *(following or ()), *own])

    @property
    def slots(self) -> Sequence[Tensor]:
        """One entry per parameter. This and the next two properties correspond to those of :class:`GeneralStep`."""
        return self.parameters

    @property
    def is_standard(self) -> bool:
        """Always true: it has no side effects and draws no random numbers."""
        return True

    @property
    def modules(self) -> Sequence[nn.Module]:
        """Empty: no ActNorm has to be initialised."""
        return ()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the log-determinant (B,) of the coupling alone."""
        before, after, own = self._split_parameters()
        y = apply(x, *before) if self.span.begins else x
        if not self.span.ends:
            return couple(y, self.span.kind, own)[:2]
        h = passes.forward(y[:, : self.span.kind.channels], own)[0]
        z, log_det = boundary_forward(y, h, *after, *self._options)
        return z, log_det

    def backward(
        self,
        needs: Sequence[bool],
        overwritable: Overwritable,
        x: Tensor | None,
        z: Tensor | None,
        grad_z: Tensor | None,
        grad_log_det: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor, list[Tensor | None]]:
        """``x``, ``z`` evaluated again if both were given, and the gradients of ``x`` and of the parameters.

        Args:
            needs: which parameters need a gradient; the others get None.
            overwritable: which of ``z`` and its gradient may be overwritten.
            x, z: input and output; one of them may be None.
        """
        given = z if x is None else x
        assert given is not None
        grad_z = torch.zeros_like(given) if grad_z is None else grad_z.to(given.dtype)
        if grad_log_det is None:
            grad_log_det = given.new_zeros(given.shape[0], dtype=compute_dtype(given))
        needed = any(needs[-len(self._split_parameters()[2]) :])
        evaluated = None
        if x is None:
            x, grad_x, every = self._backward_from_output(given, grad_z, grad_log_det, needed, overwritable)
        else:
            evaluated, grad_x, every = self._backward_from_input(x, z is not None, grad_z, grad_log_det, needed)
        return x, evaluated, grad_x, [grad if need else None for grad, need in zip(every, needs, strict=True)]

    def _backward_from_output(
        self, z: Tensor, grad_z: Tensor, grad_log_det: Tensor, needed: bool, overwritable: Overwritable
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        before, after, own = self._split_parameters()
        of_maps: list[Tensor] = []
        y, grad_y = z, grad_z
        if self.span.ends:
            y, grad_y, *of_maps = apply_reversible_backward(grad_z, z, after[0], *self._inverse(-1))
            # Free the memory of the overwritten z and gradient now, before the network allocates its own.
            if overwritable.state:
                z.data = y
            if overwritable.grad:
                grad_z.data = grad_y
            overwritable = Overwritable(state=True, grad=True)
        x, grad_x, found = couple_reversible_backward(
            grad_y, grad_log_det, y, self.span.kind, own, needed, overwritable
        )
        if self.span.begins:
            x, grad_x, *of_map = apply_reversible_backward(grad_x, x, before[0], *self._inverse(0))
            of_maps = [*of_map, *of_maps]
        return x, grad_x, [*of_maps, *found]

    def _backward_from_input(
        self, x: Tensor, evaluates: bool, grad_z: Tensor, grad_log_det: Tensor, needed: bool
    ) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:
        before, after, own = self._split_parameters()
        kind, of_maps = self.span.kind, []
        z: Tensor | None = None
        y = apply(x, *before) if self.span.begins else x
        if self.span.ends:
            h, kept = passes.forward(y[:, : kind.channels], own, frugal=True)
            if evaluates:
                z, _ = boundary_forward(y, h, *after, *self._options)
            grad_y, grad_h, *of_maps = boundary_backward(grad_z, grad_log_det, y, h, after[0], *self._options)
            del h
            below, found = passes.backward(grad_h, kept, own, True, needed, frugal=True)
            grad_y[:, : kind.channels].add_(below)
        else:
            z, _, h, kept = couple(y, kind, own, frugal=True)
            coupled = (z, h, kept)
            grad_y, found = couple_backward(grad_z, grad_log_det, kind, coupled, own, True, needed, frugal=True)
            assert grad_y is not None
        if self.span.begins:
            grad_y, *of_map = apply_backward(grad_y, x, before[0])
            of_maps = [*of_map, *of_maps]
        return z if evaluates else None, grad_y, [*of_maps, *found]

    def _split_parameters(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """Matrix and shift of the linear maps before and after the coupling, and the network's parameters."""
        start = 2 * self.span.begins
        end = start + 2 * self.span.ends
        return self.parameters[:start], self.parameters[start:end], self.parameters[end:]

    def _inverse(self, which: int) -> LinearMap:
        inverse = self.inverses[which]
        assert inverse is not None
        return inverse

    @property
    def _options(self) -> tuple[Any, ...]:
        return self.span.kind.options[1:]  # without a gain


def can_cross_boundaries(steps: Sequence[nn.Module], maps: Sequence[LinearMap | None], x: Tensor) -> bool:
    """Whether all ``steps``, with these linear ``maps``, can end with the linear map of the next step."""
    return all(
        linear is not None and is_boundary_node(x, cast(FlowStep, step), linear)
        for step, linear in zip(steps, maps, strict=True)
    )
