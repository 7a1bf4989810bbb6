"""Tensors of a recomputation: stand-ins for parameters, gradients of a small graph, and batches put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from glow_kernels.backends.numerics import output_format


def leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    """The same values as the start of a graph of its own, so that hooks and ``.grad`` of ``tensor`` stay out of it."""
    return tensor.detach().requires_grad_(requires_grad)


@contextmanager
def substituted(step: nn.Module, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let ``step`` compute with ``tensors`` in place of its parameters, in the order of ``step.parameters()``.

    Not ``torch.func.functional_call``, which reaches only the layer's ``forward``.
    """
    slots = _parameter_slots(step)
    if len(slots) != len(tensors):
        raise RuntimeError(f"it had {len(tensors)} parameters in forward and has {len(slots)} in backward")
    originals = [[owner[key] for owner, key in places] for places in slots]
    try:
        for places, tensor in zip(slots, tensors, strict=True):
            for owner, key in places:
                owner[key] = tensor  # type: ignore[assignment]
        _refresh_recurrent(step)
        yield
    finally:
        for places, values in zip(slots, originals, strict=True):
            for (owner, key), value in zip(places, values, strict=True):
                owner[key] = value
        _refresh_recurrent(step)


def _parameter_slots(step: nn.Module) -> list[list[tuple[dict[str, nn.Parameter | None], str]]]:
    """Where every parameter of ``step`` is kept; a shared one is kept in several places."""
    slots: dict[int, list[tuple[dict[str, nn.Parameter | None], str]]] = {}
    for module in step.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                slots.setdefault(id(parameter), []).append((module._parameters, key))
    return list(slots.values())


def _refresh_recurrent(step: nn.Module) -> None:
    # Recurrent layers keep a second list of their weights.
    for module in step.modules():
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def differentiate(
    outputs: Sequence[Tensor], grads: Sequence[Tensor | None], leaves: Sequence[Tensor], closed: bool
) -> list[Tensor | None]:
    """Gradients of ``outputs`` in those ``leaves`` that require them; None where there is none.

    Args:
        closed: skip the search for other leaves.

    Raises:
        RuntimeError: the outputs depend on another tensor that requires a gradient, which would not get it.
    """
    pairs = [
        (output, grad.to(output.dtype))
        for output, grad in zip(outputs, grads, strict=True)
        if output.requires_grad and grad is not None
    ]
    results: list[Tensor | None] = [None] * len(leaves)
    wanted = [number for number, tensor in enumerate(leaves) if tensor.requires_grad]
    if not pairs:
        return results
    if not closed:
        _refuse_strangers([output for output, _ in pairs], leaves)
    if wanted:
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            [leaves[number] for number in wanted],
            [grad for _, grad in pairs],
            allow_unused=True,
        )
        for number, grad in zip(wanted, found, strict=True):
            results[number] = grad
    return results


def _refuse_strangers(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    known = {id(tensor) for tensor in leaves}
    seen = {output.grad_fn for output in outputs}
    stack = list(seen)
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise RuntimeError(
                f"it uses a tensor of shape {tuple(variable.shape)} that requires a gradient and is neither a "
                "parameter of it nor passed to the chain: register it in the step, or pass it as context"
            )
        for following, _ in () if node is None else node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


class Joined:
    """A tensor whose samples arrive part by part; a single part is taken as it is."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._result: Tensor | None = None

    def add(self, part: slice, tensor: Tensor) -> None:
        """Put ``tensor`` where ``part`` of the batch belongs."""
        if len(tensor) == self._batch:
            self._result = tensor
            return
        if self._result is None:
            format_ = output_format(tensor)
            self._result = torch.zeros_like(tensor[:1].expand(self._batch, *tensor.shape[1:]), memory_format=format_)
        self._result[part] = tensor

    @property
    def tensor(self) -> Tensor:
        """All samples."""
        assert self._result is not None
        return self._result

    @property
    def tensor_or_none(self) -> Tensor | None:
        """All samples, or None if none arrived."""
        return self._result
