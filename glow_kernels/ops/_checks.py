"""Argument checks shared by the operators: an error names the argument, what was expected and what was given."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def check_tensor(name: str, value: Any) -> None:
    """``value`` must be a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_floating(name: str, value: Any) -> None:
    """``value`` must be a floating-point tensor."""
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {str(value.dtype).removeprefix('torch.')}")


def check_module(name: str, value: Any) -> None:
    """``value`` must be a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")


def check_image(name: str, x: Tensor) -> None:
    """``x`` must be a floating-point tensor (B, C, *spatial) with 0 to 3 spatial dimensions."""
    check_floating(name, x)
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"{name} must be (B, C, *spatial) with 0 to 3 spatial dimensions, got shape {tuple(x.shape)}")


def check_channels(name: str, x: Tensor, channels: int) -> None:
    """``x`` must be a floating-point tensor (B, C, *spatial) with C = ``channels``."""
    check_image(name, x)
    if x.shape[1] != channels:
        raise ValueError(f"{name} must have {channels} channels, got shape {tuple(x.shape)}")


def check_like(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str, x: Tensor) -> None:
    """``tensor`` must be floating-point, of this shape (errors give its ``meaning``) and on the device of ``x``."""
    check_floating(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {meaning} = {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of the data, {x.device}, got {tensor.device}")


def check_labels(labels: Tensor, x: Tensor) -> None:
    """``labels`` must be (B,) int64 classes of the images ``x`` (B, ...)."""
    check_tensor("labels", labels)
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        raise ValueError(
            f"labels must be int64 of shape ({x.shape[0]},), "
            f"got {str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}"
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """``value`` must be one of ``choices``."""
    # ``in`` would fail for values without a usable ==, such as arrays.
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_whole(name: str, value: Any, least: int | None = None) -> None:
    """``value`` must be an integer from Python, NumPy or torch.export, and at least ``least`` if that is given."""
    # In Python a bool is an integer.
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(name: str, value: Any) -> None:
    """``value`` must be a real number from Python, NumPy, torch.compile or torch.export."""
    # Not a tensor: as a constant argument of an operator it would silently get no gradient.
    if not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def checked_temperature(temperature: float | Tensor) -> float | Tensor:
    """``temperature``, which must be one number, finite and at least 0; the value is not checked on a GPU.

    A tensor is returned without dimensions, so that multiplying by it changes neither type nor shape.
    """
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"temperature must be one number, got a tensor of shape {tuple(temperature.shape)}")
        temperature = temperature.reshape(())
        if not temperature.is_cpu or not is_readable(temperature):
            return temperature
    else:
        check_number("temperature", temperature)
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    return temperature


def check_below(name: str, tensor: Tensor, count: int, meaning: str = "") -> None:
    """Integers must be in ``0 .. count - 1`` (errors append ``meaning``); checked only on the CPU."""
    if tensor.is_cpu and tensor.numel() and is_readable(tensor):
        low, high = (int(bound) for bound in tensor.aminmax())
        if low < 0 or high >= count:
            raise ValueError(f"{name} must be in 0 .. {count - 1}{meaning}, got {low} .. {high}")


def is_readable(tensor: Tensor) -> bool:
    """Whether Python code can read the values of ``tensor`` here, as opposed to while it is traced or transformed."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return has_data(tensor)


def has_data(tensor: Tensor) -> bool:
    """Whether ``tensor`` has values, not only a shape and a type."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def positions(x: Tensor) -> int:
    """Number of positions P of ``x`` (B, C, *spatial)."""
    return math.prod(x.shape[2:])
