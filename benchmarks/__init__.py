"""Committed results, and entry points of the benchmarks for developers; the code is in ``glow_kernels.bench``."""
