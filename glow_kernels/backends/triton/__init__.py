"""Triton kernels for NVIDIA and AMD GPUs, and for the CPU in Triton's interpreter, which is slow and meant for tests.

Importing this loads no Triton.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from glow_kernels.backends import BackendStatus

# Triton reads the variable when it decorates a kernel, which happens after this.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
_INTERPRET = "set TRITON_INTERPRET=1 before Python starts to run the kernels slowly on the CPU"


def status() -> BackendStatus:
    """Whether Triton is installed, and there is a GPU that it supports or the interpreter is requested."""
    if importlib.util.find_spec("triton") is None:
        return BackendStatus("triton", False, "Triton is not installed", "run: pip install 'triton>=3.4'")
    if not INTERPRETED:
        missing = _missing_gpu()
        if missing:
            return BackendStatus("triton", False, missing, _INTERPRET)
    import triton

    if version() < (3, 4):
        reason = f"the kernels need Triton 3.4 or newer, this is {triton.__version__}"
        return BackendStatus("triton", False, reason, "run: pip install 'triton>=3.4'")
    where = "interpreted on the CPU, slow" if INTERPRETED else torch.cuda.get_device_name()
    return BackendStatus("triton", True, f"Triton {triton.__version__}, {where}")


def version() -> tuple[int, ...]:
    """Major and minor version of Triton."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


# Constant for the life of the process, and torch.compile cannot trace it.
version._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _missing_gpu() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "no usable GPU or driver" if built else "no GPU: this torch is built without CUDA and ROCm"
    if torch.version.hip:
        return ""
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    if min(capabilities) >= (8, 0):
        return ""
    return f"the kernels need GPUs of compute capability 8.0 or newer, got {'.'.join(map(str, min(capabilities)))}"
