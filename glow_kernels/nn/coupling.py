"""Coupling layers: one half of the channels conditions the transformation of the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glow_kernels.nn.coupling_node import Kind, coupling_node, node_parameters
from glow_kernels.nn.network import CouplingNetwork
from glow_kernels.ops import (
    ScaleMap,
    additive_coupling,
    additive_coupling_inverse,
    affine_coupling,
    affine_coupling_inverse,
)
from glow_kernels.ops._checks import check_channels, check_choice, check_module, check_whole
from glow_kernels.ops.affine_coupling import LAYOUTS, ORDERS, resolve_scale_map


class _Coupling(nn.Module):
    """Splits the channels and runs the network on one half, which stays unchanged; a subclass transforms the other."""

    outputs_per_channel: int

    def __init__(self, channels: int, hidden_channels: int, network: nn.Module | None, condition_on: str) -> None:
        super().__init__()
        check_whole("channels", channels)
        if channels < 2:
            raise ValueError(f"channels must be at least 2 for a coupling, got {channels}")
        check_choice("condition_on", condition_on, ("first", "second"))
        if network is not None:
            check_module("network", network)
        self.channels = channels
        self.condition_on = condition_on
        # Like torch.chunk: with an odd number of channels the first half gets the extra one.
        self.first_channels = (channels + 1) // 2
        conditioning = self.first_channels if condition_on == "first" else channels - self.first_channels
        outputs = self.outputs_per_channel * (channels - conditioning)
        self.network = CouplingNetwork(conditioning, outputs, hidden_channels) if network is None else network

    def forward(self, x: Tensor, *context: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x`` (B, C, H, W) to ``y`` and ``log_det`` (B,); ``context`` goes to the network after its half of ``x``."""
        check_channels("x", x, self.channels)
        if not context and type(self) in (AffineCoupling, AdditiveCoupling) and self.condition_on == "first":
            kind = self._kind()
            parameters = node_parameters(x, kind, self.network)
            if parameters is not None:
                return coupling_node(x, kind, parameters)
        conditioning, transformed = self._split("x", x)
        y, log_det = self._transform(transformed, self.network(conditioning, *context))
        return self._merge(conditioning, y), log_det

    def inverse(self, y: Tensor, *context: Tensor | None) -> tuple[Tensor, Tensor]:
        """``y`` (B, C, H, W) to ``x`` and ``log_det`` (B,) of the inverse map."""
        conditioning, transformed = self._split("y", y)
        x, log_det = self._transform_inverse(transformed, self.network(conditioning, *context))
        return self._merge(conditioning, x), log_det

    def extra_repr(self) -> str:
        return f"{self.channels}, condition_on={self.condition_on!r}"

    def _split(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        check_channels(name, x, self.channels)
        # Not two slices: autograd would pad their gradients with zeros and add them.
        first, second = torch.split(x, [self.first_channels, self.channels - self.first_channels], dim=1)
        return (first, second) if self.condition_on == "first" else (second, first)

    def _merge(self, conditioning: Tensor, transformed: Tensor) -> Tensor:
        halves = (conditioning, transformed) if self.condition_on == "first" else (transformed, conditioning)
        return torch.cat(halves, dim=1)

    def _kind(self) -> Kind:
        raise NotImplementedError

    def _transform(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _transform_inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class AffineCoupling(_Coupling):
    """Affine coupling: scale and shift of one half come from a network on the other half.

    Args:
        channels: C of the input; the first half is ``(C + 1) // 2`` channels.
        hidden_channels: width of the default network.
        network: maps the conditioning half (B, C_a, H, W) to (B, 2 C_b, H, W) for C_b transformed channels; a
            :class:`~glow_kernels.nn.CouplingNetwork` by default.
        scale_map, layout, order: as for :func:`glow_kernels.affine_coupling`.
        condition_on: which half feeds the network, ``"first"`` or ``"second"``.

    Raises:
        TypeError, ValueError: fewer than two channels, a network that is not a module, or an unknown option.
    """

    outputs_per_channel = 2

    def __init__(
        self,
        channels: int,
        hidden_channels: int = 512,
        *,
        network: nn.Module | None = None,
        scale_map: str | ScaleMap = "sigmoid",
        layout: str = "interleaved_shift_scale",
        order: str = "shift_scale",
        condition_on: str = "first",
    ) -> None:
        super().__init__(channels, hidden_channels, network, condition_on)
        check_choice("layout", layout, LAYOUTS)
        check_choice("order", order, ORDERS)
        self.scale_map = resolve_scale_map(scale_map)
        self.layout = layout
        self.order = order

    def _kind(self) -> Kind:
        return Kind(self.first_channels, self.scale_map, self.layout, self.order)

    def _transform(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return affine_coupling(x, h, self.scale_map, self.layout, self.order)

    def _transform_inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return affine_coupling_inverse(y, h, self.scale_map, self.layout, self.order)


class AdditiveCoupling(_Coupling):
    """Additive coupling: a shift of one half comes from a network on the other half; the log-determinant is zero.

    Args:
        channels, hidden_channels, condition_on: as for :class:`AffineCoupling`.
        network: maps the conditioning half (B, C_a, H, W) to (B, C_b, H, W) for C_b transformed channels.

    Raises:
        TypeError, ValueError: fewer than two channels, a network that is not a module, or an unknown option.
    """

    outputs_per_channel = 1

    def __init__(
        self,
        channels: int,
        hidden_channels: int = 512,
        *,
        network: nn.Module | None = None,
        condition_on: str = "first",
    ) -> None:
        super().__init__(channels, hidden_channels, network, condition_on)

    def _kind(self) -> Kind:
        return Kind(self.first_channels, None)

    def _transform(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return additive_coupling(x, h)

    def _transform_inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return additive_coupling_inverse(y, h)
