"""Registration with torch.library: one schema, one fake and one autograd rule for all backends of an operator.

For every backend a separate operator is registered, ``glow_kernels::<module>_<function>_<backend>``. So there can be
two backends for CUDA tensors, a compiled graph keeps the backend that it was traced with, and forward and backward use
the same one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from glow_kernels import backends
from glow_kernels.backends import faster

_LIBRARY = torch.library.Library("glow_kernels", "DEF")  # type: ignore[no-untyped-call]


class Operator:
    """An operator that one or more backends implement.

    The reference and Triton backends implement it as ``function`` in their file ``module``, the native backend in its
    shared library. In ``support.py`` of native and Triton, ``module(function, *args)`` returns whether the backend
    supports these arguments; it is missing if the backend does not implement the operator. The reference supports all.

    Args:
        module: name of the file that implements it in each backend.
        function: name of the implementing function.
        schema: arguments and results in torch.library's schema language, ``(Tensor x) -> Tensor``.
        fake: computes empty results with the right shapes, types and strides.
        setup_context, backward: the autograd rule as for ``torch.library.register_autograd``; ``backward`` gets the
            name of the backend that computed the forward as its first argument. Without them, differentiating the
            operator raises an error.
        plain_reference: do not register the reference as an operator, but call its plain PyTorch code, which autograd
            can differentiate. This makes the gradients of the reference differentiable.
        composed: a function that computes the same from other operators. Only the native backend then implements this
            operator, and ``composed`` is used instead of all other backends.

    Under torch.func's derivatives and forward-mode differentiation, every operator runs as plain PyTorch, which
    supports both.
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
        plain_reference: bool = False,
        composed: Callable[..., Any] | None = None,
    ) -> None:
        self._name, self._function = f"{module}_{function}", function
        self._plain = composed or getattr(backends.implementation("reference", module), function)
        fast = [backend for backend in backends.PREFERENCE if backend != "reference"]
        self._support = {
            name: getattr(backends.implementation(name, "support"), module, _supports_nothing) for name in fast
        }
        self._implementations: dict[str, _Implementation] = {}
        for backend in backends.PREFERENCE if composed is None else ("native",):
            if self._support.get(backend) is _supports_nothing:
                continue
            if backend == "reference" and plain_reference:
                continue
            name = f"{module}_{function}_{backend}"
            rule = functools.partial(_refuse, name) if backward is None else functools.partial(backward, backend)
            python = (
                self._call_without_library
                if backend == "native"
                else functools.partial(_call, backend, module, function)
            )
            self._implementations[backend] = _Implementation(
                name, schema, fake, python, setup_context, rule, self._plain
            )

    def __call__(self, *args: Any) -> Any:
        """Compute with the first backend in order of preference that supports ``args``."""
        return self._run(self._chosen(args), args)

    def is_fast(self, *args: Any) -> bool:
        """Whether a backend other than the reference would compute a call with ``args``."""
        return self._chosen(args) != "reference"

    def on(self, backend: str, *args: Any) -> Any:
        """Compute with ``backend``, or the reference if that does not support ``args``."""
        supported = backend == "reference" or self._support[backend](self._function, *args)
        return self._run(backend if supported else "reference", args)

    def _call_without_library(self, *args: Any) -> Any:
        # Called for the native operator if its library is not loaded yet, or has no kernel for the device: in an
        # exported program.
        return self.on("native" if backends.backend_status("native").available else "reference", *args)

    def _chosen(self, args: tuple[Any, ...]) -> str:
        candidates = backends.candidates()
        if not faster.first_tensor(args).is_cpu:
            candidates = faster.first(candidates, self._name, args)
        for backend in candidates:
            if backend == "reference" or self._support[backend](self._function, *args):
                break
        return backend

    def _run(self, backend: str, args: tuple[Any, ...]) -> Any:
        function = self._implementations.get(backend) or self._plain
        return function(*args)


def is_transformed() -> bool:
    """Whether derivatives are computed in a way that only plain PyTorch supports: by torch.func or in forward mode."""
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    levels = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() in (TransformType.Grad, TransformType.Jvp) for level in levels)


class _Implementation:
    """One backend's registered operator."""

    def __init__(
        self,
        name: str,
        schema: str,
        fake: Callable[..., Any],
        python: Callable[..., Any],
        setup_context: Callable[..., None] | None,
        rule: Callable[..., Any],
        plain: Callable[..., Any],
    ) -> None:
        qualified_name = f"glow_kernels::{name}"
        _LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, python, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(qualified_name, fake, lib=_LIBRARY)
        if "!" not in schema:  # an operator that mutates its arguments cannot have an autograd rule
            torch.library.register_autograd(qualified_name, rule, setup_context=setup_context, lib=_LIBRARY)
        overload: Callable[..., Any] = getattr(torch.ops.glow_kernels, name).default
        self._overload, self._has_lists, self._plain = overload, "Tensor[]" in schema, plain
        # Below ADInplaceOrView results are not marked as views, which could not be modified in place. Operators that
        # mutate their arguments need that key to bump the arguments' versions.
        below = torch._C._AutoDispatchBelowAutograd if "!" in schema else torch._C._AutoDispatchBelowADInplaceOrView
        self._below: Callable[[], AbstractContextManager[None]] = below

        class Rule(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                with below():
                    results = overload(*args)
                if setup_context is not None:
                    setup_context(ctx, args, results)
                return results

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return rule(ctx, *grads)

        self._rule = Rule

    def __call__(self, *args: Any) -> Any:
        # Tracing and transforms must see the operator. Otherwise its autograd rule is applied here, and the dispatcher
        # is entered below autograd, which saves more than half of the time of a call.
        if (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
        ):
            return self._plain(*args) if is_transformed() else self._overload(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if self._has_lists:
                return self._overload(*args)  # its registered rule handles lists of tensors
            # Function.apply would only add support for functorch transforms.
            return super(torch.autograd.Function, self._rule).apply(*args)  # type: ignore[no-untyped-call]
        with self._below():
            return self._overload(*args)


def _call(backend: str, module: str, function: str, *args: Any) -> Any:
    return getattr(backends.implementation(backend, module), function)(*args)


def _supports_nothing(*_: Any) -> bool:
    return False


def _refuse(name: str, *_: Any) -> NoReturn:
    raise RuntimeError(_refusal(name))


def _refusal(name: str) -> str:
    return (
        f"{name} cannot be differentiated: compute second derivatives with memory='store' and "
        "glow_kernels.use_backend('reference')"
    )


def differentiable_once(name: str, backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Wrap ``backward`` of the node called ``name`` so that differentiating its results raises an error.

    Unlike with PyTorch's ``once_differentiable`` this is so even if no incoming gradient requires a gradient: the
    results also depend on the tensors that the node has saved.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        refuse: Any = torch._C._functions.DelayedError(_refusal(f"the backward of {name}").encode(), len(results))
        return refuse(*(None if result is None else result.detach().requires_grad_() for result in results))

    return once
