"""Registration with torch.library: one schema, one fake and one autograd rule for all backends of an operator.

Every backend has an operator of its own, ``glow_kernels::<operator>_<function>_<backend>``, so that a CUDA tensor can
choose between two of them, a compiled graph keeps the one that it was traced with, and forward and backward agree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from glow_kernels import backends

_LIBRARY = torch.library.Library("glow_kernels", "DEF")  # type: ignore[no-untyped-call]
_REGISTERED = ("reference",)


class Operator:
    """An operator that every backend implements.

    Args:
        module: name of the file that implements it in each backend.
        function: name of the implementing function in that file.
        schema: arguments and results in torch.library's language, ``(Tensor x) -> Tensor``.
        fake: shapes, types and strides of the results.
        setup_context, backward: the autograd rule as for ``torch.library.register_autograd``; ``backward`` gets the
            backend's module as its first argument. Without them the operator is not differentiable.
    """

    def __init__(
        self,
        module: str,
        function: str,
        schema: str,
        *,
        fake: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        self._overloads: dict[str, Callable[..., Any]] = {}
        for backend in _REGISTERED:
            name = f"{module}_{function}_{backend}"
            qualified_name = f"glow_kernels::{name}"
            _LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
            _LIBRARY.impl(name, _implementation(backend, module, function), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
            torch.library.register_fake(qualified_name, fake, lib=_LIBRARY)
            if backward is not None:
                rule = functools.partial(backward, _LazyModule(backend, module))
                torch.library.register_autograd(qualified_name, rule, setup_context=setup_context, lib=_LIBRARY)
            self._overloads[backend] = getattr(torch.ops.glow_kernels, name).default

    def __call__(self, *args: Any) -> Any:
        """Compute with the backend that is selected now."""
        return self._overloads[backends.select()](*args)


class _LazyModule:
    """A backend's module, imported at its first use: importing glow_kernels loads no Triton and no shared library."""

    def __init__(self, backend: str, module: str) -> None:
        self._name = (backend, module)

    def __getattr__(self, function: str) -> Any:
        return getattr(backends.implementation(*self._name), function)


def _implementation(backend: str, module: str, function: str) -> Callable[..., Any]:
    lazy = _LazyModule(backend, module)

    def call(*args: Any) -> Any:
        return getattr(lazy, function)(*args)

    return call
