"""Drawing the random numbers that a step drew in forward again when it is recomputed."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def seed_generators(device: torch.device, number: int) -> None:
    """Seed PyTorch's generators of the CPU and of ``device``.

    torch.manual_seed also seeds all other devices, which nothing would restore. For each that is not initialised yet it
    records a stack trace, which takes a millisecond.
    """
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        _module(device).set_rng_state(torch.Generator(device).manual_seed(number).get_state(), device)


class RandomState:
    """State of the generators that a step on ``device`` may draw from: PyTorch's for the CPU and the device, Python's
    and NumPy's. A step's own generators are not covered.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        is_alone = device.type in ("cpu", "meta") or _is_capturing(device)
        self._other = None if is_alone else _module(device).get_rng_state(device)
        self._python = random.getstate()
        self._numpy = _numpy_state()

    def has_moved(self) -> bool:
        """Whether random numbers have been drawn since."""
        if not torch.equal(self._cpu, torch.get_rng_state()):
            return True
        if self._python != random.getstate() or self._numpy != _numpy_state():
            return True
        return self._other is not None and not torch.equal(
            self._other, _module(self._device).get_rng_state(self._device)
        )

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the same numbers again inside the ``with`` block; afterwards the generators are as before it."""
        now = RandomState(self._device)
        self._set()
        try:
            yield
        finally:
            now._set()

    def _set(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._other is not None:
            _module(self._device).set_rng_state(self._other, self._device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy.random"].set_state(pickle.loads(self._numpy))


def _numpy_state() -> bytes | None:
    """State of NumPy's global generator, in a form that can be compared; None if NumPy is not imported."""
    module: Any = sys.modules.get("numpy.random")
    return None if module is None else pickle.dumps(module.get_state(legacy=False))


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def refuse_while_capturing(modules: Sequence[nn.Module], device: torch.device) -> None:
    """Raise if ``modules`` use dropout while a CUDA graph is captured: it cannot draw random numbers again."""
    if _is_capturing(device) and any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in modules):
        raise RuntimeError("it has dropout, which needs memory='store' in a CUDA graph")


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
