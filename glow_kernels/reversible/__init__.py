"""Memory-saving training of chains of invertible layers."""

from glow_kernels.reversible.chain import ReversibleSequential

__all__ = ["ReversibleSequential"]
