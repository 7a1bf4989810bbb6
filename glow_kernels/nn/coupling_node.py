"""A coupling with this package's network as one autograd node, with the linear map before it if a chain has folded it.

Composed of operators it would be some twenty nodes, and what autograd does between them costs more than the coupling:
it pads halves of a gradient with zeros and adds them, converts small gradients one by one, and spends host time on
every node. Here there is no pass that the mathematics does not require. The saved tensors and all results are the same.
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
    """What a coupling does with the network's output; without a scale map it is additive.

    Attributes:
        channels: number of channels of the conditioning half.
        scale_map, layout, order: as for :func:`glow_kernels.affine_coupling`.
    """

    channels: int
    scale_map: ScaleMap | None
    layout: str = ""
    order: str = ""

    @property
    def options(self) -> tuple[Any, ...]:
        """The last arguments of the affine coupling operators: gain, kind, parameters, layout and order."""
        assert self.scale_map is not None
        return None, self.scale_map.kind, self.scale_map.parameters, self.layout, self.order

    def outputs(self, channels: int) -> int:
        """Channels of the network's output in a coupling of ``channels`` channels."""
        return (channels - self.channels) * (1 if self.scale_map is None else 2)


class Overwritable(NamedTuple):
    """Whether nothing else uses a state, and its gradient, so that results may overwrite them."""

    state: bool = False
    grad: bool = False


NOT_OVERWRITABLE = Overwritable()


class Coupled(NamedTuple):
    """What :func:`couple` computes.

    Attributes:
        y: the result (B, C, H, W), both halves.
        log_det: (B,).
        h: the network's output.
        kept: what the backward of the network needs.
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
        kind: the kind of the coupling.
        parameters: the parameters of its network, from :func:`node_parameters`.
        linear: matrix and shift of a folded linear map that is applied to ``x`` first, if any.
    """
    if not torch.is_grad_enabled():
        return couple(_mapped(x, *linear), kind, parameters)[:2]
    y, log_det = _CouplingNode.apply(x, kind, *linear, *parameters)  # type: ignore[no-untyped-call]
    return y, log_det


def node_parameters(x: Tensor, kind: Kind, network: nn.Module) -> list[Tensor] | None:
    """The parameters of ``network`` if a coupling of ``x`` (B, C, H, W) with it can be a node, None otherwise.

    Not if the reference backend computes it, whose gradients are differentiable, or if it is traced or transformed.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or is_transformed():
        return None
    return own_parameters(x, kind, network) if backends.select() != "reference" else None


def has_passes(x: Tensor, kind: Kind, network: nn.Module) -> bool:
    """Whether :func:`couple` and its backward compute the same as a coupling of ``x`` with this network."""
    return own_parameters(x, kind, network) is not None


def own_parameters(x: Tensor, kind: Kind, network: nn.Module) -> list[Tensor] | None:
    """The parameters of ``network`` if :func:`has_passes` is true, None otherwise."""
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
    coupled: tuple[Tensor, Tensor, passes.Kept],
    parameters: Sequence[Tensor],
    needs_x: bool,
    needs_parameters: bool,
    frugal: bool = False,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of :func:`couple` in ``x`` and ``parameters``, None where not needed; ``coupled`` is (y, h, kept)."""
    y, h, kept = coupled
    grad_conditioning, grad_transformed = grad[:, : kind.channels], grad[:, kind.channels :]
    if kind.scale_map is None:
        grad_h = grad_transformed.to(h.dtype)
    else:
        y = y[:, kind.channels :]
        grad_transformed, grad_h, _ = affine_backward(grad_transformed, grad_log_det, y, h, *kind.options)
    below, found = passes.backward(grad_h, kept, parameters, needs_x, needs_parameters, frugal)
    return None if below is None else torch.cat((grad_conditioning + below, grad_transformed), 1), found


def couple_reversible_backward(
    grad: Tensor,
    grad_log_det: Tensor,
    y: Tensor,
    kind: Kind,
    parameters: Sequence[Tensor],
    needs_parameters: bool,
    overwritable: Overwritable = NOT_OVERWRITABLE,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """From the output ``y`` of :func:`couple`: ``x``, its gradient and those of ``parameters``.

    The network is evaluated once. If ``y`` and ``grad`` are ``overwritable``, ``x`` and its gradient overwrite them.
    """
    conditioning, transformed = y[:, : kind.channels], y[:, kind.channels :]
    grad_conditioning, grad_transformed = grad[:, : kind.channels], grad[:, kind.channels :]
    h, kept = passes.forward(conditioning, parameters, frugal=True)
    if kind.scale_map is None:
        transformed, grad_h = (transformed - h).to(y.dtype), grad_transformed.to(h.dtype)
        transformed = in_place(y[:, kind.channels :], transformed, overwritable.state)
    elif overwritable.state and overwritable.grad and _same_memory_format(y, grad):
        # The same as in_place below, without copies.
        own = grad_transformed.data, grad_log_det, transformed.data
        grad_h = affine_in_place_backward(*own, h, *kind.options[1:])
    else:
        transformed, grad_transformed, grad_h, _ = affine_reversible_backward(
            grad_transformed, grad_log_det, transformed, h, *kind.options
        )
        transformed = in_place(y[:, kind.channels :], transformed, overwritable.state)
        grad_transformed = in_place(grad[:, kind.channels :], grad_transformed, overwritable.grad)
    del h
    below, found = passes.backward(grad_h, kept, parameters, True, needs_parameters, frugal=True)
    del grad_h, kept
    assert below is not None
    x = y if overwritable.state else torch.cat((conditioning, transformed), 1)
    if overwritable.grad:
        grad_conditioning += below
    else:
        grad = torch.cat((grad_conditioning + below, grad_transformed), 1)
    return x, grad, found


def in_place(half: Tensor, values: Tensor, wanted: bool) -> Tensor:
    """``values``, copied into ``half`` if that is ``wanted``, so that their own memory can be freed.

    The version of the whole tensor does not change: a graph of the network may have saved its other half.
    """
    return half.data.copy_(values) if wanted else values


def _same_memory_format(x: Tensor, other: Tensor) -> bool:
    """Whether both have the same type and are both contiguous or both channels last, so one operator can write both."""
    formats = (torch.contiguous_format, torch.channels_last)
    return x.dtype == other.dtype and any(
        x.is_contiguous(memory_format=each) and other.is_contiguous(memory_format=each) for each in formats
    )


def _mapped(x: Tensor, matrix: Tensor | None, shift: Tensor | None) -> Tensor:
    return x if matrix is None or shift is None else apply(x, matrix, shift)


class _CouplingNode(torch.autograd.Function):
    """``apply(x, kind, matrix, shift, *parameters)``: three each of weights, biases and log_scales."""

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
        # Read once: under torch.utils.checkpoint, saved tensors can be unpacked only once.
        x, matrix, y, h, *saved = ctx.saved_tensors
        kept, parameters = passes.Kept(saved[:3], saved[3:6]), saved[6:]
        needs_x, _, needs_matrix, needs_shift, *needs = ctx.needs_input_grad
        needs_y = needs_x or needs_matrix or needs_shift
        grad_matrix, grad_shift = None, None
        with backends.restored(ctx.backend):
            coupled = (y, h, kept)
            grad, grad_log_det = grads
            grad_x, found = couple_backward(grad, grad_log_det, ctx.kind, coupled, parameters, needs_y, any(needs))
            if matrix is not None and grad_x is not None:
                grad_x, grad_matrix, grad_shift = apply_backward(grad_x, x, matrix, needs_x)
        every = (grad_x, None, grad_matrix, grad_shift, *found)
        return tuple(value if need else None for value, need in zip(every, ctx.needs_input_grad, strict=True))
