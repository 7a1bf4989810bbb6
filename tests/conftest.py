"""Fixtures that every test may use."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
from collections.abc import Iterator

import pytest
import torch

import glow_kernels as gk

pytest.register_assert_rewrite("operators")

# A script's process in the background ignores Ctrl-C, and so would all that tests start to interrupt it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get("TRITON_INTERPRET") == "1":
    # What takes half of the interpreter's time and computes nothing. It prepares triton.language at a launch, and again
    # for every function that a kernel calls: once is enough for Triton's own, and the others see the kernels' module.
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction

    _prepare_and_call, _prepared = InterpretedFunction.__call__, set()

    def _call(function, *args, **kwargs):
        module = function.fn.__module__
        if module.startswith("triton.") and module not in _prepared:
            _prepared.add(module)
            return _prepare_and_call(function, *args, **kwargs)
        return function.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = _call

    # It computes of every sum and product of integers whether they overflow, and asserts that only in debug mode.
    _builder = interpreter.interpreter_builder
    assert not _builder.options.debug
    _builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Every test draws the same numbers on every run, alone or among others."""
    torch.manual_seed(0)


# Where the tensors of the tests are: ``make gpu`` says cuda.
DEVICE = os.environ.get("GLOW_KERNELS_TEST_DEVICE", "cpu")
if DEVICE != "cpu":
    # Some tests want the bits of a gradient again, and none the ten bits of TF32.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=DEVICE != "cpu")
def _device() -> Iterator[None]:
    """Tests make tensors on the device that is tested."""
    with torch.device(DEVICE):
        yield


@pytest.fixture(params=gk.available_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on every backend that can run here."""
    with gk.use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN: an element that an operator forgets to write shows.

    So does one of the native library, which allocates beneath that: the C library fills what it hands out with bytes
    that are 3e38 in float32 and NaN in float16.
    """
    perturb = getattr(ctypes.CDLL(None), "mallopt", None)
    if perturb is not None:  # glibc, whose M_PERTURB is -6
        perturb(-6, 0x80)
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    if perturb is not None:
        perturb(-6, 0)
