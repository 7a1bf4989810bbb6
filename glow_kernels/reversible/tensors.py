"""Tensors of a recomputation: stand-ins for parameters, gradients of a small graph, and batches put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glow_kernels.backends.numerics import output_format


def leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    """The same values as the start of a graph of its own, so that hooks and ``.grad`` of ``tensor`` stay out of it."""
    return tensor.detach().requires_grad_(requires_grad)


def modules_of(step: nn.Module) -> list[nn.Module]:
    """``list(step.modules())``, several times faster, which counts: it is asked for in every step."""
    found = {id(step): step}
    stack = [step]
    while stack:
        children = [m for m in stack.pop()._modules.values() if m is not None and id(m) not in found]
        found.update((id(child), child) for child in children)
        stack.extend(children)
    return list(found.values())


def inverse_of(step: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The inverse of ``step``; under FSDP without gathering its weights, which its node of autograd does."""
    inverse: Any = step.inverse
    if "inverse" in step.__dict__ and hasattr(step, "_get_fsdp_state"):
        inverse = inverse.__wrapped__
    result: Callable[..., tuple[Tensor, Tensor]] = inverse
    return result


Slots = list[list[tuple[dict[str, Any], str]]]


def parameter_slots(modules: Sequence[nn.Module]) -> Slots:
    """Where every parameter is kept; a shared one is kept in several places."""
    slots: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in modules:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                slots.setdefault(id(parameter), []).append((module._parameters, key))
    return list(slots.values())


def parameters_of(step: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``step``, each once, in the order of :func:`parameter_slots`."""
    return [places[0][0][places[0][1]] for places in parameter_slots(modules_of(step))]


@contextmanager
def substituted(modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let ``modules`` compute with ``tensors`` in place of their parameters, in the order of :func:`parameters_of`.

    Not ``torch.func.functional_call``, which reaches only the ``forward`` of a layer.
    """
    slots = parameter_slots(modules)
    if len(slots) != len(tensors):
        raise RuntimeError(f"it had {len(tensors)} parameters in forward and has {len(slots)} in backward")
    originals = [places[0][0][places[0][1]] for places in slots]
    recurrent = [module for module in modules if isinstance(module, nn.RNNBase)]
    try:
        _fill(slots, tensors, recurrent)
        yield
    finally:
        _fill(slots, originals, recurrent)


def _fill(slots: Slots, tensors: Sequence[Tensor], recurrent: Sequence[nn.RNNBase]) -> None:
    for places, tensor in zip(slots, tensors, strict=True):
        for owner, key in places:
            owner[key] = tensor
    for module in recurrent:  # which keep a second list of their weights
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
