"""A step of flow of any dialect, in terms of the operators: an optional linear map, then a coupling.

Each dialect provides the parts of its steps (:class:`Parts`); computing and inverting them, and differentiating them
from the output, is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glow_kernels.backends.numerics import wide_dtype
from glow_kernels.interop.probe import Coupling
from glow_kernels.ops import actnorm_conv1x1, actnorm_conv1x1_inverse, actnorm_conv1x1_reversible_backward, lu_weight
from glow_kernels.reversible.tensors import Start, differentiate, leaf, sum_of

# log_scale, bias, weight and weight_log_det, as for actnorm_conv1x1.
Linear = tuple[Tensor, Tensor, Tensor, "Tensor | None"]


class Parts(NamedTuple):
    """The parts of a step, as functions, so that parameters are read when they are used.

    Attributes:
        coupling: what the coupling computes.
        network: maps (B, C_read, *spatial) and further arguments to (B, outputs, *spatial).
        linear: returns ActNorm and convolution before the coupling; None for a coupling alone. Its argument says
            whether they are for :func:`inverse`, where LU factors are multiplied by :func:`lu_weight_to_invert`.
        gain: returns the learned gain of each channel's log-scale, if there is one.
    """

    coupling: Coupling
    network: Callable[..., Tensor]
    linear: Callable[[bool], Linear] | None = None
    gain: Callable[[], Tensor] | None = None


def forward(parts: Parts, x: Tensor, *context: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x`` (B, C, *spatial) to ``z`` and ``log_det`` (B,); ``context`` goes to the network."""
    coupling, linear_log_det = parts.coupling, None
    if parts.linear is not None:
        x, linear_log_det = apply_linear(x, parts.linear(False))
    read, transformed = coupling.split(x)
    h = coupling.predict(parts.network, read, *context)
    y, log_det = coupling.forward(transformed, h, _gain(parts))
    return coupling.join(read, y), log_det if linear_log_det is None else linear_log_det + log_det


def apply_linear(x: Tensor, linear: Linear) -> tuple[Tensor, Tensor]:
    """``x`` after ActNorm and convolution, and ``log_det`` (B,), with ActNorm's type promotion."""
    return actnorm_conv1x1(x.to(torch.promote_types(x.dtype, linear[1].dtype)), *linear)


def inverse(parts: Parts, z: Tensor, *context: Tensor | None) -> tuple[Tensor, Tensor]:
    """``z`` (B, C, *spatial) to ``x`` and ``log_det`` (B,) of that direction."""
    coupling = parts.coupling
    read, transformed = coupling.split(z)
    h = coupling.predict(parts.network, read, *context)
    y, log_det = coupling.inverse(transformed, h, _gain(parts))
    x = coupling.join(read, y)
    if parts.linear is None:
        return x, log_det
    x, linear_log_det = actnorm_conv1x1_inverse(x, *parts.linear(True))
    return x, linear_log_det + log_det


def lu_weight_to_invert(*factors: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`glow_kernels.ops.lu_weight` in float64: the originals invert the factors and never round their product."""
    return lu_weight(*(factor.to(wide_dtype(factor.device)) for factor in factors))


def backward_from_output(
    parts: Parts,
    z: Tensor,
    grad_z: Tensor | None,
    grad_log_det: Tensor | None,
    context: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    all_leaves_known: bool,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The input of the step, its gradient, and those of ``context`` and ``parameters``, with one run of the network.

    Args:
        all_leaves_known: as for :func:`glow_kernels.reversible.tensors.differentiate`.
    """
    coupling = parts.coupling
    grad_z = torch.zeros_like(z) if grad_z is None else grad_z
    if grad_log_det is None:
        grad_log_det = z.new_zeros(len(z))
    read, transformed = coupling.split(z)
    grad_read, grad_transformed = coupling.split(grad_z)
    tensors = [tensor for tensor in context if tensor is not None]
    with torch.enable_grad():
        read = leaf(read, True)
        h = coupling.predict(parts.network, read, *context)
        gain = _gain(parts)
    constant_gain = None if gain is None else gain.detach()
    transformed, grad_transformed, grad_h, grad_gain = coupling.backward_from_output(
        grad_transformed, grad_log_det, transformed, h.detach(), constant_gain
    )
    leaves = [read, *tensors, *parameters]
    start = Start.of(h, grad_h)
    del h, grad_h
    grad_more, *grads = differentiate([start], leaves, all_leaves_known)
    if gain is not None:
        grads = _added(grads, differentiate([Start.of(gain, grad_gain)], leaves[1:], all_leaves_known=True))
    if grad_more is not None:
        grad_read = grad_read + grad_more
    x, grad_x = coupling.join(read.detach(), transformed), coupling.join(grad_read, grad_transformed)
    if parts.linear is None:
        return x, grad_x, grads
    with torch.enable_grad():
        linear = [tensor for tensor in parts.linear(False) if tensor is not None]
    constants = [tensor.detach() for tensor in linear]
    x, grad_x, *linear_grads = actnorm_conv1x1_reversible_backward(grad_x, grad_log_det, x, *constants)
    starts = [Start.of(*pair) for pair in zip(linear, linear_grads, strict=False)]
    return x, grad_x, _added(grads, differentiate(starts, leaves[1:], all_leaves_known=True))


def _gain(parts: Parts) -> Tensor | None:
    return None if parts.gain is None else parts.gain()


def _added(grads: Sequence[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [sum_of(grad, other) for grad, other in zip(grads, more, strict=True)]
