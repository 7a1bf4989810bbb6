"""Fixtures that every test may use."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch

import glow_kernels as gk
from glow_kernels.reversible.randomness import seed_generators

pytest.register_assert_rewrite("operators")

# A script's process in the background ignores Ctrl-C, and so would all that tests start to interrupt it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter  # noqa: F401


def pytest_collection_finish() -> None:
    """Spare the garbage collector PyTorch's modules and all collected tests, each time that it runs."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let all go that Triton's library would take for a leak."""
    gc.unfreeze()


# Where the tensors of the tests are: ``make gpu`` says cuda.
DEVICE = os.environ.get("GLOW_KERNELS_TEST_DEVICE", "cpu")
if DEVICE != "cpu":
    # Some tests want the bits of a gradient again, and none the ten bits of TF32.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Every test draws the same numbers on every run, alone or among others."""
    seed_generators(torch.device(DEVICE), 0)


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


@pytest.fixture(params=[name for name in gk.available_backends() if name != "reference"])
def fast_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same where the reference, which is the truth, would be compared with itself."""
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
