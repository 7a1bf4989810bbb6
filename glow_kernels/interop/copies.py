"""Faithful copies of layers, and copies with parameters that reveal what the layers compute."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from glow_kernels.interop.patch import CONSTANTS, FLAG, INITIALIZED, Mismatch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Hooks that compute a weight; without them a layer would keep that of its last call.
_NORMS = (WeightNorm, SpectralNorm)


def faithful_copy(module: Any, copies: dict[int, Any] | None = None) -> Any:
    """A deep copy of ``module`` whose closures refer to the copy, without hooks except those that normalise weights.

    Args:
        module: any module.
        copies: replacements for parts of it, by ``id``.

    Raises:
        Mismatch: it cannot be copied.
    """
    copies = {} if copies is None else copies
    replaced = {layer for layer in module.modules() if id(layer) in copies}
    for _, layer in module.named_modules(memo=replaced):  # without the submodules of replaced ones
        # A module has a dozen empty dictionaries, which take most of deepcopy's time.
        empty = [value for value in vars(layer).values() if type(value) in (dict, OrderedDict) and not value]
        copies |= {id(value): type(value)() for value in empty}
        for hooks in (getattr(layer, name) for name in _HOOKS):
            copies[id(hooks)] = OrderedDict(item for item in hooks.items() if isinstance(item[1], _NORMS))
        # deepcopy refuses tensors with a graph; nflows keeps some in an object of its own.
        held = [vars(layer), *(vars(value) for value in vars(layer).values() if hasattr(value, "__dict__"))]
        results = [value for values in held for value in values.values() if isinstance(value, Tensor)]
        copies |= {id(result): result.detach().clone() for result in results if not result.is_leaf}
    try:
        copied = copy.deepcopy(module, copies)
    except Exception as error:
        raise Mismatch(f"it cannot be copied to try things out: {error}") from error
    for layer in copied.modules():
        for name, value in list(layer.__dict__.items()):
            if isinstance(value, types.FunctionType) and value.__closure__:
                layer.__dict__[name] = rebound = _rebind(value, copies)
                # Otherwise a patched copy would see a changed constant and fall back to the original's code.
                if CONSTANTS in layer.__dict__:
                    layer.__dict__[CONSTANTS].replace(name, rebound)
    return copied


@torch.no_grad()
def randomised(module: Any) -> Any:
    """Move parameters of ``module``, a copy, away from values that hide their effect, and mark ActNorms initialised."""
    generator = torch.Generator().manual_seed(1)
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        # A matrix and its inverse, if a layer stores both, must stay inverses of each other.
        kept = name.endswith("_inv") or f"{name}_inv" in parameters
        if parameter.is_floating_point() and not kept:
            # The size of the matrix, or of the one whose triangle a vector may hold: its products must stay moderate.
            is_list = parameter.numel() == max(parameter.shape, default=1)
            width = (2 * parameter.numel()) ** 0.5 if is_list else max(parameter.shape)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            change = (0.2 / width**0.5 * noise).to(parameter)
            if parameter.dim() > 1 and parameter.numel() == len(parameter) ** 2 and parameter.any():
                # A matrix keeps the sign of its determinant, however small that is: some layers take its logarithm.
                change = (parameter.flatten(1) @ change.flatten(1)).view_as(parameter)
            parameter.add_(change)
    return set_initialized(module, True)


@torch.no_grad()
def set_initialized(module: Any, initialized: bool) -> Any:
    """Set the flags of the ActNorms in ``module``, a copy, to initialised or not initialised."""
    for layer in module.modules():
        layer.__dict__.pop(FLAG, None)
        for name, meaning in INITIALIZED.items():
            flag = getattr(layer, name, None)
            if isinstance(flag, Tensor):
                flag.fill_(meaning == initialized)
            elif isinstance(flag, bool):
                setattr(layer, name, meaning == initialized)
    return module


def _rebind(function: types.FunctionType, copies: dict[int, Any]) -> types.FunctionType:
    """A copy of ``function`` whose closure refers to copies, also through bound methods and nested closures."""
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    code, names = function.__code__, function.__globals__
    rebound = types.FunctionType(code, names, function.__name__, function.__defaults__, cells)
    rebound.__kwdefaults__ = function.__kwdefaults__
    copies[id(function)] = rebound  # its own closure may refer to it
    for cell, held in zip(cells, function.__closure__ or (), strict=True):
        cell.cell_contents = _copy_of(held.cell_contents, copies)
    return rebound


def _copy_of(value: Any, copies: dict[int, Any]) -> Any:
    """What replaces ``value`` in the closure of a copy."""
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, copies.get(id(value.__self__), value.__self__))
    if isinstance(value, types.FunctionType) and value.__closure__ and id(value) not in copies:
        return _rebind(value, copies)
    return copies.get(id(value), value)
