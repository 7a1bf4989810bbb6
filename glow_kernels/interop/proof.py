"""The proof of a patch: the original and the patched layer must agree, or the layer is not patched.

Copies of both run on the same random inputs, with the same simple stand-ins for their networks:

* in float64, even where a layer would round to float32, with parameters moved away from special values, in training and
  evaluation mode and in both directions: structure, shapes, types, values and the gradients of inputs and parameters
  must agree;
* in their own precision, with their own parameters: the error against the float64 truth must be at most twice that of
  the original, plus a few units in the last place;
* with inputs, network outputs and, in the density direction, parameters large and small enough to reveal bounds;
* starting before ActNorm is initialised: parameters after the first batch and results must agree.

The layer must also do nothing that the patch would not do: store results as attributes, change its parameters,
checkpoint its network or switch autocast for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from glow_kernels.interop.constants import plain_attributes
from glow_kernels.interop.copies import faithful_copy, randomised, set_initialized
from glow_kernels.interop.examiner import Examiner
from glow_kernels.interop.patch import INITIALIZED, Call, Mismatch, Patch
from glow_kernels.interop.probe import extreme_values
from glow_kernels.interop.stand_ins import StandIn
from glow_kernels.reversible.randomness import seed_generators

if TYPE_CHECKING:
    from glow_kernels.interop.memory import Memory

# Tolerances, relative to the largest value: for data in float64; for log-determinants and gradients in float64; for
# layers that only run in float32; for their log-determinants, sums over channels that may cancel.
_EXACT, _NEARLY_EXACT, _ROUNDED, _SUMMED = 1e-9, 1e-7, 2e-5, 1e-4
_ULPS = 32
# Draws of inputs over which errors are averaged before a layer counts as less accurate: in a single draw, one of the
# many tensors of a long chain of steps may be three times as far off by chance.
_DRAWS = 8
# Parameters per channel that reveal bounds.
_EXTREME_PARAMETERS = (6.0, -6.0, 1e-4, -1e-4)
# The largest network output that reveals them, yet leaves the data comparable.
_LARGE_OUTPUT = 8.0


@dataclass
class Agreement:
    """The largest measured differences, relative to the size of the values.

    Attributes:
        values, log_dets, gradients: by call, ``{"forward": ...}``; in float64 if the layer runs in it. Results with at
            most one number per sample count as log-determinants.
        rounding: largest error in the layer's own precision and that of the original, in units in the last place; of
            one draw of inputs, or the mean of several.
    """

    values: dict[str, float] = field(default_factory=dict)
    log_dets: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    rounding: tuple[float, float] = (0.0, 0.0)


@dataclass
class _Run:
    """The results of one call as leaves of a structure, the gradients, and the side effects: attributes stored,
    parameters changed, and whether backward ran networks again."""

    leaves: list[Any]
    structure: Any
    gradients: dict[str, Tensor | None]
    stored: list[str]
    changed: list[str]
    recomputes: bool

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def others(self) -> list[Any]:
        return [leaf for leaf in self.leaves if not isinstance(leaf, Tensor)]

    def outline(self) -> Any:
        """The returned structure, with the names of types in place of values."""
        return pytree.tree_unflatten([type(leaf).__name__ for leaf in self.leaves], self.structure)


class _Unrounded(TorchFunctionMode):
    """Turns casts to float32, such as ``float()``, into casts to float64, so that layers do not round in between.

    Nothing else gives the true value of an inverse that a layer computes in float32.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wider = [torch.float64 if arg is torch.float32 else arg for arg in args]
        options = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        function: Any = Tensor.double if func is Tensor.float else func
        return function(*wider, **options)


def prove(
    module: nn.Module, patch: type[Patch], options: Any, examiner: Examiner, memory: Memory | None = None
) -> Agreement:
    """Compare ``module`` with a copy patched by ``patch``, which keeps what ``memory`` says, or everything.

    Raises:
        Mismatch: they differ; the message says how.
    """
    before, after = examiner.replica(module), examiner.patched_replica(module, patch, options, memory)
    randomised_copies = _randomised_copies(before, after)
    agreement = Agreement()
    calls = [call for call in patch.calls(module, options) if memory is None or not call.opaque_context]
    for call in calls:
        for training in (True, False):
            compared = _same_formula(call, randomised_copies, training, agreement)
            if compared is not None and memory is None:
                _does_nothing_else(call, *compared[:2], patch)
        _as_accurate(call, before, after, agreement)
        if compared is not None:
            _same_bounds(call, *compared, extreme_parameters=call is calls[0])
    _same_initialization(calls[0], before, after)
    if not agreement.values:
        raise Mismatch("none of its calls could be compared")
    return agreement


def prove_chain(modules: Sequence[nn.Module], examiner: Examiner) -> None:
    """Compare a chain of steps, patched to keep what was decided for each, with the originals.

    Raises:
        Mismatch: they differ.
    """
    patch, options = examiner.decisions[modules[0]]
    first = patch.calls(modules[0], options)[0]
    before = nn.ModuleList(examiner.replica(module) for module in modules)
    after = nn.ModuleList(
        examiner.patched_replica(module, *examiner.decisions[module], examiner.memories[module]) for module in modules
    )

    def run(steps: Any, x: Tensor, *others: Tensor) -> list[Any]:
        results = []
        for step in steps:
            x, *more = (leaf for leaf in pytree.tree_leaves(first.run(step, x, *others)) if isinstance(leaf, Tensor))
            results.append(more)
        return [x, results]

    _same_formula(Call("the chain of steps", run, first.shapes), _randomised_copies(before, after), True, Agreement())


def _randomised_copies(*modules: Any) -> list[Any]:
    return [randomised(faithful_copy(module)) for module in modules]


def _same_formula(
    call: Call, randomised_copies: Sequence[Any], training: bool, agreement: Agreement
) -> tuple[_Run, Any, Any] | None:
    """Compare one call; returns the original's run and both copies, or None if the original refuses the call."""
    try:
        expected, dtype, pair = _first_run(call, [module.train(training) for module in randomised_copies], seed=0)
    except Exception as error:
        if call.optional and not isinstance(error, Mismatch):
            return None
        cause = str(error) or type(error).__name__
        raise Mismatch(f"{call.name} fails when it is called as such layers are: {cause}") from error
    actual = _run(call, pair[1], dtype)
    _same_structure(call.name, expected, actual)
    for index, results in enumerate(zip(expected.tensors, actual.tensors, strict=True)):
        difference = _difference(f"{call.name}: result {index}", *results, _tolerance(dtype, results[0]))
        _note(agreement.values if results[0].dim() > 1 else agreement.log_dets, call, difference)
    for name, gradient in expected.gradients.items():
        difference = _difference(
            f"{call.name}: gradient of {name}", gradient, actual.gradients[name], _tolerance(dtype)
        )
        _note(agreement.gradients, call, difference)
    return expected, *pair


def _note(largest: dict[str, float], call: Call, difference: float) -> None:
    largest[call.name] = max(difference, largest.get(call.name, 0.0))


def _as_accurate(call: Call, before: Any, after: Any, agreement: Agreement) -> None:
    dtype = _precision(before)
    if dtype == torch.float64 or call.name not in agreement.values:
        return
    own, ours = (set_initialized(faithful_copy(module).train(), True) for module in (before, after))
    truth = set_initialized(faithful_copy(before).train().double(), True)
    sums: dict[str, tuple[float, float]] = {}
    for seed in range(_DRAWS):
        try:
            true = _run(call, truth, torch.float64, seed)
        except Exception:  # it only runs in its own precision, in which it has been compared
            return
        expected, actual = _run(call, own, dtype, seed), _run(call, ours, dtype, seed)
        _same_structure(call.name, expected, actual)
        for name, (error, allowed) in _rounding(call.name, true, expected, actual, dtype):
            if not math.isfinite(error):
                raise Mismatch(f"{call.name}: {name} is not finite")
            total, total_allowed = sums.get(name, (0.0, 0.0))
            sums[name] = total + error, total_allowed + allowed
        means = {name: (error / (seed + 1), allowed / (seed + 1)) for name, (error, allowed) in sums.items()}
        wrong = [name for name, (error, allowed) in means.items() if error > 2 * allowed + _ULPS]
        if not wrong:
            agreement.rounding = max([agreement.rounding, *means.values()])
            return
    error, allowed = means[wrong[0]]
    raise Mismatch(
        f"{call.name}: {wrong[0]} is off by {error:.0f} units in the last place, {allowed:.0f} in the original"
    )


def _rounding(
    call: str, true: _Run, expected: _Run, actual: _Run, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[float, float]]]:
    """For each result and gradient, the errors of ``actual`` and of ``expected``, in units in the last place."""
    names = [f"result {index}" for index in range(len(true.tensors))] + [
        f"gradient of {name}" for name in true.gradients
    ]
    triples = zip(*([*run.tensors, *run.gradients.values()] for run in (true, expected, actual)), strict=True)
    for name, (exact, eager, fused) in zip(names, triples, strict=True):
        if exact is None or eager is None or fused is None or not exact.numel():
            continue
        if eager.dtype != fused.dtype:
            raise Mismatch(f"{call}: {name} is {fused.dtype}, not {eager.dtype}")
        # Sums over a sample have the rounding errors of their partial sums, which may be larger than the total.
        unit = torch.finfo(dtype).eps * max(1.0, exact.abs().max().item(), _terms(name, exact) ** 0.5)
        error, allowed = ((tensor.double() - exact.double()).abs().max().item() / unit for tensor in (fused, eager))
        yield name, (error, allowed)


def _does_nothing_else(call: Call, run: _Run, before: Any, patch: type[Patch]) -> None:
    stored = [name for name in run.stored if name not in patch.mutable_attributes]
    if stored:
        raise Mismatch(f"it stores its {stored[0]}")
    if run.changed:
        raise Mismatch(f"it changes its {run.changed[0]} when it is called")
    if run.recomputes:
        raise Mismatch("it runs its network again in backward, as torch.utils.checkpoint does")
    networks = _stand_ins(before)
    if not networks:
        return
    switches = any(network.had_autocast for network in networks)
    calls = [network.calls for network in networks]
    inputs = _inputs(call, before, run.tensors[0].dtype, torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast(inputs[0].device.type, torch.bfloat16):
        try:
            _results(call, before, inputs)
        except Exception:  # it does not run under autocast anyway
            return
    for network, number in zip(networks, calls, strict=True):
        switches |= network.calls != number and not network.had_autocast
    if switches:
        raise Mismatch("it switches autocast on or off for its network")


@torch.no_grad()
def _same_bounds(call: Call, run: _Run, before: Any, after: Any, extreme_parameters: bool) -> None:
    """Compare results for extreme data, and for a single sample with a single position.

    Args:
        extreme_parameters: whether to use extreme parameters per channel too; not where they would make an inverse
            ill-conditioned.
    """
    dtype, channels = run.tensors[0].dtype, call.shapes[0][1]
    if dtype != torch.float64:
        return
    for module in (before, after) if extreme_parameters else ():
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.numel() <= channels:
                values = torch.tensor(_EXTREME_PARAMETERS, dtype=dtype).repeat(channels)
                parameter.copy_(values[: parameter.numel()].view_as(parameter))
    name = f"{call.name} with large numbers"
    _same_results(name, *(_extreme_results(call, module, dtype) for module in (before, after)))
    for network in (*_stand_ins(before), *_stand_ins(after)):
        network.max_output = _LARGE_OUTPUT
    if _stand_ins(before):
        name = f"{call.name} with large network outputs"
        inputs = _inputs(call, before, dtype, torch.Generator().manual_seed(0))
        _same_results(name, *(_tensors(_results(call, module, inputs)) for module in (before, after)))
    single = dataclasses.replace(call, shapes=tuple((1, *shape[1:2], *(1,) * len(shape[2:])) for shape in call.shapes))
    try:
        expected = _extreme_results(single, before, dtype)
    except Exception:  # such as layers that squeeze neighbours into channels
        return
    _same_results(f"{call.name} of one position", expected, _extreme_results(single, after, dtype))


def _extreme_results(call: Call, module: Any, dtype: torch.dtype) -> list[Tensor]:
    inputs = _inputs(call, module, dtype, torch.Generator().manual_seed(0))
    inputs[0] = extreme_values(inputs[0])
    return _tensors(_results(call, module, inputs))


def _tensors(results: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


def _same_results(name: str, expected: list[Tensor], actual: list[Tensor]) -> None:
    _same_shapes(name, expected, actual)
    for index, (one, other) in enumerate(zip(expected, actual, strict=True)):
        if one.isfinite().all():
            _difference(f"{name}: result {index}", one, other, _ROUNDED)


def _same_initialization(call: Call, before: Any, after: Any) -> None:
    """Compare the first two batches of layers that initialise themselves."""
    try:
        prepared = [set_initialized(faithful_copy(module).train(), False) for module in (before, after)]
        expected, dtype, pair = _first_run(call, prepared, seed=1)
    except Exception:
        return
    for batch in (1, 2):
        try:
            expected = expected if batch == 1 else _run(call, pair[0], dtype, batch)
        except Exception:
            return
        try:
            actual = _run(call, pair[1], dtype, batch)
        except Exception as error:
            raise Mismatch(f"batch {batch} of a layer that was not initialised: {error}") from error
        _same_structure(f"batch {batch}", expected, actual)
        for index, results in enumerate(zip(expected.tensors, actual.tensors, strict=True)):
            _difference(f"batch {batch}: result {index}", *results, _tolerance(dtype, results[0]))
    states = [module.state_dict() for module in pair]
    for name, state in states[0].items():
        if isinstance(state, Tensor):
            _difference(f"after the first batch: {name}", state, states[1][name], _ROUNDED)


def _first_run(call: Call, pair: Sequence[Any], seed: int) -> tuple[_Run, torch.dtype, list[Any]]:
    """Run the first of ``pair`` in float64 or, if it cannot, in its own precision; returns the run, the precision, and
    copies of both in it."""
    for dtype in (torch.float64, _precision(pair[0])):
        copies = [faithful_copy(module).to(dtype) for module in pair]
        try:
            return _run(call, copies[0], dtype, seed), dtype, copies
        except Exception as error:
            failure = error
    raise failure


def _run(call: Call, module: Any, dtype: torch.dtype, seed: int = 0) -> _Run:
    generator = torch.Generator().manual_seed(seed)
    inputs = [tensor.requires_grad_() for tensor in _inputs(call, module, dtype, generator)]
    seed_generators(_device(module), seed)  # for dropout
    kept = plain_attributes(module, INITIALIZED)
    before = [(name, p, p._version, p.detach().clone()) for name, p in module.named_parameters()]
    leaves, structure = pytree.tree_flatten(_results(call, module, inputs))
    calls = [network.calls for network in _stand_ins(module)]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    names = [f"input {index}" for index in range(len(inputs))]
    wanted = dict(zip(names, inputs, strict=True))
    wanted |= {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    loss: Tensor | None = None
    for tensor in tensors:
        if tensor.requires_grad:
            weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            loss = (tensor * weights).sum() if loss is None else loss + (tensor * weights).sum()
    gradients: Sequence[Tensor | None] = [None] * len(wanted)
    if loss is not None:
        gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    recomputes = calls != [network.calls for network in _stand_ins(module)]
    now, named = plain_attributes(module, INITIALIZED), dict(zip(wanted, gradients, strict=True))
    stored = [name for name, value in now.items() if name not in kept or value is not kept[name]]
    # Writing the same values counts too: a bound that has no effect now may have one later.
    changed = [name for name, p, version, value in before if p._version != version or not torch.equal(p, value)]
    leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return _Run(leaves, structure, named, stored, changed, recomputes)


def _results(call: Call, module: Any, inputs: Sequence[Tensor]) -> Any:
    with _Unrounded() if inputs[0].dtype == torch.float64 else nullcontext():
        return call.run(module, *inputs)


def _inputs(call: Call, module: Any, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    numbers = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in call.shapes)
    return [tensor.to(_device(module), dtype) for tensor in numbers]


def _device(module: Any) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _stand_ins(module: nn.Module) -> list[StandIn]:
    return [layer for layer in module.modules() if isinstance(layer, StandIn)]


def _same_structure(name: str, expected: _Run, actual: _Run) -> None:
    if expected.structure != actual.structure or expected.others != actual.others:
        theirs, ours = (str(run.outline()).replace("'", "") for run in (expected, actual))
        raise Mismatch(f"{name} returns {theirs}, where such a layer would return {ours}")
    _same_shapes(name, expected.tensors, actual.tensors)


def _same_shapes(name: str, expected: list[Tensor], actual: list[Tensor]) -> None:
    for index, (one, other) in enumerate(zip(expected, actual, strict=True)):
        if one.shape != other.shape:
            theirs, ours = tuple(one.shape), tuple(other.shape)
            raise Mismatch(f"{name}: result {index} is {theirs}, where that of such a layer would be {ours}")


def _difference(name: str, expected: Tensor | None, actual: Tensor | None, tolerance: float) -> float:
    """Largest difference, relative to the largest value."""
    if expected is None or actual is None:
        if (expected is None) != (actual is None):
            raise Mismatch(f"{name} is {'there, and was not before' if expected is None else 'missing'}")
        return 0.0
    if not expected.numel():
        return 0.0
    size = max(1.0, expected.double().abs().max().item())
    difference = (actual.double() - expected.double()).abs().max().item() / size
    if not math.isfinite(difference):
        whose = "patched" if expected.isfinite().all() else "original"
        raise Mismatch(f"{name} of the {whose} layer is not finite")
    if difference > tolerance:
        raise Mismatch(f"{name} differs by {difference:.1e}")
    return difference


def _tolerance(dtype: torch.dtype, result: Tensor | None = None) -> float:
    if dtype != torch.float64:
        return _ROUNDED if result is None or result.dim() > 1 else _SUMMED
    return _EXACT if result is not None and result.dim() > 1 and result.dtype == dtype else _NEARLY_EXACT


def _terms(name: str, result: Tensor) -> float:
    return 1.0 if name.startswith("result") and result.dim() > 1 else 1024.0


def _precision(module: nn.Module) -> torch.dtype:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.get_default_dtype()
