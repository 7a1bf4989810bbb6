"""One step of flow: ActNorm, mixing of channels, coupling."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from glow_kernels.nn.actnorm import ActNorm
from glow_kernels.nn.conv1x1 import ChannelMixing, ChannelPermutation, InvertibleConv1x1
from glow_kernels.nn.coupling import AdditiveCoupling, AffineCoupling
from glow_kernels.ops import ScaleMap, actnorm_conv1x1, actnorm_conv1x1_inverse
from glow_kernels.ops._checks import check_channels, check_choice
from glow_kernels.ops.actnorm_conv1x1 import apply

COUPLINGS = ("affine", "additive")
MIXINGS = ("lu", "plain", "reverse", "shuffle")


class LinearMap(NamedTuple):
    """``matrix x + shift`` at every position: ActNorm and 1x1 convolution folded, or the inverse of that map.

    Attributes:
        matrix, shift: (C, C) and (C,), float32 (float64 for float64 data).
    """

    matrix: Tensor
    shift: Tensor


class FlowStep(nn.Module):
    """ActNorm and 1x1 convolution as one operator, then a coupling (Kingma and Dhariwal, "Glow", 2018, figure 2a).

    Args:
        channels: C, at least 2.
        hidden_channels: width of the coupling network.
        coupling: ``"affine"`` or ``"additive"``.
        mixing: ``"lu"`` or ``"plain"`` for the learned 1x1 convolution, ``"reverse"`` or ``"shuffle"`` for a fixed
            permutation. ``mixing="reverse"`` makes it a step of NICE (additive) or RealNVP (affine).
        scale_map: scale map of the affine coupling, as for :func:`glow_kernels.affine_coupling`.
        network: network of the coupling, as for :class:`~glow_kernels.nn.AffineCoupling`.

    Raises:
        TypeError, ValueError: fewer than two channels, a network that is not a module, or an unknown option.
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int = 512,
        *,
        coupling: str = "affine",
        mixing: str = "lu",
        scale_map: str | ScaleMap = "sigmoid",
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_choice("coupling", coupling, COUPLINGS)
        check_choice("mixing", mixing, MIXINGS)
        self.actnorm = ActNorm(channels)
        self.mixing: ChannelMixing
        if mixing in ("lu", "plain"):
            self.mixing = InvertibleConv1x1(channels, lu=mixing == "lu")
        else:
            self.mixing = ChannelPermutation(channels, mixing)
        self.coupling: AffineCoupling | AdditiveCoupling
        if coupling == "affine":
            self.coupling = AffineCoupling(channels, hidden_channels, network=network, scale_map=scale_map)
        else:
            self.coupling = AdditiveCoupling(channels, hidden_channels, network=network)

    def forward(self, x: Tensor, *context: Tensor | None, linear: LinearMap | None = None) -> tuple[Tensor, Tensor]:
        """``x`` (B, C, H, W) to ``z`` and ``log_det`` (B,); ``context`` goes to the coupling's network.

        A caller that has folded ActNorm and convolution passes the result as ``linear``; ``log_det`` is then that of
        the coupling alone.

        Raises:
            TypeError, ValueError: ``x`` has the wrong type or shape.
            RuntimeError: ActNorm is not initialised, and the module is not in training mode.
        """
        check_channels("x", x, self.actnorm.channels)
        if linear is not None:
            z, coupling_log_det = self.coupling(apply(x, *linear), *context)
            return z, coupling_log_det
        self.actnorm.prepare(x)
        weight, weight_log_det = self.mixing.matrix()
        x, linear_log_det = actnorm_conv1x1(x, self.actnorm.log_scale, self.actnorm.bias, weight, weight_log_det)
        z, coupling_log_det = self.coupling(x, *context)
        return z, linear_log_det + coupling_log_det

    def inverse(self, z: Tensor, *context: Tensor | None, linear: LinearMap | None = None) -> tuple[Tensor, Tensor]:
        """``z`` (B, C, H, W) to ``x`` and ``log_det`` (B,) of the inverse map.

        ``context`` and ``linear`` are as for :meth:`forward`, but ``linear`` is the folded inverse map.

        Raises:
            TypeError, ValueError: ``z`` has the wrong type or shape, or the 1x1 convolution is singular (on a GPU
                the results are then not finite instead).
            RuntimeError: ActNorm is not initialised.
        """
        check_channels("z", z, self.actnorm.channels)
        self.actnorm.require_initialized()
        z, coupling_log_det = self.coupling.inverse(z, *context)
        if linear is not None:
            return apply(z, *linear), coupling_log_det
        weight, weight_log_det = self.mixing.matrix()
        x, linear_log_det = actnorm_conv1x1_inverse(
            z, self.actnorm.log_scale, self.actnorm.bias, weight, weight_log_det
        )
        return x, linear_log_det + coupling_log_det
