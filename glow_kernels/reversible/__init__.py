"""Memory-saving training of chains of invertible layers."""

from glow_kernels.reversible.chain import POLICIES, ReversibleSequential
from glow_kernels.reversible.report import Reconstruction, reconstruction_error

__all__ = ["POLICIES", "Reconstruction", "ReversibleSequential", "reconstruction_error"]
