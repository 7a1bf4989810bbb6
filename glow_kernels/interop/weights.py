"""The weights of a multi-scale Glow in a common form, independent of the names and conventions of the dialects.

A convolution is ``exp(log_scale) * (W x + bias)``; ActNorm is ``sign * exp(log_scale) * (x + bias)``; output channels
("rows") that predict shift and scale are two halves, shift first; those that predict a Gaussian likewise, mean first.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Convolution:
    """``exp(log_scale) * (W x + bias)``.

    Attributes:
        weight: (O, I, k, k).
        bias, log_scale: (O,).
        border: value with which the input is padded.
    """

    weight: Tensor
    bias: Tensor
    log_scale: Tensor
    border: float = 0.0

    @property
    def depends_on_padding(self) -> bool:
        """Whether the value of the padding makes a difference."""
        return self.weight.shape[-1] > 1 and bool(self.weight.any())

    def folded(self) -> Convolution:
        """The same convolution, with its scale folded into weight and bias."""
        scale = self.log_scale.exp()
        weight = self.weight * scale[:, None, None, None]
        return Convolution(weight, self.bias * scale, torch.zeros_like(scale), self.border)

    def with_rows(self, order: Tensor) -> Convolution:
        """With the output channels in another order."""
        return dataclasses.replace(
            self, weight=self.weight[order], bias=self.bias[order], log_scale=self.log_scale[order]
        )

    def with_sign(self, sign: Tensor) -> Convolution:
        """With the output channels multiplied by ``sign`` (O,)."""
        return dataclasses.replace(self, weight=self.weight * sign[:, None, None, None], bias=self.bias * sign)


@dataclass(frozen=True)
class Mixing:
    """``W`` (C, C), or ``W = P L (U + diag(sign * exp(log_diagonal)))`` with any values outside the triangles.

    Attributes:
        weight: W, or None.
        factors: permutation, lower, upper, log_diagonal and diagonal_sign, or None.
    """

    weight: Tensor | None = None
    factors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None

    def matrix(self) -> Tensor:
        """W."""
        if self.weight is not None:
            return self.weight
        assert self.factors is not None
        permutation, lower, upper, log_diagonal, sign = (factor.double() for factor in self.factors)
        triangle = lower.tril(-1) + torch.eye(len(sign), dtype=torch.float64, device=sign.device)
        weight = permutation @ triangle @ (upper.triu(1) + torch.diag(sign * log_diagonal.exp()))
        return weight.to(self.factors[1].dtype)

    def decomposed(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The factors, with zeros outside the triangles."""
        if self.factors is not None:
            permutation, lower, upper, log_diagonal, sign = self.factors
            return permutation, lower.tril(-1), upper.triu(1), log_diagonal, sign
        assert self.weight is not None
        permutation, lower, upper = torch.linalg.lu(self.weight.double())
        diagonal = upper.diagonal()
        factors = (permutation, lower.tril(-1), upper.triu(1), diagonal.abs().log(), diagonal.sign())
        return tuple(factor.to(self.weight.dtype) for factor in factors)

    def with_signs(self, sign: Tensor) -> Mixing:
        """``W diag(sign)``."""
        if self.factors is None:
            assert self.weight is not None
            return Mixing(self.weight * sign)
        permutation, lower, upper, log_diagonal, diagonal_sign = self.factors
        return Mixing(factors=(permutation, lower, upper * sign, log_diagonal, diagonal_sign * sign))


@dataclass(frozen=True)
class Step:
    """One step of flow.

    Attributes:
        log_scale, bias, sign: of ActNorm, (C,).
        mixing: the 1x1 convolution.
        network: of the coupling; three convolutions with ReLU between them.
        initialized: whether ActNorm is.
    """

    log_scale: Tensor
    bias: Tensor
    mixing: Mixing
    network: tuple[Convolution, Convolution, Convolution]
    sign: Tensor | None = None
    initialized: bool = True

    @property
    def is_affine(self) -> bool:
        """Whether the network predicts a scale too."""
        return len(self.network[2].bias) == len(self.bias)

    def without_signs(self) -> Step:
        """The same step with positive scales: ActNorm's signs are folded into the columns of W."""
        if self.sign is None:
            return self
        return dataclasses.replace(self, mixing=self.mixing.with_signs(self.sign), sign=None)

    def with_last(self, last: Convolution) -> Step:
        """With another last convolution in its network."""
        return dataclasses.replace(self, network=(*self.network[:2], last))


@dataclass(frozen=True)
class Weights:
    """The weights of a model.

    Attributes:
        levels: the steps of each level, the level of highest resolution first.
        splits: between levels, the convolution that predicts the Gaussian of what is factored out.
        top: prior of the deepest latent, a convolution applied to zeros; None for a standard normal.
    """

    levels: list[list[Step]]
    splits: list[Convolution]
    top: Convolution | None = None


@dataclass
class StateReader:
    """Reads a ``state_dict`` and records which of its tensors have been read."""

    tensors: Mapping[str, Tensor]
    seen: set[str] = field(default_factory=set)

    def __call__(self, name: str) -> Tensor:
        """The tensor, in float32 if it has half precision; a parallel wrapper's ``module.`` may precede its name.

        Raises:
            KeyError: it is not there.
            TypeError: it is not a tensor.
        """
        found = next((key for key in (name, f"module.{name}") if key in self.tensors), None)
        if found is None:
            raise KeyError(name)
        self.seen.add(found)
        tensor = self.tensors[found]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state_dict must hold tensors, got {type(tensor).__name__} for {found}")
        # Otherwise logarithms and products of factors computed here would be rounded to three digits.
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

    def has(self, name: str) -> bool:
        """Whether it is there."""
        return name in self.tensors or f"module.{name}" in self.tensors

    def numbers(self, prefix: str) -> range:
        """The numbers that follow ``prefix`` in names, from 0.

        Raises:
            KeyError: a number before the last is missing.
        """
        found = self.sparse_numbers(prefix)
        for number in range(found[-1] if found else 0):
            if number not in found:
                raise KeyError(f"{prefix}{number}")
        return range(len(found))

    def sparse_numbers(self, prefix: str) -> list[int]:
        """The numbers that follow ``prefix`` in names; layers without tensors may leave gaps."""
        found = set()
        for key in self.tensors:
            name = key.removeprefix("module.")
            if name.startswith(prefix):
                number = re.split(r"[./]", name[len(prefix) :], maxsplit=1)[0]
                if number.isdigit():
                    found.add(int(number))
        return sorted(found)

    def unread(self) -> list[str]:
        """Names of the tensors that have not been read."""
        return [key for key in self.tensors if key not in self.seen]


def interleaved(halves: Convolution) -> Convolution:
    """Rows of two halves, interleaved."""
    rows = torch.arange(len(halves.bias))
    return halves.with_rows(rows.view(2, -1).T.flatten())


def halves(alternating: Convolution) -> Convolution:
    """The inverse of :func:`interleaved`."""
    rows = torch.arange(len(alternating.bias))
    return alternating.with_rows(torch.cat((rows[0::2], rows[1::2])))


def swapped(convolution: Convolution) -> Convolution:
    """With the two halves of the rows swapped."""
    return convolution.with_rows(torch.arange(len(convolution.bias)).roll(len(convolution.bias) // 2))


def affine_halves(step: Step) -> Step:
    """With interleaved rows for shift and scale rearranged to halves, if there are both."""
    return step.with_last(halves(step.network[2])) if step.is_affine else step


def affine_interleaved(step: Step) -> Step:
    """The inverse of :func:`affine_halves`."""
    return step.with_last(interleaved(step.network[2])) if step.is_affine else step


def negated_shift(step: Step) -> Step:
    """Converts between ``x + t`` and ``x - t``."""
    last = step.network[2]
    sign = torch.ones_like(last.bias)
    sign[: len(sign) // 2 if step.is_affine else len(sign)] = -1
    return step.with_last(last.with_sign(sign))


def constant_convolution(values: Tensor, log_scale: Tensor) -> Convolution:
    """A convolution that ignores its input."""
    return Convolution(values.new_zeros(len(values), len(values) // 2, 3, 3), values, log_scale)


def read_mixing(reader: StateReader, weight: str, factors: list[str]) -> Mixing:
    """Read W from the name ``weight``, or P, L, U, log|s| and the signs of s from the names ``factors``."""
    if reader.has(weight):
        matrix = reader(weight)
        return Mixing(matrix.reshape(matrix.shape[0], matrix.shape[0]))
    permutation, lower, upper, log_diagonal, sign = (reader(name) for name in factors)
    return Mixing(factors=(permutation, lower, upper, log_diagonal, sign))


def write_mixing(state: State, mixing: Mixing, lu: bool, weight: str, factors: list[str]) -> None:
    """Write W under the name ``weight``, or L, U, log|s|, P and the signs of s under the names ``factors``."""
    if not lu:
        state[weight] = mixing.matrix()
        return
    permutation, lower, upper, log_diagonal, sign = mixing.decomposed()
    state.update(zip(factors, (lower, upper, log_diagonal, permutation, sign), strict=True))
