"""Compile the kernels of a model before they are needed, and measure which launch parameters are fastest on a GPU."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glow_kernels.backends import backend_status, faster, implementation
from glow_kernels.backends.native import cuda
from glow_kernels.errors import BackendUnavailableError, UsageError
from glow_kernels.ops._checks import check_module, check_whole

Call = Callable[[], object]


def warmup(model: nn.Module, shape: Sequence[int]) -> None:
    """Run forward, backward and inverse of a flow once, so that all kernels it needs are compiled.

    Triton compiles a kernel at its first launch, which takes a second or so. This runs a copy: the model, its gradients
    and the random number generators do not change. On a CPU it runs too, but there is nothing to compile.

    Args:
        model: a flow with ``encode`` and ``decode``, like :class:`glow_kernels.models.Glow`, or a layer whose forward
            returns ``(z, log_det)`` and that has an ``inverse``; on the device and in the type that it will be used in.
        shape: shape of its input, (B, C, *spatial).

    Raises:
        TypeError: ``model`` is not a module, or ``shape`` not a sequence of whole numbers.
        UsageError: the model has no parameters (which determine the device), or ``shape`` is invalid.
    """
    check_module("model", model)
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise UsageError(f"model must have parameters, got a {type(model).__name__} without any")
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape must be a sequence of whole numbers, got {shape!r}")
    for size in shape:
        check_whole("a size in shape", size)
    if len(shape) < 2 or min(shape) < 1:
        raise UsageError(f"shape must be (B, C, *spatial) with sizes of at least 1, got {tuple(shape)}")
    # A server may call this in inference mode, whose tensors have no backward.
    with torch.inference_mode(False), torch.random.fork_rng([parameter.device] if parameter.is_cuda else []):
        # In training mode, so that a flow that is not initialised initialises itself.
        flow: Any = copy.deepcopy(model).train()
        x = torch.rand(tuple(shape), device=parameter.device, dtype=parameter.dtype).requires_grad_()
        labels: tuple[Tensor, ...] = ()
        if getattr(model, "num_classes", None) is not None:
            labels = (torch.zeros(shape[0], dtype=torch.int64, device=parameter.device),)
        with torch.enable_grad():
            output = flow(x, *labels)
            results: tuple[Tensor, ...] = output if isinstance(output, tuple) else (output,)
            torch.autograd.backward([result.sum() for result in results])
        with torch.no_grad():
            if hasattr(flow, "decode"):
                flow.decode(flow.encode(x, *labels), *labels)
            else:
                flow.inverse(results[0])


def tune(folder: Path | None = None) -> tuple[Path, dict[str, dict[str, int]]]:
    """Measure launch parameters for every family of Triton kernels on the current GPU, and write the table of this GPU.

    The table is updated after every family, so an interruption loses only one measurement. Compilation runs in
    subprocesses, so a script that calls this must do so under ``if __name__ == "__main__":``.

    Args:
        folder: where to write the table, by default where the package looks for it.

    Returns:
        The file, and the fastest parameters per family.

    Raises:
        BackendUnavailableError: there is no GPU, or Triton cannot use it.
    """
    status = backend_status("triton")
    if not status.available or not torch.cuda.is_available():
        reason = status.reason if not status.available else "the interpreter is on and there is no GPU"
        raise BackendUnavailableError(f"tuning needs a GPU that Triton supports: {reason}; run it on such a machine")
    launch = implementation("triton", "launch")
    path: Path = (folder or launch.TUNED) / f"{launch.table_name(torch.cuda.get_device_name())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    table: dict[str, dict[str, int]] = json.loads(path.read_text()) if path.exists() else {}
    _compile_all()
    for family, calls in _families(torch.device("cuda")).items():
        table[family] = _fastest(family, calls)
        path.write_text(json.dumps(table, indent=2) + "\n")
    return path, table


# (samples, height and width) of images of 12 channels: limited by launches, and limited by bandwidth.
_SMALL, _LARGE = (64, 16), (64, 128)


def _families(device: torch.device, sizes: Sequence[tuple[int, int]] = (_SMALL, _LARGE)) -> dict[str, list[Call]]:
    """The calls that are measured for every family: all sizes, in float32, hidden layers in bfloat16."""
    families: dict[str, list[Call]] = {}
    for samples, side in sizes:
        for family, calls in _calls(samples, side, device).items():
            families.setdefault(family, []).extend(calls)
    return families


def _calls(samples: int, side: int, device: torch.device) -> dict[str, list[Call]]:
    """The calls of one size, by family."""
    names = ("affine_coupling", "actnorm_conv1x1", "actnorm_statistics", "bias_relu", "coupling_conv1x1")
    coupling, linear, statistics, bias_relu, across_steps = (implementation("triton", name) for name in names)
    options = (None, "sigmoid", [1.0, 2.0, 1.0, 0.0, 0.0, 0.0], "interleaved_shift_scale", "shift_scale")
    lam = torch.randn(samples, device=device)
    families: dict[str, list[Call]] = {}
    # Like the levels of a model: channels double, height and width halve.
    for channels, block_c in ((12, 16), (24, 32), (48, 64)):
        data = torch.randn(samples, channels, side * 12 // channels, side * 12 // channels, device=device)
        h = torch.randn_like(data)
        matrix, shift = torch.eye(channels, device=device), torch.zeros(channels, device=device)
        half = data[:, channels // 2 :]
        if channels == 12:
            families["elementwise"] = [
                functools.partial(coupling.forward, half, h, *options),
                functools.partial(coupling.reversible_backward, half, lam, half, h, *options),
            ]
            families["statistics"] = [functools.partial(statistics.forward, data)]
            hidden = torch.randn(samples, 128, side, side, dtype=torch.bfloat16, device=device)
            hidden = hidden.contiguous(memory_format=torch.channels_last)
            families["bias_relu"] = [functools.partial(bias_relu.backward, hidden, hidden, 1)]
        calls: dict[str, tuple[Callable[..., object], tuple[Any, ...]]] = {
            "linear": (linear.apply, (data, matrix, shift)),
            "linear_sums": (linear.apply_backward, (data, data, matrix, False)),
        }
        if block_c <= 32:  # more channels take several launches of the other families
            calls["linear_backward"] = linear.apply_reversible_backward, (data, data, matrix, matrix, shift)
        if (samples, side) != _LARGE:  # for large data a model uses two operators instead
            calls["coupling"] = across_steps.forward, (data, h, matrix, shift, *options[1:])
            calls["coupling_backward"] = across_steps.backward, (data, lam, data, h, matrix, *options[1:])
        for name, (function, arguments) in calls.items():
            families[f"{name}_{block_c}"] = [functools.partial(function, *arguments)]
    return families


def _fastest(family: str, calls: Sequence[Call]) -> dict[str, int]:
    """The parameters with the smallest product of times, so that all calls have equal weight."""
    from triton.testing import do_bench

    times: list[tuple[float, dict[str, int]]] = []
    for parameters in _candidates(family):
        with _measured(family, parameters) as fits:
            if all(fits(call) for call in calls):
                medians = [do_bench(call, warmup=5, rep=20, return_mode="median") for call in calls]
                times.append((math.prod(medians), parameters))
    return min(times, key=lambda pair: pair[0])[1]


@contextmanager
def _measured(family: str, parameters: dict[str, int]) -> Iterator[Callable[[Call], bool]]:
    """Launch this family with these parameters inside the ``with`` block.

    Yields a function that runs a call and returns whether its tiles fit the GPU.
    """
    from triton.runtime.errors import OutOfResources

    def fits(call: Call) -> bool:
        try:
            call()
        except OutOfResources:
            return False
        return True

    overrides = implementation("triton", "launch").OVERRIDES
    overrides[family] = parameters
    try:
        yield fits
    finally:
        del overrides[family]


def _compile_all() -> None:
    """Compile all kernels that will be measured, in parallel processes: compiling takes longer than measuring."""
    families = list(_families(torch.device("meta"), [_SMALL]))
    jobs = [(family, parameters) for family in families for parameters in _candidates(family)]
    # Not fork: a forked process cannot use CUDA.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), context) as pool:
        list(pool.map(_compile, *zip(*jobs, strict=True)))


def _compile(family: str, parameters: dict[str, int]) -> None:
    with _measured(family, parameters) as fits:
        for call in _families(torch.device("cuda"), [_SMALL])[family]:
            fits(call)


def _candidates(family: str) -> Iterator[dict[str, int]]:
    """The default parameters, and others that give a thread 4 to 32 elements."""
    usual = implementation("triton", "launch").DEFAULTS[family]
    yield usual
    for elements, num_warps in itertools.product((512, 1024, 2048, 4096), (2, 4, 8)):
        parameters = {"elements": elements, "num_warps": num_warps}
        if 4 <= elements // (32 * num_warps) <= 32 and parameters != usual:
            yield parameters


def compare(folder: Path | None = None) -> tuple[Path, faster.Table]:
    """Measure CUDA C++ against Triton on the current GPU, per operator and size, and write which one is faster.

    Args:
        folder: where to write the table, by default where the package looks for it.

    Returns:
        The file, and per operator pairs of a number of elements and the backend that is faster up to that number.

    Raises:
        BackendUnavailableError: one of the two backends cannot run here.
    """
    for status in (backend_status("triton"), cuda.status()):
        if not status.available or not torch.cuda.is_available():
            raise BackendUnavailableError(f"there is nothing to compare: {status.reason}; {status.remedy}")
    table: faster.Table = {}
    for size in ((1, 4), (16, 8), (64, 16), (64, 32), (64, 128)):
        for operator, arguments in _arguments(*size, torch.device("cuda")).items():
            seconds = {backend: _seconds(f"{operator}_{backend}", arguments) for backend in ("native", "triton")}
            row, fastest = table.setdefault(operator, []), min(seconds, key=seconds.__getitem__)
            if row and row[-1][1] == fastest:
                row.pop()
            row.append((faster.elements(arguments), fastest))
    path = (folder or faster.TABLES) / f"{faster.table_name(torch.cuda.get_device_name())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=2) + "\n")
    return path, table


def _arguments(samples: int, side: int, device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator, for float32 data of 12 channels and bfloat16 hidden layers of 128 channels."""
    x = torch.randn(samples, 12, side, side, device=device)
    h, lam = torch.randn(samples, 24, side, side, device=device), torch.randn(samples, device=device)
    matrix, vector = torch.eye(12, device=device), torch.zeros(12, device=device)
    hidden = torch.randn(samples, 128, side, side, dtype=torch.bfloat16, device=device)
    hidden = hidden.contiguous(memory_format=torch.channels_last)
    coupling = (h, None, "sigmoid", [1.0, 2.0, 1.0, 0.0, 0.0, 0.0], "interleaved_shift_scale", "shift_scale")
    arguments: dict[str, tuple[Any, ...]] = {
        "actnorm_statistics_forward": (x,),
        "actnorm_conv1x1_apply": (x, matrix, vector),
        "actnorm_conv1x1_apply_backward": (x, x, matrix, True),
        "actnorm_conv1x1_apply_reversible_backward": (x, x, matrix, matrix, vector),
        "bias_relu_forward": (hidden, hidden[0, :, 0, 0].contiguous()),
        "bias_relu_backward": (hidden, hidden, 1),
        "bias_relu_bias_backward": (hidden, 1),
        "bias_relu_pad": (x, 16, torch.bfloat16, True, 0),
        "gaussian_log_prob_backward": (lam, x, h, "interleaved_mean_log_sd"),
    }
    across = (x, torch.randn_like(x))  # half of the channels condition
    arguments["coupling_conv1x1_forward"] = (*across, matrix, vector, *coupling[2:])
    arguments["coupling_conv1x1_backward"] = (x, lam, *across, matrix, *coupling[2:])
    for function in ("forward", "inverse"):
        arguments[f"affine_coupling_{function}"] = (x, *coupling)
    for function in ("backward", "inverse_backward", "reversible_backward"):
        arguments[f"affine_coupling_{function}"] = (x, lam, x, *coupling)
    arguments["affine_coupling_in_place_backward"] = (x.clone(), lam, x.clone(), h, *coupling[2:])
    for function in ("forward", "sample", "standardize"):
        arguments[f"gaussian_log_prob_{function}"] = (x, h, "interleaved_mean_log_sd")
    for function in ("sample_backward", "standardize_backward"):
        arguments[f"gaussian_log_prob_{function}"] = (x, x, h, "interleaved_mean_log_sd")
    return arguments | _folding_arguments(samples, device) | _filter_arguments(8 * side, device)


def _filter_arguments(width: int, device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Arguments for the filters of a network that reads 6 of the channels, with convolutions in half precision."""
    shapes = ((width, 6, 3, 3), (width, width, 1, 1), (12, width, 3, 3))
    weights = [torch.randn(shape, device=device) for shape in shapes]
    vectors, factors = [weight.new_zeros(len(weight)) for weight in weights], [1.0, 1.0, 3.0]
    scaled = [tensor.bfloat16() for pair in zip(weights, vectors, strict=True) for tensor in pair]
    one = (weights[1], vectors[1], vectors[1], 1.0)
    return {
        "scale_filters_forward": (*one, torch.bfloat16),
        "scale_filters_backward": (*scaled[2:4], *one),
        "scale_filters_forward_all": (
            weights,
            vectors,
            vectors,
            factors,
            torch.bfloat16,
            [n for shape in shapes for n in shape[:2]],
        ),
        "scale_filters_backward_all": (scaled, weights, vectors, vectors, factors),
    }


def _folding_arguments(steps: int, device: torch.device) -> dict[str, tuple[Any, ...]]:
    vector, matrix = torch.zeros(steps, 12, device=device), torch.eye(12, device=device).repeat(steps, 1, 1)
    number = torch.zeros(steps, device=device)
    parameters, lu = (vector, vector, matrix, None), (matrix, matrix, matrix, vector, torch.ones_like(vector))
    arguments: dict[str, tuple[Any, ...]] = {
        "actnorm_conv1x1_lu_weight": lu,
        "actnorm_conv1x1_lu_weight_backward": (matrix, number, *lu),
    }
    for function in ("fold", "fold_inverse"):
        arguments[f"actnorm_conv1x1_{function}"] = parameters
        arguments[f"actnorm_conv1x1_{function}_backward"] = (matrix, vector, number, *parameters)
    return arguments


def _seconds(operator: str, arguments: tuple[Any, ...]) -> float:
    """Time of a call in a long sequence of calls, so it is limited by the slower of host and GPU."""
    call = getattr(torch.ops.glow_kernels, operator).default
    times = []
    for calls in (10, 100, 100, 100):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call(*arguments)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return min(times[1:])
