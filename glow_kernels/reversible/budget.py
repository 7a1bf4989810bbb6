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

    One part per sample if even a single sample takes more. Every step is evaluated on one sample, and again on as many
    as that says will fit, until no more do: what does not grow with the batch, as filters, counts once in a part.
    """
    if len(x) == 0:
        return 1
    parts = len(x)
    while True:
        samples = -(-len(x) // parts)
        # Copies: what is kept of a view has the memory of the whole.
        some = [None if tensor is None else tensor[:samples].detach().clone() for tensor in context]
        most = _most(chain, x[:samples].detach().clone(), some)
        fewer = int(-(-len(x) * most // (samples * budget)))  # a budget may be written 1e9
        if fewer >= parts:
            return parts
        parts = fewer


def _most(chain: ReversibleSequential, x: Tensor, context: Sequence[Tensor | None]) -> int:
    """The working set of the step that has the largest for ``x``."""
    mode = Mode.current(x.device, 1)
    most = 1
    for step in chain:
        with torch.enable_grad(), mode.applied(x.device), torch.random.fork_rng(enabled=x.device.type == "cpu"):
            taken, x = _working_set(step, x, context)
        most = max(most, taken)
    return most


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
