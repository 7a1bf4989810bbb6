"""How a layer of existing code gets another computation and keeps everything else.

The class of the *instance* is exchanged for a subclass whose methods compute with the fused operators. Parameters,
buffers, hooks, modes and the identity of the module stay; ``isinstance`` and ``repr`` say what they said. Deep copies
keep the new class, as a method stored on the instance would not, and so do pickles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

if TYPE_CHECKING:
    from glow_kernels.interop.memory import Memory
    from glow_kernels.interop.steps import Parts
    from glow_kernels.interop.workshop import Workshop

# What a patch keeps on the instance: what was found by probing, the flag that was last read as true, and what a step
# keeps for backward.
_OPTIONS = "_glow_kernels_options"
FLAG = "_glow_kernels_flag"
MEMORY = "_glow_kernels_memory"
# And on the generated class.
_PATCH = "_glow_kernels_patch"
_ORIGINAL = "_glow_kernels_original"
# Attributes, and their values, by which ActNorms of the dialects know that they have been initialised.
INITIALIZED = {
    "initialized": True,
    "inited": True,
    "is_initialized": True,
    "data_dep_init_done": True,
    "init_on_next_batch": False,
}
_CLASSES: dict[tuple[type[Patch], type[nn.Module]], type[nn.Module]] = {}


class Mismatch(Exception):  # noqa: N818 - an answer, which ends as a row of the report
    """The layer does not do what its structure suggests; the message says what it does instead."""


@dataclass(frozen=True)
class Call:
    """One way to call a layer, with which the patch is proven.

    Attributes:
        name: a word for the report, ``"forward"`` or ``"inverse"`` where there is one of each.
        run: calls the module with the random inputs.
        shapes: of those inputs.
        optional: the layer itself may refuse this call; then it is not compared.
    """

    name: str
    run: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False


class Patch:
    """How to recognise a layer, and the methods that replace its own; never instantiated.

    The functions called as one of ``methods`` are those of a module: ``self`` is the layer, and ``own(self)`` the class
    that it had, for cases that stay as they were.

    Attributes:
        dialect, kind: what the layer is recognised as.
        better: what is improved in every such layer.
        note: what of the layer stays as it was, and why, for the report.
        methods: names of the methods that replace those of the layer.
        has_network: it runs a network by :func:`glow_kernels.interop.memory.run` or ``run_alone``, whose activations
            need not be kept.
    """

    dialect: ClassVar[str]
    kind: ClassVar[str]
    better: ClassVar[tuple[str, ...]] = ()
    note: ClassVar[str] = ""
    methods: ClassVar[tuple[str, ...]] = ("forward",)
    has_network: ClassVar[bool] = False

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the structure of ``module`` is that of this layer."""
        raise NotImplementedError

    @classmethod
    def examine(cls, module: Any, workshop: Workshop) -> Any:
        """Options found by probing copies of ``module``.

        Raises:
            Mismatch: it is not this layer after all.
        """
        return None

    @classmethod
    def improvements(cls, module: Any, options: Any) -> tuple[str, ...]:
        """What is not imitated but improved, for the report."""
        return cls.better

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        """The calls that users make, for the proof; that in the density direction first."""
        raise NotImplementedError

    @classmethod
    def parts(cls, module: Any) -> Parts | None:
        """What the patched ``module`` computes with, if that is a step of flow that can be computed as a whole."""
        return None


def patch_of(module: nn.Module) -> type[Patch] | None:
    """How ``module`` is patched, or None."""
    return getattr(type(module), _PATCH, None)


def options_of(module: nn.Module) -> Any:
    """What was found when ``module`` was patched."""
    return module.__dict__[_OPTIONS]


def own(module: nn.Module) -> Any:
    """The class that ``module`` had before it was patched."""
    return getattr(type(module), _ORIGINAL)


def apply(module: nn.Module, patch: type[Patch], options: Any = None, memory: Memory | None = None) -> None:
    """Give ``module`` the computation of ``patch``, which keeps what ``memory`` says, or everything."""
    undo(module)
    module.__class__ = _patched_class(patch, type(module))
    module.__dict__[_OPTIONS] = options
    if memory is not None:
        module.__dict__[MEMORY] = memory


def memory_of(module: nn.Module) -> Memory | None:
    """What a patched ``module`` keeps for backward; None is everything, as PyTorch does."""
    return module.__dict__.get(MEMORY)


def undo(module: nn.Module) -> bool:
    """Give ``module`` its own class back; False if it is not patched."""
    if patch_of(module) is None:
        return False
    module.__class__ = own(module)
    for name in (_OPTIONS, FLAG, MEMORY):
        module.__dict__.pop(name, None)
    return True


def why_not_patchable(module: nn.Module) -> str | None:
    """Why the class of ``module`` cannot be exchanged, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted: accelerate before torch.jit.script"
    if module._compiled_call_impl is not None:
        return "it is compiled: accelerate before compile()"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "its parameters are parametrized"
    for method in ("__reduce_ex__", "__reduce__"):
        if getattr(type(module), method) is not getattr(object, method):
            return f"its class defines {method}, which copies and pickles must keep"
    if hasattr(type(module), "__deepcopy__"):
        return "its class defines __deepcopy__, which copies must keep"
    tensors = [*module.parameters(), *module.buffers()]
    if len({tensor.device for tensor in module.parameters()}) > 1:
        return "its parameters are on several devices"
    if any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors):
        return "its parameters have no data yet"
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors):
        return "it has half-precision weights: the flow needs float32, the networks may use autocast"
    return None


def is_set(module: nn.Module, flag: Any) -> bool:
    """Whether ``flag`` of ``module``, a number or a tensor, says that ActNorm has been initialised.

    A tensor is read, which waits for the device, until it was read as true, and again once it was written to or
    exchanged.
    """
    if not isinstance(flag, Tensor):
        return bool(flag)
    if torch.compiler.is_compiling():
        return FLAG in module.__dict__
    if flag.is_inference():
        return bool(flag)
    known, version = module.__dict__.get(FLAG, (None, None))
    if known is flag and version == flag._version:
        return True
    if bool(flag):
        module.__dict__[FLAG] = (flag, flag._version)
        return True
    module.__dict__.pop(FLAG, None)
    return False


def is_uninitialised(layer: nn.Module) -> bool:
    """Whether ``layer`` is an ActNorm that has not been initialised; as :func:`is_set`, it remembers a set flag."""
    for name, meaning in INITIALIZED.items():
        flag = layer.__dict__.get(name, layer._buffers.get(name))
        if flag is not None:
            return is_set(layer, flag) is not meaning
    return False


def has_hooks(*modules: nn.Module) -> bool:
    """Whether something watches calls of ``modules``, so that they must be called and not be computed together."""
    return any_hooks(None, *modules)


def any_hooks(harmless: Callable[[Any], bool] | None, *modules: nn.Module) -> bool:
    """As :func:`has_hooks`, except for hooks that are ``harmless``."""
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    for module in modules:
        before, after = module._forward_pre_hooks, module._forward_hooks
        for hooks in (before, after, module._backward_pre_hooks, module._backward_hooks):
            if hooks and (harmless is None or not all(harmless(hook) for hook in hooks.values())):
                return True
    return False


def once(log_det: Tensor) -> Tensor:
    """The log-determinant () of a layer for which it is the same in every sample, from that of each sample (B,)."""
    return log_det[0] if log_det.shape[0] else log_det.sum()


def _patched_class(patch: type[Patch], original: type[nn.Module]) -> type[nn.Module]:
    if (patch, original) not in _CLASSES:
        names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
        names |= {name: getattr(patch, name) for name in patch.methods}
        names |= {"__reduce_ex__": _reduce, _PATCH: patch, _ORIGINAL: original}
        _CLASSES[patch, original] = type(original.__name__, (original,), names)
    return _CLASSES[patch, original]


def _reduce(module: nn.Module, protocol: Any) -> Any:
    # A generated class cannot be found by its name, but made again.
    _, _, *state = tuple(object.__reduce_ex__(module, protocol))
    return (_rebuild, (patch_of(module), own(module)), *state)


def _rebuild(patch: type[Patch], original: type[nn.Module]) -> nn.Module:
    cls = _patched_class(patch, original)
    return cls.__new__(cls)
