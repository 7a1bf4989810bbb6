"""How many micro-batches keep the working set of a step within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from glow_kernels.reversible.recompute import Mode

if TYPE_CHECKING:
    from glow_kernels.reversible.chain import ReversibleSequential


def micro_batches(chain: ReversibleSequential, x: Tensor, context: Sequence[Tensor | None], budget: float) -> int:
    """Parts of the batch of ``x`` for which backward through every step of ``chain`` takes ``budget`` bytes at most.

    One part per sample if even a single sample takes more. Every step is evaluated once, on one sample.
    """
    if len(x) == 0:
        return 1
    sample, sample_context = x[:1].detach(), [None if tensor is None else tensor[:1].detach() for tensor in context]
    mode = Mode.current(x.device, 1)
    most = 1
    for step in chain:
        with torch.enable_grad(), mode.applied(x.device), torch.random.fork_rng(enabled=x.device.type == "cpu"):
            taken, sample = _working_set(step, sample, sample_context)
        most = max(most, taken)
    return min(len(x), int(-(-len(x) * most // budget)))  # a budget may be written 1e9


def _working_set(step: nn.Module, x: Tensor, context: Sequence[Tensor | None]) -> tuple[int, Tensor]:
    """Bytes that the graph of ``step`` keeps, and twice the largest of them for gradients; and its output."""
    owned = {tensor.untyped_storage()._cdata for tensor in (*step.parameters(), *step.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = (storage.nbytes(), tensor.detach())
        # Nothing: this graph has no backward, and a result that kept itself would never be freed.

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        z, _ = step.forward(x.requires_grad_(), *context)
    sizes = [size for size, _ in kept.values()]
    return sum(sizes) + 2 * max(sizes, default=0), z.detach()
