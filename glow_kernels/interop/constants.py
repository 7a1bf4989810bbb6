"""What a patch takes for constant: the plain attributes and buffers of its layer, as they were when it was made.

Probing turns them into options, and a checkpoint or a user may change them later: then the layer computes as it did
before it was patched. Parameters and submodules are not among them; patches read these whenever they compute.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from glow_kernels.ops._checks import has_data

# What every module has.
_INTERNAL = frozenset(nn.Module().__dict__)
PLAIN = (int, float, str, bool, type(None))
# Of these there are two at least, so that they are read as a tuple.
_ALWAYS = ("_is_full_backward_hook", "_is_full_backward_hook")
_MISSING = object()


class Constants:
    """Of one layer. To ask for them costs about half a microsecond while nothing has changed.

    Args:
        module: the layer.
        ignored: names that do not matter: what patches read whenever they compute, or keep themselves.
    """

    def __init__(self, module: nn.Module, ignored: Collection[str]) -> None:
        self._ignored = frozenset(ignored)
        attributes = plain_attributes(module, self._ignored)
        self._attributes = {name: _copied(value) for name, value in attributes.items()}
        self._buffers = {name: buffer for name, buffer in module._buffers.items() if name not in self._ignored}
        tensors = self._attributes | self._buffers
        self._values = {name: value.detach().clone() for name, value in tensors.items() if isinstance(value, Tensor)}
        # What was there at the last comparison, how many attributes there were, and its outcome. One comparison of
        # tuples, which looks at identities first, costs less than a loop.
        self._read = operator.itemgetter(*self._attributes, *_ALWAYS)
        self._seen: tuple[Any, ...] = ()
        self._seen_buffers: list[tuple[str, Any]] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._count, self._hold = -1, True

    def hold(self, module: nn.Module) -> bool:
        """Whether ``module`` still has them."""
        attributes = module.__dict__
        try:
            if self._count != len(attributes) or self._read(attributes) != self._seen:
                return self._compare(module)
        except Exception:  # of an attribute that is gone, or of one that cannot be compared
            return self._compare(module)
        for name, value in self._seen_buffers:
            if module._buffers.get(name, _MISSING) is not value:
                return self._compare(module)
        for tensor, version in self._versions:
            if tensor._version != version:
                return self._compare(module)
        return self._hold

    def exchange(self, name: str, value: Any) -> None:
        """Take ``value``, which does the same, for what the attribute ``name`` was."""
        if name in self._attributes:
            self._attributes[name] = value
            self._count = -1

    def _compare(self, module: nn.Module) -> bool:
        attributes, buffers = module.__dict__, module._buffers
        holds = all(
            self._same(name, value, owner.get(name, _MISSING))
            for owner, values in ((attributes, self._attributes), (buffers, self._buffers))
            for name, value in values.items()
        )
        if "_is_replica" in attributes:  # of DataParallel, which shares this object and has plain parameters
            return holds
        holds = holds and not any(_matters(module, name) for name in self._new_names(module))
        seen = {name: attributes.get(name, _MISSING) for name in (*self._attributes, *_ALWAYS)}
        self._seen = self._read({name: _copied(value) for name, value in seen.items()})
        self._seen_buffers = [(name, buffers.get(name, _MISSING)) for name in self._buffers]
        tensors = [value for value in (*seen.values(), *dict(self._seen_buffers).values()) if isinstance(value, Tensor)]
        self._versions = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]
        self._count, self._hold = len(attributes), holds
        return holds

    def _same(self, name: str, value: Any, current: Any) -> bool:
        if isinstance(value, Tensor):
            value = self._values[name]
            if not isinstance(current, Tensor) or current.shape != value.shape:
                return False
            if not has_data(current):  # of torch.export
                return False
            # The layer may have been moved, and its type may have changed.
            return torch.equal(current.detach().cpu().float(), value.cpu().float())
        try:
            return current is value or bool(current == value)
        except Exception:  # as of arrays
            return False

    def _new_names(self, module: nn.Module) -> list[str]:
        known = self._attributes.keys() | self._ignored
        return [name for name in plain_attributes(module) if name not in known]


def plain_attributes(module: nn.Module, ignored: Collection[str] = ()) -> dict[str, Any]:
    """What ``module`` keeps beside parameters, buffers, submodules and hooks."""
    attributes = module.__dict__.items()
    return {name: value for name, value in attributes if name not in _INTERNAL and name not in ignored}


def _copied(value: Any) -> Any:
    """``value``, or a copy of a list or dictionary of plain values, whose identity says nothing of what it holds."""
    if not isinstance(value, (list, dict)) or not all(isinstance(leaf, PLAIN) for leaf in pytree.tree_leaves(value)):
        return value
    return pytree.tree_map(lambda leaf: leaf, value)


def _matters(module: nn.Module, name: str) -> bool:
    """Whether an attribute that was not there is more than a note of some tool's own."""
    return not name.startswith("_") or (hasattr(type(module), name) and not hasattr(nn.Module, name))
