"""Results, and entry points of the benchmarks for developers; the code is ``glow_kernels.bench``."""
