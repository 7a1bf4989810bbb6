"""The number of micro-batches that keeps the working set of every step within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from glow_kernels.reversible.recompute import Mode

if TYPE_CHECKING:
    from glow_kernels.reversible.chain import ReversibleSequential


def micro_batches(chain: ReversibleSequential, x: Tensor, context: Sequence[Tensor | None], budget: float) -> int:
    """The number of parts of the batch ``x`` with which backward of every step of ``chain`` fits into ``budget`` bytes.

    One part per sample if even a single sample takes more. Every step is evaluated on one sample, then on as many
    samples as that predicts will fit, and so on until the number no longer grows: memory that does not depend on the
    batch, such as that of filters, makes the first predictions too small.
    """
    if len(x) == 0:
        return 1
    parts = len(x)
    while True:
        samples = -(-len(x) // parts)
        # Copies: a saved view would count with the memory of the whole tensor.
        some = [None if tensor is None else tensor[:samples].detach().clone() for tensor in context]
        largest = _largest_working_set(chain, x[:samples].detach().clone(), some)
        fewer = int(-(-len(x) * largest // (samples * budget)))  # the budget may be a float such as 1e9
        if fewer >= parts:
            return parts
        parts = fewer


def _largest_working_set(chain: ReversibleSequential, x: Tensor, context: Sequence[Tensor | None]) -> int:
    """The largest working set of any step for ``x``, in bytes."""
    mode = Mode.current(x.device, 1)
    largest = 1
    for step in chain:
        with torch.enable_grad(), mode.applied(x.device), torch.random.fork_rng(enabled=x.device.type == "cpu"):
            taken, x = _working_set(step, x, context)
        largest = max(largest, taken)
    return largest


def _working_set(step: nn.Module, x: Tensor, context: Sequence[Tensor | None]) -> tuple[int, Tensor]:
    """Bytes of the tensors saved by the graph of ``step``, plus twice the largest for gradients; and its output."""
    owned = {tensor.untyped_storage()._cdata for tensor in (*step.parameters(), *step.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = (storage.nbytes(), tensor.detach())
        # Returns None: this graph is never differentiated, and a saved output would be a reference cycle.

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        z, _ = step.forward(x.requires_grad_(), *context)
    sizes = [size for size, _ in kept.values()]
    return sum(sizes) + 2 * max(sizes, default=0), z.detach()
