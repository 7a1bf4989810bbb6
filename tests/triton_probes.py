"""Small kernels and a counter of memory traffic to inspect the Triton kernels in the interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from glow_kernels.backends.triton.device_functions import (
    atan,
    exp,
    kernel,
    log1p_of_fraction,
    pointers,
    row_pointers,
    tanh,
)


def elementary(x: Tensor, name: str) -> Tensor:
    """An elementary function of ``x`` (n,), as the kernels compute it."""
    result = torch.empty_like(x)
    with numpy.errstate(all="ignore"):
        _elementary_kernel[(1,)](x, result, x.numel(), NAME=name, BLOCK=triton.next_power_of_2(x.numel()))
    return result


def offsets(sample: int, position: int, channel: int, positions: int, strides: Sequence[int]) -> tuple[int, int]:
    """The offset of an element, from its sample and from its row, which counts the positions of all samples."""
    base, result = torch.empty(1, dtype=torch.int8), torch.empty(2, dtype=torch.int64)
    _offset_kernel[(1,)](base, result, *strides, sample, position, channel, positions)
    return int(result[0]), int(result[1])


@triton.jit
def _elementary_kernel(x_ptr, result_ptr, n, NAME: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n, other=0.5)
    if NAME == "exp":
        result = exp(x)
    elif NAME == "tanh":
        result, _ = tanh(x)
    elif NAME == "atan":
        result = atan(x)
    else:
        result = log1p_of_fraction(x)
    tl.store(result_ptr + i, result, i < n)


@kernel
def _offset_kernel(
    base_ptr, result_ptr, stride_b, stride_c, stride_p,
    sample: tl.int32, position: tl.int32, channel: tl.int32, P: tl.int32,
):  # fmt: skip
    strides = (stride_b, stride_c, stride_p)
    zero = tl.arange(0, 1)
    of_element = pointers(base_ptr, strides, sample, channel + zero[:, None], position + zero[:, None], False, 1)
    of_row = row_pointers(base_ptr, strides, sample * P + position + zero, P, channel + zero, False, 1)
    at = result_ptr + zero[:, None]
    tl.store(at, of_element.to(tl.int64) - base_ptr.to(tl.int64))
    tl.store(at + 1, of_row.to(tl.int64) - base_ptr.to(tl.int64))


class Traffic:
    """How often every address was read and written, launch by launch."""

    def __init__(self) -> None:
        self._reads: list[Counter[int]] = []
        self._writes: list[Counter[int]] = []
        self._sizes: dict[int, int] = {}

    def begin_launch(self) -> None:
        """Count what follows as another launch."""
        self._reads.append(Counter())
        self._writes.append(Counter())

    def note_read(self, pointers: Any, mask: Any) -> None:
        """Count what a load reads."""
        self._reads[-1].update(self._noted(pointers, mask))

    def note_write(self, pointers: Any, mask: Any) -> None:
        """Count what a store writes."""
        self._writes[-1].update(self._noted(pointers, mask))

    def reads(self, tensor: Tensor) -> list[int]:
        """How often every element of ``tensor`` was read."""
        return [sum(launch[address] for launch in self._reads) for address in _addresses(tensor)]

    def writes(self, tensor: Tensor) -> list[int]:
        """How often every element of ``tensor`` was written."""
        return [sum(launch[address] for launch in self._writes) for address in _addresses(tensor)]

    def moved(self) -> int:
        """Bytes to and from memory, if a launch finds in the cache whatever it reads again."""
        read = sum(self._sizes[address] for launch in self._reads for address in launch)
        return read + sum(self._sizes[address] * n for launch in self._writes for address, n in launch.items())

    def _noted(self, pointers: Any, mask: Any) -> list[int]:
        addresses: list[int] = pointers.data[mask.data].tolist()
        self._sizes.update(dict.fromkeys(addresses, pointers.get_element_ty().primitive_bitwidth // 8))
        return addresses


def count(call: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Traffic]:
    """The results of ``call`` and its traffic in the interpreter."""
    traffic, builder = Traffic(), interpreter.interpreter_builder
    load, store, launch = builder.create_masked_load, builder.create_masked_store, interpreter.GridExecutor.__call__

    def counted_load(pointers: Any, mask: Any, *args: Any) -> Any:
        traffic.note_read(pointers, mask)
        return load(pointers, mask, *args)

    def counted_store(pointers: Any, values: Any, mask: Any, *args: Any) -> Any:
        traffic.note_write(pointers, mask)
        return store(pointers, values, mask, *args)

    def counted_launch(self: Any, *args: Any, **options: Any) -> Any:
        traffic.begin_launch()
        return launch(self, *args, **options)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        with mock.patch.object(interpreter.GridExecutor, "__call__", counted_launch):
            return call(), traffic
    finally:
        del builder.create_masked_load, builder.create_masked_store


def _addresses(tensor: Tensor) -> list[int]:
    elements = torch.zeros(tensor.shape, dtype=torch.int64)
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        elements += (torch.arange(size) * stride).view(-1, *[1] * (tensor.dim() - dimension - 1))
    return (tensor.data_ptr() + elements * tensor.element_size()).flatten().tolist()
