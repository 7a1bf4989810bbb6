"""The affine coupling, applied to the half of the channels that it transforms.

``u, t = layout(h)`` splits the network's output into scale and shift; ``log s = phi(u)`` by a :class:`ScaleMap`; then
``y = (x + t) * s``, ``x * s + t`` or ``(x - t) * s``, with ``log_det = sum log s`` over all elements of a sample
(Dinh et al., "Density estimation using Real NVP", 2017, section 3.2; Kingma and Dhariwal, "Glow", 2018, section 3.3).

Backward, with ``g = dL/dy`` and ``l = dL/dlog_det``: ``dx = g s`` always; for ``(x + t) s``: ``dt = g s`` and
``du = phi'(u) (g y + l)``, which needs the output and ``h`` but not the input; for ``(x - t) s``: ``dt = -g s`` and the
same ``du``; for ``x s + t``: ``dt = g`` and ``du = phi'(u) (g (y - t) + l)``.

Backward of the inverse, with ``g = dL/dx``: ``dy = g / s`` always. For ``(x + t) s``, ``(x - t) s`` and ``x s + t``, in
this order, ``dt`` is ``-g``, ``g`` and ``-g / s``; and ``du = phi'(u) (g w - l)`` with ``w = s dx/ds``, which is
``-(x + t)``, ``-(x - t)`` and ``-x``.

The reversible backward computes the input and the gradients in one pass over the output. Its in-place variant writes
the input and its gradient over the output and its gradient, which may be halves of larger tensors and need no copies.

The additive coupling (Dinh et al., "NICE", 2015, section 3.2) is ``y = x + h`` without a log-determinant. It is one
addition, which PyTorch already does in one pass, so it has no operator of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format
from glow_kernels.ops._checks import check_choice, check_image, check_like, check_number
from glow_kernels.ops._registry import Operator

KINDS = ("sigmoid", "exp", "tanh", "atan", "softsign", "clip")
LAYOUTS = ("chunk_scale_shift", "chunk_shift_scale", "interleaved_scale_shift", "interleaved_shift_scale")
ORDERS = ("shift_scale", "scale_shift", "unshift_scale")


@dataclass(frozen=True)
class ScaleMap:
    """How the network's raw output ``u`` becomes the scale: ``log s = phi(u)`` with ``v = slope * u + offset``.

    ==========  ====================================
    kind        scale before the floor is added
    ==========  ====================================
    sigmoid     ``gain * sigmoid(v)``
    exp         ``exp(gain * v)``
    tanh        ``exp(gain * tanh(v))``
    atan        ``exp(gain * atan(v))``
    softsign    ``exp(gain * v / (1 + |v|))``
    clip        ``exp(gain * clip(v, low, high))``
    ==========  ====================================

    and ``s`` is that plus ``floor``. ``ScaleMap("sigmoid", offset=2.0)`` is Glow's ``sigmoid(u + 2)``, evaluated as
    ``logsigmoid``. A floor above zero bounds the inverse: a sigmoid with ``gain = 1 - floor`` keeps ``s`` in
    ``(floor, 1)``.

    Raises:
        TypeError: a parameter is not a number.
        ValueError: an unknown kind, a floor below zero, a gain of a sigmoid that is not above zero, low > high, or
            another parameter that is not finite.
    """

    kind: Literal["sigmoid", "exp", "tanh", "atan", "softsign", "clip"]
    slope: float = 1.0
    offset: float = 0.0
    gain: float = 1.0
    floor: float = 0.0
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        for name in ("slope", "offset", "gain", "floor", "low", "high"):
            check_number(name, getattr(self, name))
        if not self.floor >= 0.0:
            raise ValueError(f"floor must be at least 0, got {self.floor}")
        if self.kind == "sigmoid" and not self.gain > 0.0:
            raise ValueError(f"gain of a sigmoid scale map must be above 0, got {self.gain}")
        if not self.low <= self.high:
            raise ValueError(f"low must not be above high, got low={self.low}, high={self.high}")
        for name in ("slope", "offset", "gain", "floor"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")

    @property
    def parameters(self) -> list[float]:
        """``[slope, offset, gain, floor, low, high]``, as the operators take them."""
        return [self.slope, self.offset, self.gain, self.floor, self.low, self.high]


# Scale maps of well-known models, by short names.
SCALE_MAPS = {
    "sigmoid": ScaleMap("sigmoid", offset=2.0),  # Glow: s = sigmoid(u + 2)
    "exp": ScaleMap("exp"),  # RealNVP without a bound, WaveGlow
    "tanh": ScaleMap("tanh"),  # RealNVP: a bounded log-scale
}


def affine_coupling(
    x: Tensor,
    h: Tensor,
    scale_map: str | ScaleMap = "sigmoid",
    layout: str = "interleaved_shift_scale",
    order: str = "shift_scale",
    log_scale_gain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Transform the half ``x`` of the channels with the network's output ``h``.

    Arithmetic is in float32 (float64 for float64 ``x``), even under autocast; in mixed precision ``x`` is normally
    float32 and ``h`` bfloat16.

    Args:
        x: ``(B, C, *spatial)``, the transformed half, with 0 to 3 spatial dimensions, any floating-point type.
        h: ``(B, 2 C, *spatial)``, raw scale u and shift t, any floating-point type.
        scale_map: ``"sigmoid"`` (``sigmoid(u + 2)``), ``"exp"``, ``"tanh"`` or a :class:`ScaleMap`.
        layout: how u and t are arranged in the channels of ``h``: ``"chunk_scale_shift"``, ``"chunk_shift_scale"``,
            ``"interleaved_scale_shift"`` or ``"interleaved_shift_scale"`` (even channels are the shift).
        order: ``"shift_scale"`` for ``(x + t) * s``, ``"scale_shift"`` for ``x * s + t`` or ``"unshift_scale"`` for
            ``(x - t) * s``.
        log_scale_gain: ``(C,)``, a learned factor of ``log s`` before the floor, for every kind except ``"sigmoid"``.

    Returns:
        ``y`` with the shape and type of ``x``, and ``log_det`` ``(B,)`` of the map x -> y, float32 or float64.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device, or an option is unknown.
    """
    map_ = _check("x", x, h, scale_map, layout, order, log_scale_gain)
    gain = _in_compute_dtype(x, log_scale_gain)
    y, log_det = forward(x, h, gain, map_.kind, map_.parameters, layout, order)
    return y, log_det


def affine_coupling_inverse(
    y: Tensor,
    h: Tensor,
    scale_map: str | ScaleMap = "sigmoid",
    layout: str = "interleaved_shift_scale",
    order: str = "shift_scale",
    log_scale_gain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`affine_coupling`: ``y / s - t``, ``(y - t) / s`` or ``y / s + t``.

    Args:
        y: ``(B, C, *spatial)``; the other arguments as for :func:`affine_coupling`.

    Returns:
        ``x`` with the shape and type of ``y``, and ``log_det`` ``(B,)`` of the map y -> x.

    Raises:
        TypeError, ValueError: as for :func:`affine_coupling`.
    """
    map_ = _check("y", y, h, scale_map, layout, order, log_scale_gain)
    gain = _in_compute_dtype(y, log_scale_gain)
    x, log_det = _inverse(y, h, gain, map_.kind, map_.parameters, layout, order)
    return x, log_det


def affine_coupling_reversible_backward(
    grad: Tensor,
    grad_log_det: Tensor,
    y: Tensor,
    h: Tensor,
    scale_map: str | ScaleMap = "sigmoid",
    layout: str = "interleaved_shift_scale",
    order: str = "shift_scale",
    log_scale_gain: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Invert and differentiate :func:`affine_coupling` in one pass, given its output.

    Args:
        grad: ``(B, C, *spatial)``, gradient of the output ``y``, of its type.
        grad_log_det: ``(B,)``, gradient of ``log_det``.
        y: ``(B, C, *spatial)``, the output; the other arguments as for :func:`affine_coupling`.

    Returns:
        The input ``x``, its gradient, the gradient of ``h``, and that of ``log_scale_gain`` or None. They cannot be
        differentiated again.

    Raises:
        TypeError, ValueError: as for :func:`affine_coupling`.
    """
    map_ = _check("y", y, h, scale_map, layout, order, log_scale_gain)
    check_like("grad", grad, y.shape, "the shape of y", y)
    check_like("grad_log_det", grad_log_det, y.shape[:1], "(B,) with B = y.shape[0]", y)
    gain = _in_compute_dtype(y, log_scale_gain)
    grad, grad_log_det = grad.to(y.dtype), grad_log_det.to(compute_dtype(y))
    options = (map_.kind, map_.parameters, layout, order)
    x, grad_x, grad_h, grad_gain = reversible_backward(grad, grad_log_det, y, h, gain, *options)
    return x, grad_x, grad_h, None if log_scale_gain is None else grad_gain.to(log_scale_gain.dtype)


def additive_coupling(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """``y = x + h``, with a log-determinant of zero.

    Args:
        x: ``(B, C, *spatial)``, the transformed half.
        h: ``(B, C, *spatial)``, the network's output.

    Returns:
        ``y`` with the shape and type of ``x``, and ``log_det`` ``(B,)`` of zeros.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
    """
    _check_additive("x", x, h)
    return (x + h).to(x.dtype), x.new_zeros(x.shape[0], dtype=compute_dtype(x))


def additive_coupling_inverse(y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`additive_coupling`: ``x = y - h``; arguments, results and errors likewise."""
    _check_additive("y", y, h)
    return (y - h).to(y.dtype), y.new_zeros(y.shape[0], dtype=compute_dtype(y))


def resolve_scale_map(scale_map: str | ScaleMap) -> ScaleMap:
    """The :class:`ScaleMap` of a short name, or the map itself.

    Raises:
        TypeError: neither a name nor a map.
        ValueError: an unknown name.
    """
    if isinstance(scale_map, ScaleMap):
        return scale_map
    if not isinstance(scale_map, str):
        raise TypeError(f"scale_map must be a name or a ScaleMap, got {type(scale_map).__name__}")
    if scale_map not in SCALE_MAPS:
        raise ValueError(
            f"scale_map must be a ScaleMap or one of {', '.join(map(repr, SCALE_MAPS))}, got {scale_map!r}"
        )
    return SCALE_MAPS[scale_map]


def _check(
    name: str,
    x: Tensor,
    h: Tensor,
    scale_map: str | ScaleMap,
    layout: str,
    order: str,
    log_scale_gain: Tensor | None,
) -> ScaleMap:
    check_image(name, x)
    batch, channels, *spatial = x.shape
    check_like("h", h, (batch, 2 * channels, *spatial), f"(B, 2 C, *spatial) for this {name}", x)
    check_choice("layout", layout, LAYOUTS)
    check_choice("order", order, ORDERS)
    map_ = resolve_scale_map(scale_map)
    if log_scale_gain is not None:
        check_like("log_scale_gain", log_scale_gain, x.shape[1:2], f"(C,) with C = {name}.shape[1]", x)
        if map_.kind == "sigmoid":
            raise ValueError("log_scale_gain must be None for a sigmoid scale map, got a tensor")
    return map_


def _check_additive(name: str, x: Tensor, h: Tensor) -> None:
    check_image(name, x)
    check_like("h", h, x.shape, f"the shape of {name}", x)


def _in_compute_dtype(x: Tensor, gain: Tensor | None) -> Tensor | None:
    return None if gain is None else gain.to(compute_dtype(x))


def _fake(x: Tensor, h: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=output_format(x)),
        x.new_empty(x.shape[0], dtype=compute_dtype(x)),
    )


def _backward_fake(
    grad: Tensor, grad_log_det: Tensor, y: Tensor, h: Tensor, log_scale_gain: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(y, memory_format=output_format(y)),
        torch.empty_like(h, memory_format=output_format(h)),
        y.new_empty(0 if log_scale_gain is None else y.shape[1], dtype=compute_dtype(y)),
    )


def _reversible_backward_fake(
    grad: Tensor, grad_log_det: Tensor, y: Tensor, h: Tensor, log_scale_gain: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.empty_like(y, memory_format=output_format(y))
    return x, *_backward_fake(grad, grad_log_det, y, h, log_scale_gain)


def _in_place_backward_fake(grad: Tensor, grad_log_det: Tensor, y: Tensor, h: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(h, memory_format=output_format(h))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, h, gain, *ctx.options = inputs
    ctx.save_for_backward(output[0], h, gain)


def _forward_rule(backend: str, ctx: Any, grad: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, backward.on, backend, grad, grad_log_det)


def _inverse_rule(backend: str, ctx: Any, grad: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, _inverse_backward.on, backend, grad, grad_log_det)


def _gradients(ctx: Any, operator: Callable[..., Any], *arguments: Any) -> tuple[Tensor | None, ...]:
    # Read once: under torch.utils.checkpoint, saved tensors can be unpacked only once.
    y, h, gain = ctx.saved_tensors
    grad_x, grad_h, grad_gain = operator(*arguments, y, h, gain, *ctx.options)
    return grad_x, grad_h, None if gain is None else grad_gain, None, None, None, None


_MODULE = "affine_coupling"
_OPTIONS = "Tensor h, Tensor? log_scale_gain, str kind, float[] scale_parameters, str layout, str order"
# The last result is the gradient of log_scale_gain, empty if there is none.
_BACKWARD_SCHEMA = f"(Tensor grad, Tensor grad_log_det, Tensor y, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"

forward = Operator(
    _MODULE,
    "forward",
    f"(Tensor x, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_forward_rule,
)
_inverse = Operator(
    _MODULE,
    "inverse",
    f"(Tensor y, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_inverse_rule,
)
backward = Operator(_MODULE, "backward", _BACKWARD_SCHEMA, fake=_backward_fake, plain_reference=True)
_inverse_backward = Operator(_MODULE, "inverse_backward", _BACKWARD_SCHEMA, fake=_backward_fake, plain_reference=True)
reversible_backward = Operator(
    _MODULE,
    "reversible_backward",
    f"(Tensor grad, Tensor grad_log_det, Tensor y, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_reversible_backward_fake,
)
# reversible_backward without a gain that overwrites y with x and grad with the gradient of x, and returns the gradient
# of h. The caller must own y and grad. They must have the same type and strides, and their positions (*spatial) must be
# addressable by a single stride.
in_place_backward = Operator(
    _MODULE,
    "in_place_backward",
    "(Tensor(a!) grad, Tensor grad_log_det, Tensor(b!) y, Tensor h, "
    "str kind, float[] scale_parameters, str layout, str order) -> Tensor",
    fake=_in_place_backward_fake,
)
