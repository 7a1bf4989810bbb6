"""A chain of invertible steps that is trained with little memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glow_kernels.nn import ActNorm, boundary_node
from glow_kernels.nn.folding import Folded, Stack
from glow_kernels.nn.step import LinearMap
from glow_kernels.ops._checks import check_choice, check_number, check_tensor, check_whole
from glow_kernels.reversible import budget, guards
from glow_kernels.reversible.general_step import GeneralStep
from glow_kernels.reversible.linear_maps import LinearMaps
from glow_kernels.reversible.link import Link, NodeSpec, chain_of, register
from glow_kernels.reversible.offload import OffloadedAnchors
from glow_kernels.reversible.plain_step import PlainStep, can_cross_boundaries
from glow_kernels.reversible.recompute import Mode

if TYPE_CHECKING:
    from typing_extensions import Self

POLICIES = ("store", "checkpoint", "anchor", "invert")


class ReversibleSequential(nn.Sequential):
    """A sequence of invertible steps whose backward recomputes the activations that other modules store.

    A step is any module with ``forward(x, *context) -> (z, log_det)`` and ``inverse(z, *context) -> (x, log_det)``.
    Backward starts at the output of the chain. For every step it gets the input (the state before the step) by
    inverting the step, or from an anchor (a stored state), and evaluates the step again to compute gradients. The
    network of a :class:`~glow_kernels.nn.FlowStep` is evaluated once for both; that of any other step that is inverted
    is evaluated twice.

    If all steps are flow steps of one structure, their ActNorms and 1x1 convolutions are folded in one call for the
    whole chain, and folded again in backward. The gradients of these parameters are ready only when backward has
    reached the first step.

    Slicing, ``+`` and ``*`` return chains of the same steps, with the options of the left operand.

    Args:
        steps: the steps, at least one.
        memory: what is kept for backward: ``"store"`` everything, as PyTorch does; ``"checkpoint"`` the state before
            every step; ``"anchor"`` the state before every ``anchor_every``-th step, so that fewer steps than that are
            inverted in a row; ``"invert"`` nothing. Inverting many steps in a row amplifies rounding errors
            exponentially, even to infinity for inputs unlike the training data; anchors prevent that.
        anchor_every: number of steps from one anchor to the next.
        micro_batches: number of parts in which every step evaluates the batch, one after the other; this divides the
            working memory of the step's network. ``"auto"`` finds the number from ``memory_budget``. Must be 1 with
            ``"store"``.
        check: what to do with the error of the state that is reconstructed at an anchor: ``"off"`` does not compute it;
            ``"flag"`` records it for :meth:`drift`; ``"raise"`` raises if it is above ``drift_limit``, and in that case
            ``"replay"`` computes the gradients from there to the next anchor again, from exact states. The last two
            wait for the device at every anchor. All except ``"off"`` also keep the input of the chain, as an anchor.
        memory_budget: working memory, in bytes, that one step may take, for ``micro_batches="auto"``. If a single
            sample takes more, samples are evaluated one at a time.
        offload_anchors: keep the anchors in host memory. On CUDA they are copied to pinned memory asynchronously, and
            prefetched one ahead in backward. Everything else stays on the device. Not supported under
            ``torch.compile`` or in a CUDA graph.
        drift_limit: largest accepted relative error of a reconstructed state; by default 1e-4, 1e-9 in float64, and
            3e-2 with networks in low precision.

    Raises:
        TypeError, ValueError: there are no steps, a step is not a module with an inverse, or an option is unknown.
    """

    def __init__(
        self,
        steps: Iterable[nn.Module],
        memory: str = "anchor",
        anchor_every: int = 4,
        micro_batches: int | str = 1,
        check: str = "off",
        *,
        memory_budget: float | None = None,
        offload_anchors: bool = False,
        drift_limit: float | None = None,
    ) -> None:
        if not isinstance(steps, Iterable):
            raise TypeError(f"steps must be modules with an inverse, got {type(steps).__name__}")
        steps = list(steps)
        if not steps:
            raise ValueError("steps must have at least one step, got none")
        check_choice("memory", memory, POLICIES)
        check_choice("check", check, guards.CHECKS)
        check_whole("anchor_every", anchor_every, 1)
        if micro_batches != "auto":
            check_whole("micro_batches other than 'auto'", micro_batches, 1)
        if memory == "store" and micro_batches != 1:
            raise ValueError(f"micro_batches must be 1 with memory='store', got {micro_batches!r}")
        if (micro_batches == "auto") != (memory_budget is not None):
            raise ValueError(
                f"memory_budget must be given with micro_batches='auto' and only then, got {memory_budget}"
            )
        if memory_budget is not None:
            check_number("memory_budget", memory_budget)
            if not memory_budget >= 1:
                raise ValueError(f"memory_budget must be at least 1 byte, got {memory_budget}")
        if drift_limit is not None:
            check_number("drift_limit", drift_limit)
            if not drift_limit >= 0.0:  # a limit of NaN would let everything pass
                raise ValueError(f"drift_limit must be at least 0, got {drift_limit}")
        if offload_anchors and memory not in ("anchor", "checkpoint"):
            raise ValueError(f"memory must be 'anchor' or 'checkpoint' with offload_anchors=True, got {memory!r}")
        super().__init__(*steps)  # calls add_module, which checks each step
        self.memory = memory
        self.anchor_every = anchor_every
        self.micro_batches = micro_batches
        self.memory_budget = memory_budget
        self.offload_anchors = offload_anchors
        self.check = check
        self.drift_limit = drift_limit
        self._drift: dict[int, Tensor] = {}
        self._proven: dict[tuple[int, bool, bool, bool], list[nn.Module]] = {}
        self._parts: dict[tuple[Any, ...], int] = {}
        self._handle = register(self)

    def forward(self, x: Tensor, *context: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x`` (B, ...) to ``z`` and ``log_det`` (B,), the sum over the steps.

        In training mode, ActNorms that have not been initialised are initialised from ``x`` first.

        Args:
            x: the data; the batch is the first dimension.
            context: passed to every step after ``x``: tensors (B, ...), which get gradients, or None.

        Raises:
            TypeError: ``x`` is not a tensor, or a step does not return a tensor and its log-determinant.
            RuntimeError: a step cannot be recomputed, see :mod:`glow_kernels.reversible.guards`; the message names it.
        """
        check_tensor("x", x)
        if self.memory == "store" or not torch.is_grad_enabled():
            stack = Stack.of(list(self), x)
            if stack is None or context or torch.compiler.is_compiling():
                return _in_turn(list(self), None if stack is None else stack.fold(x), x, context)
            folded = stack.fold(x)
            x, log_dets = boundary_node.in_turn(list(self), folded.maps, x)
            return x, _total([folded.log_det, *log_dets], x)
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                f"memory={self.memory!r} cannot train in DataParallel: use DistributedDataParallel, or memory='store'"
            )
        if not torch.compiler.is_compiling():
            guards.refuse_transforms()
            _check_batches(x, context)
        elif self.offload_anchors:
            raise RuntimeError("offload_anchors=True cannot be compiled: compile the networks only, or do not offload")
        offloaded = OffloadedAnchors(x.device) if self.offload_anchors else None
        mode = Mode.current(x.device, self._micro_batches(x, context))
        ghost: Tensor | None = None
        modules = list(self)
        linear, log_dets, maps = self._folded(x)
        applied: list[_Maps] = [() if own is None else (own, None) for own in linear]
        if not context and can_cross_boundaries(modules, linear, x):
            applied = [(linear[0], linear[1]), *((None, following) for following in [*linear[2:], None])]
        for numbers in self._nodes():
            steps = [_step_of(modules[number], applied[number], x, context) for number in numbers]
            _initialize([modules[number] for number in numbers], steps, x, context)
            spec = NodeSpec(
                self._handle,
                numbers[0],
                len(numbers),
                len(context),
                self._is_anchor(numbers[0]),
                numbers[-1] == len(self) - 1,
                self.check != "off",
            )
            x, log_det, ghost = _linked(steps, spec, mode, maps, offloaded, x, ghost, context)
            log_dets.append(log_det)
            if spec.keeps_input and not spec.compares:
                ghost = None  # the backward of this node needs no reconstructed state from the next node
        return x, _total(log_dets, x)

    def inverse(self, z: Tensor, *context: Tensor | None) -> tuple[Tensor, Tensor]:
        """``z`` (B, ...) to ``x`` and ``log_det`` (B,) of the inverse map; always with plain autograd.

        ``context`` is as for :meth:`forward`.

        Raises:
            TypeError: ``z`` is not a tensor, or the inverse of a step returns only a tensor.
            ValueError: a 1x1 convolution is singular (on a GPU the results are then not finite instead).
        """
        check_tensor("z", z)
        stack = Stack.of(list(self), z)
        folded = None if stack is None else self._inverted(stack, z)
        return _in_turn([step.inverse for step in self], folded, z, context, backwards=True)  # type: ignore[misc]

    def drift(self) -> dict[int, float]:
        """Relative errors of the states that the last backward reconstructed at the anchors, by step index.

        Empty with ``check="off"``. Calling this waits for the device.
        """
        return {index: value.item() for index, value in sorted(self._drift.items())}

    def __getitem__(self, index: Any) -> Any:
        return self._of(list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    def __setitem__(self, index: int, module: nn.Module) -> None:
        _check_step(index, module)
        super().__setitem__(index, module)

    def __add__(self, other: nn.Sequential) -> ReversibleSequential:
        return self._of([*self, *other])

    def __mul__(self, other: int) -> ReversibleSequential:
        return self._of(list(self) * other)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a step, as ``append``, ``extend`` and ``+=`` do."""
        _check_step(name, module)
        super().add_module(name, module)

    def insert(self, index: int, module: nn.Module) -> Self:
        """Insert a step before step ``index``."""
        _check_step(index, module)
        return super().insert(index, module)

    def _of(self, steps: Iterable[nn.Module]) -> ReversibleSequential:
        """A chain of ``steps`` with the options of this one."""
        return ReversibleSequential(
            steps,
            self.memory,
            self.anchor_every,
            self.micro_batches,
            self.check,
            memory_budget=self.memory_budget,
            offload_anchors=self.offload_anchors,
            drift_limit=self.drift_limit,
        )

    def extra_repr(self) -> str:
        return f"memory={self.memory!r}, anchor_every={self.anchor_every}, micro_batches={self.micro_batches}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._handle = register(self)

    def _folded(self, x: Tensor) -> tuple[Sequence[LinearMap | None], list[Tensor], LinearMaps | None]:
        """The linear map of every step, their total log-determinant, and the object that backward gets the maps from.

        All are empty if the steps fold for themselves, as they do inside the opaque operators of a compiled chain.
        """
        stack = None if torch.compiler.is_compiling() else Stack.of(list(self), x)
        if stack is None:
            return [None] * len(self), [], None
        maps = LinearMaps(self, stack, any(self._needs_inverse(index) for index in range(len(self))))
        folded = maps.fold(x)
        return folded.maps, [folded.log_det], maps

    def _inverted(self, stack: Stack, z: Tensor) -> Folded:
        try:
            return stack.fold_inverse(z)
        except ValueError:
            with guards.errors_name_step(self, stack.singular()):
                raise

    def _micro_batches(self, x: Tensor, context: tuple[Tensor | None, ...]) -> int:
        if not isinstance(self.micro_batches, str):
            return self.micro_batches
        assert self.memory_budget is not None
        key = (x.shape, x.dtype, Mode.current(x.device, 1).autocast)
        if key not in self._parts:
            if torch.compiler.is_compiling():
                raise RuntimeError("micro_batches='auto' needs one training step of these shapes before torch.compile")
            _initialize(list(self), [GeneralStep.of(step) for step in self], x, context)
            self._parts[key] = budget.micro_batches(self, x, context, self.memory_budget)
        return self._parts[key]

    def _nodes(self) -> list[range]:
        """The steps of every autograd node: one each, or with ``check="replay"`` all from one anchor to the next."""
        if self.check != "replay":
            return [range(index, index + 1) for index in range(len(self))]
        starts = [index for index in range(len(self)) if self._is_anchor(index)]
        return [range(start, end) for start, end in itertools.pairwise([*starts, len(self)])]

    def _is_anchor(self, index: int) -> bool:
        if self.memory == "anchor" and index % self.anchor_every == self.anchor_every - 1:
            return True
        # The input of the chain is kept only for comparison.
        return self.memory == "checkpoint" or (index == 0 and self.check != "off")

    def _needs_inverse(self, index: int) -> bool:
        return not self._is_anchor(index)


def _check_step(name: object, step: object) -> None:
    if not isinstance(step, nn.Module) or not callable(getattr(step, "inverse", None)):
        raise TypeError(f"step {name} must be a module with an inverse, got {type(step).__name__}")


def _in_turn(
    calls: Sequence[Callable[..., tuple[Tensor, Tensor]]],
    folded: Folded | None,
    x: Tensor,
    context: tuple[Tensor | None, ...],
    backwards: bool = False,
) -> tuple[Tensor, Tensor]:
    """The result of all ``calls`` in sequence, given their ``folded`` linear maps if any, and the total log_det."""
    log_dets = []
    if folded is not None:
        calls = [functools.partial(call, linear=linear) for call, linear in zip(calls, folded.maps, strict=True)]
        log_dets = [folded.log_det]
    numbered = list(enumerate(calls))
    for number, call in reversed(numbered) if backwards else numbered:
        result = call(x, *context)
        if isinstance(result, Tensor):  # unpacking it below would split it into samples
            wanted = "its inverse must return x" if backwards else "it must return z"
            raise TypeError(f"step {number}: {guards.wrong_result(wanted, result)}")
        x, log_det = result
        log_dets.append(log_det)
    return x, _total(log_dets, x)


def _total(log_dets: Sequence[Tensor], x: Tensor) -> Tensor:
    if x.is_cuda and not torch.compiler.is_compiling():  # every addition would be a kernel launch
        return torch.stack(list(log_dets)).sum(0)
    return functools.reduce(torch.add, log_dets)


# The folded linear maps that a step begins and ends with; empty if the step folds for itself.
_Maps = tuple[LinearMap | None, LinearMap | None] | tuple[()]


def _step_of(step: nn.Module, maps: _Maps, x: Tensor, context: tuple[Tensor | None, ...]) -> GeneralStep | PlainStep:
    if not maps:
        return GeneralStep.of(step)
    plain = None if context else PlainStep.of(step, x, *maps)
    return GeneralStep.of(step, maps[0] or ()) if plain is None else plain


def _initialize(
    modules: Sequence[nn.Module],
    steps: Sequence[GeneralStep | PlainStep],
    x: Tensor,
    context: tuple[Tensor | None, ...],
) -> None:
    """Run ``modules``, which ``steps`` are made of, once if one of them has an ActNorm that is not initialised."""
    parts = [part for module, step in zip(modules, steps, strict=True) if module.training for part in step.modules]
    if any(isinstance(part, ActNorm) and not part.is_initialized() for part in parts):
        with torch.no_grad():
            for module in modules:
                x, _ = module(x, *context)


def _check_batches(x: Tensor, context: tuple[Tensor | None, ...]) -> None:
    for number, tensor in enumerate(context):
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.shape[:1] != x.shape[:1]):
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"context {number} must be a tensor whose first dimension is the batch of x, {x.shape[0]}, got {got}"
            )


def _linked(
    steps: Sequence[GeneralStep | PlainStep],
    spec: NodeSpec,
    mode: Mode,
    maps: LinearMaps | None,
    offloaded: OffloadedAnchors | None,
    x: Tensor,
    ghost: Tensor | None,
    context: tuple[Tensor | None, ...],
) -> Any:
    def link(x: Tensor, ghost: Tensor | None, *context: Tensor | None) -> Any:
        # Read here, after the pre-forward hooks, in which FSDP gathers them.
        parameters = [parameter for step in steps for parameter in step.parameters]
        arguments = (maps, offloaded, x, ghost, *context, *parameters)
        if torch.compiler.is_compiling():
            return Link.apply(spec, mode, None, *arguments)  # type: ignore[no-untyped-call]
        # Function.apply would only add support for functorch transforms, which chains refuse.
        return super(torch.autograd.Function, Link).apply(spec, mode, steps, *arguments)  # type: ignore[no-untyped-call]

    hooked = [step.module for step in steps if isinstance(step, GeneralStep) and _has_hooks(step.module)]
    if torch.compiler.is_compiling() or not hooked:
        return link(x, ghost, *context)
    if len(steps) > 1:
        raise RuntimeError("check='replay' runs several steps as one, without their hooks (FSDP): use check='raise'")
    return _through_hooks(hooked[0], spec, link, x, ghost, *context)


def _has_hooks(step: nn.Module) -> bool:
    hooks = (step._forward_hooks, step._forward_pre_hooks, step._backward_hooks, step._backward_pre_hooks)
    return any(hooks)


def _through_hooks(
    step: nn.Module, spec: NodeSpec, link: Callable[..., Any], x: Tensor, ghost: Tensor | None, *context: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Call ``link`` as if it were the forward of ``step``: FSDP gathers the parameters of a step in its hooks.

    The hooks see the same arguments and results as without a chain. They must not change a state that backward
    reconstructs: the inverse of the step would not undo the change.
    """
    own = step.__dict__.get("forward")
    inside: list[Any] = []

    def restore() -> None:
        if own is None:
            step.__dict__.pop("forward", None)
        else:
            step.__dict__["forward"] = own

    def forward(received: Tensor, *context: Tensor | None) -> tuple[Tensor, Tensor]:
        restore()
        result, log_det, following = link(received, ghost, *context)
        inside.extend((_identity(received), result, _identity(result), following))
        return result, log_det

    before = _identity(x)
    step.__dict__["forward"] = forward
    try:
        z, log_det = step(x, *context)
    finally:
        restore()
    received, _, result, following = inside  # the second one, z, is there to keep its memory from being reused yet
    is_awaited = not spec.keeps_output and (spec.compares or not spec.keeps_input)
    if (ghost is not None and _differ(before, received)) or (is_awaited and _differ(result, _identity(z))):
        raise RuntimeError(
            f"{guards.step_name(chain_of(spec), spec.number)}: a hook changes its input or its output, which its "
            "inverse does not undo: do it inside the step, or use memory='store', or memory='checkpoint' with "
            "check='off'"
        )
    return z, log_det, following


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """The type of ``tensor``, and what is equal for two tensors that are the same, or views of all of the same one."""
    storage = tensor.untyped_storage()._cdata
    return tensor.dtype, storage, tensor.storage_offset(), tensor.shape, tensor.stride(), guards.versions([tensor])


def _differ(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    # FSDP's hooks may cast to the type of its parameters and back. That is exact, so other types do not count.
    return one[0] == other[0] and one != other
