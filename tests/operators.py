"""Properties that every operator must have, written once; the test file of an operator defines what it computes.

The truth is always a plain formula in float64, written in the test file, and autograd through it for gradients. The
accuracy rule: the error is at most twice that of the same formula in eager PyTorch at the precision of the result, plus
a few units in the last place.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import glow_kernels as gk

Function = Callable[..., Any]

# The reference has a file for every operator, named after it.
REFERENCE = Path(gk.__file__).parent / "backends" / "reference"
MODULES = sorted(path.stem for path in REFERENCE.glob("[!_]*.py"))

# Triton's interpreter is a thousand times slower than a kernel, so with it the same checks use fewer samples: each
# type, layout and option occurs, but not every combination. Triton on a GPU does so too where each combination would
# take a third of a second to compile; ``test_triton_compile.py`` covers these.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def combinations(*values: Sequence[Any], few: bool = INTERPRETED) -> list[tuple[Any, ...]]:
    """Combinations of one of each of ``values``, with all pairs of values; if ``few``, just with every value.

    Pairs are enough: an option decides on addresses, on conversions or on one term of the arithmetic, never on how two
    others interact. Hypothesis draws other combinations: ``test_anything_is_as_accurate_as_eager``.
    """
    if few:
        return [tuple(each[index % len(each)] for each in values) for index in range(max(map(len, values), default=0))]
    candidates = list(itertools.product(*map(range, map(len, values))))
    chosen: list[tuple[int, ...]] = []
    missing = {pair for candidate in candidates for pair in _pairs(candidate)}
    while missing:
        chosen.append(max(candidates, key=lambda candidate: len(missing & _pairs(candidate))))
        missing -= _pairs(chosen[-1])
    return [tuple(each[index] for each, index in zip(values, indices, strict=True)) for indices in chosen]


@functools.cache
def _pairs(candidate: tuple[int, ...]) -> frozenset[tuple[tuple[int, int], ...]]:
    return frozenset(itertools.combinations(enumerate(candidate), 2))


# Dtypes of the data and of the other arguments.
DTYPES = {
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "float32_with_bfloat16": (torch.float32, torch.bfloat16),
    "bfloat16_with_float32": (torch.bfloat16, torch.float32),
}

# (B, C, *spatial): 0 to 3 spatial dimensions, sizes of one, primes, and empty tensors.
SHAPES = [
    (1, 1),
    (5, 3),
    (2, 7, 11),
    (1, 1, 1, 1),
    (3, 4, 5, 7),
    (2, 13, 3, 1),
    (2, 1, 17, 3),
    (2, 3, 2, 5, 3),
]
EMPTY_SHAPES = [(0, 3), (0, 4, 2, 2), (2, 0, 3), (2, 3, 0), (2, 3, 0, 5)]
# Samples that kernels cut into tiles: with sizes that are multiples of 8, with other sizes, and with many channels.
# Triton's interpreter runs a program per channel of the last, where 72 are enough for tiles to begin and end inside.
LARGE_SHAPES = [(2, 8, 32, 24), (2, 5, 37, 29), (2, 72 if INTERPRETED else 600, 2, 4)]
# Enough work for several threads, on the data and on matrices beside them.
SHAPE_OF_MANY_TASKS = (5, 64, 16, 16)
LARGE_DTYPES = ("float32", "float64", "bfloat16", "float32_with_bfloat16")


@dataclass(frozen=True)
class Case:
    """One direction of one operator with one choice of options.

    Attributes:
        name: the test's id.
        operator: the function under test, of tensors only; the first is the data (B, C, *spatial).
        formula: the same map written plainly, for tensors of one dtype.
        inputs: makes random float64 arguments for data of a given shape.
        batched: how many leading arguments have the shape of the data, except for the number of channels.
        data_arguments: how many leading arguments have the dtype of the data.
        types: for every result, the argument whose dtype it has, or None for the dtype of log-determinants. By default,
            results with the shape of the data have the dtype of the data.
        undo: operator and formula that lead from the first result back to the data, given the other arguments.
    """

    name: str
    operator: Function
    formula: Function
    inputs: Callable[[Sequence[int]], tuple[Tensor, ...]]
    batched: int = 1
    data_arguments: int = 1
    types: tuple[int | None, ...] | None = None
    undo: tuple[Function, Function] | None = None

    def draw(self, shape: Sequence[int], dtypes: tuple[torch.dtype, torch.dtype] = DTYPES["float32"]) -> list[Tensor]:
        """Random arguments of these dtypes."""
        arguments = enumerate(self.inputs(shape))
        return [argument.to(dtypes[index >= self.data_arguments]) for index, argument in arguments]


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _among_nan(x: Tensor, channels: slice, layout: Function = Tensor.contiguous) -> Tensor:
    # A view between NaN, to reveal reads beyond it.
    room = x.new_full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), torch.nan)
    return layout(room)[:, channels].copy_(x)


# Memory layouts of a tensor (B, C, *spatial). The last two change its values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "permuted": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "channels_last": _channels_last,
    "every_second_channel": lambda x: _among_nan(x, slice(0, None, 2)),
    "last_half": lambda x: _among_nan(x, slice(x.shape[1], None)),
    "last_half_channels_last": lambda x: _among_nan(x, slice(x.shape[1], None), _channels_last),
    "offset": lambda x: torch.cat((x.new_full((1,), torch.nan), x.flatten()))[1:].view(x.shape),
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "one_element": lambda x: x.new_full((), 0.75).expand(x.shape),
}


def _cropped(x: Tensor) -> Tensor:
    return x.new_full((*x.shape[:-1], x.shape[-1] + 1), torch.nan)[..., :-1].copy_(x)


# Ways for rows of a whole number of vectors not to begin where a vector may.
UNALIGNED: dict[str, Callable[[Tensor], Tensor]] = {
    "offset": LAYOUTS["offset"],
    "cropped": _cropped,
    "cropped_channels_last": lambda x: _cropped(x.movedim(1, -1)).movedim(-1, 1),
    "cropped_samples": lambda x: _cropped(x.flatten(1)).unflatten(1, x.shape[1:]),
}


def unaligned(case: Case, layout: str) -> list[Tensor]:
    """Arguments for 12 channels; unaligned are those with the shape of the data or, at an offset, all."""
    inputs = case.draw((3, 12, 16))
    count = len(inputs) if layout == "offset" else case.batched
    return [*map(UNALIGNED[layout], inputs[:count]), *inputs[count:]]


def other_layouts(layout: str, count: int) -> list[tuple[str, ...]]:
    """Layouts of the ``count`` arguments after the first, which has this one; in the interpreter only a few."""
    if INTERPRETED:
        return [(layout,) * count, ("contiguous",) * count][: 1 + (count > 0)]
    return list(itertools.product(LAYOUTS, repeat=count))


def in_layout(tensors: Sequence[Tensor], *layouts: str) -> list[Tensor]:
    """``tensors``, the leading ones of which have these layouts."""
    laid_out = [LAYOUTS[layout](tensor) for layout, tensor in zip(layouts, tensors, strict=False)]
    return [*laid_out, *tensors[len(layouts) :]]


def spread_parameters(case: Case, inputs: Sequence[Tensor]) -> list[Tensor]:
    """``inputs``, of which those that do not have the shape of the data have NaN beside each element."""
    spread = [torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0] for tensor in inputs]
    return [*inputs[: case.batched], *spread[case.batched :]]


def upstream_in_layout(grad: Tensor, layout: str) -> Tensor:
    """A gradient of data (B, C, *spatial) or of a log-determinant (B,) with this memory layout."""
    return LAYOUTS[layout](grad) if grad.dim() > 1 else LAYOUTS[layout](grad[:, None].repeat(1, 2))[:, 0]


def evaluate(function: Function, inputs: Sequence[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """All results of ``function``; its arguments are converted to ``dtype`` if given."""
    results = function(*(tensor if dtype is None else tensor.to(dtype) for tensor in inputs))
    return results if isinstance(results, tuple) else (results,)


def backpropagate(
    results: Sequence[Tensor], upstream: Sequence[Tensor | None], leaves: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of ``results`` in ``leaves``, zero for leaves without one. Upstream gradients of None are not used."""
    pairs = [(result, grad) for result, grad in zip(results, upstream, strict=True) if result.requires_grad]
    used = [(result, grad.to(result.dtype)) for result, grad in pairs if grad is not None]
    if not used:
        return [torch.zeros_like(leaf) for leaf in leaves]
    outputs, grads = zip(*used, strict=True)
    return list(torch.autograd.grad(outputs, leaves, grads, materialize_grads=True))


def gradients(
    function: Function,
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    dtype: torch.dtype | None = None,
    wanted: Collection[int] | None = None,
) -> list[Tensor]:
    """Gradients of the results of :func:`evaluate` in the ``wanted`` inputs, by default all."""
    wanted = range(len(inputs)) if wanted is None else wanted
    leaves = [tensor.detach().requires_grad_(index in wanted) for index, tensor in enumerate(inputs)]
    return backpropagate(evaluate(function, leaves, dtype), upstream, [leaves[index] for index in wanted])


def random_upstream(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """A random gradient for every result."""
    return [torch.randn(result.shape, dtype=result.dtype) for result in evaluate(function, inputs)]


def assert_accurate(actual: Tensor, truth: Tensor, eager: Tensor, what: str, unit: float = 1.0) -> None:
    """The accuracy rule, for the largest error over all elements.

    Args:
        actual, truth, eager: the operator's result, the truth in float64, and the formula in eager PyTorch.
        what: the name in the error message.
        unit: least magnitude for units in the last place: that of the arguments, and so of terms that cancel.
    """
    assert actual.shape == truth.shape, what
    if actual.numel() == 0:
        return
    # A float64 truth is no more accurate than a float64 result: both round sums of up to 400 terms.
    ulps = 1000 if actual.dtype == torch.float64 else 8
    tolerance = ulps * torch.finfo(actual.dtype).eps * max(unit, truth.abs().max().item())
    # Elements where eager is not finite do not raise the tolerance.
    eager_error = (eager.double() - truth).abs().nan_to_num(0.0, posinf=0.0)
    allowed = 2.0 * eager_error.max().item() + tolerance
    error = (actual.double() - truth).abs().nan_to_num(torch.inf)
    worst = torch.unravel_index(error.argmax(), error.shape)
    where = f"{what}[{', '.join(str(int(index)) for index in worst)}]"
    assert error.max() <= allowed, f"{where} is {actual[worst]}, not {truth[worst]}; allowed error {allowed:.2e}"


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    """A list that grows by one with every call of the function ``name`` of ``module``."""
    calls: list[int] = []
    original = getattr(module, name)

    def counted(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(module, name, counted)
    return calls


def unit_of_sum(result: Tensor, data: Tensor, unit: float) -> float:
    """Magnitude of the partial sums in one element of ``result``: n random terms of size one reach sqrt(n)."""
    return unit * math.sqrt(max(1.0, data.numel() / max(1, result.numel())))


def check_results(case: Case, inputs: Sequence[Tensor], unit: float = 1.0) -> None:
    """Check shapes, dtypes and values of the results."""
    data = inputs[0]
    truth, actual = evaluate(case.formula, inputs, torch.float64), evaluate(case.operator, inputs)
    for index, (result, true) in enumerate(zip(actual, truth, strict=True)):
        like = (0 if true.shape == data.shape else None) if case.types is None else case.types[index]
        assert result.dtype == (torch.promote_types(data.dtype, torch.float32) if like is None else inputs[like].dtype)
        eager = evaluate(case.formula, inputs, result.dtype)[index]
        assert_accurate(result, true, eager, f"result {index}", unit_of_sum(result, data, unit))


def check_gradients(
    case: Case,
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor | None] | None = None,
    wanted: Collection[int] | None = None,
    unit: float = 1.0,
    precision: torch.dtype | None = None,
) -> None:
    """Check dtypes and values of the gradients in the ``wanted`` inputs, by default all.

    ``precision`` is the dtype of the eager formula, by default that of the data.
    """
    if upstream is None:
        upstream = random_upstream(case.operator, inputs)
    wide_upstream = [None if grad is None else grad.double() for grad in upstream]
    truth = gradients(case.formula, [tensor.double() for tensor in inputs], wide_upstream, wanted=wanted)
    eager = gradients(case.formula, inputs, upstream, precision or inputs[0].dtype, wanted)
    actual = gradients(case.operator, inputs, upstream, wanted=wanted)
    for index, (grad, true, naive) in enumerate(zip(actual, truth, eager, strict=True)):
        assert grad.dtype == naive.dtype
        assert_accurate(grad, true, naive, f"gradient {index}", unit_of_sum(grad, inputs[0], unit))


def gradcheck(function: Function, inputs: Sequence[Tensor]) -> bool:
    """``torch.autograd.gradcheck``; in the interpreter its fast mode, which checks one random direction."""
    return torch.autograd.gradcheck(function, inputs, fast_mode=INTERPRETED)


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Check that all values are equal, bit for bit."""
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def _with_threads(count: int, function: Function, *args: Any) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function(*args)
    finally:
        torch.set_num_threads(before)


def registered_operators(module: str = "") -> list[str]:
    """Names of the operators of ``module`` in ``torch.ops.glow_kernels`` that can run here."""
    names = [name.partition("::") for name in torch._C._dispatch_get_all_op_names()]
    ours = [name for library, _, name in names if library == "glow_kernels" and name.startswith(module)]
    return sorted(name for name in ours if name.endswith(gk.available_backends()) and _runs_on_cpu(name))


def _runs_on_cpu(name: str) -> bool:
    # An operator of the native library may be for the CPU, for CUDA or for both.
    return not name.endswith("_native") or torch._C._dispatch_has_kernel_for_dispatch_key(
        f"glow_kernels::{name}", "CPU"
    )


# Shape and memory layout of the data for opcheck: every layout, and 2 to 5 dimensions.
OPCHECK_SAMPLES = [((2, 4, 3, 5), layout) for layout in LAYOUTS]
OPCHECK_SAMPLES += [(shape, "contiguous") for shape in [(2, 4), (3, 4, 5), (2, 4, 2, 3, 2), (2, 1, 3, 2), (0, 4, 2, 2)]]
OPCHECK_SAMPLES += [(shape, "channels_last") for shape in [(3, 4, 5), (2, 4, 1, 1), (2, 4, 2, 3, 2)]]
if INTERPRETED:
    OPCHECK_SAMPLES = [((2, 4), "contiguous"), ((2, 4, 3, 5), "channels_last"), ((0, 4, 2, 2), "contiguous")]
OPCHECK_FAST = ("test_schema", "test_faketensor")

CHANNELS_LAST = [((2, 4, 3, 5), torch.channels_last), ((2, 4, 2, 3, 2), torch.channels_last_3d)]

# Reproducible. The fixture about which hypothesis warns only sets the backend, which is the same for all examples.
PROPERTY = settings(
    max_examples=8 if INTERPRETED else 40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def any_shape(draw: st.DrawFn, smallest: int = 0) -> tuple[int, ...]:
    """Shapes (B, C, *spatial); empty ones too unless the ``smallest`` size is one."""
    torch.manual_seed(0)  # so that only the example decides on the numbers
    spatial = draw(st.lists(st.integers(smallest, 7), max_size=3))
    return (draw(st.integers(smallest, 4)), draw(st.integers(smallest, 9)), *spatial)


class ResultProperties:
    """What holds for the results of every operator; a subclass names the operator and its cases.

    Attributes:
        module: the operator's name in ``torch.ops.glow_kernels``, ``<module>_<function>_<backend>``.
        cases: directions and options.
        shapes: shapes of the data to try.
    """

    module: ClassVar[str]
    cases: ClassVar[list[Case]]
    shapes: ClassVar[list[tuple[int, ...]]] = SHAPES + EMPTY_SHAPES

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        values = {
            "case": {case.name: case for case in self.cases},
            "invertible": {case.name: case for case in self.cases if case.undo},
            "registered": {name: name for name in registered_operators(self.module)},
            "shape": {str(shape): shape for shape in self.shapes},
        }
        for name in [name for name in values if name in metafunc.fixturenames]:
            metafunc.parametrize(name, values[name].values(), ids=values[name].keys())

    @pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
    def test_results_are_as_accurate_as_eager(self, backend, case, dtypes):
        check_results(case, case.draw((4, 6, 5, 7), dtypes))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_low_precision_results_are_rounded_once(self, backend, case, dtype):
        inputs = case.draw((4, 6, 5, 7), (dtype, torch.float32))
        truths = evaluate(case.formula, inputs, torch.float64)
        for actual, truth in zip(evaluate(case.operator, inputs), truths, strict=True):
            rounding = truth.abs() * torch.finfo(actual.dtype).eps / 2
            arithmetic = truth.abs().max() * torch.finfo(torch.float32).eps * 16
            assert ((actual.double() - truth).abs() <= rounding + arithmetic).all()

    def test_results_of_every_shape(self, backend, case, shape):
        check_results(case, case.draw(shape))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_results_of_every_memory_layout(self, backend, case, layout):
        for others in other_layouts(layout, case.batched - 1):
            check_results(case, in_layout(case.draw((3, 4, 2, 5)), layout, *others))

    @pytest.mark.parametrize("layout", UNALIGNED)
    def test_results_of_unaligned_rows(self, backend, case, layout):
        check_results(case, unaligned(case, layout))

    @pytest.mark.parametrize(("size", "memory_format"), CHANNELS_LAST)
    def test_channels_last_data_makes_channels_last_results(self, backend, case, size, memory_format):
        for layout in ("channels_last", "last_half_channels_last"):
            inputs = in_layout(case.draw(size), layout)
            for result in evaluate(case.operator, inputs):
                assert result.shape != inputs[0].shape or result.is_contiguous(memory_format=memory_format)

    # Without permuted dimensions, which the additive coupling preserves, like every addition in PyTorch.
    @pytest.mark.parametrize("layout", ["every_second_channel", "last_half", "offset", "expanded_batch", "one_element"])
    def test_views_make_contiguous_results(self, backend, case, layout):
        for result in evaluate(case.operator, in_layout(case.draw((3, 4, 2, 5)), layout)):
            assert result.is_contiguous()

    def test_results_of_spread_parameters(self, backend, case):
        check_results(case, spread_parameters(case, case.draw((3, 4, 2, 5))))

    def test_arguments_are_not_modified_and_results_are_new(self, backend, case):
        inputs = case.draw((2, 3, 4, 5), DTYPES["float64"])
        before = [tensor.clone() for tensor in inputs]
        results = evaluate(case.operator, inputs)
        assert_same_bits(inputs, before)
        for result in results:
            result.fill_(torch.nan)
        assert_same_bits(inputs, before)

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("size", [(2, 3, 1, 1), (3, 5, 7, 11)], ids=str)
    def test_results_are_written_everywhere_and_repeat_bit_for_bit(self, backend, case, size):
        inputs = case.draw(size)
        check_results(case, inputs)
        assert_same_bits(evaluate(case.operator, inputs), evaluate(case.operator, inputs))

    def require_native(self):
        """Skip the test unless the native library computes this operator on the CPU."""
        if not any(name.endswith("_native") for name in registered_operators(self.module)):
            pytest.skip("the native library is not built or has not this operator on the CPU")
        if torch.ops.glow_kernels.native_isa() == "cuda host shim":
            pytest.skip("the CUDA sources on the CPU have one thread")

    def test_native_results_are_the_same_with_any_number_of_threads(self, case):
        self.require_native()
        inputs = case.draw(SHAPE_OF_MANY_TASKS)
        with gk.use_backend("native"):
            assert_same_bits(*(_with_threads(count, evaluate, case.operator, inputs) for count in (1, 3)))

    def test_results_are_the_same_under_autocast(self, backend, case):
        inputs = case.draw((2, 4, 3, 5))
        expected = evaluate(case.operator, inputs)
        with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
            assert_same_bits(evaluate(case.operator, inputs), expected)

    def test_meta_tensors_make_results_of_the_same_shapes(self, backend, case):
        inputs = case.draw((2, 4, 3, 5))
        fakes = evaluate(case.operator, [tensor.to("meta") for tensor in inputs])
        for fake, real in zip(fakes, evaluate(case.operator, inputs), strict=True):
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())

    def test_compiles_into_one_graph_with_the_same_results(self, backend, case):
        torch._dynamo.reset()
        compiled = torch.compile(case.operator, fullgraph=True, backend="aot_eager")
        for shape in [(2, 4, 3, 5), (3, 4, 2, 7)]:  # the second makes the sizes symbolic
            inputs = case.draw(shape)
            assert_same_bits(evaluate(compiled, inputs), evaluate(case.operator, inputs))


class OperatorProperties(ResultProperties):
    """What holds for every operator, and for all that is registered for it.

    Attributes:
        arguments: for every function of ``module``, its arguments for data of a shape, laid out by a function; under
            ``<function>_<backend>`` where a backend's differ.
    """

    arguments: ClassVar[dict[str, Callable[[Sequence[int], Function], tuple[Any, ...]]]]

    @pytest.mark.parametrize(("size", "layout"), OPCHECK_SAMPLES, ids=str)
    def test_opcheck_of_schema_and_fake_in_every_memory_layout(self, registered, size, layout):
        torch.library.opcheck(*self.sample(registered, size, LAYOUTS[layout]), test_utils=OPCHECK_FAST)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_opcheck_of_schema_and_fake_of_every_type(self, registered, dtype):
        torch.library.opcheck(*self.sample(registered, (2, 4, 3, 5), lambda x: x.to(dtype)), test_utils=OPCHECK_FAST)

    # With symbolic sizes, which takes 100 times as long, so only for one layout.
    def test_opcheck_of_traced_forward_and_backward(self, registered):
        sample = self.sample(registered, (2, 4, 3, 5), _channels_last)
        torch.library.opcheck(*sample, test_utils=("test_autograd_registration", "test_aot_dispatch_dynamic"))

    def sample(self, registered: str, size: Sequence[int], lay: Function) -> tuple[Any, tuple[Any, ...]]:
        """A registered operator and its arguments."""
        name = registered.removeprefix(f"{self.module}_")
        arguments = self.arguments.get(name) or self.arguments[name.rpartition("_")[0]]
        return getattr(torch.ops.glow_kernels, registered).default, arguments(size, lay)


class DifferentiableProperties(OperatorProperties):
    """Properties of every operator with gradients."""

    @pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
    def test_gradients_are_as_accurate_as_eager(self, backend, case, dtypes):
        check_gradients(case, case.draw((4, 6, 5, 7), dtypes))

    def test_gradients_of_every_shape(self, backend, case, shape):
        check_gradients(case, case.draw(shape))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_gradients_of_every_memory_layout(self, backend, case, layout):
        for others in other_layouts(layout, case.batched - 1):
            check_gradients(case, in_layout(case.draw((3, 4, 2, 5)), layout, *others))

    @pytest.mark.parametrize("layout", UNALIGNED)
    def test_gradients_of_unaligned_rows(self, backend, case, layout):
        check_gradients(case, unaligned(case, layout))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_upstream_gradients_of_every_memory_layout(self, backend, case, layout):
        inputs = case.draw((3, 4, 2, 5))
        upstream = random_upstream(case.operator, inputs)
        check_gradients(case, inputs, [upstream_in_layout(grad, layout) for grad in upstream])

    def test_gradients_of_spread_parameters(self, backend, case):
        check_gradients(case, spread_parameters(case, case.draw((3, 4, 2, 5))))

    def test_gradients_when_one_result_is_used(self, backend, case):
        inputs = case.draw((3, 4, 2, 5))
        upstream = random_upstream(case.operator, inputs)
        for used in range(len(upstream)):
            check_gradients(case, inputs, [grad if index == used else None for index, grad in enumerate(upstream)])

    def test_gradients_of_every_subset_of_the_arguments(self, backend, case):
        inputs = case.draw((3, 4, 2, 5))
        sizes = range(1, len(inputs))
        for size in {sizes[0], sizes[-1]} if INTERPRETED else sizes:
            for wanted in itertools.combinations(range(len(inputs)), size):
                check_gradients(case, inputs, wanted=wanted)

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_results_may_be_modified_in_place(self, backend, case, layout):
        inputs = [tensor.requires_grad_() for tensor in in_layout(case.draw((3, 4, 2, 5)), layout)]
        factor = torch.ones((), requires_grad=True)
        for has_graph in (True, False):
            with torch.set_grad_enabled(has_graph):
                results = evaluate(case.operator, inputs)
            for result in results:
                result.mul_(factor)

    def test_gradcheck(self, backend, case):
        inputs = [tensor.requires_grad_() for tensor in case.draw((2, 3, 2), DTYPES["float64"])]
        assert gradcheck(case.operator, inputs)

    def test_gradgradcheck_of_the_reference(self, case):
        inputs = [tensor.requires_grad_() for tensor in case.draw((2, 2, 2), DTYPES["float64"])]
        with gk.use_backend("reference"):
            assert torch.autograd.gradgradcheck(case.operator, inputs)

    def test_derivatives_by_torch_func_and_forwards(self, backend, case):
        inputs = tuple(case.draw((2, 3, 2), DTYPES["float64"]))
        directions = tuple(torch.randn_like(tensor) for tensor in inputs)
        truth = torch.func.jvp(lambda *args: evaluate(case.formula, args), inputs, directions)[1]
        tangents = torch.func.jvp(lambda *args: evaluate(case.operator, args), inputs, directions)[1]
        with torch.no_grad(), forward_ad.dual_level():
            duals = map(forward_ad.make_dual, inputs, directions)
            others = [forward_ad.unpack_dual(result).tangent for result in evaluate(case.operator, list(duals))]
        for true, *found in zip(truth, tangents, others, strict=True):
            for tangent in found:
                torch.testing.assert_close(torch.zeros_like(true) if tangent is None else tangent, true)
        upstream = tuple(random_upstream(case.operator, inputs))
        grads = torch.func.vjp(lambda *args: evaluate(case.operator, args), *inputs)[1](upstream)
        for grad, true in zip(grads, gradients(case.formula, inputs, upstream), strict=True):
            torch.testing.assert_close(grad, true)

    @pytest.mark.usefixtures("poisoned_memory")
    def test_gradients_are_written_everywhere_and_repeat_bit_for_bit(self, backend, case):
        inputs = case.draw((3, 5, 7, 11))
        upstream = random_upstream(case.operator, inputs)
        check_gradients(case, inputs, upstream)
        first, second = (gradients(case.operator, inputs, upstream) for _ in range(2))
        assert_same_bits(first, second)

    def test_native_gradients_are_the_same_with_any_number_of_threads(self, case):
        self.require_native()
        inputs = case.draw(SHAPE_OF_MANY_TASKS)
        upstream = random_upstream(case.operator, inputs)
        with gk.use_backend("native"):
            assert_same_bits(*(_with_threads(count, gradients, case.operator, inputs, upstream) for count in (1, 3)))

    @pytest.mark.parametrize(("around_forward", "around_backward"), [(True, False), (True, True), (False, True)])
    def test_gradients_are_the_same_under_autocast(self, backend, case, around_forward, around_backward):
        inputs = case.draw((2, 4, 3, 5))
        upstream = random_upstream(case.operator, inputs)
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        autocast = functools.partial(torch.autocast, inputs[0].device.type, dtype=torch.bfloat16)
        with autocast(enabled=around_forward):
            results = evaluate(case.operator, leaves)
        with autocast(enabled=around_backward):
            actual = backpropagate(results, upstream, leaves)
        assert_same_bits(actual, gradients(case.operator, inputs, upstream))

    def test_compiles_into_one_graph_with_the_same_gradients(self, backend, case):
        torch._dynamo.reset()
        compiled = torch.compile(case.operator, fullgraph=True, backend="aot_eager")
        inputs = case.draw((2, 4, 3, 5))
        upstream = random_upstream(case.operator, inputs)
        assert_same_bits(gradients(compiled, inputs, upstream), gradients(case.operator, inputs, upstream))

    @pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
    def test_undoing_restores_the_data_and_cancels_the_log_det(self, backend, invertible, dtypes):
        inputs = invertible.draw((4, 6, 5, 7), dtypes)
        undo, undo_formula = invertible.undo
        data, others = inputs[0], inputs[1:]

        def there_and_back(data: Tensor, *others: Tensor) -> Tensor:
            return evaluate(undo_formula, [evaluate(invertible.formula, [data, *others])[0], *others])[0]

        result, *log_det = evaluate(invertible.operator, inputs)
        restored, *undone_log_det = evaluate(undo, [result, *others])
        (eager,) = evaluate(there_and_back, inputs, data.dtype)
        assert_accurate(restored, data.double(), eager, "restored data")
        for one, other in zip(log_det, undone_log_det, strict=True):
            # The sums of the same 210 terms, in different orders.
            assert (one + other).abs().max() <= 8 * torch.finfo(one.dtype).eps * one.abs().max()

    def test_log_det_is_that_of_the_jacobian(self, backend, invertible):
        data, *others = invertible.draw((2, 3, 2), DTYPES["float64"])
        jacobian = torch.autograd.functional.jacobian(lambda x: evaluate(invertible.operator, [x, *others])[0], data)
        for sample, *log_det in zip(range(2), *evaluate(invertible.operator, [data, *others])[1:], strict=True):
            block = jacobian[sample, ..., sample, :, :].reshape(6, 6)
            for value in log_det:
                assert abs(value - torch.linalg.slogdet(block).logabsdet) < 1e-9
