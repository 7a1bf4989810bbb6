"""Tensors of a recomputation: the start and the gradients of a small graph, and batches put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glow_kernels.backends.numerics import output_format


def leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    """The same values as the start of a graph of its own, so that hooks and ``.grad`` of ``tensor`` stay out of it."""
    return tensor.detach().requires_grad_(requires_grad)


def part_of(tensor: Tensor, part: slice | None) -> Tensor:
    """Those samples of ``tensor``, all for None."""
    return tensor if part is None else tensor[part]


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


def sum_of(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """Two gradients together, of which either may be missing."""
    # Not in place: gradients of two parameters may be one tensor.
    if total is None or grad is None:
        return grad if total is None else total
    return total + grad


class Joined:
    """A tensor whose samples arrive part by part; a single part is taken as it is."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._result: Tensor | None = None

    def add(self, part: slice | None, tensor: Tensor) -> None:
        """Put ``tensor`` where ``part`` of the batch belongs."""
        if part is None:
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
