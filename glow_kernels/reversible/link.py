"""A step of a chain as one autograd node.

The node saves its input (then it is an anchor) or nothing. If it saves nothing, its backward starts from its output,
which the backward of the next step has just reconstructed. That state is passed on as the gradient of a ghost: a tensor
that has the shape of the state but takes no memory. The last step saves the output of the chain. The parameters are
inputs of the node and their gradients are returned, so hooks, DistributedDataParallel and ``torch.autograd.grad`` see
an ordinary node.

Under ``torch.compile`` the node consists of opaque operators: the compiler would merge a recomputation that it can
trace with the forward, and keep the activations that are to be discarded.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from glow_kernels.backends.numerics import output_format
from glow_kernels.nn.actnorm import ActNorm
from glow_kernels.nn.coupling_node import NOT_OVERWRITABLE, Overwritable
from glow_kernels.reversible import guards, recompute
from glow_kernels.reversible.general_step import GeneralStep, in_modes
from glow_kernels.reversible.linear_maps import FoldedMaps, LinearMaps
from glow_kernels.reversible.offload import OffloadedAnchors
from glow_kernels.reversible.plain_step import PlainStep, Span
from glow_kernels.reversible.recompute import Drawn, Mode, Recomputed
from glow_kernels.reversible.tensors import sum_of

if TYPE_CHECKING:
    from glow_kernels.reversible.chain import ReversibleSequential

_chains: weakref.WeakValueDictionary[int, ReversibleSequential] = weakref.WeakValueDictionary()
_handles = itertools.count()
_LIBRARY = torch.library.Library("glow_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(chain: ReversibleSequential) -> int:
    """A number by which nodes and compiled graphs find ``chain`` as long as it is alive."""
    handle = next(_handles)
    _chains[handle] = chain
    return handle


class NodeSpec(NamedTuple):
    """The steps that make up a node: which chain they belong to, what is saved, and whether states are compared.

    The first ``contexts`` of the node's tensors are the context, which all steps share; the parameters of each step
    follow.

    A node is usually one step, so that its gradients are passed on as soon as they are ready. With ``check="replay"``
    it is all steps from one anchor to the next, so that their gradients can still be discarded.
    """

    handle: int
    number: int
    length: int
    contexts: int
    keeps_input: bool
    keeps_output: bool
    compares: bool

    @property
    def numbers(self) -> range:
        """The steps, by their number in the chain."""
        return range(self.number, self.number + self.length)


Step = GeneralStep | PlainStep


class Link(torch.autograd.Function):
    """``apply(spec, mode, steps, maps, offloaded, x, ghost, *context, *parameters)``, with the parameters of all steps.

    Returns ``z``, ``log_det`` and the ghost of ``z``. ``steps`` is None when compiling. With ``maps``, the first
    parameters of every step are its linear maps, which are not saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: NodeSpec,
        mode: Mode,
        steps: Sequence[Step] | None,
        maps: LinearMaps | None,
        offloaded: OffloadedAnchors | None,
        x: Tensor,
        ghost: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.mode, ctx.maps, ctx.draws = spec, mode, maps, None
        remembered: Sequence[Any] = tensors
        if steps is None:
            # Dynamo in PyTorch 2.11 fails if symbolic sizes are read here: only the operators read them.
            z, log_det, following, like_x = _forward_operator(x, list(tensors), *_as_settings(spec, mode))
            remembered = (like_x, *tensors)
        else:
            z, log_det, ctx.draws = _forward(spec, mode, steps, x, tensors)
            following = _ghost_of(z)
            ctx.spans = [step.span if isinstance(step, PlainStep) else None for step in steps]
            # Dropout and BatchNorm must run in the same mode in backward.
            ctx.modes = [(m, m.training) for step in steps if not step.is_standard for m in step.modules]
            ctx.bounds = _bounds(spec, steps)
            ctx.of_steps = [_maps_of(*step) for step in zip(spec.numbers, ctx.spans, strict=True)]
        # Backward through a single step needs its input or its output; through several steps it needs both.
        keeps_output = spec.keeps_output and not (spec.keeps_input and spec.length == 1)
        ctx.offloaded = offloaded if spec.keeps_input else None
        kept = x if spec.keeps_input and offloaded is None else None
        if maps is not None:
            remembered = _with_maps(tensors, ctx.bounds, [[(None, None)] * len(own) for own in ctx.of_steps])
        ctx.save_for_backward(kept, z if keeps_output else None, *remembered)
        if ctx.offloaded is not None:
            ctx.anchor_number = ctx.offloaded.store(x)
        if not torch.compiler.is_compiling():
            ctx.chain = _chains[spec.handle]  # keeps the chain alive until backward
            ctx.overwritable = _overwritable(ctx.chain, spec, maps)
        return z, log_det, following

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        spec, mode = ctx.spec, ctx.mode
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            guards.refuse_second_derivatives(ctx.chain, spec.number)
        grad_z, grad_log_det, reconstructed = grads
        needs = ctx.needs_input_grad[7:]
        if torch.compiler.is_compiling():
            x, z, like_x, *tensors = ctx.saved_tensors
        else:
            x, z, *tensors = guards.saved_tensors(ctx, ctx.chain, spec.number)
            if ctx.offloaded is not None:
                x = ctx.offloaded.fetch(ctx.anchor_number)
        # If the input is saved, the state reconstructed by the next node is needed only for comparison.
        if z is None and (x is None or spec.compares):
            z = reconstructed
        if torch.compiler.is_compiling():
            arguments = (x, z, grad_z, grad_log_det, tensors, needs, like_x)
            reached, grad_x, *tensor_grads = _backward_operator(*arguments, *_as_settings(spec, mode))
            found = iter(tensor_grads)
            tensor_grads = [next(found) if need else None for need in needs]
        else:
            maps: list[FoldedMaps] = [[]] * spec.length
            if ctx.maps is not None:
                maps = ctx.maps.of(ctx.of_steps)
                tensors = _with_maps(tensors, ctx.bounds, [[linear for linear, _ in own] for own in maps])
            steps = _steps(spec, tensors, ctx.spans, ctx.bounds, maps)
            with in_modes(ctx.modes) if ctx.modes else nullcontext():
                result = _backward(
                    spec, mode, steps, x, z, (grad_z, grad_log_det), tensors, needs, ctx.draws, ctx.overwritable
                )
            reached, grad_x, tensor_grads = result.x, result.grad_x, result.grads
        ghost_grad = (reached if x is None else x) if ctx.needs_input_grad[6] else None
        return None, None, None, None, None, grad_x, ghost_grad, *tensor_grads


def _ghost_of(state: Tensor) -> Tensor:
    """One element, never read, expanded by zero strides to the shape of ``state``. FSDP would warn about a view."""
    return state.new_empty_strided(state.shape, [0] * state.dim())


Draws = list[list[Drawn] | None]


def _forward(
    spec: NodeSpec, mode: Mode, steps: Sequence[Step], x: Tensor, tensors: Sequence[Any]
) -> tuple[Tensor, Tensor, Draws]:
    chain = chain_of(spec)
    context = tensors[: spec.contexts]
    total: Tensor | None = None
    draws: Draws = []
    for number, step in zip(spec.numbers, steps, strict=True):
        with guards.errors_name_step(chain, number):
            guards.try_out(chain, number, step, x, context, mode)
            with guards.unchanged(step, x, "forward"):
                x, log_det, drawn = recompute.forward(step, x, context, mode)
        total = log_det if total is None else total + log_det
        draws.append(drawn)
    assert total is not None
    return x, total, draws


def _backward(
    spec: NodeSpec,
    mode: Mode,
    steps: Sequence[Step],
    x: Tensor | None,
    z: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None],
    tensors: Sequence[Any],
    needs: Sequence[bool],
    draws: Draws | None,
    overwritable: Overwritable = NOT_OVERWRITABLE,
) -> Recomputed:
    chain = chain_of(spec)
    draws = [None] * spec.length if draws is None else draws
    inputs = [x, *[None] * (spec.length - 1)]
    result, reached = _sweep(spec, mode, steps, inputs, z, grads, tensors, needs, draws, overwritable)
    if result.z is None or reached is None:
        return result
    with guards.errors_name_step(chain, spec.number):
        too_far = guards.compare(chain, spec.number, result.z, reached, mode)
    if not too_far:
        return result
    # Differentiate again, with exact states, recomputed from the anchor.
    for index, step in enumerate(steps[:-1]):
        given = inputs[index]
        assert given is not None
        inputs[index + 1] = recompute.forward(step, given, tensors[: spec.contexts], mode, draws[index])[0]
    return _sweep(spec, mode, steps, inputs, None, grads, tensors, needs, draws)[0]


def _sweep(
    spec: NodeSpec,
    mode: Mode,
    steps: Sequence[Step],
    inputs: Sequence[Tensor | None],
    z: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None],
    tensors: Sequence[Any],
    needs: Sequence[bool],
    draws: Draws,
    overwritable: Overwritable = NOT_OVERWRITABLE,
) -> tuple[Recomputed, Tensor | None]:
    """Backward through the steps, from the known ``inputs`` or else from ``z``.

    Returns the result of the first step, with the gradients of all tensors, and the output that it was given.
    """
    chain = chain_of(spec)
    context = tensors[: spec.contexts]
    totals: list[Tensor | None] = [None] * len(tensors)
    state = reached = z
    result: Recomputed | None = None
    bounds = _bounds(spec, steps)
    for index in reversed(range(spec.length)):
        step, own, number = steps[index], slice(bounds[index], bounds[index + 1]), spec.number + index
        reached = state
        given = state if inputs[index] is None else inputs[index]
        assert given is not None
        with guards.errors_name_step(chain, number), guards.unchanged(step, given, "backward"):
            result = recompute.backward(
                step,
                inputs[index],
                state,
                grads,
                context,
                tensors[own],
                [*needs[: spec.contexts], *needs[own]],
                mode,
                draws[index],
                step.is_standard,
                overwritable,
            )
        state, grads = result.x, (result.grad_x, grads[1])
        totals[own] = result.grads[spec.contexts :]
        for position, grad in enumerate(result.grads[: spec.contexts]):
            totals[position] = sum_of(totals[position], grad)
    assert result is not None
    return result._replace(grads=totals), reached


def _overwritable(chain: ReversibleSequential, spec: NodeSpec, maps: LinearMaps | None) -> Overwritable:
    """Which of the tensors passed to the backward of a node it may overwrite: those that nothing else holds.

    The next node has just made the state and its gradient, and does not keep them; hooks could, but steps whose linear
    maps come from the chain have none. The last step's tensors belong to the caller, and an anchor may be needed again.
    """
    if maps is None or spec.length > 1 or spec.keeps_output:
        return NOT_OVERWRITABLE
    return Overwritable(state=not spec.keeps_input and not chain._is_anchor(spec.number + 1), grad=not spec.keeps_input)


def chain_of(spec: NodeSpec) -> ReversibleSequential:
    """The chain of ``spec``."""
    chain = _chains.get(spec.handle)
    if chain is None:
        raise RuntimeError("the reversible chain that this was compiled for no longer exists")
    return chain


def _bounds(spec: NodeSpec, steps: Sequence[Step]) -> list[int]:
    """Index of the first parameter of each step among the tensors, and the end index of the last step's."""
    return list(itertools.accumulate([len(step.slots) for step in steps], initial=spec.contexts))


def _maps_of(number: int, span: Span | None) -> range:
    """The indices of a step's linear maps among those of its chain."""
    return range(number, number + 1) if span is None else span.maps(number)


def _with_maps(tensors: Sequence[Any], bounds: Sequence[int], maps: Sequence[Sequence[Any]]) -> list[Any]:
    """``tensors`` with the matrices and shifts of every step replaced by ``maps``."""
    result = list(tensors)
    for start, own in zip(bounds, maps, strict=False):
        result[start : start + 2 * len(own)] = itertools.chain.from_iterable(own)
    return result


def _steps(
    spec: NodeSpec,
    tensors: Sequence[Any],
    spans: Sequence[Span | None],
    bounds: Sequence[int],
    maps: Sequence[FoldedMaps],
) -> list[Step]:
    """The steps as in forward, with the parameters and linear maps that forward used."""
    chain = chain_of(spec)
    steps: list[Step] = []
    for number, span, (start, end), own in zip(spec.numbers, spans, itertools.pairwise(bounds), maps, strict=True):
        if span is None:
            linear, inverse = own[0] if own else ((), None)
            steps.append(GeneralStep.of(chain[number], linear, inverse))
        else:
            steps.append(PlainStep(span, tensors[start:end], [inverse for _, inverse in own]))
    return steps


def _general_steps(spec: NodeSpec) -> list[Step]:
    chain = chain_of(spec)
    return [GeneralStep.of(chain[number]) for number in spec.numbers]


def _as_settings(spec: NodeSpec, mode: Mode) -> tuple[Any, ...]:
    return (*spec, *mode)


_SETTINGS = (
    "int handle, int number, int length, int contexts, bool keeps_input, bool keeps_output, "
    "bool compares, int micro_batches, ScalarType? autocast, str? backend"
)
# The last two results of forward are the ghost of its output and, for backward, the ghost of its input.
_SCHEMAS = (
    f"reversible_forward(Tensor x, Tensor?[] tensors, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    "reversible_backward(Tensor? x, Tensor? z, Tensor? grad_z, Tensor? grad_log_det, Tensor?[] tensors, bool[] needs, "
    f"Tensor like_x, {_SETTINGS}) -> Tensor[]",
)
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
_forward_operator = torch.ops.glow_kernels.reversible_forward.default
_backward_operator = torch.ops.glow_kernels.reversible_backward.default


def _from_settings(settings: Sequence[Any]) -> tuple[NodeSpec, Mode]:
    count = len(NodeSpec._fields)
    return NodeSpec(*settings[:count]), Mode(*settings[count:])


@contextmanager
def _eager() -> Iterator[None]:
    """Let autograd record inside an operator, where the dispatcher excludes its keys."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


def _as_declared(tensor: Tensor, *inputs: Tensor | None) -> Tensor:
    """``tensor`` with the strides of its fake, copied if it shares memory with an argument of the operator."""
    tensor = tensor.contiguous(memory_format=output_format(tensor))
    storages = [other.untyped_storage().data_ptr() for other in inputs if other is not None]
    return tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor


@contextmanager
def _substituted(spec: NodeSpec, steps: Sequence[Step], tensors: Sequence[Any]) -> Iterator[None]:
    """Let ``steps`` compute with the parameters among ``tensors``.

    A compiled graph holds its own parameters, and writes what it changes (such as the initial values of ActNorm) to the
    modules only at its end. It initialises ActNorms before these operators run, so they count as initialised here, and
    their flags are restored afterwards.
    """
    norms = [module for step in steps for module in step.modules if isinstance(module, ActNorm)]
    flags = [norm._is_initialized for norm in norms]
    with ExitStack() as stack:
        for step, (start, end) in zip(steps, itertools.pairwise(_bounds(spec, steps)), strict=True):
            assert isinstance(step, GeneralStep)
            stack.enter_context(step.substituted(tensors[start:end]))
        try:
            for norm in norms:
                norm._is_initialized = True
            yield
        finally:
            for norm, flag in zip(norms, flags, strict=True):
                norm._is_initialized = flag


def _run_forward(x: Tensor, tensors: Sequence[Tensor | None], *settings: Any) -> tuple[Tensor, ...]:
    spec, mode = _from_settings(settings)
    steps = _general_steps(spec)
    with _eager(), _substituted(spec, steps, tensors):
        z, log_det, draws = _forward(spec, mode, steps, x, tensors)
    drawing = [number for number, drawn in zip(spec.numbers, draws, strict=True) if drawn is not None]
    if drawing:
        name = guards.step_name(chain_of(spec), drawing[0])
        raise RuntimeError(f"{name}: it draws random numbers, which needs memory='store' under torch.compile")
    return _as_declared(z, x), log_det.contiguous(), _ghost_of(z), _ghost_of(x)


def _fake_forward(x: Tensor, tensors: Sequence[Tensor | None], *settings: Any) -> tuple[Tensor, ...]:
    spec, mode = _from_settings(settings)
    fake_mode = detect_fake_mode(x)
    assert fake_mode is not None
    allowed = fake_mode.allow_non_fake_inputs
    # The step's own parameters and buffers are real tensors.
    fake_mode.allow_non_fake_inputs = True
    z, steps = x, _general_steps(spec)
    try:
        with _substituted(spec, steps, tensors):
            for step in steps:
                z, log_det, _ = recompute.forward(step, z, tensors[: spec.contexts], mode)
    finally:
        fake_mode.allow_non_fake_inputs = allowed
    result = torch.empty_like(z, memory_format=output_format(z))
    return result, log_det.new_empty(log_det.shape), _ghost_of(z), _ghost_of(x)


def _run_backward(
    x: Tensor | None,
    z: Tensor | None,
    grad_z: Tensor | None,
    grad_log_det: Tensor | None,
    tensors: Sequence[Tensor | None],
    needs: list[bool],
    like_x: Tensor,
    *settings: Any,
) -> list[Tensor]:
    spec, mode = _from_settings(settings)
    steps = _general_steps(spec)
    with _eager(), _substituted(spec, steps, tensors):
        result = _backward(spec, mode, steps, x, z, (grad_z, grad_log_det), tensors, needs, None)
    inputs = (x, z, grad_z)
    grads = [
        tensor.new_zeros(tensor.shape) if grad is None else grad.clone(memory_format=torch.contiguous_format)
        for grad, tensor, need in zip(result.grads, tensors, needs, strict=True)
        if need and tensor is not None
    ]
    return [_as_declared(result.x, *inputs), _as_declared(result.grad_x, *inputs), *grads]


def _fake_backward(
    x: Tensor | None,
    z: Tensor | None,
    grad_z: Tensor | None,
    grad_log_det: Tensor | None,
    tensors: Sequence[Tensor | None],
    needs: list[bool],
    like_x: Tensor,
    *settings: Any,
) -> list[Tensor]:
    given = z if x is None else x
    assert given is not None
    state = torch.empty(like_x.shape, dtype=given.dtype, device=given.device, memory_format=output_format(given))
    wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need and tensor is not None]
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in wanted]
    return [state, torch.empty_like(state), *grads]


for _name, _run, _fake in (
    ("reversible_forward", _run_forward, _fake_forward),
    ("reversible_backward", _run_backward, _fake_backward),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"glow_kernels::{_name}", _fake, lib=_LIBRARY)
