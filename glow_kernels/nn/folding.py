"""The linear maps of the steps of a chain, folded in one call for all of them instead of one per step.

Folding is C x C work that does not depend on the batch: a few operators on tiny matrices per step. On a GPU each of
them costs a kernel launch that does hardly any work, and a level of Glow has 32 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from glow_kernels.backends.numerics import compute_dtype
from glow_kernels.nn.actnorm import ActNorm
from glow_kernels.nn.conv1x1 import ChannelPermutation, InvertibleConv1x1
from glow_kernels.nn.network_passes import is_overridden_or_hooked, parameter_of
from glow_kernels.nn.step import FlowStep, LinearMap
from glow_kernels.ops import lu_weight
from glow_kernels.ops._checks import positions
from glow_kernels.ops.folding import fold, fold_inverse

Results = tuple[Tensor, Tensor, Tensor]


class Folded(NamedTuple):
    """The linear maps of K steps in one direction, and the sum of their log-determinants (B,)."""

    maps: Sequence[LinearMap]
    log_det: Tensor

    @classmethod
    def of(cls, results: Results, x: Tensor) -> Folded:
        """The ``results`` of folding, for data ``x``."""
        return cls(linear_maps(results), results[2].sum().expand(x.shape[0]) * positions(x))


def linear_maps(results: Results) -> list[LinearMap]:
    """The map of every step."""
    matrices, shifts, _ = results
    return [LinearMap(*pair) for pair in zip(matrices.unbind(), shifts.unbind(), strict=True)]


@dataclass
class Stack:
    """What the linear maps of K steps are folded from.

    Attributes:
        parameters: for every step, log_scale and bias of ActNorm, and the weight or its learned LU factors.
        fixed: for every step, the fixed LU factors of the weight (permutation and sign), empty without LU factors.
        is_permutation: whether the weights are permutations, so that their log-determinant is zero.
        dtype: type of the maps.
    """

    parameters: Sequence[Sequence[Tensor]]
    fixed: Sequence[Sequence[Tensor]]
    is_permutation: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, steps: Sequence[nn.Module], x: Tensor) -> Stack | None:
        """The stack of ``steps`` for data ``x``; None if each step has to fold for itself.

        That is the case if the steps differ in structure, may compute something other than this package's layers, have
        hooks, which must run before parameters are read (FSDP gathers them there), or have an ActNorm that is not
        initialised.
        """
        if not _are_alike(steps, x):
            return None
        alike = cast("Sequence[FlowStep]", steps)
        mixings: Any = [step._modules["mixing"] for step in alike]
        fixed: list[tuple[Tensor, ...]]
        if getattr(mixings[0], "lu", False):
            factors = [mixing.factors for mixing in mixings]
            weights, fixed = [of[1:4] for of in factors], [(of[0], of[4]) for of in factors]
        else:
            weights, fixed = [(mixing.weight,) for mixing in mixings], [()] * len(mixings)
        actnorms = [step._modules["actnorm"] for step in alike]
        parameters = [
            (parameter_of(actnorm, "log_scale"), parameter_of(actnorm, "bias"), *weight)
            for actnorm, weight in zip(actnorms, weights, strict=True)
        ]
        return cls(parameters, fixed, isinstance(mixings[0], ChannelPermutation), compute_dtype(x))

    def fold(self, x: Tensor) -> Folded:
        """The maps x -> z."""
        return Folded.of(fold(*self.stacked(self.parameters)), x)

    def fold_inverse(self, z: Tensor) -> Folded:
        """The maps z -> x.

        Raises:
            ValueError: a weight is singular.
        """
        return Folded.of(fold_inverse(*self.stacked(self.parameters)), z)

    def singular(self) -> int:
        """The index of the first step whose weight is singular according to :meth:`fold_inverse`."""
        stacked = self.stacked(self.parameters)
        for index in range(len(self.parameters)):
            try:
                fold_inverse(*(None if tensor is None else tensor[index] for tensor in stacked))  # type: ignore[arg-type]
            except ValueError:
                return index
        raise AssertionError("no weight is singular")

    def stacked(self, parameters: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """log_scale and bias (K, C), weight (K, C, C) and weight_log_det (K,), None if not known, all of one type."""
        log_scale, bias, *weights = (torch.stack(kind) for kind in zip(*parameters, strict=True))
        weight, log_det = weights[0], None
        if self.fixed[0]:
            permutation, sign = (torch.stack(kind) for kind in zip(*self.fixed, strict=True))
            lower, upper, log_diagonal = weights
            weight, log_det = lu_weight(permutation, lower, upper, log_diagonal, sign)
        elif self.is_permutation:
            log_det = weight.new_zeros(len(weight))
        log_det = None if log_det is None else log_det.to(self.dtype)
        return log_scale.to(self.dtype), bias.to(self.dtype), weight.to(self.dtype), log_det


def _are_alike(steps: Sequence[nn.Module], x: Tensor) -> bool:
    first = steps[0]
    if len(steps) < 2 or not isinstance(first, FlowStep):
        return False
    like, mixing = first.actnorm.log_scale, first.mixing
    if x.dim() < 2 or x.size(1) != len(like) or x.device != like.device:
        return False
    if type(mixing) not in (InvertibleConv1x1, ChannelPermutation):
        return False
    lu, dtype, device = getattr(mixing, "lu", None), like.dtype, like.device
    # A plain loop that reads the modules' dictionaries directly: this runs at every call, for every step.
    for step in steps:
        if type(step) is not FlowStep or is_overridden_or_hooked(step) or "inverse" in step.__dict__:
            return False
        actnorm, own = step._modules["actnorm"], step._modules["mixing"]
        if type(actnorm) is not ActNorm or not actnorm._is_initialized:
            return False
        if type(own) is not type(mixing) or "matrix" in own.__dict__ or own.__dict__.get("lu") != lu:
            return False
        log_scale = parameter_of(actnorm, "log_scale")
        if log_scale.size() != like.size() or log_scale.dtype != dtype or log_scale.device != device:
            return False
    return True
