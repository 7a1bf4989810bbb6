"""Mixing of channels: the invertible 1x1 convolution, and the fixed permutations that it generalises."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glow_kernels.ops import actnorm_conv1x1, actnorm_conv1x1_inverse, lu_weight
from glow_kernels.ops._checks import check_channels, check_choice, check_whole
from glow_kernels.ops.folding import lu_weight_backward


class ChannelMixing(nn.Module):
    """Base class of layers that compute ``z = W x`` at every position; a subclass defines W.

    Args:
        channels: C.

    Raises:
        TypeError, ValueError: ``channels`` is not a whole number of at least 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_whole("channels", channels, 1)
        self.channels = channels

    def matrix(self) -> tuple[Tensor, Tensor | None]:
        """W (C, C), and ``log|det W|`` as a scalar tensor; None if it has to be computed from W."""
        raise NotImplementedError

    def matrix_gradients(self, grad_weight: Tensor, grad_log_det: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """The backward of :meth:`matrix`, without a graph: pairs of a parameter and its gradient."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` (B, C, *spatial) to ``z`` and ``log_det`` (B,)."""
        check_channels("x", x, self.channels)
        return actnorm_conv1x1(x, *self._identity_actnorm(x), *self.matrix())

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` (B, C, *spatial) to ``x`` and ``log_det`` (B,) of the inverse map.

        Raises:
            ValueError: W is singular (on a GPU the results are then not finite instead).
        """
        check_channels("z", z, self.channels)
        return actnorm_conv1x1_inverse(z, *self._identity_actnorm(z), *self.matrix())

    def extra_repr(self) -> str:
        return str(self.channels)

    def _identity_actnorm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zeros = x.new_zeros(self.channels)
        return zeros, zeros


class InvertibleConv1x1(ChannelMixing):
    """Invertible 1x1 convolution, initially a random rotation (Kingma and Dhariwal, "Glow", 2018, section 3.2).

    Args:
        channels: C.
        lu: learn ``W = P L (U + diag(s))`` with the permutation P and the signs of s fixed, so that ``log|det W|`` is
            the sum of ``log|s|``; otherwise learn W itself.
    """

    permutation: Tensor
    diagonal_sign: Tensor

    def __init__(self, channels: int, lu: bool = True) -> None:
        super().__init__(channels)
        self.lu = lu
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q
        if not lu:
            self.weight = nn.Parameter(rotation.to(torch.get_default_dtype()).contiguous())
            return
        permutation, lower, upper = (factor.to(torch.get_default_dtype()) for factor in torch.linalg.lu(rotation))
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1).contiguous())
        self.upper = nn.Parameter(upper.triu(1).contiguous())
        self.log_diagonal = nn.Parameter(diagonal.abs().log())
        self.register_buffer("permutation", permutation.contiguous())
        self.register_buffer("diagonal_sign", diagonal.sign())

    def matrix(self) -> tuple[Tensor, Tensor | None]:
        if not self.lu:
            return self.weight, None
        return lu_weight(*self.factors)

    def matrix_gradients(self, grad_weight: Tensor, grad_log_det: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        if not self.lu or grad_log_det is None:
            return [(self.weight, grad_weight)]
        grads = lu_weight_backward(grad_weight, grad_log_det, *self.factors)
        return list(zip((self.lower, self.upper, self.log_diagonal), grads, strict=True))

    def extra_repr(self) -> str:
        return f"{self.channels}, lu={self.lu}"

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The arguments of :func:`glow_kernels.ops.lu_weight`; only with ``lu=True``."""
        return self.permutation, self.lower, self.upper, self.log_diagonal, self.diagonal_sign


class ChannelPermutation(ChannelMixing):
    """A fixed permutation of the channels, saved with the weights (the alternatives in Glow's section 3.2).

    Args:
        channels: C.
        kind: ``"reverse"`` reverses the channels, as RealNVP does; ``"shuffle"`` is a random permutation.
    """

    weight: Tensor

    def __init__(self, channels: int, kind: str = "reverse") -> None:
        super().__init__(channels)
        check_choice("kind", kind, ("reverse", "shuffle"))
        self.kind = kind
        order = torch.arange(channels - 1, -1, -1) if kind == "reverse" else torch.randperm(channels)
        self.register_buffer("weight", torch.eye(channels)[order])

    def matrix(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.weight.new_zeros(())

    def matrix_gradients(self, grad_weight: Tensor, grad_log_det: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        return []

    def extra_repr(self) -> str:
        return f"{self.channels}, kind={self.kind!r}"
