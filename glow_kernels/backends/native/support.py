"""What the shared library takes."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense_cpu(*tensors: Tensor) -> bool:
    """Whether all tensors are ordinary strided tensors on the CPU."""
    return all(tensor.device.type == "cpu" and tensor.layout == torch.strided for tensor in tensors)
