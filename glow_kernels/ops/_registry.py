"""Registration with torch.library: one schema, one fake and one autograd rule for all backends of an operator.

Every backend has an operator of its own, ``glow_kernels::<operator>_<function>_<backend>``, so that a CUDA tensor can
choose between two of them, a compiled graph keeps the one that it was traced with, and forward and backward agree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from glow_kernels import backends

_LIBRARY = torch.library.Library("glow_kernels", "DEF")  # type: ignore[no-untyped-call]


class Operator:
    """An operator that one or more backends implement.

    Args:
        module: name of the file that implements it in each backend.
        function: name of the implementing function in that file.
        schema: arguments and results in torch.library's language, ``(Tensor x) -> Tensor``.
        fake: shapes, types and strides of the results.
        setup_context, backward: the autograd rule as for ``torch.library.register_autograd``; ``backward`` gets the
            backend's module as its first argument. Without them the operator is not differentiable.
        native: whether the native backend has it. Its implementation comes from the shared library, and the file of
            this name in ``backends/native`` says which arguments it ``supports``; the reference takes the others.
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
        native: bool = False,
    ) -> None:
        self._overloads: dict[str, Callable[..., Any]] = {}
        self._native: Any = backends.implementation("native", module) if native else None
        for backend in ("native", "reference") if native else ("reference",):
            implementation = backends.implementation(backend, module)
            rule = None if backward is None else functools.partial(backward, implementation)
            python = getattr(implementation, function) if backend == "reference" else None
            name = f"{module}_{function}_{backend}"
            self._overloads[backend] = _register(name, schema, fake, python, setup_context, rule)

    def __call__(self, *args: Any) -> Any:
        """Compute with the backend that is selected now, or the reference where that one does not support ``args``."""
        backend = backends.select()
        if backend not in self._overloads or (backend == "native" and not self._native.supports(*args)):
            backend = "reference"
        return self._overloads[backend](*args)


def register_backward(name: str, schema: str, fake: Callable[..., Any]) -> None:
    """Register the backward of an operator in one backend, implemented in its shared library.

    The reference needs none: its backward is plain PyTorch, and so can be differentiated again.
    """
    _register(name, schema, fake, None, None, functools.partial(_refuse, name))


def _refuse(name: str, *_: Any) -> NoReturn:
    raise RuntimeError(
        f"{name} cannot be differentiated again: compute second derivatives with glow_kernels.use_backend('reference')"
    )


def _register(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    implementation: Callable[..., Any] | None,
    setup_context: Callable[..., None] | None,
    rule: Callable[..., Any] | None,
) -> Callable[..., Any]:
    qualified_name = f"glow_kernels::{name}"
    _LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
    if implementation is not None:
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(qualified_name, fake, lib=_LIBRARY)
    if rule is not None:
        torch.library.register_autograd(qualified_name, rule, setup_context=setup_context, lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.glow_kernels, name).default
    return overload
