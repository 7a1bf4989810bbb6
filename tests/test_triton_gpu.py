"""Triton kernels on a GPU: accuracy on the standard shapes, no waiting, graphs, streams, devices, compilation.

Skipped without a GPU; ``make gpu`` runs them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from operators import assert_accurate, unit_of_sum
from torch import Tensor

import glow_kernels as gk
from glow_kernels.bench.operators import STANDARD_SHAPES
from glow_kernels.ops import coupling_conv1x1

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not gk.backend_status("triton").available, reason=gk.backend_status("triton").reason),
]

Function = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with gk.use_backend("triton"):
        yield


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cuda") -> dict[str, Tensor]:
    """All arguments that the functions below select by name."""
    draw = functools.partial(torch.randn, dtype=torch.float64)
    channels = shape[1]
    data = {"x": draw(shape), "grad": draw(shape), "h": draw(shape[0], 2 * channels, *shape[2:])}
    weight = torch.linalg.qr(draw(channels, channels)).Q + 0.1 * draw(channels, channels) / channels**0.5
    parameters = {
        "lam": draw(shape[0]),
        "log_scale": 0.3 * draw(channels),
        "bias": draw(channels),
        "weight": weight,
    }
    wide = torch.promote_types(dtype, torch.float32)
    return {name: tensor.to(device, dtype) for name, tensor in data.items()} | {
        name: tensor.to(device, wide) for name, tensor in parameters.items()
    }


def _differentiated(function: Function, *names: str) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """Results of ``function`` and the gradients of all its arguments."""

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        leaves = [given[name].detach().requires_grad_() for name in names]
        results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        upstream = [given["grad" if result.dim() > 1 else "lam"].to(result.dtype) for result in results]
        return [*results, *torch.autograd.grad(results, leaves, upstream)]

    return run


def _across_steps(x: Tensor, h: Tensor, matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The coupling of the second half of the channels, and the linear map."""
    options = ("sigmoid", [1.0, 2.0, 1.0, 0.0, 0.0, 0.0], "interleaved_shift_scale", "shift_scale")
    return coupling_conv1x1.forward(x, h[:, : x.shape[1]], matrix, shift, *options)


CALLS: dict[str, Callable[[dict[str, Tensor]], list[Tensor]]] = {
    "actnorm_conv1x1": _differentiated(gk.actnorm_conv1x1, "x", "log_scale", "bias", "weight"),
    "actnorm_conv1x1_inverse": _differentiated(gk.actnorm_conv1x1_inverse, "x", "log_scale", "bias", "weight"),
    "actnorm_conv1x1_reversible_backward": lambda given: [
        result
        for result in gk.ops.actnorm_conv1x1_reversible_backward(
            *(given[name] for name in ("grad", "lam", "x", "log_scale", "bias", "weight"))
        )
        if result is not None
    ],
    "affine_coupling": _differentiated(gk.affine_coupling, "x", "h"),
    "affine_coupling_inverse": _differentiated(gk.affine_coupling_inverse, "x", "h"),
    "affine_coupling_reversible_backward": lambda given: list(
        gk.ops.affine_coupling_reversible_backward(*(given[name] for name in ("grad", "lam", "x", "h")))[:3]
    ),
    "coupling_conv1x1": _differentiated(_across_steps, "x", "h", "weight", "bias"),
    "gaussian_log_prob": _differentiated(gk.gaussian_log_prob, "x", "h"),
    "actnorm_statistics": lambda given: list(gk.actnorm_statistics(given["x"])),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Check equality in every bit."""
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@every_call
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", STANDARD_SHAPES, ids=str)
def test_standard_shapes_are_as_accurate_as_eager(call, shape, channels_last):
    given = arguments(shape)
    if channels_last:
        given = {
            name: tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
            for name, tensor in given.items()
        }
    actual = call(given)
    with gk.use_backend("reference"):
        truth = call({name: tensor.double() for name, tensor in given.items()})
        eager = call(given)
    for index, (one, true, other) in enumerate(zip(actual, truth, eager, strict=True)):
        assert_accurate(one, true, other, f"result {index}", unit_of_sum(one, given["x"], 1.0))


@every_call
@pytest.mark.parametrize("channels", [12, 96])
def test_nothing_waits_for_the_device(call, channels):
    given = arguments((4, channels, 8, 8))
    call(given)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_call
@pytest.mark.parametrize("channels", [12, 96])
def test_a_captured_graph_replays_on_new_data(call, channels):
    given = arguments((4, channels, 8, 8))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(given)
    for _ in range(2):
        fresh = arguments((4, channels, 8, 8))
        for name, tensor in given.items():
            tensor.copy_(fresh[name])
        graph.replay()
        assert_equal(results, call(fresh))


@every_call
def test_kernels_run_on_the_current_stream(call):
    given = arguments((4, 12, 8, 8))
    expected = call(given)
    late = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
    late["weight"].copy_(torch.eye(12))
    call(late)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # A kernel that does not wait for this stream computes with zeros.
        torch.cuda._sleep(100_000_000)
        for name, tensor in late.items():
            tensor.copy_(given[name])
        results = call(late)
    side.synchronize()
    assert_equal(results, expected)


@every_call
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_their_tensors(call):
    given = arguments((4, 12, 8, 8))
    there = {name: tensor.to("cuda:1") for name, tensor in given.items()}
    assert torch.cuda.current_device() == 0
    assert_equal([result.to("cuda:0") for result in call(there)], call(given))


def test_a_flow_step_becomes_one_graph():
    def flow_step(x: Tensor, h: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        z, linear_log_det = gk.actnorm_conv1x1(x, *parameters)
        y, coupling_log_det = gk.affine_coupling(z, h)
        return y, linear_log_det + coupling_log_det

    names = ("x", "h", "log_scale", "bias", "weight")
    torch._dynamo.reset()
    for mode in ("default", "reduce-overhead"):
        compiled = torch.compile(flow_step, fullgraph=True, mode=mode)
        for _ in range(3):
            given = arguments((4, 12, 8, 8))
            actual, expected = (_differentiated(function, *names)(given) for function in (compiled, flow_step))
            # The compiler fuses a product and a sum of log-determinants into one rounding instead of two.
            for one, other in zip(actual, expected, strict=True):
                assert (one - other).abs().max() <= 1e-6 * other.abs().max()
