"""Counts the bytes of tensors that are alive at the same time; also of fake tensors, of sizes that need no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glow_kernels.nn import ActNorm
from glow_kernels.reversible.offload import OffloadedAnchors


def training_step_bytes(build: Callable[[], nn.Module], shape: Sequence[int], fake: bool = True) -> tuple[int, int]:
    """Bytes kept after the forward of a training step, and the peak during the step.

    Gradients of parameters do not count, nor do anchors once they have been offloaded to the host.

    Args:
        build: makes a model whose call returns a log-density (B,).
        shape: the shape of its input.
        fake: use fake tensors, which have no values and need no memory, instead of real ones.
    """
    with FakeTensorMode() if fake else nullcontext():
        model = build()
        for module in model.modules():
            if isinstance(module, ActNorm):
                module._is_initialized = True
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda p: setattr(p, "grad", None)
            )
        store = OffloadedAnchors.store

        def store_uncounted(self: OffloadedAnchors, state: Tensor) -> int:
            number = store(self, state)
            storages.ignore(self._anchors[number])
            return number

        with LiveStorages([model]) as storages, patch.object(OffloadedAnchors, "store", store_uncounted):
            log_prob = model(torch.rand(shape))
            kept = storages.now
            log_prob.mean().backward()
    return kept, storages.peak


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operators have made since the mode was entered: ``now`` and at the ``peak``.

    Args:
        ignored: modules whose parameters and buffers do not count, even if operators return views of them.
    """

    def __init__(self, ignored: Iterable[nn.Module] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._bytes: dict[int, int] = {}
        for module in ignored:
            for tensor in (*module.parameters(), *module.buffers()):
                self._bytes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        self.peak = max(self.peak, self.now)
        return results

    def ignore(self, tensor: Tensor) -> None:
        """Do not count the storage of ``tensor`` from now on."""
        key = tensor.untyped_storage()._cdata
        self.now -= self._bytes[key]
        self._bytes[key] = 0

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._bytes:
            self._bytes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._bytes.pop(key, 0)
