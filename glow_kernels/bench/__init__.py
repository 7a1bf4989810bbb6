"""Benchmarks: how fast, how far from the limit, how much memory; against eager, ``torch.compile`` and other packages.

``glow-kernels bench`` runs them. Everything measured goes to one JSON-lines file, from which tables, plots and
comparisons are made.
"""
