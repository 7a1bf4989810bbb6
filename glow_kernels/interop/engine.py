"""``accelerate`` and ``restore``: walk over a model, recognise, probe, prove, patch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from glow_kernels.errors import in_brief
from glow_kernels.interop import (
    chrischute,
    convolutions,
    freia,
    glowtts,
    nflows,
    normflows,
    openai,
    pclucas14,
    rosinality,
    survae,
    waveglow,
)
from glow_kernels.interop.examiner import Examiner
from glow_kernels.interop.memory import Memory
from glow_kernels.interop.patch import (
    Mismatch,
    Patch,
    apply,
    has_same_submodules,
    is_unchanged,
    is_uninitialised,
    memory_of,
    options_of,
    patch_of,
    undo,
    why_not_patchable,
)
from glow_kernels.interop.proof import Agreement, prove, prove_chain
from glow_kernels.interop.report import LayerReport, Report
from glow_kernels.ops._checks import check_choice, check_module, check_whole
from glow_kernels.progress import with_progress
from glow_kernels.reversible import POLICIES

# Dialects with the more specific structure first: survae's convolution has an inverse method, OpenAI's has not.
DIALECTS = (
    convolutions,
    rosinality,
    survae,
    waveglow,
    glowtts,
    openai,
    pclucas14,
    chrischute,
    normflows,
    nflows,
    freia,
)


def accelerate(
    model: nn.Module, memory: str = "store", anchor_every: int = 4, micro_batches: int = 1, *, verify: bool = True
) -> Report:
    """Make the flow layers of ``model`` compute with the fused operators, in place, and change nothing else.

    Layers are recognised by their structure; options that copies of well-known code may have changed, such as the scale
    function of a coupling, are found by probing; then each patched layer is compared with the original, in both
    directions and with gradients, and is not patched if they disagree. Parameters, buffers, ``state_dict`` keys, hooks,
    optimizers, modes, copying and pickling stay as they were. Calling it again only changes ``memory``.

    With any ``memory`` other than ``"store"``, layers that run a network keep none of its activations; backward
    recomputes them. Steps form a chain, as in a :class:`~glow_kernels.ReversibleSequential`, where one is given the
    very tensor that another returned. In training under ``torch.compile``, and in ``DataParallel``, every step keeps
    its input instead. A step keeps everything while its layers have hooks.

    Args:
        model: any module; layers are looked for at every depth.
        memory: what a chain keeps: ``"store"`` everything, as PyTorch does; ``"checkpoint"`` the input of every step;
            ``"anchor"`` the input of every ``anchor_every``-th step and the last output; ``"invert"`` the last output.
        anchor_every: number of steps from one anchor to the next.
        micro_batches: evaluate every step in this many parts of the batch, which divides the working memory of its
            network. Must be 1 with ``"store"``.
        verify: compare every patched layer with the original. Without it, recognition and probing are trusted, and a
            layer that has the structure of a known one but another formula gives other results.

    Returns:
        A report, to print or to process.

    Raises:
        TypeError: ``model`` is not a module, or a number is not whole.
        ValueError: an unknown policy, a number below 1, or ``micro_batches`` above 1 with ``"store"``.
    """
    check_module("model", model)
    examiner = Examiner(_memory(memory, anchor_every, micro_batches))
    if any(_is_outdated(module, examiner.memory) for module in model.modules()):
        restore(model)
    paths = dict(reversed([(module, name) for name, module in model.named_modules()]))
    with _undisturbed(model):
        for module, path in with_progress(paths.items(), "accelerate", "layers"):  # the deepest first
            _decide(module, path, _patches(), examiner, verify)
        for module in list(examiner.decisions):
            for layer in (layer for network in examiner.networks.get(module, ()) for layer in network.modules()):
                _decide(layer, paths[layer], convolutions.NETWORK_PATCHES, examiner, verify)
        if verify:
            _prove_chains(model, examiner)
    for module, (patch, options) in examiner.decisions.items():
        if patch_of(module) is None:
            apply(module, patch, options, examiner.memories[module])
        is_uninitialised(module)  # remembers a flag that is set, which compilers cannot read
    ordered = tuple(examiner.rows[module] for module in model.modules() if module in examiner.rows)
    if not ordered:
        return Report(note=_why_nothing(model))
    applies = examiner.memory is None or any(row.memory for row in ordered)
    return Report(ordered, "" if applies else f"no step was found that memory={memory!r} applies to")


def restore(model: nn.Module) -> int:
    """Undo :func:`accelerate`: every layer gets its original class back.

    Returns:
        The number of layers that were restored.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_module("model", model)
    return sum(undo(module) for module in model.modules())


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Isolate probing from the caller's random state, warnings, modes, default device and global hooks."""
    numpy = sys.modules.get("numpy")
    python_numbers, numpy_numbers = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    with (
        torch.random.fork_rng(devices=sorted(devices)),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        warnings.catch_warnings(),
        nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"),
    ):
        warnings.simplefilter("ignore")
        try:
            with _exact_products(), _without_global_hooks():
                yield
        finally:
            random.setstate(python_numbers)
            if numpy is not None:
                numpy.random.set_state(numpy_numbers)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Compute float32 products in float32: convolutions on a GPU use TF32 by default, which no operator agrees with.

    PyTorch has newer settings beside older ones, and raises when an older one is read while the two disagree.
    """
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    newer = (cudnn.conv, cudnn.rnn, backends.cuda.matmul, mkldnn.conv, mkldnn.matmul)
    with ExitStack() as undo:
        for setting in newer:
            undo.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
        with suppress(RuntimeError):
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        with suppress(RuntimeError):
            undo.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
            cudnn.allow_tf32 = False
        for setting in newer:
            setting.fp32_precision = "ieee"
        yield


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    """Remove global hooks: they would see the copies, and make patched layers fall back to the original code."""
    forward = ("forward_pre_hooks", "forward_hooks", "forward_hooks_with_kwargs", "forward_hooks_always_called")
    names = (*forward, "backward_pre_hooks", "backward_hooks")
    registries = [getattr(torch.nn.modules.module, f"_global_{name}") for name in names]
    hooks = [dict(registry) for registry in registries]
    for registry in registries:
        registry.clear()
    try:
        yield
    finally:
        for registry, before in zip(registries, hooks, strict=True):
            registry.update(before)


def _decide(
    module: nn.Module,
    path: str,
    patches: Iterable[type[Patch]],
    examiner: Examiner,
    verify: bool,
) -> None:
    """Decide on ``module``, unless that has been done, and add a row to the report if it is a flow layer."""
    patch, reason, options, agreement = patch_of(module), "", None, None
    memory, memory_reason = memory_of(module), ""
    if module in examiner.rows:
        return
    if patch is not None:
        options = options_of(module)
    else:
        patch = next((patch for patch in patches if _matches(patch, module)), None)
        if patch is None:
            return
        try:
            options, agreement = _examine(module, patch, examiner, verify)
            if patch.has_network:
                memory, memory_reason = _memory_of_step(module, patch, options, examiner, verify)
        except Mismatch as mismatch:
            reason = _first_line(mismatch)
        except Exception as error:  # foreign code may fail in any way; then the layer is not patched
            reason = f"it could not be examined: {in_brief(error)}"
    name, patched = type(module).__name__, not reason
    row = LayerReport(path, name, patch.dialect, patch.kind, patched, agreement=agreement, reason=reason)
    if patched:
        examiner.decisions[module], examiner.memories[module] = (patch, options), memory
        kept = "" if not patch.has_network else "store" if memory is None else memory.policy
        better = patch.improvements(module, options)
        described = "; ".join(filter(None, (options.describe() if options else "", patch.note)))
        row = dataclasses.replace(row, options=described, memory=kept, memory_reason=memory_reason, better=better)
    examiner.rows[module] = row


def _matches(patch: type[Patch], module: nn.Module) -> bool:
    try:
        # In wolf and MACOW, inverse is not a method but a flag for the density direction.
        has_methods = all(callable(getattr(type(module), name, None)) for name in patch.methods)
        return has_methods and patch.matches(module)
    except Exception:  # such as parameters without shapes, or properties that raise
        return False


def _examine(module: nn.Module, patch: type[Patch], examiner: Examiner, verify: bool) -> tuple[Any, Agreement | None]:
    """Options and agreement.

    Raises:
        Mismatch: it cannot be patched.
    """
    reason = why_not_patchable(module, patch.methods)
    if reason is not None:
        raise Mismatch(reason)
    options = patch.examine(module, examiner)
    return options, prove(module, patch, options, examiner) if verify else None


def _memory_of_step(
    module: nn.Module, patch: type[Patch], options: Any, examiner: Examiner, verify: bool
) -> tuple[Memory | None, str]:
    """What a step keeps for backward, and the reason if that is everything although less was asked for."""
    try:
        memory = examiner.memory_for(module)
        if memory is not None and verify:
            prove(module, patch, options, examiner, memory)
    except Exception as error:  # foreign code may fail in any way; then the step keeps everything
        return None, _first_line(error)
    return memory, ""


def _prove_chains(model: nn.Module, examiner: Examiner) -> None:
    """Prove chains of consecutive steps that recompute their activations; where one disagrees, its steps store them."""

    def kind(module: nn.Module) -> Any:
        if examiner.memories.get(module) is None or patch_of(module) is not None:
            return None
        patch, options = examiner.decisions[module]
        if patch.parts.__func__ is Patch.parts.__func__:  # type: ignore[attr-defined]
            return None  # it forms no chain
        return patch, patch.calls(module, options)[0].shapes

    for parent in model.modules():
        for key, group in itertools.groupby(parent.children(), kind):
            chain = list(group)
            if key is None or len(chain) < 2:
                continue
            try:
                prove_chain(chain, examiner)
            except Exception as error:
                for module in chain:
                    examiner.memories[module] = None
                    reason = _first_line(error)
                    row = dataclasses.replace(examiner.rows[module], memory="store", memory_reason=reason)
                    examiner.rows[module] = row


def _why_nothing(model: nn.Module) -> str:
    if any(type(module).__module__.startswith("glow_kernels.") for module in model.modules()):
        return (
            "the model is made of layers of glow_kernels, which are fast already; give memory=... to their constructors"
        )
    return "no flow layers were recognised: the model is unchanged"


def _memory(policy: str, anchor_every: int, micro_batches: int) -> Memory | None:
    check_choice("memory", policy, POLICIES)
    for name, value in (("anchor_every", anchor_every), ("micro_batches", micro_batches)):
        check_whole(name, value, 1)
    if policy == "store" and micro_batches > 1:
        raise ValueError(f"micro_batches must be 1 with memory='store', got {micro_batches}")
    return None if policy == "store" else Memory(policy, anchor_every, micro_batches)


def _is_outdated(module: nn.Module, memory: Memory | None) -> bool:
    """Whether ``module`` was patched for another memory, or has changed since it was patched."""
    patch, current = patch_of(module), memory_of(module)
    if patch is None:
        return False
    if current is not None:
        if not has_same_submodules(module):
            return True
        current = dataclasses.replace(current, restores_buffers=False)
    return (patch.has_network and current != memory) or not is_unchanged(module, *patch.inner(module))


@functools.cache
def _patches() -> tuple[type[Patch], ...]:
    return tuple(patch for dialect in DIALECTS for patch in dialect.PATCHES)


def _first_line(error: Exception) -> str:
    """The first line of an error's message, without what compilers and dispatchers add."""
    return str(error).partition("\n")[0][:300]
