"""CUDA C++ on NVIDIA GPUs: loads ``_C_cuda.so`` when the first CUDA tensor or ``glow-kernels info`` needs it."""

from __future__ import annotations

import functools
import logging
import shutil
from typing import Any

import torch

from glow_kernels.backends import BackendStatus
from glow_kernels.backends.native.library import Library, UnusableError, load

LIBRARY = Library("_C_cuda.so", "cuda", "the native CUDA library", "build-cuda", "cuda")
# The oldest GPU and the oldest nvcc that setup.py supports.
OLDEST_GPU = (8, 0)
OLDEST_NVCC = "12.8"
FALLBACK_NOTE = "Triton or the reference computes on the GPU instead"

_log = logging.getLogger(__name__)


@functools.cache
def status() -> BackendStatus:
    """Load the library and say which GPUs it supports, or why it cannot be used and what computes instead."""
    try:
        built, stale = _load()
    except UnusableError as error:
        return BackendStatus("native on CUDA", False, f"{error.reason}; {FALLBACK_NOTE}", error.remedy)
    gpus = [_gpu(index, built["archs"]) for index in range(torch.cuda.device_count())]
    reason = f"CUDA C++, built with CUDA {built['nvcc']}; " + ", ".join(gpus)
    if stale:
        return BackendStatus(
            "native on CUDA", True, f"{reason}; out of date: csrc has changed", "run 'make build-cuda'"
        )
    return BackendStatus("native on CUDA", True, reason)


def takes(index: int) -> bool:
    """Whether the library supports this GPU. If not, the reason is logged once."""
    return _takes(index)


# Constant for the life of the process, and torch.compile cannot trace it. A cached function would be traced regardless
# of the attribute, hence the wrapper.
takes._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _takes(index: int) -> bool:
    try:
        built, _ = _load()
    except UnusableError as error:
        _log.info("%s; %s", error.reason, FALLBACK_NOTE)
        return False
    if why_not := _unfit(torch.cuda.get_device_capability(index), built["archs"]):
        _log.warning("%s, %s; %s", torch.cuda.get_device_name(index), why_not, FALLBACK_NOTE)
    return not why_not


@functools.cache
def _load() -> tuple[dict[str, Any], bool]:
    if torch.version.cuda is None:
        raise UnusableError("this torch is built without CUDA", "install a torch with CUDA to compute on NVIDIA GPUs")
    if not torch.cuda.is_available():
        raise UnusableError("no usable NVIDIA GPU or driver", "see what nvidia-smi says")
    try:
        return load(LIBRARY, _other_cuda)
    except UnusableError as error:
        if shutil.which("nvcc"):
            raise
        toolkit = f"there is no nvcc: install the CUDA toolkit {OLDEST_NVCC} or newer, then {error.remedy}"
        raise UnusableError(error.reason, toolkit) from None


def _other_cuda(built: dict[str, Any]) -> str:
    """Why a library of another CUDA version than torch's cannot be used: its runtime may need a newer driver."""
    ours = str(torch.version.cuda)
    if built["nvcc"].split(".")[0] == ours.split(".")[0]:
        return ""
    return (
        f"it is built with CUDA {built['nvcc']}, and this torch with CUDA {ours}: both must have the same major version"
    )


def _gpu(index: int, archs: list[int]) -> str:
    why_not = _unfit(torch.cuda.get_device_capability(index), archs)
    name = torch.cuda.get_device_name(index)
    return f"not on {name}, {why_not}; {FALLBACK_NOTE}" if why_not else f"on {name}"


def _unfit(capability: tuple[int, int], archs: list[int]) -> str:
    """Why a GPU cannot run code for ``archs`` (90 for sm_90) with PTX for the last of them; empty if it can."""
    gpu = f"which is sm_{capability[0]}{capability[1]}"
    if capability < OLDEST_GPU:
        return f"{gpu}, too old: sm_80 or newer is needed"
    # Machine code runs on later GPUs of the same generation, PTX on all later GPUs.
    of_generation = [divmod(arch, 10)[1] for arch in archs if divmod(arch, 10)[0] == capability[0]]
    if any(minor <= capability[1] for minor in of_generation) or capability >= divmod(archs[-1], 10):
        return ""
    built_for = ", ".join(f"sm_{arch}" for arch in archs)
    return (
        f"{gpu}, for which the native CUDA library has no code ({built_for}): "
        f"run GLOW_KERNELS_CUDA_ARCHS={capability[0]}{capability[1]} make build-cuda"
    )
