"""Tensors in a recomputation: the leaves and gradients of a small graph, and batches assembled from parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils import _pytree as pytree

from glow_kernels.backends.numerics import output_format


def is_graph_retained() -> bool:
    """Whether the running backward retains the graph, so that what it has kept may be needed again."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    """The same values as the leaf of a separate graph, which does not involve the hooks and ``.grad`` of ``tensor``."""
    return tensor.detach().requires_grad_(requires_grad)


def passed(leaves: Sequence[Tensor | None]) -> list[Any]:
    """Views of ``leaves`` to pass to modules: hooks on leaves, such as FlopCounterMode's, fail in autograd.grad."""
    return [None if tensor is None else tensor.view_as(tensor) for tensor in leaves]


def with_graph(owner: nn.Module) -> dict[int, tuple[str, Tensor]]:
    """Tensors that have a graph in the attributes of ``owner`` and its submodules (also in lists), with their paths,
    by ``id``."""
    found = {}
    for path, module in owner.named_modules():
        for name, values in vars(module).items():
            for value in pytree.tree_leaves(values):
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    found[id(value)] = f"{path}.{name}".lstrip("."), value
    return found


def part_of(tensor: Tensor, part: slice | None) -> Tensor:
    """The samples ``part`` of ``tensor``; all samples for None."""
    # Detached: a step may run autograd inside, and slices of a tensor that requires a gradient, taken without a graph,
    # do not allow that.
    return tensor if part is None else tensor.detach()[part]


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a dense tensor with the memory layout of ``tensor``."""
    return torch.empty_like(tensor, device="meta").stride()


def with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same values with these strides."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


class Start(NamedTuple):
    """The start of a backward: the graph edge of an output (which may itself be freed), and a stand-in gradient.

    :func:`torch.autograd.grad` keeps its arguments alive until it returns. So it gets an expanded zero (in which
    anomaly detection finds no NaN), and a hook replaces that by the real gradient, which is freed after its first use.
    """

    edge: GradientEdge
    grad: Tensor

    @classmethod
    def of(cls, output: Tensor, grad: Tensor | None) -> Start | None:
        """The start at ``output``; None if ``output`` requires no gradient or ``grad`` is None."""
        if grad is None or not output.requires_grad:
            return None
        with torch.enable_grad():
            start = output.view_as(output)  # a new tensor: other hooks on ``output`` must see the real gradient
        owned = [grad.to(output.dtype)]
        start.register_hook(lambda _: owned.pop())  # type: ignore[no-untyped-call]
        return cls(get_gradient_edge(start), start.new_zeros(()).expand(start.shape))


def differentiate(
    starts: Sequence[Start | None], leaves: Sequence[Tensor], all_leaves_known: bool
) -> list[Tensor | None]:
    """Gradients of the ``leaves`` that require them; None for the others, and where there is no gradient.

    Args:
        all_leaves_known: the graph is known to have no other leaves, so it is not searched for them.

    Raises:
        RuntimeError: a start depends on another leaf that requires a gradient, which would not get one.
    """
    given = [start for start in starts if start is not None]
    results: list[Tensor | None] = [None] * len(leaves)
    wanted = [number for number, tensor in enumerate(leaves) if tensor.requires_grad]
    if not given:
        return results
    edges, grads = zip(*given, strict=True)
    if not all_leaves_known:
        _refuse_unknown_leaves([edge.node for edge in edges], leaves)
    if wanted:
        found = torch.autograd.grad(edges, [leaves[number] for number in wanted], grads, allow_unused=True)
        for number, grad in zip(wanted, found, strict=True):
            results[number] = grad
    return results


def _refuse_unknown_leaves(nodes: Sequence[Node], leaves: Sequence[Tensor]) -> None:
    known = {id(tensor) for tensor in leaves}
    seen = set(nodes)
    stack = list(seen)
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise RuntimeError(
                f"it uses a tensor of shape {tuple(variable.shape)} that requires a gradient and is neither a "
                "parameter of it nor passed to the chain: register it in the step, or pass it as context"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def sum_of(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """The sum of two gradients, either of which may be None."""
    # Not in place: the gradients of two parameters may be the same tensor.
    if total is None or grad is None:
        return grad if total is None else total
    return total + grad


class BatchBuffer:
    """A tensor that is assembled from parts of the batch; a single part for the whole batch is not copied.

    Args:
        out: a tensor of the same shape, into whose memory the parts are written, without changing its version.
    """

    def __init__(self, batch: int, out: Tensor | None = None) -> None:
        self._batch = batch
        self._out = out
        self._result: Tensor | None = None

    def add(self, part: slice | None, tensor: Tensor) -> None:
        """Store ``tensor`` as ``part`` of the batch; None is the whole batch."""
        if part is None:
            self._result = tensor
            return
        if self._result is None and self._out is not None:
            self._result = self._out.data
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
        """All samples, or None if none were added."""
        return self._result
