"""A coupling with its own network, and where a chain has folded it the linear map before, as one node of autograd.

Composed of operators it is some twenty nodes, and what autograd does between them costs more than the coupling: halves
of a gradient are padded with zeros and added, small gradients are converted one by one, every node takes the host its
time. Here every pass is one that the mathematics asks for. What backward keeps is the same, and so is every result.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glow_kernels import backends
from glow_kernels.backends.numerics import compute_dtype, is_autocast_enabled
from glow_kernels.nn import network_passes as passes
from glow_kernels.ops import ScaleMap
from glow_kernels.ops._registry import differentiable_once, is_transformed
from glow_kernels.ops.actnorm_conv1x1 import apply, apply_backward
from glow_kernels.ops.affine_coupling import backward as affine_backward
from glow_kernels.ops.affine_coupling import forward as affine_forward
from glow_kernels.ops.affine_coupling import in_place_backward as affine_in_place_backward
from glow_kernels.ops.affine_coupling import reversible_backward as affine_reversible_backward


class Kind(NamedTuple):
    """What a coupling does with the network's output: additive without a scale map.

    Attributes:
        channels: of the half that conditions.
        scale_map, layout, order: of :func:`glow_kernels.affine_coupling`.
    """

    channels: int
    scale_map: ScaleMap | None
    layout: str = ""
    order: str = ""

    @property
    def options(self) -> tuple[Any, ...]:
        """The last arguments of the operators."""
        assert self.scale_map is not None
        return None, self.scale_map.kind, self.scale_map.parameters, self.layout, self.order

    def outputs(self, channels: int) -> int:
        """Channels of the network's output in a coupling of so many channels."""
        return (channels - self.channels) * (1 if self.scale_map is None else 2)


class Private(NamedTuple):
    """Whether a state, and its gradient, are used by nothing else, so that they may be overwritten."""

    state: bool = False
    grad: bool = False


SHARED = Private()


class Coupled(NamedTuple):
    """What :func:`couple` computes.

    Attributes:
        y: the whole result (B, C, H, W).
        log_det: (B,).
        h: the network's output.
        kept: of the network, for its backward.
    """

    y: Tensor
    log_det: Tensor
    h: Tensor
    kept: passes.Kept


def coupling_node(
    x: Tensor, kind: Kind, parameters: Sequence[Tensor], linear: Sequence[Tensor | None] = (None, None)
) -> tuple[Tensor, Tensor]:
    """``y`` and ``log_det`` (B,) of ``x`` (B, C, H, W), whose first ``kind.channels`` channels condition the others.

    Args:
        x: the data.
        kind: of the coupling.
        parameters: of its network, from :func:`node_parameters`.
        linear: matrix and shift of a linear map of ``x`` that comes first, folded.
    """
    if not torch.is_grad_enabled():
        return couple(_mapped(x, *linear), kind, parameters)[:2]
    y, log_det = _CouplingNode.apply(x, kind, *linear, *parameters)  # type: ignore[no-untyped-call]
    return y, log_det


def node_parameters(x: Tensor, kind: Kind, network: nn.Module) -> list[Tensor] | None:
    """The parameters of ``network`` if a coupling of ``x`` (B, C, H, W) with it can be a node, None otherwise.

    It must be computed by a backend that is not the reference, whose gradients have gradients, and not be traced or
    transformed.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or is_transformed():
        return None
    return own_parameters(x, kind, network) if backends.select() != "reference" else None


def has_passes(x: Tensor, kind: Kind, network: nn.Module) -> bool:
    """Whether :func:`couple` and its backward compute what a coupling of ``x`` with this network does."""
    return own_parameters(x, kind, network) is not None


def own_parameters(x: Tensor, kind: Kind, network: nn.Module) -> list[Tensor] | None:
    """The parameters of ``network`` if :func:`has_passes`, None otherwise."""
    parameters = passes.plain_parameters(network) if x.dim() == 4 else None
    if parameters is None:
        return None
    weight, last = parameters[0], parameters[2]
    fits = (
        x.device == weight.device
        and (x.dtype == weight.dtype or (x.is_floating_point() and is_autocast_enabled(x.device.type)))
        and weight.size(1) == kind.channels
        and last.size(0) == kind.outputs(x.size(1))
    )
    return parameters if fits else None


def couple(x: Tensor, kind: Kind, parameters: Sequence[Tensor], frugal: bool = False) -> Coupled:
    """The coupling of ``x`` (B, C, H, W), by a network with these ``parameters``, without autograd.

    Here and below, ``frugal`` is that of :class:`~glow_kernels.nn.CouplingNetwork`.
    """
    conditioning, transformed = x[:, : kind.channels], x[:, kind.channels :]
    h, kept = passes.forward(conditioning, parameters, frugal)
    if kind.scale_map is None:
        y, log_det = (transformed + h).to(x.dtype), x.new_zeros(x.shape[0], dtype=compute_dtype(x))
    else:
        y, log_det = affine_forward(transformed, h, *kind.options)
    return Coupled(torch.cat((conditioning, y), 1), log_det, h, kept)


def couple_backward(
    grad: Tensor,
    grad_log_det: Tensor,
    kind: Kind,
    of: tuple[Tensor, Tensor, passes.Kept],
    parameters: Sequence[Tensor],
    needs_x: bool,
    needs_parameters: bool,
    frugal: bool = False,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of :func:`couple` in ``x`` and ``parameters``, None where none is needed; ``of`` is its y, h, kept."""
    y, h, kept = of
    grad_conditioning, grad_transformed = grad[:, : kind.channels], grad[:, kind.channels :]
    if kind.scale_map is None:
        grad_h = grad_transformed.to(h.dtype)
    else:
        y = y[:, kind.channels :]
        grad_transformed, grad_h, _ = affine_backward(grad_transformed, grad_log_det, y, h, *kind.options)
    below, found = passes.backward(grad_h, kept, parameters, needs_x, needs_parameters, frugal)
    return None if below is None else torch.cat((grad_conditioning + below, grad_transformed), 1), found


def uncouple(
    grad: Tensor,
    grad_log_det: Tensor,
    y: Tensor,
    kind: Kind,
    parameters: Sequence[Tensor],
    needs_parameters: bool,
    private: Private = SHARED,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The ``x`` of :func:`couple`, its gradient and those of ``parameters``; the network is evaluated once.

    What is ``private`` of ``y`` and ``grad`` is overwritten by ``x`` and its gradient.
    """
    conditioning, transformed = y[:, : kind.channels], y[:, kind.channels :]
    grad_conditioning, grad_transformed = grad[:, : kind.channels], grad[:, kind.channels :]
    h, kept = passes.forward(conditioning, parameters, frugal=True)
    if kind.scale_map is None:
        transformed, grad_h = (transformed - h).to(y.dtype), grad_transformed.to(h.dtype)
        transformed = in_place(y[:, kind.channels :], transformed, private.state)
    elif private.state and private.grad and _lie_alike(y, grad):
        # As in_place does, without copies.
        own = grad_transformed.data, grad_log_det, transformed.data
        grad_h = affine_in_place_backward(*own, h, *kind.options[1:])
    else:
        transformed, grad_transformed, grad_h, _ = affine_reversible_backward(
            grad_transformed, grad_log_det, transformed, h, *kind.options
        )
        transformed = in_place(y[:, kind.channels :], transformed, private.state)
        grad_transformed = in_place(grad[:, kind.channels :], grad_transformed, private.grad)
    del h
    below, found = passes.backward(grad_h, kept, parameters, True, needs_parameters, frugal=True)
    del grad_h, kept
    assert below is not None
    x = y if private.state else torch.cat((conditioning, transformed), 1)
    if private.grad:
        grad_conditioning += below
    else:
        grad = torch.cat((grad_conditioning + below, grad_transformed), 1)
    return x, grad, found


def in_place(half: Tensor, values: Tensor, wanted: bool) -> Tensor:
    """``values``, in place of the old ones of ``half`` if that is ``wanted``, so that their own memory is free again.

    The other half, which a graph of the network may keep, stays as it is, and does not count as modified.
    """
    return half.data.copy_(values) if wanted else values


def _lie_alike(x: Tensor, other: Tensor) -> bool:
    """Whether both have one type and are contiguous, or channels last, so that one operator can write into both."""
    formats = (torch.contiguous_format, torch.channels_last)
    return x.dtype == other.dtype and any(
        x.is_contiguous(memory_format=each) and other.is_contiguous(memory_format=each) for each in formats
    )


def _mapped(x: Tensor, matrix: Tensor | None, shift: Tensor | None) -> Tensor:
    return x if matrix is None or shift is None else apply(x, matrix, shift)


class _CouplingNode(torch.autograd.Function):
    """``apply(x, kind, matrix, shift, weights, biases, log_scales)``, three each of the last."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kind: Kind, matrix: Tensor | None, shift: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, log_det, h, kept = couple(_mapped(x, matrix, shift), kind, parameters)
        ctx.kind, ctx.backend = kind, backends.choice()
        given = None if matrix is None else x
        ctx.save_for_backward(given, matrix, y, h, *kept.inputs, *kept.weights, *parameters)
        return y, log_det

    @staticmethod
    @functools.partial(differentiable_once, "a coupling")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Asked for once: torch.utils.checkpoint hands out what is saved only once.
        x, matrix, y, h, *saved = ctx.saved_tensors
        kept, parameters = passes.Kept(saved[:3], saved[3:6]), saved[6:]
        needs_x, _, needs_matrix, needs_shift, *needs = ctx.needs_input_grad
        needs_y = needs_x or needs_matrix or needs_shift
        grad_matrix, grad_shift = None, None
        with backends.restored(ctx.backend):
            of = (y, h, kept)
            grad, grad_log_det = grads
            grad_x, found = couple_backward(grad, grad_log_det, ctx.kind, of, parameters, needs_y, any(needs))
            if matrix is not None and grad_x is not None:
                grad_x, grad_matrix, grad_shift = apply_backward(grad_x, x, matrix, needs_x)
        every = (grad_x, None, grad_matrix, grad_shift, *found)
        return tuple(value if need else None for value, need in zip(every, ctx.needs_input_grad, strict=True))
