"""Fits a :class:`~glow_kernels.ScaleMap` to a sampled scale function."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from glow_kernels.backends.reference.affine_coupling import scale_map as log_scale
from glow_kernels.ops import ScaleMap

# Raw values at which the scale is sampled: dense where it bends, far out for its limits.
_TAILS = torch.logspace(1.1, 12, 24, dtype=torch.float64)
_MIDDLE = torch.cat([torch.linspace(-width, width, 161, dtype=torch.float64) for width in (1, 12)])
RAW_VALUES = torch.cat((_MIDDLE, _TAILS, -_TAILS))
TOLERANCE = 1e-9


def fit_scale_map(raw: Tensor, scale: Tensor) -> ScaleMap | None:
    """The map with ``scale = exp(phi(raw))`` at all samples, or None.

    Args:
        raw: float64 samples that contain :data:`RAW_VALUES`.
        scale: float64, the scale at each of them.
    """
    if bool(scale.isnan().any()) or bool((scale < 0).any()):
        return None
    if bool(scale.max() - scale.min() <= TOLERANCE * scale.min()):  # constant up to rounding, as in GIN
        return None
    for fit in (_exp, _sigmoid, _tanh, _atan, _softsign, _clip):
        try:
            parameters = fit(raw, scale)
        except (ArithmeticError, ValueError, RuntimeError):
            continue
        if parameters is not None:
            for candidate in (_snap(parameters, 1e-9), _snap(parameters, 1e-13), parameters):
                if agrees(candidate, raw, scale):
                    return candidate
    return None


def agrees(candidate: ScaleMap, raw: Tensor, scale: Tensor) -> bool:
    """Whether ``candidate`` gives ``scale`` at every sample, overflow and underflow included."""
    predicted = log_scale(raw[:, None], None, candidate.kind, candidate.parameters)[:, 0].exp()
    # The relative rounding error of exp grows with the size of the exponent.
    allowed = TOLERANCE * (1 + predicted.log().abs().clamp(max=1e3).nan_to_num(1e3)) * scale
    finite = scale.isfinite() & predicted.isfinite()
    close = (predicted - scale).abs() <= allowed + 1e-300
    return bool((close | ~finite).all()) and bool((predicted.isfinite() == scale.isfinite()).all())


def _limits(raw: Tensor, scale: Tensor) -> tuple[float, float]:
    """The scale at the smallest and at the largest raw value."""
    return scale[raw.argmin()].item(), scale[raw.argmax()].item()


def _line(raw: Tensor, values: Tensor, usable: Tensor) -> tuple[float, float]:
    """Slope and offset of the line through the usable samples."""
    if int(usable.sum()) < 4:
        raise ValueError("too few samples")
    x, y = raw[usable], values[usable]
    design = torch.stack((x, torch.ones_like(x)), dim=1)
    slope, offset = torch.linalg.lstsq(design, y).solution.tolist()
    return slope, offset


def _bounded(kind: str, bound: float, inverse: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], ScaleMap]:
    """A fit of ``s = exp(gain * b(slope * u + offset)) + floor``, where b, whose inverse is given, is within ±bound."""

    def fit(raw: Tensor, scale: Tensor) -> ScaleMap:
        left, right = _limits(raw, scale)
        gain = math.asinh(abs(right - left) / 2) / bound
        floor = _not_negative(min(left, right) - math.exp(-gain * bound))
        inner = torch.log(scale - floor) / gain
        usable = (inner.abs() < 0.9 * bound) & (raw.abs() <= 12)
        slope, offset = _line(raw, inverse(inner), usable)
        return ScaleMap(kind, slope=slope, offset=offset, gain=gain, floor=floor)  # type: ignore[arg-type]

    return fit


_tanh = _bounded("tanh", 1.0, torch.atanh)
_atan = _bounded("atan", math.pi / 2, torch.tan)
_softsign = _bounded("softsign", 1.0, lambda inner: inner / (1 - inner.abs()))


def _exp(raw: Tensor, scale: Tensor) -> ScaleMap:
    left, right = _limits(raw, scale)
    floor = _not_negative(min(left, right))
    values = torch.log(scale - floor)
    slope, offset = _line(raw, values, (raw.abs() <= 12) & values.isfinite() & (scale > 100 * floor))
    return ScaleMap("exp", slope=slope, offset=offset, floor=floor)


def _sigmoid(raw: Tensor, scale: Tensor) -> ScaleMap:
    left, right = _limits(raw, scale)
    floor = _not_negative(min(left, right))
    gain = max(left, right) - floor
    share = (scale - floor) / gain
    slope, offset = _line(raw, torch.logit(share), (share > 0.01) & (share < 0.99))
    return ScaleMap("sigmoid", slope=slope, offset=offset, gain=gain, floor=floor)


def _clip(raw: Tensor, scale: Tensor) -> ScaleMap:
    limits = torch.tensor(_limits(raw, scale), dtype=torch.float64).log()
    low, high = limits.min().item(), limits.max().item()
    values = torch.log(scale)
    inside = (raw.abs() <= 12) & (values > low + 1e-6) & (values < high - 1e-6)
    slope, offset = _line(raw, values, inside)
    return ScaleMap("clip", slope=slope, offset=offset, low=low, high=high)


def _not_negative(floor: float) -> float:
    # A difference of two rounded limits is zero only up to rounding.
    return 0.0 if abs(floor) < 1e-11 else floor


def _snap(fitted: ScaleMap, tolerance: float) -> ScaleMap:
    """The same map, with parameters rounded if they are nearly round numbers."""
    names = ("slope", "offset", "gain", "floor", "low", "high")
    values = {name: round_number(getattr(fitted, name), tolerance) for name in names}
    return ScaleMap(fitted.kind, **values)


def round_number(value: float, tolerance: float) -> float:
    """``value`` rounded to the fewest decimals, at most 7, that are within ``tolerance``; unchanged if none are."""
    if not math.isfinite(value):
        return value
    for digits in range(8):
        rounded = round(value, digits)
        if abs(value - rounded) <= tolerance * max(1.0, abs(value)) and (rounded != 0.0 or abs(value) < 1e-10):
            return rounded + 0.0  # no negative zero
    return value
