"""Patches Triton's interpreter; importing this module is enough.

It skips the bookkeeping that takes most of its time, and checks the alignment of vectors that kernels promise.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from triton.language.core import block_type
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

_prepare_and_call, _prepared = InterpretedFunction.__call__, set()
_broadcast = TritonSemantic.broadcast_impl_value
_with_element_type = block_type.with_element_ty
_load, _store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
_numpy_type = interpreter._get_np_dtype
_numpy_type_of_scalar = functools.cache(_numpy_type)


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function without patching triton.language again, which the interpreter does at every launch and every call
    in a kernel: once is enough for Triton's own functions, and the others share the kernels' module."""
    module = function.fn.__module__
    if module.startswith("triton.") and module not in _prepared:
        _prepared.add(module)
        return _prepare_and_call(function, *args, **kwargs)
    return function.rewrite()(*args, **kwargs)


def _broadcast_if_shapes_differ(semantic: Any, one: Any, other: Any) -> Any:
    same = one.type.is_block() and other.type.is_block() and list(one.type.shape) == list(other.type.shape)
    return (one, other) if same else _broadcast(semantic, one, other)


def _with_other_element_type(block: Any, scalar: Any) -> Any:
    return block if scalar is block.element_ty else _with_element_type(block, scalar)


def _numpy_type_from_cache(dtype: Any) -> Any:
    return _numpy_type(dtype) if dtype.scalar.is_ptr() else _numpy_type_of_scalar(dtype.scalar)


def _check_alignment(pointers: Any, mask: Any) -> None:
    """See that the addresses which a kernel claims to be multiples of a number are: a GPU relies on it."""
    for axis, multiple in enumerate(pointers.attr.get("tt.divisibility", ())):
        if multiple > 1:
            vector = multiple * 8 // pointers.get_element_ty().primitive_bitwidth
            firsts = (slice(None),) * axis + (slice(None, None, vector),)
            misaligned = pointers.data[firsts] % multiple > 0
            assert not (misaligned & mask.data[firsts]).any(), f"addresses are no multiples of {multiple} bytes"


def _load_aligned(builder: Any, pointers: Any, mask: Any, *args: Any) -> Any:
    _check_alignment(pointers, mask)
    return _load(builder, pointers, mask, *args)


def _store_aligned(builder: Any, pointers: Any, values: Any, mask: Any, *args: Any) -> Any:
    _check_alignment(pointers, mask)
    return _store(builder, pointers, values, mask, *args)


InterpretedFunction.__call__ = _call
InterpreterBuilder.create_masked_load = _load_aligned
InterpreterBuilder.create_masked_store = _store_aligned
TritonSemantic.broadcast_impl_value = _broadcast_if_shapes_differ
block_type.with_element_ty = _with_other_element_type
block_type.to_ir = lambda block, builder: block  # the original builds an equal type
interpreter._get_np_dtype = _numpy_type_from_cache

# The interpreter checks every integer sum and product for overflow, but asserts the result only in debug mode.
_builder = interpreter.interpreter_builder
assert not _builder.options.debug
_builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)
