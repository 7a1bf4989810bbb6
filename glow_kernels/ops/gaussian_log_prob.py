"""The learned diagonal Gaussian of the split prior and the top prior.

``mean, log_sd = layout(h)``; per sample
``log p = sum(-log(2 pi) / 2 - log_sd - (z - mean)^2 exp(-2 log_sd) / 2)``, and its sampling inverse is
``z = mean + exp(log_sd) * eps`` (Kingma and Dhariwal, "Glow", 2018, section 3.6, after Dinh et al., "Real NVP", 2017).

Backward of the log-density, with ``r = (z - mean) exp(-2 log_sd)`` and ``l = dL/dlog p``: ``dz = -l r``,
``dmean = l r``, ``dlog_sd = l ((z - mean) r - 1)``.

Backward of the sample, with ``g = dL/dz``: ``deps = g exp(log_sd)``, ``dmean = g``, ``dlog_sd = g exp(log_sd) eps``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glow_kernels.backends.numerics import compute_dtype, output_format
from glow_kernels.ops._checks import check_choice, check_image, check_like
from glow_kernels.ops._registry import Operator

LAYOUTS = ("chunk_mean_log_sd", "interleaved_mean_log_sd")


def gaussian_log_prob(z: Tensor, h: Tensor, layout: str = "interleaved_mean_log_sd") -> Tensor:
    """Log-density of ``z`` under a diagonal Gaussian whose mean and log standard deviation are ``h``.

    Args:
        z: ``(B, C, *spatial)`` with 0 to 3 spatial dimensions, any floating-point type.
        h: ``(B, 2 C, *spatial)``, mean and log standard deviation, any floating-point type.
        layout: ``"interleaved_mean_log_sd"`` (even channels are the mean) or ``"chunk_mean_log_sd"``.

    Returns:
        ``(B,)`` in nats, float32 (float64 for float64 ``z``).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device, or the layout is unknown.
    """
    _check("z", z, h, layout)
    log_prob: Tensor = _forward(z, h, layout)
    return log_prob


def gaussian_sample(eps: Tensor, h: Tensor, layout: str = "interleaved_mean_log_sd") -> Tensor:
    """``z = mean + exp(log_sd) * eps``: a sample if ``eps`` is standard normal, perhaps times a temperature.

    Args:
        eps: ``(B, C, *spatial)``; the other arguments as for :func:`gaussian_log_prob`.

    Returns:
        ``z`` with the shape and type of ``eps``.

    Raises:
        TypeError, ValueError: as for :func:`gaussian_log_prob`.
    """
    _check("eps", eps, h, layout)
    z: Tensor = _sample(eps, h, layout)
    return z


def gaussian_standardize(z: Tensor, h: Tensor, layout: str = "interleaved_mean_log_sd") -> Tensor:
    """``eps = (z - mean) exp(-log_sd)``, the inverse of :func:`gaussian_sample`; arguments and errors likewise."""
    _check("z", z, h, layout)
    eps: Tensor = _standardize(z, h, layout)
    return eps


def _check(name: str, z: Tensor, h: Tensor, layout: str) -> None:
    check_image(name, z)
    check_like("h", h, (z.shape[0], 2 * z.shape[1], *z.shape[2:]), f"(B, 2 C, *spatial) for this {name}", z)
    check_choice("layout", layout, LAYOUTS)


def _log_prob_fake(z: Tensor, h: Tensor, layout: str) -> Tensor:
    return z.new_empty(z.shape[0], dtype=compute_dtype(z))


def _elementwise_fake(z: Tensor, h: Tensor, layout: str) -> Tensor:
    return torch.empty_like(z, memory_format=output_format(z))


def _backward_fake(grad: Tensor, z: Tensor, h: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(z, memory_format=output_format(z)),
        torch.empty_like(h, memory_format=output_format(h)),
    )


def _save_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, h, ctx.layout = inputs
    ctx.save_for_backward(z, h)


def _save_output(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, h, ctx.layout = inputs
    ctx.save_for_backward(output, h)


def _forward_rule(backend: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward.on(backend, grad, *ctx.saved_tensors, ctx.layout), None)


def _sample_rule(backend: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_sample_backward.on(backend, grad, *ctx.saved_tensors, ctx.layout), None)


def _standardize_rule(backend: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_standardize_backward.on(backend, grad, *ctx.saved_tensors, ctx.layout), None)


_MODULE = "gaussian_log_prob"
_BACKWARD_SCHEMA = "(Tensor grad, Tensor z, Tensor h, str layout) -> (Tensor, Tensor)"

_forward = Operator(
    _MODULE,
    "forward",
    "(Tensor z, Tensor h, str layout) -> Tensor",
    fake=_log_prob_fake,
    setup_context=_save_input,
    backward=_forward_rule,
)
_backward = Operator(_MODULE, "backward", _BACKWARD_SCHEMA, fake=_backward_fake, plain_reference=True)
_sample = Operator(
    _MODULE,
    "sample",
    "(Tensor eps, Tensor h, str layout) -> Tensor",
    fake=_elementwise_fake,
    setup_context=_save_input,
    backward=_sample_rule,
)
_sample_backward = Operator(_MODULE, "sample_backward", _BACKWARD_SCHEMA, fake=_backward_fake, plain_reference=True)
_standardize = Operator(
    _MODULE,
    "standardize",
    "(Tensor z, Tensor h, str layout) -> Tensor",
    fake=_elementwise_fake,
    setup_context=_save_output,
    backward=_standardize_rule,
)
_standardize_backward = Operator(
    _MODULE,
    "standardize_backward",
    _BACKWARD_SCHEMA,
    fake=_backward_fake,
    plain_reference=True,
)
