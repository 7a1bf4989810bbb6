"""The linear maps of all steps of a chain, which nobody keeps from forward to backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from glow_kernels import backends
from glow_kernels.nn.folding import Stack
from glow_kernels.nn.step import LinearMap
from glow_kernels.reversible import guards

if TYPE_CHECKING:
    from glow_kernels.reversible.chain import ReversibleSequential

# Linear maps, each with its inverse where backward needs that.
FoldedMaps = list[tuple[LinearMap, LinearMap | None]]


class LinearMaps:
    """Of one forward: folded for it in one call, and once more, with their inverses, when backward reaches the chain.

    Nothing of it depends on the batch, so that this costs little, and no memory in between.

    Args:
        stack: what they are folded from.
        inverted: whether backward needs the inverses.
    """

    def __init__(self, chain: ReversibleSequential, stack: Stack, inverted: bool) -> None:
        self._chain, self._stack, self._inverted = chain, stack, inverted
        self._backend = backends.choice()
        self._versions = [guards.versions(parameters) for parameters in stack.parameters]
        self._found: FoldedMaps | None = None

    def of(self, steps: Sequence[range]) -> list[FoldedMaps]:
        """The maps of these numbers of each of some steps; backward ends with step 0, whose own map is the last.

        Raises:
            RuntimeError: a parameter of a step has been modified since forward.
            ValueError: a weight is singular.
        """
        if self._found is None:
            self._found = self._fold()
        found = [[self._found[number] for number in numbers] for numbers in steps]
        if 0 in steps[0]:
            self._found = None
        return found

    def _fold(self) -> FoldedMaps:
        for number, (parameters, before) in enumerate(zip(self._stack.parameters, self._versions, strict=True)):
            if guards.versions(parameters) != before:
                raise RuntimeError(guards.modified(self._chain, number))
        try:
            with backends.restored(self._backend):
                return self._stack.fold_both(self._inverted)
        except ValueError:
            with guards.named(self._chain, self._stack.singular()):
                raise
