"""Benchmarks of speed, distance to the limit and memory, against eager, ``torch.compile`` and other packages.

``glow-kernels bench`` runs them. All measurements go to one JSON-lines file, from which tables, plots and comparisons
are made.
"""
