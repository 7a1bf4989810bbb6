"""Running one step of a chain: forward without a graph, and backward from its input or from its output.

Backward from the input evaluates the step again, with a graph. Backward from the output inverts the step first, then
does the same. For a flow step it is instead one pass per operator, with a single evaluation of the network.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize

from glow_kernels import backends
from glow_kernels.backends.numerics import is_autocast_enabled
from glow_kernels.nn.coupling_node import NOT_OVERWRITABLE, Overwritable
from glow_kernels.reversible import flow_step
from glow_kernels.reversible.general_step import GeneralStep
from glow_kernels.reversible.plain_step import PlainStep
from glow_kernels.reversible.randomness import RandomState, refuse_while_capturing
from glow_kernels.reversible.tensors import (
    BatchBuffer,
    Start,
    dense_strides,
    differentiate,
    leaf,
    part_of,
    passed,
    sum_of,
    with_strides,
)


class Mode(NamedTuple):
    """The settings that a step runs under, the same in forward and backward.

    Attributes:
        micro_batches: number of parts in which the step evaluates the batch, one after the other.
        autocast: type of the networks under autocast; None without autocast.
        backend: the explicitly chosen backend, if any.
    """

    micro_batches: int
    autocast: torch.dtype | None
    backend: str | None

    @classmethod
    def current(cls, device: torch.device, micro_batches: int) -> Mode:
        """The mode that is in effect now."""
        enabled = is_autocast_enabled(device.type)
        autocast = torch.get_autocast_dtype(device.type) if enabled else None
        return cls(micro_batches, autocast, backends.choice())

    def applied(self, device: torch.device) -> AbstractContextManager[Any]:
        """Backend and autocast as recorded, with weight caches off: weights cached in forward lack a graph."""
        is_same = self.autocast is None and not is_autocast_enabled(device.type) and self.backend == backends.choice()
        if is_same and not parametrize._cache_enabled:
            return nullcontext()
        return self._changed(device)

    @contextmanager
    def _changed(self, device: torch.device) -> Iterator[None]:
        on = self.autocast is not None
        caching = parametrize._cache_enabled  # a counter, which other threads may change meanwhile
        parametrize._cache_enabled -= caching
        try:
            with (
                backends.restored(self.backend),
                torch.autocast(device.type, self.autocast, enabled=on, cache_enabled=not on),
            ):
                yield
        finally:
            parametrize._cache_enabled += caching

    def parts(self, batch: int) -> list[slice | None]:
        """Slices of the batch whose sizes differ by at most one; a single None stands for the whole batch."""
        count = max(1, min(self.micro_batches, batch))
        if count == 1:
            return [None]
        bounds = [batch * number // count for number in range(count + 1)]
        return [slice(start, end) for start, end in itertools.pairwise(bounds)]


class Drawn(NamedTuple):
    """What is needed to draw the same random numbers for the same elements again: dropout draws in memory order.

    Attributes:
        state: the state of the generators before the step.
        before, after: strides of the input and of the output of the step.
    """

    state: RandomState
    before: tuple[int, ...]
    after: tuple[int, ...]


class Recomputed(NamedTuple):
    """The input of a step, its output if it was evaluated again, and the gradients of input, context and parameters."""

    x: Tensor
    z: Tensor | None
    grad_x: Tensor
    grads: list[Tensor | None]


def forward(
    step: GeneralStep | PlainStep,
    x: Tensor,
    context: Sequence[Tensor | None],
    mode: Mode,
    draws: Sequence[Drawn] | None = None,
) -> tuple[Tensor, Tensor, list[Drawn] | None]:
    """``z``, ``log_det`` (B,) and, if the step drew random numbers, what is needed to draw them again, for every part.

    Given the ``draws`` of an earlier call, the step draws the random numbers of that call.
    """
    batch = x.shape[0]
    z, log_det = BatchBuffer(batch), BatchBuffer(batch)
    may_draw = not isinstance(x, FakeTensor) and not step.is_standard
    if may_draw and x.is_cuda:
        refuse_while_capturing(step.modules, x.device)
    drawn = []
    drew = False
    with torch.no_grad(), mode.applied(x.device):
        for number, part in enumerate(mode.parts(batch)):
            state = RandomState(x.device) if may_draw else None
            part_x = part_of(x, part)
            with _replayed(None if draws is None else draws[number]):
                part_z, part_log_det = step.forward(part_x, *_parts_of(context, part))
            if state is not None:
                drew = drew or state.has_moved()
                drawn.append(Drawn(state, dense_strides(part_x), dense_strides(part_z)))
            z.add(part, part_z)
            log_det.add(part, part_log_det)
    return z.tensor, log_det.tensor, drawn if drew else None


def backward(
    step: GeneralStep | PlainStep,
    x: Tensor | None,
    z: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None],
    context: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    needs: Sequence[bool],
    mode: Mode,
    draws: Sequence[Drawn] | None,
    all_leaves_known: bool,
    overwritable: Overwritable = NOT_OVERWRITABLE,
) -> Recomputed:
    """Differentiate a step, given its input ``x`` or its output ``z``; given both, also evaluate its output again.

    Args:
        grads: gradients of the output and of the log-determinant.
        needs: which of ``context`` and ``parameters`` need a gradient.
        draws: as :func:`forward` returned them.
        all_leaves_known: as for :func:`~glow_kernels.reversible.tensors.differentiate`.
        overwritable: which of ``z`` and its gradient may be overwritten.
    """
    if isinstance(step, PlainStep):
        return _backward_of_plain(step, x, z, grads, needs, mode, overwritable)
    given = cast(Tensor, z if x is None else x)
    batch = len(given)
    from_output = flow_step.backward_from_output_of(step, overwritable) if x is None else None
    tensors = [tensor for tensor in context if tensor is not None]
    x_buffer, grad_buffer = _buffers(batch, z, grads[0], overwritable)
    z_buffer = BatchBuffer(batch)
    context_buffers = [BatchBuffer(batch) for _ in tensors]
    totals: list[Tensor | None] = [None] * len(parameters)
    leaves = [leaf(tensor, need) for tensor, need in zip(parameters, needs[len(context) :], strict=True)]
    wanted_context = [need for need, tensor in zip(needs, context, strict=False) if tensor is not None]
    with step.substituted(leaves), flow_step.frugal(step), mode.applied(given.device):
        for number, part in enumerate(mode.parts(batch)):
            parts = iter([leaf(part_of(t, part), need) for t, need in zip(tensors, wanted_context, strict=True)])
            part_context = [None if tensor is None else next(parts) for tensor in context]
            drawn = None if draws is None else draws[number]
            part_given = part_of(given, part)
            if x is None and drawn is not None:
                part_given = with_strides(part_given, drawn.after)
            grad_z, grad_log_det = (None if grad is None else part_of(grad, part) for grad in grads)
            if from_output is not None:
                with _replayed(drawn):
                    part_x, grad_x, part_grads = from_output(
                        part_given, grad_z, grad_log_det, part_context, leaves, all_leaves_known
                    )
            else:
                part_x = part_given
                if x is None:
                    with torch.no_grad(), _replayed(drawn):
                        part_x, _ = step.inverse(part_given, *part_context)
                    if drawn is not None:
                        part_x = with_strides(part_x, drawn.before)
                with torch.enable_grad(), _replayed(drawn):
                    start = leaf(part_x, True)
                    part_z, part_log_det = step.forward(*passed([start, *part_context]))
                if x is not None and z is not None:
                    z_buffer.add(part, part_z.detach())
                every_leaf = [start, *(t for t in part_context if t is not None), *leaves]
                starts = [Start.of(part_z, grad_z), Start.of(part_log_det, grad_log_det)]
                del part_z, part_log_det
                grad, *part_grads = differentiate(starts, every_leaf, all_leaves_known)
                grad_x = torch.zeros_like(part_x) if grad is None else grad
            if x is None:
                x_buffer.add(part, part_x)
            grad_buffer.add(part, grad_x)
            for buffer, grad in zip(context_buffers, part_grads, strict=False):
                if grad is not None:
                    buffer.add(part, grad)
            totals = [sum_of(total, grad) for total, grad in zip(totals, part_grads[len(tensors) :], strict=True)]
    context_grads = iter([buffer.tensor_or_none for buffer in context_buffers])
    every_grad = [None if tensor is None else next(context_grads) for tensor in context]
    return Recomputed(
        x_buffer.tensor if x is None else x, z_buffer.tensor_or_none, grad_buffer.tensor, [*every_grad, *totals]
    )


def _backward_of_plain(
    step: PlainStep,
    x: Tensor | None,
    z: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None],
    needs: Sequence[bool],
    mode: Mode,
    overwritable: Overwritable,
) -> Recomputed:
    given = cast(Tensor, z if x is None else x)
    batch = given.shape[0]
    x_buffer, grad_buffer = _buffers(batch, z, grads[0], overwritable)
    z_buffer = BatchBuffer(batch)
    totals: list[Tensor | None] = [None] * len(step.parameters)
    with mode.applied(given.device):
        for part in mode.parts(batch):
            parts = (None if tensor is None else part_of(tensor, part) for tensor in (x, z, *grads))
            *states, found = step.backward(needs, overwritable, *parts)
            for buffer, state in zip((x_buffer, z_buffer, grad_buffer), states, strict=True):
                if state is not None:
                    buffer.add(part, state)
            totals = [sum_of(total, grad) for total, grad in zip(totals, found, strict=True)]
    return Recomputed(x_buffer.tensor if x is None else x, z_buffer.tensor_or_none, grad_buffer.tensor, totals)


def _buffers(
    batch: int, z: Tensor | None, grad_z: Tensor | None, overwritable: Overwritable
) -> tuple[BatchBuffer, BatchBuffer]:
    """Accumulators for the input of a step and its gradient, which reuse the memory of what is overwritable."""
    return (
        BatchBuffer(batch, z if overwritable.state else None),
        BatchBuffer(batch, grad_z if overwritable.grad else None),
    )


def _parts_of(context: Sequence[Tensor | None], part: slice | None) -> list[Tensor | None]:
    return [None if tensor is None else part_of(tensor, part) for tensor in context]


def _replayed(drawn: Drawn | None) -> AbstractContextManager[None]:
    return nullcontext() if drawn is None else drawn.state.replayed()
