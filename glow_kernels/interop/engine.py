"""``accelerate`` and ``restore``: walk over a model, recognise, probe, prove, patch."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from glow_kernels.interop import (
    chrischute,
    convolutions,
    freia,
    glowtts,
    nflows,
    normflows,
    openai,
    rosinality,
    survae,
    waveglow,
)
from glow_kernels.interop.patch import Mismatch, Patch, apply, options_of, patch_of, undo, why_not_patchable
from glow_kernels.interop.proof import Agreement, prove
from glow_kernels.interop.report import LayerReport, Report
from glow_kernels.interop.workshop import Workshop

# Layers with more of a structure first: survae's convolution has an inverse, that of OpenAI's ports has none.
DIALECTS = (convolutions, rosinality, survae, waveglow, glowtts, openai, chrischute, normflows, nflows, freia)


def accelerate(model: nn.Module, *, verify: bool = True) -> Report:
    """Make the flow layers of ``model`` compute with the fused operators, in place, and change nothing else.

    Layers are recognised by their structure; options that copies of well-known code may have changed, as the scale
    function of a coupling, are found by probing; then each patched layer is compared with the original, in both
    directions and with gradients, and left alone if they disagree. Parameters, buffers, ``state_dict`` keys, hooks,
    optimizers, modes, copying and pickling stay as they were. Calling it again changes nothing.

    Args:
        model: any module; layers are looked for at every depth.
        verify: prove every patch. Without, what was recognised and probed is trusted.

    Returns:
        a report to print, or to read by a program.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    workshop = Workshop()
    rows: dict[nn.Module, LayerReport] = {}
    paths = dict(reversed([(module, name) for name, module in model.named_modules()]))
    with _undisturbed(model):
        for module, path in paths.items():  # the deepest first
            _look_at(module, path, _patches(), workshop, rows, verify)
        for module in list(workshop.decisions):
            for layer in (layer for network in workshop.networks.get(module, ()) for layer in network.modules()):
                _look_at(layer, paths[layer], convolutions.NETWORK_PATCHES, workshop, rows, verify)
    for module, (patch, options) in workshop.decisions.items():
        if patch_of(module) is None:
            apply(module, patch, options)
    ordered = tuple(rows[module] for _, module in model.named_modules() if module in rows)
    note = "" if ordered else "no flow layers were recognised: the model is as it was"
    return Report(ordered, note)


def restore(model: nn.Module) -> int:
    """Undo :func:`accelerate`: every layer gets its own class back.

    Returns:
        how many layers were restored.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return sum(undo(module) for module in model.modules())


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Random numbers, warnings and modes of the caller are none of the probing's business."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    with (
        torch.random.fork_rng(devices=sorted(devices)),
        torch.inference_mode(False),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _look_at(
    module: nn.Module,
    path: str,
    patches: Iterable[type[Patch]],
    workshop: Workshop,
    rows: dict[nn.Module, LayerReport],
    verify: bool,
) -> None:
    """Decide on ``module``, unless that has been done, and add a row to the report if it is a flow layer."""
    patch, reason, options, agreement = patch_of(module), "", None, None
    if module in rows:
        return
    if patch is not None:
        options = options_of(module)
    else:
        patch = next((patch for patch in patches if patch.matches(module)), None)
        if patch is None:
            return
        try:
            options, agreement = _examine(module, patch, workshop, verify)
        except Mismatch as mismatch:
            reason = _first_line(mismatch)
        except Exception as error:  # whatever a layer does that nobody thought of, it is left alone
            reason = f"it could not be examined: {type(error).__name__}: {_first_line(error)}"
    name, patched = type(module).__name__, not reason
    row = LayerReport(path, name, patch.dialect, patch.kind, patched, agreement=agreement, reason=reason)
    if patched:
        workshop.decisions[module] = (patch, options)
        better = patch.improvements(module, options)
        row = dataclasses.replace(row, options=options.describe() if options else "", better=better)
    rows[module] = row


def _examine(module: nn.Module, patch: type[Patch], workshop: Workshop, verify: bool) -> tuple[Any, Agreement | None]:
    """Options and agreement.

    Raises:
        Mismatch: it must be left alone.
    """
    reason = why_not_patchable(module)
    if reason is not None:
        raise Mismatch(reason)
    options = patch.examine(module, workshop)
    return options, prove(module, patch, options, workshop) if verify else None


@functools.cache
def _patches() -> tuple[type[Patch], ...]:
    return tuple(patch for dialect in DIALECTS for patch in dialect.PATCHES)


def _first_line(error: Exception) -> str:
    """What an error says, without what compilers and dispatchers add."""
    return str(error).partition("\n")[0][:300]
