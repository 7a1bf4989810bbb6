"""Fast, memory-light operators, layers and models for Glow-style normalizing flows.

Importing this package loads neither Triton nor a shared library, and creates no CUDA context.
"""

from glow_kernels import models, nn
from glow_kernels.allocator import tune_allocator
from glow_kernels.backends import available_backends, backend_status, use_backend
from glow_kernels.graphs import CapturedStep
from glow_kernels.interop import accelerate, restore
from glow_kernels.ops import (
    ScaleMap,
    actnorm_conv1x1,
    actnorm_conv1x1_inverse,
    actnorm_statistics,
    additive_coupling,
    additive_coupling_inverse,
    affine_coupling,
    affine_coupling_inverse,
    gaussian_log_prob,
    gaussian_sample,
    gaussian_standardize,
)
from glow_kernels.reversible import ReversibleSequential, reconstruction_error
from glow_kernels.tuning import warmup

__version__ = "0.1.0"

__all__ = [
    "CapturedStep",
    "ReversibleSequential",
    "ScaleMap",
    "accelerate",
    "actnorm_conv1x1",
    "actnorm_conv1x1_inverse",
    "actnorm_statistics",
    "additive_coupling",
    "additive_coupling_inverse",
    "affine_coupling",
    "affine_coupling_inverse",
    "available_backends",
    "backend_status",
    "gaussian_log_prob",
    "gaussian_sample",
    "gaussian_standardize",
    "models",
    "nn",
    "reconstruction_error",
    "restore",
    "tune_allocator",
    "use_backend",
    "warmup",
]
