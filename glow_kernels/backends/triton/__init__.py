"""Triton kernels: not yet part of this version."""

from __future__ import annotations

from glow_kernels.backends import BackendStatus


def status() -> BackendStatus:
    """Say that there are no kernels yet."""
    return BackendStatus(
        "triton",
        False,
        "its kernels are not part of this version",
        "use backend 'reference', or leave the choice open",
    )
