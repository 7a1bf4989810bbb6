"""Which backend computes an operator, and why.

An explicit choice (:func:`use_backend`, or the environment variable ``GLOW_KERNELS_BACKEND`` at import) is followed, or
refused with a reason. Without one, the first backend of :data:`PREFERENCE` that can run here and supports the arguments
is used.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType

from glow_kernels.errors import BackendUnavailableError, UsageError

PREFERENCE = ("native", "triton", "reference")
ENVIRONMENT_VARIABLE = "GLOW_KERNELS_BACKEND"

# A module global, not a contextvar: torch.compile traces and guards it, so that switching recompiles. The environment
# is read once: reading it costs more than the rest of the choice.
_chosen: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here; if not, ``reason`` says why and ``remedy`` what to do."""

    name: str
    available: bool
    reason: str
    remedy: str = ""


@functools.cache
def backend_status(name: str) -> BackendStatus:
    """Whether backend ``name`` can run here, and why or why not.

    Raises:
        UsageError: ``name`` is not a backend of this package.
    """
    if name not in PREFERENCE:
        raise UsageError(f"backend must be one of {', '.join(PREFERENCE)}, got {name!r}")
    status: BackendStatus = importlib.import_module(f"{__name__}.{name}").status()
    return status


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run here, in order of preference."""
    return tuple(name for name in PREFERENCE if backend_status(name).available)


def use_backend(name: str) -> AbstractContextManager[None]:
    """Compute every operator with backend ``name`` inside the ``with`` block.

    The reference computes calls whose arguments the backend does not support. The choice applies to the whole process,
    including other threads. Blocks may be nested.

    Args:
        name: ``"native"``, ``"triton"`` or ``"reference"``.

    Raises:
        UsageError: ``name`` is not a backend of this package.
        BackendUnavailableError: the backend cannot run here; the message gives the reason and the remedy.
    """
    return restored(_require(name))


def choice() -> str | None:
    """The current explicit choice, or None, for :func:`restored`."""
    return _chosen


@contextmanager
def restored(choice: str | None) -> Iterator[None]:
    """Inside the ``with`` block, use the ``choice`` that :func:`choice` has returned earlier."""
    global _chosen
    previous = _chosen
    _chosen = choice
    try:
        yield
    finally:
        _chosen = previous


def candidates() -> tuple[str, ...]:
    """The backends to try for the next operator, in order; the last one, the reference, supports all arguments.

    Raises:
        UsageError: ``GLOW_KERNELS_BACKEND`` is not the name of a backend of this package.
        BackendUnavailableError: ``GLOW_KERNELS_BACKEND`` names a backend that cannot run here.
    """
    if _chosen is None:
        return _default()
    return (_require(_chosen), "reference") if _chosen != "reference" else ("reference",)


def select() -> str:
    """The backend that computes the next operator if it supports its arguments; errors as for :func:`candidates`."""
    return candidates()[0]


def implementation(backend: str, operator: str) -> ModuleType:
    """The module of ``backend`` that implements ``operator``, imported on first use."""
    return importlib.import_module(f"{__name__}.{backend}.{operator}")


def _require(name: str) -> str:
    status = backend_status(name)
    if not status.available:
        raise BackendUnavailableError(f"backend {name!r} is not available: {status.reason}; {status.remedy}")
    return name


def _default() -> tuple[str, ...]:
    return _default_order()


@functools.cache
def _default_order() -> tuple[str, ...]:
    return available_backends()


# These are constant for the life of the process, and access files, which torch.compile cannot trace. The attribute is
# the one that torch.compiler.assume_constant_result sets; calling that would import the whole compiler, and Triton.
for _constant in (_require, _default):
    _constant._dynamo_marked_constant = True  # type: ignore[union-attr]
