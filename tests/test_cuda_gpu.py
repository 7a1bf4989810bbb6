"""The CUDA kernels on a real GPU: streams, graphs and devices, and tensors large enough for a GPU.

The operator tests prove everything else, and run on a GPU too.
"""

from __future__ import annotations

import math

import pytest
import torch
from operators import assert_accurate, assert_same_bits

import glow_kernels as gk
from glow_kernels.backends.native import cuda
from glow_kernels.ops.actnorm_conv1x1 import apply, apply_backward, apply_reversible_backward

pytestmark = pytest.mark.skipif(not cuda.status().available, reason=cuda.status().reason)


def inputs(device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    """Data x and the conditioning h."""
    return torch.randn(8, 12, 32, 32, device=device), torch.randn(8, 24, 32, 32, device=device)


def compute(x: torch.Tensor, h: torch.Tensor) -> list[torch.Tensor]:
    """A result of every operator."""
    y, log_det = gk.affine_coupling(x, h)
    weight, vector = torch.eye(12, device=x.device) + 0.1, torch.full((12,), 0.1, device=x.device)
    return [y, log_det, *gk.actnorm_conv1x1(y, vector, vector, weight), gk.gaussian_log_prob(y, h)]


@pytest.fixture(autouse=True)
def _native():
    with gk.use_backend("native"):
        yield


def test_a_graph_replays_what_was_captured():
    x, h = inputs()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        compute(x, h)  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = compute(x, h)
    for part in (x, h):
        part.copy_(torch.randn_like(part))
    graph.replay()
    assert_same_bits(results, compute(x, h))


def test_kernels_wait_for_what_is_on_their_stream():
    x, h = inputs()
    expected = compute(x, h)
    torch.cuda.synchronize()
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        results = compute(late, h)
    stream.synchronize()
    assert_same_bits(results, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_gpu_are_computed_there():
    x, h = inputs("cuda:1")
    for result in compute(x, h):
        assert result.device == x.device
    assert torch.cuda.current_device() == 0


# Shapes that the tensor cores compute, some of which do not fill their tiles.
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(16, 48, 64, 64), (40, 25, 37, 41), (16, 64, 64, 64)], ids=str)
def test_many_channels_of_a_large_tensor(shape, memory_format):
    x, grad = (torch.randn(shape, device="cuda").contiguous(memory_format=memory_format) for _ in range(2))
    matrix = torch.linalg.qr(torch.randn(shape[1], shape[1], device="cuda")).Q.contiguous()
    inverse, shift = matrix.T.contiguous(), torch.randn(shape[1], device="cuda")

    def compute(x, grad, matrix, inverse, shift):
        reversible = apply_reversible_backward(grad, x, matrix, inverse, shift)
        return apply(x, matrix, shift), *apply_backward(grad, x, matrix), *reversible

    inputs = x, grad, matrix, inverse, shift
    results = compute(*inputs)
    assert_same_bits(results, compute(*inputs))
    with gk.use_backend("reference"):
        truths, eagers = compute(*(tensor.double() for tensor in inputs)), compute(*inputs)
    for index, (result, truth, eager) in enumerate(zip(results, truths, eagers, strict=True)):
        terms = 1 if result.shape == x.shape else x.numel() / shape[1]
        assert_accurate(result, truth, eager, f"result {index}", unit=math.sqrt(terms))
