"""Fixtures for all tests."""

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

# A background process of a shell script ignores SIGINT, and so would the processes that tests start to interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter  # noqa: F401


def pytest_collection_finish() -> None:
    """Freeze PyTorch's modules and all collected tests, so the garbage collector does not scan them at every run."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Unfreeze the objects again, which Triton's library would otherwise take for leaks."""
    gc.unfreeze()


# The device of the tests' tensors; ``make gpu`` sets it to cuda.
DEVICE = os.environ.get("GLOW_KERNELS_TEST_DEVICE", "cpu")
if DEVICE != "cpu":
    # Some tests need bitwise reproducible gradients, and no test tolerates the ten mantissa bits of TF32.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Every test draws the same numbers on every run, whether run alone or with others."""
    seed_generators(torch.device(DEVICE), 0)


@pytest.fixture(autouse=DEVICE != "cpu")
def _device() -> Iterator[None]:
    """Tests make tensors on the tested device by default."""
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
    """Fill every ``torch.empty`` with NaN, to reveal elements that an operator forgets to write.

    The native library allocates below this level, so glibc also fills the memory that it returns with bytes that make
    3e38 in float32 and NaN in float16.
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
