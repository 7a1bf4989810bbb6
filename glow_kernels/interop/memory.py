"""Memory-saving execution of recognised steps, whatever code calls them.

A step becomes one autograd node, which saves its input, its output or nothing, and no activations of its network:
backward recomputes them with the engine of :mod:`glow_kernels.reversible`. If a step is given the very tensor that
another step returned, the two form a chain: in backward, the second one reconstructs that state and passes it on as
the gradient of a ghost, a tensor of the state's shape that takes no memory. So chains form within loops of the user's
own code, and end where anything else is done to the state.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from glow_kernels.interop import steps
from glow_kernels.interop.constants import PLAIN
from glow_kernels.interop.patch import (
    any_hooks,
    has_same_submodules,
    is_uninitialised,
    memory_of,
    original_class,
    patch_of,
)
from glow_kernels.reversible import guards, recompute
from glow_kernels.reversible.general_step import SUBSTITUTION, GeneralStep, in_modes
from glow_kernels.reversible.randomness import RandomState
from glow_kernels.reversible.recompute import Mode
from glow_kernels.reversible.tensors import is_graph_retained

_LINK = "_glow_kernels_link"
# Placeholder for a tensor.
_TENSOR = object()


@dataclass(frozen=True)
class Memory:
    """What a recognised step keeps for backward; as for :class:`~glow_kernels.ReversibleSequential`.

    Attributes:
        policy: ``"checkpoint"``, ``"anchor"`` or ``"invert"``.
        anchor_every: number of steps from one anchor of a chain to the next.
        micro_batches: number of parts of the batch in which the step is evaluated.
        restores_buffers: its network changes buffers, as BatchNorm does; recomputation must not change them again.
    """

    policy: str
    anchor_every: int = 4
    micro_batches: int = 1
    restores_buffers: bool = False

    def keeps_input(self, position: int) -> bool:
        """Whether the step at this position of a chain keeps its input."""
        anchor = self.policy == "anchor" and position % self.anchor_every == self.anchor_every - 1
        return anchor or self.policy == "checkpoint"


class _ContextStructure:
    """The structure of a context, which may be nested, without its tensors, which autograd must be given directly."""

    def __init__(self, context: Sequence[Any]) -> None:
        leaves, self._structure = pytree.tree_flatten(context)
        self._leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def call(self, function: Callable[..., Any], x: Tensor, *tensors: Tensor) -> Any:
        """``function(x, *context)``, with ``tensors`` in place of those in the context.

        Raises:
            RuntimeError: it changes the context; recomputation would change it again.
        """
        given, versions = iter(tensors), guards.versions(tensors)
        leaves = [next(given) if leaf is _TENSOR else leaf for leaf in self._leaves]
        context = pytree.tree_unflatten(leaves, self._structure)
        result = function(x, *context)
        after, structure = pytree.tree_flatten(context)
        same = structure == self._structure and all(map(operator.is_, leaves, after))
        if not same or guards.versions(tensors) != versions:
            raise RuntimeError("the network of a step changes its context: use memory='store'")
        return result


class _StepModule(nn.Module):
    """A step of existing code in the form that the engine takes; its computation stays even if the step is restored."""

    def __init__(
        self,
        module: nn.Module,
        computation: steps.Parts | Callable[..., Any],
        context_structure: _ContextStructure | None = None,
    ) -> None:
        super().__init__()
        self.module = module

        def with_context(function: Callable[..., Any]) -> Callable[..., Any]:
            return function if context_structure is None else functools.partial(context_structure.call, function)

        if isinstance(computation, steps.Parts):
            parts = computation._replace(network=with_context(computation.network))
            self.function: Callable[..., Any] = functools.partial(steps.forward, parts)
            self.backward_from_output = functools.partial(steps.backward_from_output, parts)
        else:
            self.function = with_context(computation)

    def forward(self, x: Tensor, *context: Any) -> Any:
        return self.function(x, *context)


class _Output:
    """The state after a step, kept until a following step undertakes to reconstruct it."""

    def __init__(self) -> None:
        self._state: Tensor | None = None
        self._version = 0

    def keep(self, state: Tensor | None) -> None:
        """Keep ``state``; with None, drop what is kept."""
        self._state, self._version = state, 0 if state is None else state._version

    def kept(self) -> Tensor:
        """The state.

        Raises:
            RuntimeError: it has been dropped, or modified in place.
        """
        if self._state is None:
            raise RuntimeError(
                "the backward of a step needs the state from the step that follows it, which is not part of what is "
                "differentiated: use memory='checkpoint'"
            )
        if self._state._version != self._version:
            raise RuntimeError("the state after a step was modified in place: use memory='checkpoint'")
        return self._state


class _Link:
    """What a step attaches to the tensor that it returns, for the step that is given it."""

    def __init__(self, z: Tensor, ghost: Tensor, output: _Output, position: int) -> None:
        self.node, self.version = z.grad_fn, z._version
        self.ghost, self.output, self.position = ghost, output, position
        self.taken = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as None: a tensor that is saved has left the chain."""
        return type(None), ()

    def is_valid_for(self, x: Tensor) -> bool:
        """Whether ``x`` is what the step returned, unchanged, and no other step follows."""
        return not self.taken and x.grad_fn is self.node and x._version == self.version

    def take(self) -> Tensor:
        """The ghost, for the step that will reconstruct the state."""
        self.taken = True
        self.output.keep(None)
        return self.ghost


def run(module: nn.Module, x: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
    """A patched step in the density direction: ``x`` (B, C, *spatial) to ``z`` and ``log_det`` (B,).

    ``context``, tensors or structures of them, is passed to the network.
    """
    memory, patch = _memory_of_call(module, x, context), cast(Any, patch_of(module))
    parts = patch.parts(module)
    if memory is None:
        return steps.forward(parts, x, *context)
    if _hides_parameters(module):
        return checkpoint(_StepModule(module, parts), x, *context, use_reentrant=False)  # type: ignore[no-any-return]
    link = getattr(x, _LINK, None)
    # Hooks on saved tensors must get the input: torch.utils.checkpoint runs a step again, outside of its chain.
    is_hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    if link is None or memory.policy == "checkpoint" or is_hooked or not link.is_valid_for(x):
        link = None
    position = 0 if link is None else link.position + 1
    keeps_input = is_hooked or memory.keeps_input(position)
    output, ghost = _Output(), None
    if link is not None:
        ghost = link.take()
    z, log_det, next_ghost = _apply(module, parts, memory, keeps_input, output, x, ghost, context)
    if z.requires_grad and memory.policy != "checkpoint":
        setattr(z, _LINK, _Link(z, next_ghost, output, position))
    return z, log_det


def run_alone(module: nn.Module, function: Callable[..., Any], x: Tensor, *context: Any) -> Any:
    """``function(x, *context)`` of a patched layer that has no :class:`~glow_kernels.interop.steps.Parts`; it returns a
    pair of tensors (B, ...), and keeps only its inputs."""
    memory = _memory_of_call(module, x, context)
    if memory is None:
        return function(x, *context)
    if _hides_parameters(module):
        return checkpoint(_StepModule(module, function), x, *context, use_reentrant=False)
    z, log_det, _ = _apply(module, function, memory, True, _Output(), x, None, context)
    return z, log_det


def initialize(module: nn.Module, method: str, *arguments: Any, **options: Any) -> None:
    """Initialise the ActNorms of a step that recomputes, by calling the original's ``method`` without a graph.

    The original gets copies of tensors, to which it may add in place.
    """
    if torch.compiler.is_compiling() or _memory_of_call(module) is None:
        return
    if not any(is_uninitialised(layer) for layer in GeneralStep.of(module).modules):
        return
    # Not from a parameter: a replica of DataParallel has none.
    device = next(leaf.device for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor))
    # Undo the original's other side effects: the step has them again.
    others = [layer for layer in module.modules() if not is_uninitialised(layer)]
    with torch.no_grad(), RandomState(device).replayed(), _buffers_restored(others):
        arguments, options = pytree.tree_map_only(Tensor, Tensor.clone, (arguments, options))
        getattr(original_class(module), method)(module, *arguments, **options)


def _apply(
    module: nn.Module,
    computation: steps.Parts | Callable[..., Any],
    memory: Memory,
    keeps_input: bool,
    output: _Output,
    x: Tensor,
    ghost: Tensor | None,
    context: Sequence[Any],
) -> Any:
    mode = Mode.current(x.device, memory.micro_batches)
    tensors = [leaf for leaf in pytree.tree_leaves(context) if isinstance(leaf, Tensor)]
    with SUBSTITUTION:
        step = GeneralStep.of(_StepModule(module, computation, _ContextStructure(context)))
        modes = [(module, module.training) for module in step.modules]
        arguments = _NodeArguments(step, memory, mode, modes, keeps_input, output, len(tensors))
        return _Node.apply(arguments, x, ghost, *tensors, *step.parameters)  # type: ignore[no-untyped-call]


class _NodeArguments(NamedTuple):
    """What a node needs besides tensors."""

    step: GeneralStep
    memory: Memory
    mode: Mode
    modes: list[tuple[nn.Module, bool]]
    keeps_input: bool
    output: _Output
    contexts: int


class _Node(torch.autograd.Function):
    """A step that keeps its input, or its output while no other step follows."""

    @staticmethod
    def forward(
        ctx: Any, arguments: _NodeArguments, x: Tensor, ghost: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.arguments = arguments
        watched = nullcontext() if arguments.memory.restores_buffers else guards.unchanged(arguments.step, x, "forward")
        with watched:
            z, log_det, ctx.draws = recompute.forward(arguments.step, x, tensors[: arguments.contexts], arguments.mode)
        ctx.save_for_backward(x if arguments.keeps_input else None, *tensors)
        if not arguments.keeps_input:
            arguments.output.keep(z.detach())
        return z, log_det, z.new_zeros(()).expand(z.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the backward of a step that keeps no activations cannot be differentiated again: compute second "
                "derivatives with memory='store' and glow_kernels.use_backend('reference')"
            )
        arguments: _NodeArguments = ctx.arguments
        grad_z, grad_log_det, reconstructed = grads
        x, *tensors = ctx.saved_tensors
        z = None
        if x is None:
            z = arguments.output.kept() if reconstructed is None else reconstructed
        if not is_graph_retained():
            arguments.output.keep(None)  # as PyTorch frees saved tensors, even if the user keeps the loss
        changing = arguments.step.modules if arguments.memory.restores_buffers else []
        with in_modes(arguments.modes), _buffers_restored(changing):
            result = recompute.backward(
                arguments.step,
                x,
                z,
                (grad_z, grad_log_det),
                tensors[: arguments.contexts],
                tensors[arguments.contexts :],
                ctx.needs_input_grad[3:],
                arguments.mode,
                ctx.draws,
                all_leaves_known=False,
            )
        return None, result.grad_x, result.x if ctx.needs_input_grad[2] else None, *result.grads


@contextmanager
def _buffers_restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restore the buffers of ``modules`` afterwards; restoring them does not raise their version counters."""
    owners = [module._buffers for module in modules]
    before = [(owner, {name: (b, b.clone()) for name, b in owner.items() if b is not None}) for owner in owners]
    try:
        yield
    finally:
        for owner, buffers in before:
            for name, (buffer, values) in buffers.items():
                owner[name] = buffer
                buffer.data.copy_(values)


def _memory_of_call(module: nn.Module, x: Tensor | None = None, context: Sequence[Any] = ()) -> Memory | None:
    """What ``module`` keeps in the current call; None for everything, as PyTorch does."""
    memory = memory_of(module)
    if memory is None or not torch.is_grad_enabled():
        return None
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return None
    # Hooks within a step must not see its calls twice.
    if any_hooks(_harmless, *GeneralStep.of(module).modules[1:]):
        return None
    # It is not known whether a new network may be evaluated twice; one with spectral_norm, for example, may not.
    if not _is_replica(module) and not has_same_submodules(module):
        return None
    leaves = pytree.tree_leaves(context)
    if not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):
        return None  # it may hold tensors that are not found
    if x is not None and any(leaf.shape[:1] != x.shape[:1] for leaf in leaves if isinstance(leaf, Tensor)):
        return replace(memory, micro_batches=1)  # the context cannot be divided by samples
    return memory


def _harmless(hook: Any) -> bool:
    return isinstance(hook, WeightNorm)


def _hides_parameters(module: nn.Module) -> bool:
    """Whether the module cannot name its parameters: it is a replica of DataParallel, or is being compiled."""
    return torch.compiler.is_compiling() or _is_replica(module)


def _is_replica(module: nn.Module) -> bool:
    return getattr(module, "_is_replica", False)
