"""Benchmarks for pytest-benchmark: ``pytest benchmarks``, with its options to save, compare and plot results."""

import itertools

import pytest
import torch

import glow_kernels as gk
from glow_kernels.bench import operators
from glow_kernels.bench.operators import DIRECTIONS, OPERATORS, QUICK_SHAPES, Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    Case(name, direction, shape, device=DEVICE)
    for name, direction, shape in itertools.product(OPERATORS, DIRECTIONS, QUICK_SHAPES)
    if direction in OPERATORS[name].traffic
]


@pytest.mark.parametrize("backend", gk.available_backends())
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator}-{case.direction}-{case.shape}")
def test_operator(benchmark, case, backend):
    operator = OPERATORS[case.operator]
    torch.manual_seed(0)
    arguments = operator.arguments(case)
    grads = operators.upstream(operator, case, arguments)
    with gk.use_backend(backend):
        call = operators.call(operator.ours, case.direction, arguments, grads)
        benchmark(call if DEVICE == "cpu" else lambda: (call(), torch.cuda.synchronize()))
