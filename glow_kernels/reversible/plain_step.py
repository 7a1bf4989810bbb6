"""A flow step of this package's own layers alone: forward and backward without autograd, and without its modules.

Most steps are one, and what a general step costs beside its arithmetic (looking into its modules, putting tensors in
place of parameters, a graph) is a tenth of a training step of a small Glow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from glow_kernels.nn import AdditiveCoupling, AffineCoupling, FlowStep
from glow_kernels.nn import network_passes as passes
from glow_kernels.nn.coupling_node import Kind, Private, couple, couple_backward, has_passes, uncouple
from glow_kernels.nn.step import LinearMap
from glow_kernels.ops.actnorm_conv1x1 import apply, apply_backward, apply_reversible_backward


class PlainStep(NamedTuple):
    """Such a step, taken apart into tensors.

    Attributes:
        kind: of its coupling.
        parameters: matrix and shift of its linear map, which its chain has folded, and those of the network.
        inverse: the linear map back, where backward needs it.
    """

    kind: Kind
    parameters: Sequence[Tensor]
    inverse: LinearMap | None = None

    @classmethod
    def of(cls, step: nn.Module, linear: LinearMap, x: Tensor) -> PlainStep | None:
        """That of a ``step`` whose ``linear`` map has been folded, None if it is not one for data ``x``."""
        coupling: Any = cast(FlowStep, step).coupling
        if type(coupling) not in (AffineCoupling, AdditiveCoupling) or coupling.condition_on != "first":
            return None
        kind = coupling._kind()
        if passes.is_altered(coupling) or not has_passes(x, kind, coupling.network):
            return None
        return cls(kind, [*linear, *passes.parameters_of(coupling.network)])

    @property
    def slots(self) -> Sequence[Tensor]:
        """As many as it has parameters; this and what follows are those of :class:`Anatomy`."""
        return self.parameters

    @property
    def is_standard(self) -> bool:
        """It has no side effects, and draws no random numbers."""
        return True

    @property
    def modules(self) -> Sequence[nn.Module]:
        """None: all are initialised."""
        return ()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` and the log-determinant (B,) of the coupling."""
        matrix, shift, *own = self.parameters
        return couple(apply(x, matrix, shift), self.kind, own)[:2]

    def backward(
        self,
        needs: Sequence[bool],
        private: Private,
        x: Tensor | None,
        z: Tensor | None,
        grad_z: Tensor | None,
        grad_log_det: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor, list[Tensor | None]]:
        """``x``, ``z`` evaluated again if both are given, and gradients of ``x`` and of the parameters that need one.

        Args:
            needs: which parameters do.
            private: of ``z`` and its gradient, what may be overwritten.
            x, z: input and output; one of them may be missing.
        """
        given = z if x is None else x
        assert given is not None
        matrix, shift, *own = self.parameters
        grad_z = torch.zeros_like(given) if grad_z is None else grad_z.to(given.dtype)
        if grad_log_det is None:
            grad_log_det = matrix.new_zeros(given.shape[0])
        if x is None:
            assert self.inverse is not None
            y, grad_y, found = uncouple(grad_z, grad_log_det, given, self.kind, own, any(needs[2:]), private)
            x, grad_x, *of_map = apply_reversible_backward(grad_y, y, matrix, *self.inverse)
            evaluated = None
        else:
            y = apply(x, matrix, shift)
            exact, _, h, kept = couple(y, self.kind, own, frugal=True)
            evaluated = None if z is None else exact
            grads = (grad_z, grad_log_det)
            below, found = couple_backward(*grads, self.kind, (exact, h, kept), own, True, any(needs[2:]), frugal=True)
            assert below is not None
            grad_x, *of_map = apply_backward(below, x, matrix)
        every = (*of_map, *found)
        return x, evaluated, grad_x, [grad if need else None for grad, need in zip(every, needs, strict=True)]
