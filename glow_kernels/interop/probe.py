"""Finds out what an affine or additive coupling computes, by feeding it chosen network outputs.

For a layer ``y = f(x, h)``, where ``h`` replaces the network's output, the probe finds which channels the network
reads, which channels of ``h`` are scale and shift, the scale function, and the order of scaling and shifting. It
relies on no names or attributes of the layer; a coupling that no operator computes is a :class:`Mismatch`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.reference.affine_coupling import merge, split
from glow_kernels.interop.patch import Mismatch
from glow_kernels.interop.scale_map import RAW_VALUES, TOLERANCE, fit_scale_map, round_number
from glow_kernels.ops import (
    ScaleMap,
    additive_coupling,
    additive_coupling_inverse,
    affine_coupling,
    affine_coupling_inverse,
    affine_coupling_reversible_backward,
)
from glow_kernels.ops.affine_coupling import LAYOUTS


@dataclass(frozen=True)
class Coupling:
    """A coupling in terms of the operators.

    Attributes:
        read, transformed: channels that the network reads, and the others.
        scale_map, layout, order: as for :func:`glow_kernels.affine_coupling`; additive couplings have no scale map.
        inverted: the layer's forward is the operator's inverse.
        factor: the network's output is multiplied by this first.
        channels_last: the network gives the same result for images in ``channels_last`` memory format.
        inverse_has_graph: the layer's inverse can be differentiated.
        forward_has_log_det, inverse_has_log_det: the layer, or its inverse, returns a log-determinant; only set for
            dialects whose copies differ in this.
    """

    read: tuple[int, ...]
    transformed: tuple[int, ...]
    scale_map: ScaleMap | None = None
    layout: str = ""
    order: str = ""
    inverted: bool = False
    factor: float = 1.0
    channels_last: bool = False
    inverse_has_graph: bool = True
    forward_has_log_det: bool = True
    inverse_has_log_det: bool = True

    @property
    def channels(self) -> int:
        """C of the layer's input."""
        return len(self.read) + len(self.transformed)

    @property
    def has_halves(self) -> bool:
        """Whether the channels read and those transformed are one contiguous block each."""
        return _is_contiguous(self.read) and _is_contiguous(self.transformed)

    @property
    def is_sigmoid(self) -> bool:
        """Whether the scale is a sigmoid."""
        return self.scale_map is not None and self.scale_map.kind == "sigmoid"

    @property
    def reads_first(self) -> bool:
        """Whether the network reads the first channels; otherwise the last."""
        return self.read[0] == 0

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The channels of ``x`` that are read, and those that are transformed."""
        if not self.has_halves:
            return _take(x, self.read), _take(x, self.transformed)
        # Not two slices: in backward, each would return a gradient of full size.
        sizes = (self.read, self.transformed) if self.reads_first else (self.transformed, self.read)
        one, other = torch.split(x, [len(channels) for channels in sizes], dim=1)
        return (one, other) if self.reads_first else (other, one)

    def join(self, read: Tensor, transformed: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        if not self.has_halves:
            joined = read.new_empty(read.shape[0], self.channels, *read.shape[2:])
            joined[:, list(self.read)], joined[:, list(self.transformed)] = read, transformed
            return joined
        return torch.cat((read, transformed) if self.reads_first else (transformed, read), dim=1)

    def require_halves(self) -> Coupling:
        """The coupling itself, if :attr:`has_halves`.

        Raises:
            Mismatch: the channels that are read are scattered among the others.
        """
        if not self.has_halves:
            raise Mismatch("the network reads neither the first nor the last channels")
        return self

    def predict(self, network: Callable[..., Tensor], read: Tensor, *args: Any) -> Tensor:
        """What ``network`` returns for the channels that it reads."""
        # It makes convolutions on a CPU up to twice as fast; the operators take h in any memory format.
        if self.channels_last and read.device.type == "cpu":
            read = read.contiguous(memory_format=torch.channels_last)
        return network(read, *args)

    def forward(self, x: Tensor, h: Tensor, log_scale_gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The transformed channels ``x`` after the layer, and ``log_det`` (B,)."""
        return self._run(x, h, log_scale_gain, self.inverted)

    def inverse(self, y: Tensor, h: Tensor, log_scale_gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`forward`, and ``log_det`` of that direction."""
        return self._run(y, h, log_scale_gain, not self.inverted)

    def backward_from_output(
        self, grad: Tensor, grad_log_det: Tensor, y: Tensor, h: Tensor, log_scale_gain: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The input from which :meth:`forward` computed ``y``, and the gradients of this input, ``h`` and the gain.

        Args:
            grad, grad_log_det: gradients of the results of :meth:`forward`.
        """
        if self.scale_map is None:
            factor = -self.factor if self.inverted else self.factor
            return self.inverse(y, h)[0], grad, grad * factor, None
        if not self.inverted:
            raw = h if self.factor == 1.0 else h * self.factor
            options = (self.scale_map, self.layout, self.order, log_scale_gain)
            x, grad_x, grad_h, grad_gain = affine_coupling_reversible_backward(grad, grad_log_det, y, raw, *options)
            return x, grad_x, grad_h if self.factor == 1.0 else grad_h * self.factor, grad_gain
        inputs = [self.inverse(y, h, log_scale_gain)[0], h, *([] if log_scale_gain is None else [log_scale_gain])]
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            results = self.forward(*leaves)
        grads = torch.autograd.grad(results, leaves, (grad.to(y.dtype), grad_log_det.to(results[1].dtype)))
        return inputs[0], grads[0], grads[1], None if log_scale_gain is None else grads[2]

    def describe(self) -> str:
        """For the report."""
        half = "first" if self.reads_first else "second"
        part = f"net reads the {half} half" if _is_contiguous(self.read) else "net reads chosen channels"
        if self.scale_map is None:
            return f"additive, {part}"
        inverted = ", inverted" if self.inverted else ""
        return f"s = {describe_scale_map(self.scale_map)}, {self.layout}, {self.order}{inverted}, {part}"

    def _run(self, x: Tensor, h: Tensor, gain: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.factor != 1.0:
            h = h * self.factor
        if self.scale_map is None:
            return additive_coupling_inverse(x, h) if inverse else additive_coupling(x, h)
        function = affine_coupling_inverse if inverse else affine_coupling
        return function(x, h, self.scale_map, self.layout, self.order, gain)


def describe_scale_map(scale_map: ScaleMap) -> str:
    """For the report: ``sigmoid(u + 2) + 0.001``."""
    inner = {1.0: "u", -1.0: "-u"}.get(scale_map.slope, f"{scale_map.slope:g} u")
    inner += f" {'+' if scale_map.offset > 0 else '-'} {abs(scale_map.offset):g}" if scale_map.offset else ""
    gain = "" if scale_map.gain == 1.0 else f"{scale_map.gain:g} "
    floor = f" + {scale_map.floor:g}" if scale_map.floor else ""
    if scale_map.kind == "sigmoid":
        return f"{gain}sigmoid({inner}){floor}"
    if scale_map.kind == "exp":
        return f"exp({gain}({inner})){floor}" if gain else f"exp({inner}){floor}"
    bounds = f", {scale_map.low:g}, {scale_map.high:g}" if scale_map.kind == "clip" else ""
    return f"exp({gain}{scale_map.kind}({inner}{bounds})){floor}"


def find_coupling(
    layer: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    channels: int,
    outputs: int,
    spatial: tuple[int, ...],
    log_scale_gain: Tensor | None = None,
) -> Coupling:
    """Find out what ``layer`` computes.

    Args:
        layer: maps float64 ``x`` (B, channels, *spatial) and the network's output ``h`` (B, outputs, *spatial) to
            the network's input and ``y``.
        channels: C.
        outputs: channels of the network's output.
        spatial: sizes to probe with.
        log_scale_gain: (C_transformed,), if the layer multiplies the log-scale of each channel by a learned number.

    Raises:
        Mismatch: it is not a coupling that the operators can compute.
    """
    probe = _Probe(layer, channels, outputs, spatial)
    read, transformed = probe.halves()
    if outputs == len(transformed):
        return probe.additive(read, transformed)
    if outputs != 2 * len(transformed):
        raise Mismatch(f"the network returns {outputs} channels for {len(transformed)} that are transformed")
    layout = probe.layout(transformed)
    raw, scale = probe.scale(transformed, layout)
    if log_scale_gain is not None:
        scale = scale.log().div(log_scale_gain.view(1, -1, *(1,) * len(spatial))).exp()
    scale_map, inverted = _scale_map(raw.flatten(), scale.flatten())
    order, factor = probe.order(transformed, layout, inverted)
    if factor != 1.0:
        slope = round_number(scale_map.slope / factor, 1e-12)
        scale_map = ScaleMap(scale_map.kind, slope, *scale_map.parameters[1:])
    return Coupling(read, transformed, scale_map, layout, order, inverted, factor)


class _Probe:
    def __init__(
        self,
        layer: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        channels: int,
        outputs: int,
        spatial: tuple[int, ...],
    ) -> None:
        self.layer, self.channels, self.outputs, self.spatial = layer, channels, outputs, spatial
        self.generator = torch.Generator().manual_seed(0)
        # Enough elements in every channel for all raw values.
        positions = max(1, torch.Size(spatial).numel())
        self.batch = -(-len(RAW_VALUES) // positions)

    def halves(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Channels that the network reads, which must stay unchanged, and the others."""
        x = self._normal(self.channels)
        seen, y = self.layer(x, self._normal(self.outputs))
        if seen.shape[2:] != x.shape[2:] or y.shape != x.shape:
            raise Mismatch("it changes the shape of its input")
        flat, seen_flat = x.movedim(1, 0).flatten(1), seen.movedim(1, 0).flatten(1)
        read = tuple(index for index in range(self.channels) if bool((seen_flat == flat[index]).all(1).any()))
        transformed = tuple(index for index in range(self.channels) if index not in read)
        if not read or not transformed:
            raise Mismatch("the network does not read one part of the channels")
        if not torch.equal(_take(y, read), _take(x, read)):
            raise Mismatch("the channels that the network reads are changed")
        return read, transformed

    def additive(self, read: tuple[int, ...], transformed: tuple[int, ...]) -> Coupling:
        """``y = x + factor * h``."""
        x, h = self._normal(self.channels), extreme_values(self._normal(self.outputs))
        shift = _take(self.layer(x, h)[1] - x, transformed)
        factor = round_number(_ratio(shift, h), 1e-9)
        if not _close(shift, factor * h):
            raise Mismatch("the network's output is not added")
        return Coupling(read, transformed, inverted=factor < 0, factor=abs(factor))

    def layout(self, transformed: tuple[int, ...]) -> str:
        """The layout of scale and shift in ``h``: another shift does not change the layer's slope in ``x``."""
        h = self._normal(self.outputs)
        slope = self._slope(transformed, h)
        found = []
        for layout in LAYOUTS:
            raw, shift = split(h, layout)
            other_shift = merge(raw, torch.roll(shift, 1, 0) + 0.5, layout)
            other_scale = merge(torch.roll(raw, 1, 0) + 0.5, shift, layout)
            if _close(self._slope(transformed, other_shift), slope):
                if _close(self._slope(transformed, other_scale), slope):
                    raise Mismatch("the network's output does not scale the other channels")
                found.append(layout)
        if not found:
            raise Mismatch("scale and shift are neither halves nor alternating channels of the network's output")
        return found[0]

    def scale(self, transformed: tuple[int, ...], layout: str) -> tuple[Tensor, Tensor]:
        """Raw values and the scale at each, both (B, C_transformed, *spatial)."""
        shape = (len(transformed), self.batch, *self.spatial)
        raw = RAW_VALUES.repeat(-(-torch.Size(shape[1:]).numel() // len(RAW_VALUES)))
        raw = raw[: torch.Size(shape[1:]).numel()].view(1, *shape[1:]).expand(shape).transpose(0, 1).contiguous()
        h = merge(raw, torch.zeros_like(raw), layout)
        x = torch.ones(self.batch, self.channels, *self.spatial, dtype=torch.float64)
        scale = _take(self.layer(x, h)[1], transformed)
        if not _close(_take(self.layer(-2.0 * x, h)[1], transformed), -2.0 * scale):
            raise Mismatch("it is not affine in the channels that the network does not read")
        return raw, scale

    def order(self, transformed: tuple[int, ...], layout: str, inverted: bool) -> tuple[str, float]:
        """Order of scaling and shifting, and the factor of the shift."""
        h = self._normal(self.outputs)
        slope, (raw, shift) = self._slope(transformed, h), split(h, layout)
        shift = extreme_values(shift)
        x = torch.zeros(self.batch, self.channels, *self.spatial, dtype=torch.float64)
        offset = _take(self.layer(x, merge(raw, shift, layout))[1], transformed)
        candidates = {"shift_scale": shift * slope, "scale_shift": shift, "unshift_scale": -shift * slope}
        if inverted:
            candidates = {"shift_scale": -shift, "scale_shift": -shift * slope, "unshift_scale": shift}
        factors = {order: round_number(_ratio(offset, value), 1e-9) for order, value in candidates.items()}
        fits = [order for order, value in candidates.items() if _close(offset, factors[order] * value)]
        if not fits or factors[fits[0]] == 0.0:
            raise Mismatch("the shift is not added before or after scaling")
        best = min(fits, key=lambda order: (factors[order] != 1.0, factors[order] < 0))
        return best, factors[best]

    def _slope(self, transformed: tuple[int, ...], h: Tensor) -> Tensor:
        ones = torch.ones(self.batch, self.channels, *self.spatial, dtype=torch.float64)
        return _take(self.layer(ones, h)[1] - self.layer(0 * ones, h)[1], transformed)

    def _normal(self, channels: int) -> Tensor:
        shape = (self.batch, channels, *self.spatial)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


def extreme_values(normal: Tensor) -> Tensor:
    """Map normal random numbers to very small and very large ones of either sign, which reveal bounds."""
    return normal.sign() * (6 * normal.abs()).exp()


def _scale_map(raw: Tensor, scale: Tensor) -> tuple[ScaleMap, bool]:
    found = fit_scale_map(raw, scale)
    if found is not None:
        return found, False
    found = fit_scale_map(raw, 1 / scale)
    if found is not None:
        return found, True
    raise Mismatch("its scale is not a known function of the network's output")


def _is_contiguous(channels: tuple[int, ...]) -> bool:
    return channels[-1] - channels[0] + 1 == len(channels)


def _take(x: Tensor, channels: tuple[int, ...]) -> Tensor:
    return x[:, list(channels)]


def _ratio(values: Tensor, units: Tensor) -> float:
    return ((values * units).sum() / (units * units).sum()).item()


def _close(one: Tensor, other: Tensor) -> bool:
    finite = one.isfinite() & other.isfinite()
    difference = (one - other)[finite].abs()
    allowed = TOLERANCE * (1 + torch.maximum(one, other)[finite].abs())
    return bool((difference <= allowed).all()) and bool((one.isfinite() == other.isfinite()).all())
