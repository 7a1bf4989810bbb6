"""Checks that make a chain raise, naming the step: wrong inverses, side effects, modified tensors, drift.

Recomputation is correct only if a step computes the same result again. So a step is tried out when it is first used,
its inputs and buffers are watched on every call, and the state reconstructed at an anchor can be compared with the
exact one, which costs one pass over the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from glow_kernels.ops._checks import has_data
from glow_kernels.reversible.general_step import GeneralStep
from glow_kernels.reversible.plain_step import PlainStep
from glow_kernels.reversible.randomness import RandomState
from glow_kernels.reversible.tensors import leaf, part_of, with_graph

if TYPE_CHECKING:
    from glow_kernels.reversible.chain import ReversibleSequential
    from glow_kernels.reversible.recompute import Mode

CHECKS = ("off", "flag", "raise", "replay")
# With up to this relative drift between two anchors, gradients are still good to about three digits.
DRIFT_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}
LOW_PRECISION_DRIFT_LIMIT = 3e-2


def step_name(chain: ReversibleSequential, index: int) -> str:
    """The name of a step in error messages: ``step 3 (FlowStep)``."""
    return f"step {index} ({type(chain[index]).__name__})"


@contextmanager
def errors_name_step(chain: ReversibleSequential, index: int) -> Iterator[None]:
    """Prefix errors raised inside the ``with`` block with the name of the step; their type stays the same."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        message = str(error)
        if not message.startswith("step "):
            error.args = (f"{step_name(chain, index)}: {message}", *error.args[1:])
        raise


def versions(tensors: Sequence[Tensor | None]) -> list[int]:
    """How often each tensor has been modified in place."""
    return [0 if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors]


def unchanged(step: GeneralStep | PlainStep, state: Tensor, direction: str) -> AbstractContextManager[None]:
    """Check a call of a step for in-place changes, unless the step is known to have no side effects.

    Raises:
        RuntimeError: ``state``, or a parameter or buffer of the step, was modified in place.
    """
    if isinstance(step, PlainStep) or step.is_standard:
        return nullcontext()
    return _watched(step, state, direction)


@contextmanager
def _watched(step: GeneralStep, state: Tensor, direction: str) -> Iterator[None]:
    owned = step.tensors
    before = versions([state, *owned])
    yield
    after = versions([state, *owned])
    if before != after:
        named_tensors = (*step.module.named_parameters(), *step.module.named_buffers())
        names = {id(tensor): name for name, tensor in named_tensors}
        changed = [t for t, old, new in zip((state, *owned), before, after, strict=True) if old != new]
        raise RuntimeError(
            f"it modifies {', '.join(names.get(id(t), 'its input') for t in changed)} in place in {direction}, so "
            "recomputing it would give a different result: use memory='store', or a step without side effects "
            "(BatchNorm in evaluation mode, initialised layers)"
        )


def saved_tensors(ctx: Any, chain: ReversibleSequential, index: int) -> tuple[Tensor, ...]:
    """``ctx.saved_tensors``; an error about a modified tensor names the step."""
    try:
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(f"{modified(chain, index)}: {error}") from error
    return tensors


def modified(chain: ReversibleSequential, index: int) -> str:
    """The error message for a step if something that its backward needs has been modified."""
    return (
        f"{step_name(chain, index)}: its parameters, its context or the state kept for it were modified in place "
        "between forward and backward"
    )


def refuse_second_derivatives(chain: ReversibleSequential, index: int) -> None:
    """Raise because backward is itself to be differentiated (``create_graph=True``)."""
    raise RuntimeError(
        f"{step_name(chain, index)}: the backward of a reversible chain cannot be differentiated again: compute second "
        "derivatives with memory='store' and glow_kernels.use_backend('reference')"
    )


def refuse_transforms() -> None:
    """Raise under ``torch.func`` transforms and forward-mode differentiation, which the chain does not support."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError("a reversible chain does not support torch.func: use memory='store'")
    if forward_ad._current_level >= 0:
        raise RuntimeError("a reversible chain does not support forward-mode differentiation: use memory='store'")


def try_out(
    chain: ReversibleSequential,
    index: int,
    step: GeneralStep | PlainStep,
    x: Tensor,
    context: Sequence[Tensor | None],
    mode: Mode,
) -> None:
    """Try a step out on two samples when its modules are first used, unless it consists only of this package's layers.

    Raises:
        RuntimeError: its result depends on more than its input and parameters, its inverse does not return the input,
            or FSDP shards it in a way that leaves no weights to recompute it with.
        TypeError: its result is not ``(z, log_det)``.
    """
    if isinstance(step, PlainStep) or step.is_standard or not has_data(x) or len(x) == 0:
        return
    # It gathers weights only for forward(): an inverse would read freed memory. Compared by name because importing it
    # is slow.
    if type(step.module).__name__ == "FullyShardedDataParallel":
        raise RuntimeError(
            "its weights are freed before it is recomputed: use fully_shard, or wrap only the whole model"
        )
    needs_inverse, divides = chain._needs_inverse(index), len(mode.parts(len(x))) > 1
    key = (index, step.module.training, needs_inverse, divides)
    if chain._proven.get(key) == step.modules:
        return
    if any(hasattr(module, "_get_fsdp_state") for module in step.modules if module is not step.module):
        raise RuntimeError("FSDP shards a part of it, whose weights are freed within it: use fully_shard on the step")
    sample = x[:2].detach().clone()
    sample_context = [None if tensor is None else part_of(tensor, slice(2)) for tensor in context]
    with torch.no_grad(), mode.applied(x.device):
        _try_on_samples(step, sample, sample_context, needs_inverse, divides)
    chain._proven[key] = step.modules


def _try_on_samples(
    step: GeneralStep, x: Tensor, context: Sequence[Tensor | None], needs_inverse: bool, divides: bool
) -> None:
    state = RandomState(x.device)
    results = []
    for _ in range(2):
        with unchanged(step, x, "forward"), state.replayed():
            result = step.module.forward(x, *context)
        if not _is_result(result, len(x)):
            raise TypeError(wrong_result("it must return z", result))
        results.append(result)
    (z, log_det), (z_again, log_det_again) = results
    if difference(z_again, z) > _tolerance(z) or difference(log_det_again, log_det) > _tolerance(z):
        raise RuntimeError("it gives different results for the same input, so it cannot be recomputed")
    _refuse_stored_results(step, x, context, state)
    if divides:
        # A batch of copies of the first sample: not every network accepts a batch of one.
        copies, *context_copies = (None if t is None else t[:1].expand_as(t).clone() for t in (x, *context))
        with state.replayed():
            z_of_copies, log_det_of_copies = step.module.forward(copies, *context_copies)
        pairs = ((z_of_copies, z), (log_det_of_copies, log_det))
        if any(difference(one[:1], other[:1]) > _tolerance(z) for one, other in pairs):
            raise RuntimeError(
                "its result for a sample depends on the others in the batch, so it cannot be computed in parts: use "
                "micro_batches=1"
            )
    if not needs_inverse:
        return
    with unchanged(step, z, "inverse"), state.replayed():
        result = step.inverse(z, *context)
    if isinstance(result, Tensor):
        raise TypeError(wrong_result("its inverse must return x", result))
    back, _ = result
    if back.shape != x.shape or difference(back, x) > _tolerance(z):
        found = f"shape {tuple(back.shape)}" if back.shape != x.shape else f"an error of {difference(back, x):.1e}"
        raise RuntimeError(f"its inverse does not return its input: {found}; use memory='checkpoint'")


def _refuse_stored_results(step: GeneralStep, x: Tensor, context: Sequence[Tensor | None], state: RandomState) -> None:
    """Raise if a call stores a result in an attribute: in a chain that result has no graph, so a loss computed from it
    would have no gradients."""
    before, start = with_graph(step.module), leaf(x, True)
    leaves = [leaf(parameter, parameter.requires_grad) for parameter in step.parameters]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        saved.append(tensor)
        return len(saved) - 1

    # Saved-tensor hooks around the chain, such as those of torch.utils.checkpoint, must not see what is saved here.
    own_hooks = torch.autograd.graph.saved_tensors_hooks(pack, saved.__getitem__)
    try:
        with torch.enable_grad(), state.replayed(), step.substituted(leaves), own_hooks:
            step.module.forward(start.clone(), *context)
        for key, (name, value) in with_graph(step.module).items():
            if key in before:
                continue
            # Weights computed from parameters do not depend on the input, and so are not results.
            (grad,) = torch.autograd.grad(value, start, torch.ones_like(value), allow_unused=True)
            if grad is not None:
                raise RuntimeError(
                    f"it stores a result, {name}, which has no gradients when it is recomputed: detach it, or use "
                    "memory='store'"
                )
    finally:
        saved.clear()  # a saved output is part of a reference cycle, which nothing else would ever free


def wrong_result(wanted: str, result: object) -> str:
    """The error message for a wrong ``result`` of a step; ``wanted`` is its beginning."""
    return f"{wanted} and log_det of shape (B,), which is zero if it is not a flow, got {_described(result)}"


def _described(result: object) -> str:
    if isinstance(result, tuple):
        return f"({', '.join(map(_described, result))})"
    return f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__


def _is_result(result: object, batch: int) -> bool:
    if not isinstance(result, tuple) or len(result) != 2 or not all(isinstance(part, Tensor) for part in result):
        return False
    return bool(result[1].shape == (batch,))


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest relative L2 difference of any sample; elements where either is not finite count as equal."""
    both = actual.isfinite() & expected.isfinite()
    a, b = (
        torch.where(both, tensor, 0).double().flatten(1 if actual.dim() > 1 else 0) for tensor in (actual, expected)
    )
    return float(((a - b).norm(dim=-1) / (b.norm(dim=-1) + 1e-30)).max()) if a.numel() else 0.0


def drift(exact: Tensor, reconstructed: Tensor) -> Tensor:
    """The largest relative L2 difference of any sample, a scalar tensor; infinite for NaN, 0 for an empty tensor."""
    if exact.numel() == 0:
        return exact.new_zeros(())
    a, b = (tensor.unsqueeze(-1).flatten(1) for tensor in (exact, reconstructed))
    error = torch.linalg.vector_norm(a - b, dim=1) / torch.linalg.vector_norm(a, dim=1).clamp_min(1e-30)
    return torch.amax(error.nan_to_num(nan=torch.inf, posinf=torch.inf))


def compare(chain: ReversibleSequential, index: int, exact: Tensor, reconstructed: Tensor, mode: Mode) -> bool:
    """Record the drift of the state reconstructed at an anchor, and say whether it is above the limit.

    Always False with ``check="flag"``, which does not wait for the device.

    Raises:
        RuntimeError: ``check="raise"``, and the drift is above the limit.
    """
    measured = drift(exact, reconstructed)
    chain._drift[index] = measured
    if chain.check == "flag":
        return False
    limit = drift_limit(chain, exact, mode)
    too_far = not measured.item() <= limit
    if too_far and chain.check == "raise":
        raise RuntimeError(
            f"the state after it was reconstructed with a relative error of {measured.item():.1e}, above the limit of "
            f"{limit:.1e}: use a smaller anchor_every, memory='checkpoint' or check='replay'"
        )
    return too_far


def drift_limit(chain: ReversibleSequential, state: Tensor, mode: Mode) -> float:
    """The limit set on the chain, or the default for the precision."""
    if chain.drift_limit is not None:
        return chain.drift_limit
    if mode.autocast is not None:
        return LOW_PRECISION_DRIFT_LIMIT
    return DRIFT_LIMITS.get(state.dtype, LOW_PRECISION_DRIFT_LIMIT)


def _tolerance(z: Tensor) -> float:
    return float(10.0 * torch.finfo(z.dtype).eps ** 0.5)
