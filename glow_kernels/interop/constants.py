"""What a patch assumes to be constant: the plain attributes and buffers of its layer when it was patched.

Probing turned them into options. If a checkpoint or a user changes one later, the layer computes as it did before it
was patched. Parameters and submodules are not among them; patches read these at every call.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from glow_kernels.ops._checks import has_data

# Attributes of every module.
_INTERNAL = frozenset(nn.Module().__dict__)
PLAIN = (int, float, str, bool, type(None))
# Two at least, so that itemgetter returns a tuple.
_ALWAYS = ("_is_full_backward_hook", "_is_full_backward_hook")
_MISSING = object()


class Constants:
    """The constants of one layer. Checking them costs about half a microsecond while nothing has changed.

    Args:
        module: the layer.
        ignored: names that do not matter: those that patches read at every call, or set themselves.
    """

    def __init__(self, module: nn.Module, ignored: Collection[str]) -> None:
        self._ignored = frozenset(ignored)
        attributes = plain_attributes(module, self._ignored)
        self._attributes = {name: _copied(value) for name, value in attributes.items()}
        self._buffers = {name: buffer for name, buffer in module._buffers.items() if name not in self._ignored}
        tensors = self._attributes | self._buffers
        self._values = {name: value.detach().clone() for name, value in tensors.items() if isinstance(value, Tensor)}
        # What the last comparison saw, the number of attributes then, and its outcome. One comparison of tuples, which
        # compares identities first, costs less than a loop.
        self._read = operator.itemgetter(*self._attributes, *_ALWAYS)
        self._seen: tuple[Any, ...] = ()
        self._seen_buffers: list[tuple[str, Any]] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._count, self._hold = -1, True

    def unchanged_in(self, module: nn.Module) -> bool:
        """Whether ``module`` still has these constants."""
        attributes = module.__dict__
        try:
            if self._count != len(attributes) or self._read(attributes) != self._seen:
                return self._compare(module)
        except Exception:  # an attribute is gone, or cannot be compared
            return self._compare(module)
        for name, value in self._seen_buffers:
            if module._buffers.get(name, _MISSING) is not value:
                return self._compare(module)
        for tensor, version in self._versions:
            if tensor._version != version:
                return self._compare(module)
        return self._hold

    def replace(self, name: str, value: Any) -> None:
        """Make ``value``, which is equivalent, the constant value of the attribute ``name``."""
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
        if "_is_replica" in attributes:  # DataParallel's replicas share this object; their parameters are attributes
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
            if not has_data(current):  # under torch.export
                return False
            # The layer may have been moved to another device or converted to another type.
            return torch.equal(current.detach().cpu().float(), value.cpu().float())
        try:
            return current is value or bool(current == value)
        except Exception:  # such as from arrays, whose comparison is not a single bool
            return False

    def _new_names(self, module: nn.Module) -> list[str]:
        known = self._attributes.keys() | self._ignored
        return [name for name in plain_attributes(module) if name not in known]


def plain_attributes(module: nn.Module, ignored: Collection[str] = ()) -> dict[str, Any]:
    """The attributes of ``module`` except parameters, buffers, submodules and hooks."""
    attributes = module.__dict__.items()
    return {name: value for name, value in attributes if name not in _INTERNAL and name not in ignored}


def _copied(value: Any) -> Any:
    """``value``, or a copy if it is a list or dictionary of plain values, which may be changed in place."""
    if not isinstance(value, (list, dict)) or not all(isinstance(leaf, PLAIN) for leaf in pytree.tree_leaves(value)):
        return value
    return pytree.tree_map(lambda leaf: leaf, value)


def _matters(module: nn.Module, name: str) -> bool:
    """Whether a new attribute is more than the private state of some tool."""
    return not name.startswith("_") or (hasattr(type(module), name) and not hasattr(nn.Module, name))
