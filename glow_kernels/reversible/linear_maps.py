"""The folded linear maps of all steps of a chain, which are computed again in backward instead of being saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glow_kernels import backends
from glow_kernels.nn.folding import Folded, Results, Stack, linear_maps
from glow_kernels.nn.step import LinearMap
from glow_kernels.ops.folding import fold, fold_inverse
from glow_kernels.reversible import guards

if TYPE_CHECKING:
    from glow_kernels.reversible.chain import ReversibleSequential

# Linear maps, each with its inverse, or None where backward does not need that.
FoldedMaps = list[tuple[LinearMap, LinearMap | None]]


class LinearMaps:
    """The linear maps for one forward and its backward.

    They are folded in one call for forward, and again, with their inverses, when backward reaches the chain. Folding
    does not depend on the batch, so this costs little time, and no memory is held in between.

    Args:
        stack: the parameters that they are folded from.
        inverted: whether backward needs the inverses.
    """

    def __init__(self, chain: ReversibleSequential, stack: Stack, inverted: bool) -> None:
        self._chain, self._stack, self._inverted = chain, stack, inverted
        self._backend = backends.choice()
        self._versions = [guards.versions(parameters) for parameters in stack.parameters]
        self._found: FoldedMaps | None = None
        self._graph: tuple[list[Tensor], Results] | None = None

    def fold(self, x: Tensor) -> Folded:
        """The maps for forward with data ``x``."""
        tensors = [tensor for parameters in self._stack.parameters for tensor in parameters]
        return Folded.of(_Fold.apply(self, *tensors), x)  # type: ignore[no-untyped-call]

    def of(self, steps: Sequence[range]) -> list[FoldedMaps]:
        """The maps at the given indices, for each of ``steps``; dropped after map 0, with which backward ends.

        Raises:
            RuntimeError: a parameter of a step has been modified since forward.
            ValueError: a weight is singular.
        """
        if self._found is None:
            self._found = self._fold_again()
        found = [[self._found[number] for number in numbers] for numbers in steps]
        if 0 in steps[0]:
            self._found = None
        return found

    def gradients(self, grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of the parameters, None where not needed, from ``grads``, those of the results of :meth:`fold`.

        To be called when backward has gone through all steps.
        """
        assert self._graph is not None
        leaves, results = self._graph
        self._graph = self._found = None
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        found = iter(torch.autograd.grad(results, wanted, grads, allow_unused=True))
        return [next(found) if need else None for need in needs]

    def _fold_again(self) -> FoldedMaps:
        for number, (parameters, before) in enumerate(zip(self._stack.parameters, self._versions, strict=True)):
            if guards.versions(parameters) != before:
                raise RuntimeError(guards.modified(self._chain, number))
        rows = [[t.detach().requires_grad_() for t in parameters] for parameters in self._stack.parameters]
        with backends.restored(self._backend):
            with torch.enable_grad():
                stacked = self._stack.stacked(rows)
                results = fold(*stacked)
            self._graph = [leaf for row in rows for leaf in row], results
            matrices, shifts, log_det = (tensor.detach() for tensor in results)
            linear = linear_maps((matrices, shifts, log_det))
            if not self._inverted:
                return [(each, None) for each in linear]
            try:
                with torch.no_grad():
                    return list(zip(linear, linear_maps(fold_inverse(*stacked)), strict=True))
            except ValueError:
                with guards.errors_name_step(self._chain, self._stack.singular()):
                    raise


class _Fold(torch.autograd.Function):
    """``apply(maps, *parameters)``: the folded linear maps of ``parameters``."""

    @staticmethod
    def forward(ctx: Any, maps: LinearMaps, *parameters: Tensor) -> Results:
        ctx.maps = maps
        ctx.save_for_backward(*parameters)  # so that PyTorch raises if they are modified in place
        return fold(*maps._stack.stacked(maps._stack.parameters))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        return None, *ctx.maps.gradients(grads, ctx.needs_input_grad[1:])
