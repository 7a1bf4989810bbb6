"""The definition of every operator, in plain PyTorch: any device, any floating-point type, any order of derivative."""

from glow_kernels.backends import BackendStatus


def status() -> BackendStatus:
    """The reference runs wherever PyTorch does."""
    return BackendStatus("reference", True, "plain PyTorch, every device and floating-point type")
