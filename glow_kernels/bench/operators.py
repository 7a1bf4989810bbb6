"""The measured operators: what they are compared with, on which shapes, and how many bytes they must move."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from glow_kernels import available_backends, ops
from glow_kernels.backends import implementation
from glow_kernels.bench import textbook
from glow_kernels.errors import UsageError
from glow_kernels.ops import coupling_conv1x1
from glow_kernels.ops.actnorm_conv1x1 import apply as apply_folded
from glow_kernels.ops.affine_coupling import resolve_scale_map

Function = Callable[..., Any]
Shape = tuple[int, int, int, int]

# (B, C, H, W) at the levels of a Glow for images of 32, 64 and 256 pixels, and two that fit in no cache.
BANDWIDTH_SHAPES: tuple[Shape, ...] = ((64, 12, 128, 128), (32, 48, 64, 64))
STANDARD_SHAPES: tuple[Shape, ...] = (
    *((64, 12, 16, 16), (64, 24, 8, 8), (64, 48, 4, 4)),
    *((32, 12, 32, 32), (32, 24, 16, 16), (32, 48, 8, 8)),
    *((4, 12, 128, 128), (4, 24, 64, 64), (4, 48, 32, 32), (4, 96, 16, 16), (4, 192, 8, 8)),
    *BANDWIDTH_SHAPES,
)
QUICK_SHAPES: tuple[Shape, ...] = ((64, 12, 16, 16), (4, 12, 128, 128), (4, 96, 16, 16))
# forward and backward use an autograd graph, no_grad and inverse do not.
DIRECTIONS = ("forward", "no_grad", "inverse", "backward", "forward_backward", "reversible_backward")
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Above this many channels the linear map is limited by the matrix product, not by memory.
LARGEST_MEMORY_BOUND_CHANNELS = 48


@dataclass(frozen=True)
class Case:
    """An operator and direction with the conditions under which it is measured."""

    operator: str
    direction: str
    shape: Shape
    dtype: str = "float32"
    memory_format: str = "contiguous"
    threads: int = 1
    allocator: str = "tuned"
    device: str = "cpu"

    def as_dict(self) -> dict[str, Any]:
        """The case as values for JSON."""
        return {**asdict(self), "shape": list(self.shape)}

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensor (B, C, H, W)."""
        return math.prod(self.shape) * int(DTYPES[self.dtype].itemsize)


@dataclass(frozen=True)
class Functions:
    """One implementation: forward, inverse, and the reversible backward of (grad, grad_log_det, output, *others).

    If there is no reversible backward, inverse, forward and backward are run in sequence instead.
    """

    forward: Function
    inverse: Function | None = None
    reversible_backward: Function | None = None


@dataclass(frozen=True)
class Operator:
    """An operator: our and the textbook's implementation, and random arguments, of which the first is the data.

    Attributes:
        traffic: for every direction, the bytes read and written, in units of the data's bytes; the limit copies as
            many. Parameters of C and C x C elements do not count.
        products: for every direction, the number of matrix products of the data's size.
        is_fast: for an operator that models call only if a backend other than the reference takes the arguments:
            whether one does. Otherwise the case is not measured.
    """

    name: str
    ours: Functions
    textbook: Functions
    arguments: Callable[[Case], list[Tensor]]
    traffic: dict[str, float]
    products: dict[str, int]
    is_fast: Callable[..., bool] | None = None


def _random(shape: Sequence[int], case: Case) -> Tensor:
    tensor = torch.randn(shape, device=case.device).to(DTYPES[case.dtype])
    return tensor.contiguous(memory_format=MEMORY_FORMATS[case.memory_format])


def _linear_arguments(case: Case) -> list[Tensor]:
    channels = case.shape[1]
    weight = torch.linalg.qr(torch.randn(channels, channels)).Q.contiguous().to(case.device)
    scale_and_bias = 0.1 * torch.randn(2, channels, device=case.device)
    dtype = torch.float64 if case.dtype == "float64" else torch.float32
    return [_random(case.shape, case), *(tensor.to(dtype) for tensor in (*scale_and_bias.unbind(), weight))]


def _folded_arguments(case: Case) -> list[Tensor]:
    """Data, matrix M and shift v."""
    x, _, bias, weight = _linear_arguments(case)
    return [x, weight, bias]


def _half_arguments(case: Case) -> list[Tensor]:
    """The second half of the channels of a tensor of this shape, as a view, and the network's output."""
    return [_random(case.shape, case)[:, case.shape[1] // 2 :], _random(case.shape, case)]


def _across_steps_arguments(case: Case) -> list[Tensor]:
    """Data, the network's output for half of them, matrix M and shift v."""
    z, matrix, shift = _folded_arguments(case)
    return [z, _random(case.shape, case), matrix, shift]


def _coupling_conv1x1(*arguments: Tensor) -> Any:
    """``coupling_conv1x1`` with the options of the textbook's coupling."""
    return coupling_conv1x1.forward(*arguments, *_COUPLING)


_GLOW = resolve_scale_map("sigmoid")
_COUPLING = (_GLOW.kind, _GLOW.parameters, "interleaved_shift_scale", "shift_scale")

OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            "actnorm_conv1x1",
            Functions(ops.actnorm_conv1x1, ops.actnorm_conv1x1_inverse, ops.actnorm_conv1x1_reversible_backward),
            Functions(textbook.actnorm_conv1x1, textbook.actnorm_conv1x1_inverse),
            _linear_arguments,
            traffic={
                "forward": 2,
                "no_grad": 2,
                "inverse": 2,
                "backward": 3,
                "forward_backward": 5,
                "reversible_backward": 4,
            },
            products={
                "forward": 1,
                "no_grad": 1,
                "inverse": 1,
                "backward": 2,
                "forward_backward": 3,
                "reversible_backward": 3,
            },
        ),
        Operator(
            "folded_conv1x1",  # what a chain runs, which folds the linear maps of all its steps in advance
            Functions(apply_folded),
            Functions(textbook.folded_conv1x1),
            _folded_arguments,
            traffic={"forward": 2, "no_grad": 2, "backward": 3, "forward_backward": 5},
            products={"forward": 1, "no_grad": 1, "backward": 2, "forward_backward": 3},
        ),
        # For the coupling and the density, the data is half a tensor and counts 1/2; h counts 1.
        Operator(
            "affine_coupling",
            Functions(ops.affine_coupling, ops.affine_coupling_inverse, ops.affine_coupling_reversible_backward),
            Functions(textbook.affine_coupling, textbook.affine_coupling_inverse),
            _half_arguments,
            traffic={
                "forward": 2,  # x, h; y
                "no_grad": 2,
                "inverse": 2,
                "backward": 3.5,  # y, h, dy; dx, dh
                "forward_backward": 5.5,
                "reversible_backward": 4,  # y, h, dy; x, dx, dh
            },
            products={},
        ),
        Operator(
            "coupling_conv1x1",  # the coupling of one step of a chain and the linear map of the next
            Functions(_coupling_conv1x1),
            Functions(textbook.coupling_conv1x1),
            _across_steps_arguments,
            traffic={
                "forward": 3,  # z, h; next z
                "no_grad": 3,
                "backward": 5,  # z, h, dz of the next; dz, dh
                "forward_backward": 8,
            },
            products={},
            is_fast=lambda *arguments: coupling_conv1x1.forward.is_fast(*arguments, *_COUPLING),
        ),
        Operator(
            "gaussian_log_prob",
            Functions(ops.gaussian_log_prob, ops.gaussian_sample),
            Functions(textbook.gaussian_log_prob, textbook.gaussian_sample),
            _half_arguments,
            traffic={"forward": 1.5, "no_grad": 1.5, "inverse": 2, "backward": 3, "forward_backward": 4.5},
            products={},
        ),
        Operator(
            "actnorm_statistics",
            Functions(ops.actnorm_statistics),
            Functions(textbook.actnorm_statistics),
            lambda case: [_random(case.shape, case)],
            traffic={"no_grad": 1},
            products={},
        ),
    )
}


def operator(name: str) -> Operator:
    """The operator called ``name``.

    Raises:
        UsageError: there is no such operator.
    """
    if name not in OPERATORS:
        raise UsageError(f"operator must be one of {', '.join(OPERATORS)}, got {name!r}")
    return OPERATORS[name]


def is_measured(case: Case) -> bool:
    """Whether the operator has this direction, and a backend that a model would use for it."""
    operator = OPERATORS[case.operator]
    if operator.is_fast is None or case.direction not in operator.traffic:
        return case.direction in operator.traffic
    # Only the device, the dtype and the number of channels matter.
    return operator.is_fast(*operator.arguments(replace(case, shape=(1, case.shape[1], 1, 1))))


def parse_shape(text: str) -> Shape:
    """Parse a shape such as ``64x12x16x16``.

    Raises:
        UsageError: the text is not four whole numbers of at least 1, or the number of channels is odd.
    """
    parts = text.lower().split("x")
    if len(parts) != 4 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"a shape must be four whole numbers BxCxHxW of at least 1, got {text!r}")
    batch, channels, height, width = map(int, parts)
    if channels % 2:
        raise UsageError(f"a shape must have an even number of channels, which a coupling halves, got {text!r}")
    return batch, channels, height, width


def backends_on(device: torch.device) -> tuple[str, ...]:
    """Backends with kernels of their own for this device, in order of preference, and last the reference."""
    x = torch.zeros(1, 2, 2, 2, device=device)

    def computes(backend: str) -> bool:
        return backend == "reference" or bool(implementation(backend, "support").actnorm_statistics("forward", x))

    return tuple(name for name in available_backends() if computes(name))


def moved_bytes(case: Case) -> int:
    """Bytes that the operator must read and write, from :attr:`Operator.traffic`."""
    return round(operator(case.operator).traffic[case.direction] * case.data_bytes)


def upstream(operator: Operator, case: Case, arguments: Sequence[Tensor]) -> list[Tensor]:
    """A random gradient for every result of the forward."""
    with torch.no_grad():  # on meta tensors, since only the shapes of the results are needed
        results = _as_list(operator.textbook.forward(*(argument.to("meta", torch.float64) for argument in arguments)))
    dtypes = [arguments[0].dtype if result.dim() == 4 else _log_det_dtype(case) for result in results]
    return [
        torch.randn(result.shape, device=case.device).to(dtype) for result, dtype in zip(results, dtypes, strict=True)
    ]


def call(functions: Functions, direction: str, arguments: Sequence[Tensor], grads: Sequence[Tensor]) -> Function:
    """The computation of one direction, as a function without arguments that returns its results.

    Preparations, such as the forward for ``"backward"``, are done here and not in the function.
    """
    forward = functions.forward
    leaves = [argument.detach().requires_grad_() for argument in arguments]
    if direction == "forward":
        return lambda: forward(*leaves)
    if direction in ("no_grad", "inverse"):
        return torch.no_grad()(without_graph(functions, direction, arguments))
    if direction == "forward_backward":
        return lambda: _differentiate(_as_list(forward(*leaves)), leaves, grads)
    if direction == "backward":
        results = _as_list(forward(*leaves))
        return lambda: _differentiate(results, leaves, grads, retain_graph=True)
    if functions.reversible_backward is not None:
        reversible = functions.reversible_backward
        return torch.no_grad()(lambda: reversible(*grads, *arguments))
    return lambda: _restore_and_differentiate(functions, arguments, grads)


def without_graph(functions: Functions, direction: str, arguments: Sequence[Tensor]) -> Function:
    """The computation of ``no_grad`` or ``inverse``; the caller must disable gradients."""
    function = functions.forward if direction == "no_grad" else functions.inverse
    assert function is not None
    return functools.partial(function, *arguments)


def _restore_and_differentiate(
    functions: Functions, arguments: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """The reversible backward of an implementation that has none: inverse, forward, backward."""
    with torch.no_grad():
        data = _as_list(functions.inverse(*arguments))[0]  # type: ignore[misc]
    leaves = [argument.detach().requires_grad_() for argument in (data, *arguments[1:])]
    return [data, *_differentiate(_as_list(functions.forward(*leaves)), leaves, grads)]


def _differentiate(
    results: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor], retain_graph: bool = False
) -> list[Tensor]:
    typed = [grad.to(result.dtype) for grad, result in zip(grads, results, strict=True)]
    return list(torch.autograd.grad(results, leaves, typed, retain_graph=retain_graph))


def tensors(results: object) -> list[Tensor]:
    """The tensors among the results of a call."""
    return [result for result in _as_list(results) if result is not None]


def _as_list(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _log_det_dtype(case: Case) -> torch.dtype:
    return torch.float64 if case.dtype == "float64" else torch.float32
