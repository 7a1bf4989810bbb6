"""Which arguments the Triton kernels take; a function for every operator. Importing this loads no Triton."""

from __future__ import annotations

from typing import Any


def _nothing(function: str, *args: Any) -> bool:
    return False


actnorm_conv1x1 = actnorm_statistics = affine_coupling = gaussian_log_prob = _nothing
