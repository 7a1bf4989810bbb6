"""The CUDA kernels on a real GPU: streams, graphs and devices. Everything else the operator tests prove there too."""

from __future__ import annotations

import pytest
import torch
from operators import assert_same_bits

import glow_kernels as gk
from glow_kernels.backends.native import cuda

pytestmark = pytest.mark.skipif(not cuda.status().available, reason=cuda.status().reason)


def inputs(device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    """Data and what conditions it."""
    return torch.randn(8, 12, 32, 32, device=device), torch.randn(8, 24, 32, 32, device=device)


def compute(x: torch.Tensor, h: torch.Tensor) -> list[torch.Tensor]:
    """Something of every operator."""
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
