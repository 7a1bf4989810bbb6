"""Times of the operators in every direction and standard shape, as a table.

Each case is computed in turn by PyTorch as people write it (eager), the same under torch.compile, and the backend of
this package that is the default here. The copy clones every tensor that the operator must read, which is as many bytes
as the operator moves, or fewer. A case whose results are not as accurate as eager's is reported as wrong, not timed.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import glow_kernels as gk
from benchmarks import textbook
from benchmarks.timing import busy_cores, interleaved, median_ratio

# (B, C, H, W): images of 32, 64 and 256 pixels at the levels of a Glow, and two that no cache holds.
SHAPES = [
    *[(64, 12, 16, 16), (64, 24, 8, 8), (64, 48, 4, 4)],
    *[(32, 12, 32, 32), (32, 24, 16, 16), (32, 48, 8, 8)],
    *[(4, 12, 128, 128), (4, 24, 64, 64), (4, 48, 32, 32), (4, 96, 16, 16), (4, 192, 8, 8)],
    *[(64, 12, 128, 128), (32, 48, 64, 64)],
]
DIRECTIONS = ("forward", "inverse", "backward", "reversible_backward")
Function = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Operator:
    """Ours and the textbook's functions, and random arguments for a shape; the first is the data."""

    name: str
    ours: Function
    ours_inverse: Function
    ours_reversible: Callable[..., tuple[Tensor | None, ...]]
    plain: Function
    plain_inverse: Function
    arguments: Callable[[tuple[int, int, int, int]], list[Tensor]]


def conv_arguments(shape: tuple[int, int, int, int]) -> list[Tensor]:
    """Data, log_scale, bias and a rotation."""
    channels = shape[1]
    weight = torch.linalg.qr(torch.randn(channels, channels)).Q.contiguous()
    return [torch.randn(shape), 0.1 * torch.randn(channels), 0.1 * torch.randn(channels), weight]


def coupling_arguments(shape: tuple[int, int, int, int]) -> list[Tensor]:
    """The second half of the channels of a tensor of this shape, and the network's output."""
    return [torch.randn(shape)[:, shape[1] // 2 :], torch.randn(shape)]


OPERATORS = [
    Operator(
        "actnorm_conv1x1",
        gk.actnorm_conv1x1,
        gk.actnorm_conv1x1_inverse,
        lambda grad, grad_log_det, z, *others: gk.ops.actnorm_conv1x1_reversible_backward(
            grad, grad_log_det, z, *others
        ),
        textbook.actnorm_conv1x1,
        textbook.actnorm_conv1x1_inverse,
        conv_arguments,
    ),
    Operator(
        "affine_coupling",
        gk.affine_coupling,
        gk.affine_coupling_inverse,
        lambda grad, grad_log_det, y, h: gk.ops.affine_coupling_reversible_backward(grad, grad_log_det, y, h),
        textbook.affine_coupling,
        textbook.affine_coupling_inverse,
        coupling_arguments,
    ),
]


def backward(function: Function, arguments: list[Tensor], upstream: tuple[Tensor, Tensor]) -> Callable[[], object]:
    """The backward alone, of a forward that was run once."""
    leaves = [argument.detach().requires_grad_() for argument in arguments]
    results = function(*leaves)
    return lambda: torch.autograd.grad(results, leaves, upstream, retain_graph=True)


def restore_and_differentiate(
    function: Function, inverse: Function, arguments: list[Tensor], upstream: tuple[Tensor, Tensor]
) -> Callable[[], object]:
    """What a backward without stored inputs takes otherwise: the inverse, the forward again, and its backward."""

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            data, _ = inverse(*arguments)
        leaves = [argument.detach().requires_grad_() for argument in (data, *arguments[1:])]
        return (data, *torch.autograd.grad(function(*leaves), leaves, upstream))

    return run


def candidates(
    operator: Operator, direction: str, arguments: list[Tensor], with_compile: bool
) -> dict[str, Callable[[], object]]:
    """Eager, compiled and ours, as functions without arguments."""
    data = arguments[0]
    upstream = (torch.randn(data.shape), torch.randn(data.shape[0]))

    def plain(wrap: Callable[[Function], Function]) -> Callable[[], object]:
        forward, inverse = wrap(operator.plain), wrap(operator.plain_inverse)
        if direction in ("forward", "inverse"):
            function = forward if direction == "forward" else inverse
            return lambda: function(*arguments)
        if direction == "backward":
            return backward(forward, arguments, upstream)
        return restore_and_differentiate(forward, inverse, arguments, upstream)

    def compiled(function: Function) -> Function:
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False, fullgraph=True)

    ours: Callable[[], object]
    if direction == "backward":
        ours = backward(operator.ours, arguments, upstream)
    elif direction == "reversible_backward":
        ours = lambda: operator.ours_reversible(*upstream, *arguments)  # noqa: E731
    else:
        function = operator.ours if direction == "forward" else operator.ours_inverse
        ours = lambda: function(*arguments)  # noqa: E731
    found = {"copy": lambda: [argument.clone() for argument in moved(direction, arguments, upstream)]}
    found["eager"] = plain(lambda function: function)
    if with_compile:
        found["compile"] = plain(compiled)
    return {**found, "ours": ours}


def moved(direction: str, arguments: list[Tensor], upstream: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The large tensors that a direction must read."""
    large = [argument for argument in arguments if argument.dim() == 4]
    return large if direction in ("forward", "inverse") else [*large, upstream[0]]


def is_accurate(eager: object, ours: object) -> bool:
    """Whether the results agree to float32's precision of what they sum up."""
    if isinstance(eager, Tensor) and isinstance(ours, Tensor):
        scale = max(1.0, eager.abs().max().item())
        return bool(((eager - ours).abs().max() <= 1e-4 * scale).item())
    if isinstance(eager, (tuple, list)) and isinstance(ours, (tuple, list)):
        present = [result for result in ours if result is not None]
        return len(present) == len(eager) and all(map(is_accurate, eager, present))
    return False


def measure(operator: Operator, direction: str, seconds: float, with_compile: bool) -> Iterator[dict[str, float]]:
    """A row for every shape."""
    for shape in SHAPES:
        torch.manual_seed(0)
        functions = candidates(operator, direction, operator.arguments(shape), with_compile)
        if not is_accurate(functions["eager"](), functions["ours"]()):
            print(f"{operator.name:16} {direction:20} {shape!s:19} WRONG", flush=True)
            continue
        times = interleaved(functions, seconds)
        row = {name: 1e6 * statistics.median(values) for name, values in times.items()}
        row |= {f"{name}/ours": median_ratio(values, times["ours"]) for name, values in times.items() if name != "ours"}
        row["channels"] = shape[1]
        row["bytes"] = 4 * math.prod(shape)
        print(f"{operator.name:16} {direction:20} {shape!s:19} {describe(row)}", flush=True)
        yield row


def describe(row: dict[str, float]) -> str:
    """A row's times in microseconds and ratios."""
    names = [name for name in ("copy", "eager", "compile", "ours") if name in row]
    times = " ".join(f"{row[name]:9.1f}" for name in names)
    ratios = " ".join(f"{row[f'{name}/ours']:7.2f}" for name in names[1:-1])
    return f"{times} {ratios} {1 / row['copy/ours']:7.1f}"


def geometric_mean(values: list[float]) -> float:
    """Of ratios."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def summarize(operator: Operator, direction: str, rows: list[dict[str, float]]) -> str:
    """Geometric means and the slowest shape."""
    parts = []
    for name in ("eager", "compile"):
        ratios = [row[f"{name}/ours"] for row in rows if f"{name}/ours" in row]
        if ratios:
            parts.append(f"{geometric_mean(ratios):.2f}x {name} (least {min(ratios):.2f}x)")
    copies = [1 / row["copy/ours"] for row in rows if row["bytes"] > 8 * 2**20]
    return f"{operator.name} {direction}: {', '.join(parts)}; over 8 MiB at most {max(copies):.1f} copies"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch (%(default)s)")
    parser.add_argument("--operator", choices=[operator.name for operator in OPERATORS], help="only this one")
    parser.add_argument("--direction", choices=DIRECTIONS, help="only this one")
    parser.add_argument("--seconds", type=float, default=0.5, help="for every case (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    parser.add_argument("--tuned-allocator", action="store_true", help="keep freed memory, see tune_allocator()")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.tuned_allocator:
        gk.tune_allocator()
    if busy_cores() > 0.5:
        print(f"WARNING: {busy_cores():.1f} cores are busy with something else; times will be wrong")
    status = gk.backend_status(gk.available_backends()[0])
    allocator = "tuned" if arguments.tuned_allocator else "as it is"
    print(f"ours: {status.name} ({status.reason}); {arguments.threads} threads; torch {torch.__version__}")
    print(f"allocator {allocator}; microseconds, times ours is faster, and copies that ours takes\n")
    names = ["copy", "eager", *([] if arguments.no_compile else ["compile"]), "ours"]
    header = " ".join(f"{name:>9}" for name in names) + " " + " ".join(f"{name[:6] + 'x':>7}" for name in names[1:-1])
    print(f"{'operator':16} {'direction':20} {'shape':19} {header} {'copies':>7}")
    summaries = []
    for operator in OPERATORS:
        for direction in DIRECTIONS:
            if arguments.operator in (None, operator.name) and arguments.direction in (None, direction):
                rows = list(measure(operator, direction, arguments.seconds, not arguments.no_compile))
                summaries.append(summarize(operator, direction, rows))
    print("\n" + "\n".join(summaries))
