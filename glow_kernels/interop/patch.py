"""Patching: replaces the computation of a layer of existing code and nothing else.

The class of the *instance* is replaced by a subclass whose methods compute with the fused operators. Parameters,
buffers, hooks, modes and the identity of the module stay the same, and so do the answers of ``isinstance`` and
``repr``. Deep copies and pickles keep the new class; methods stored on the instance would break them.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad

from glow_kernels.interop.constants import Constants
from glow_kernels.ops._checks import has_data
from glow_kernels.reversible.general_step import GeneralStep

if TYPE_CHECKING:
    from glow_kernels.interop.examiner import Examiner
    from glow_kernels.interop.memory import Memory
    from glow_kernels.interop.steps import Parts

# Attributes that a patch stores on the instance: the options found by probing, the constants that they depend on, the
# initialisation flag last read as true, what a step keeps for backward, and the submodules for which it may keep that.
_OPTIONS = "_glow_kernels_options"
CONSTANTS = "_glow_kernels_constants"
FLAG = "_glow_kernels_flag"
MEMORY = "_glow_kernels_memory"
_MODULES = "_glow_kernels_modules"
# Attributes of the generated class.
_PATCH = "_glow_kernels_patch"
_ORIGINAL = "_glow_kernels_original"
# Flags of the dialects' ActNorms, with the value that means that they have been initialised.
INITIALIZED = {
    "initialized": True,
    "inited": True,
    "is_initialized": True,
    "data_dep_init_done": True,
    "init_on_next_batch": False,
}
_CLASSES: dict[tuple[type[Patch], type[nn.Module]], type[nn.Module]] = {}


class Mismatch(Exception):  # noqa: N818 - not an error: it becomes a row of the report
    """The layer does not do what its structure suggests; the message says what it does instead."""


@dataclass(frozen=True)
class Call:
    """One way to call a layer, for the proof of its patch.

    Attributes:
        name: for the report, such as ``"forward"`` or ``"inverse"``.
        run: calls the module with random inputs.
        shapes: of these inputs.
        optional: the original layer may refuse this call; then it is not compared.
        opaque_context: it passes a context that can be neither used nor kept for backward.
    """

    name: str
    run: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False
    opaque_context: bool = False


@dataclass(frozen=True)
class Results:
    """Options of a linear layer whose return values differ between the copies of a dialect.

    Attributes:
        has_log_det: whether it returns a log-determinant with the data, in the direction where copies differ.
    """

    has_log_det: bool

    def describe(self) -> str:
        """For the report."""
        return ""


class Patch:
    """How to recognise a layer, and the methods that replace its own; never instantiated.

    The functions named in ``methods`` become methods of the layer: their ``self`` is the layer. In cases that the patch
    does not compute, they call the method of ``original_class(self)``.

    Attributes:
        dialect, kind: what the layer is recognised as.
        better: what is improved in every such layer, for the report.
        note: what part of the layer is not patched, and why, for the report.
        methods: names of the methods that replace those of the layer. They are called only while the layer's attributes
            and buffers are as they were found, and only with arguments that they take; else the original is called.
        mutable_attributes: names of attributes and buffers that these methods read at every call, and that may
            therefore change.
        has_network: it runs a network through :func:`glow_kernels.interop.memory.run` or ``run_alone``, so that its
            activations need not be kept.
    """

    dialect: ClassVar[str]
    kind: ClassVar[str]
    better: ClassVar[tuple[str, ...]] = ()
    note: ClassVar[str] = ""
    methods: ClassVar[tuple[str, ...]] = ("forward",)
    mutable_attributes: ClassVar[tuple[str, ...]] = ()
    has_network: ClassVar[bool] = False

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether ``module`` has the structure of this layer."""
        raise NotImplementedError

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Any:
        """Options found by probing copies of ``module``.

        Raises:
            Mismatch: it is not this layer after all.
        """
        return None

    @classmethod
    def improvements(cls, module: Any, options: Any) -> tuple[str, ...]:
        """What the patch improves besides speed, for the report."""
        return cls.better

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        """The calls that users make, for the proof; the density direction comes first."""
        raise NotImplementedError

    @classmethod
    def inner(cls, module: Any) -> Sequence[nn.Module]:
        """Submodules of ``module``, except its network, whose attributes the options depend on too."""
        return ()

    @classmethod
    def parts(cls, module: Any) -> Parts | None:
        """The parts of the patched ``module``, if it is a step of flow that can be computed as a whole."""
        return None


def patch_of(module: nn.Module) -> type[Patch] | None:
    """The patch of ``module``; None if it has none, like a new instance of a patched module's class."""
    return getattr(type(module), _PATCH, None) if _OPTIONS in module.__dict__ else None


def options_of(module: nn.Module) -> Any:
    """The options that were found for the patched ``module``."""
    return module.__dict__[_OPTIONS]


def original_class(module: nn.Module) -> Any:
    """The original class of the patched ``module``."""
    return getattr(type(module), _ORIGINAL)


def apply(module: nn.Module, patch: type[Patch], options: Any = None, memory: Memory | None = None) -> None:
    """Patch ``module`` with ``patch``; for backward it keeps what ``memory`` says, or everything."""
    undo(module)
    module.__class__ = _patched_class(patch, type(module))
    module.__dict__[_OPTIONS] = options
    if memory is not None:
        module.__dict__[MEMORY] = memory
        module.__dict__[_MODULES] = GeneralStep.of(module).modules[1:]
    ignored = (*INITIALIZED, *patch.mutable_attributes, _OPTIONS, CONSTANTS, FLAG, MEMORY, _MODULES)
    for layer in (module, *patch.inner(module)):
        layer.__dict__[CONSTANTS] = Constants(layer, ignored)


def _compile_time_constant(question: Callable[[nn.Module], bool]) -> Callable[[nn.Module], bool]:
    """``question``, which ``torch.compile`` asks while it compiles, taking the answer for a constant.

    The module is passed by its address, since before PyTorch 2.12 no module can be a constant.
    """

    def at(address: int) -> bool:
        return question(ctypes.cast(address, ctypes.py_object).value)

    # As torch.compiler.assume_constant_result does, which would import the compiler.
    at._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @functools.wraps(question)
    def ask(module: nn.Module) -> bool:
        return at(id(module)) if torch.compiler.is_compiling() else question(module)

    return ask


def is_unchanged(*modules: nn.Module) -> bool:
    """Whether all ``modules`` are patched, or inner modules of a patched one, and have not changed since."""
    return all(map(_is_unchanged, modules))


@_compile_time_constant
def _is_unchanged(module: nn.Module) -> bool:
    constants = module.__dict__.get(CONSTANTS)
    return constants is not None and constants.unchanged_in(module)


def memory_of(module: nn.Module) -> Memory | None:
    """What a patched ``module`` keeps for backward; None for everything, as PyTorch does."""
    return module.__dict__.get(MEMORY)


@_compile_time_constant
def has_same_submodules(module: nn.Module) -> bool:
    """Whether a ``module`` that recomputes activations still has the submodules that it had when it was patched."""
    return module.__dict__.get(_MODULES) == GeneralStep.of(module).modules[1:]


def undo(module: nn.Module) -> bool:
    """Give ``module`` its original class back; False if it is not patched."""
    patch, was_patched = getattr(type(module), _PATCH, None), patch_of(module) is not None
    if patch is None:
        return False
    for layer in patch.inner(module):
        layer.__dict__.pop(CONSTANTS, None)
    module.__class__ = _without_patch(type(module))
    for name in (_OPTIONS, CONSTANTS, FLAG, MEMORY, _MODULES):
        module.__dict__.pop(name, None)
    return was_patched


def why_not_patchable(module: nn.Module, methods: Sequence[str]) -> str | None:
    """Why the class of ``module`` cannot be replaced by one with other ``methods``, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted, and accelerated layers cannot be"
    if module._compiled_call_impl is not None:
        return "it is compiled: accelerate before compile()"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "its parameters are parametrized"
    for method in ("__reduce_ex__", "__reduce__"):
        if getattr(type(module), method) is not getattr(object, method):
            return f"its class defines {method}, which copies and pickles must keep"
    for method in methods:
        if method in vars(module):
            return f"its {method} is not that of its class, but was put on this layer"
        first = list(inspect.signature(getattr(type(module), method)).parameters.values())[:2]
        if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in first):
            return f"its {method} takes *args, of which it is not known what they are: functools.wraps would tell"
    if hasattr(type(module), "__deepcopy__"):
        return "its class defines __deepcopy__, which copies must keep"
    tensors = [*module.parameters(), *module.buffers()]
    if len({tensor.device for tensor in module.parameters()}) > 1:
        return "its parameters are on several devices"
    if not all(map(has_data, tensors)):
        return "its parameters have no data yet"
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors):
        return "it has half-precision weights: the flow needs float32, the networks may use autocast"
    return None


def is_set(module: nn.Module, flag: Any) -> bool:
    """Whether ``flag`` of ``module``, a number or a tensor, says that ActNorm has been initialised.

    Reading a tensor waits for the device: one that has been read as true is read again only after it was written to or
    replaced.
    """
    if not isinstance(flag, Tensor):
        return bool(flag)
    if torch.compiler.is_compiling():
        return FLAG in module.__dict__ and _is_still_set(module)
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


@_compile_time_constant
def _is_still_set(module: nn.Module) -> bool:
    flag, version = module.__dict__[FLAG]
    places = (*module._buffers.values(), *module.__dict__.values())
    return flag._version == version and any(flag is tensor for tensor in places)


def is_uninitialised(layer: nn.Module) -> bool:
    """Whether ``layer`` is an ActNorm that has not been initialised; like :func:`is_set`, it remembers a set flag."""
    for name, meaning in INITIALIZED.items():
        flag = layer.__dict__.get(name, layer._buffers.get(name))
        if flag is not None:
            return is_set(layer, flag) is not meaning
    return False


def has_hooks(*modules: nn.Module) -> bool:
    """Whether there are hooks on ``modules``, or global ones, so that the modules must be called instead of fused."""
    return any_hooks(None, *modules)


def any_hooks(harmless: Callable[[Any], bool] | None, *modules: nn.Module) -> bool:
    """Like :func:`has_hooks`, but ignoring hooks on ``modules`` for which ``harmless`` is true."""
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    for module in modules:
        before, after = module._forward_pre_hooks, module._forward_hooks
        for hooks in (before, after, module._backward_pre_hooks, module._backward_hooks):
            if hooks and (harmless is None or not all(harmless(hook) for hook in hooks.values())):
                return True
    return False


def shared_log_det(log_det: Tensor) -> Tensor:
    """The log-determinant () of a layer whose log-determinants of all samples (B,) are equal."""
    return log_det[0] if log_det.shape[0] else log_det.sum()


def _patched_class(patch: type[Patch], original: type[nn.Module]) -> type[nn.Module]:
    if (patch, original) not in _CLASSES:
        names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
        names |= {name: _method(getattr(patch, name), getattr(original, name), patch) for name in patch.methods}
        names |= {"__reduce_ex__": _reduce, _PATCH: patch, _ORIGINAL: original}
        _CLASSES[patch, original] = type(original.__name__, (original,), names)
    return _CLASSES[patch, original]


def _without_patch(patched: type[nn.Module]) -> Any:
    """The class without the patch: the original, or what others, such as parametrizations, have derived from it."""
    if _PATCH in vars(patched):
        return getattr(patched, _ORIGINAL)
    bases = tuple(_without_patch(base) if hasattr(base, _PATCH) else base for base in patched.__bases__)
    return type(patched.__name__, bases, dict(vars(patched)))


def _method(ours: Callable[..., Any], theirs: Callable[..., Any], patch: type[Patch]) -> Callable[..., Any]:
    """``ours`` with the signature of ``theirs``; calls that ``ours`` does not support go to ``theirs``."""
    their_signature = inspect.signature(theirs)
    first, *others = list(their_signature.parameters)[1:]
    parameters = list(inspect.signature(ours).parameters.values())[2:]
    reads_all = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    known = set(names) & set(others)
    has_inner = patch.inner.__func__ is not Patch.inner.__func__  # type: ignore[attr-defined]
    same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(names, others, strict=False))))

    def adapted(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments after the data, for ``ours``; None if one that it does not take differs from its default."""
        try:
            bound = their_signature.bind(module, *args, **options).arguments
        except TypeError:  # the original raises its own
            return None
        given = {}
        for name, value in list(bound.items())[2:]:
            parameter = their_signature.parameters[name]
            if name in known:
                given[name] = value
            elif parameter.kind is parameter.VAR_KEYWORD:
                if any(option is not None for key, option in value.items() if key not in names):
                    return None
                given |= {key: option for key, option in value.items() if key in names}
            elif value is not parameter.default:
                return None
        return given

    @functools.wraps(theirs)
    def method(self: Any, *args: Any, **options: Any) -> Any:
        # Forward-mode derivatives and torch.func need plain PyTorch, as in the operators.
        transformed = _are_functorch_transforms_active() or forward_ad._current_level >= 0
        if transformed or not is_unchanged(self) or (has_inner and not is_unchanged(*patch.inner(self))):
            return theirs(self, *args, **options)
        if not args and first in options:
            args, options = (options[first],), {name: value for name, value in options.items() if name != first}
        if not reads_all and (len(args) != 1 or options) and (len(args) > 1 + same or not options.keys() <= known):
            adapted_options = adapted(self, args, options)
            if adapted_options is None:
                return theirs(self, *args, **options)
            args, options = args[:1], adapted_options
        return ours(self, *args, **options)

    return method


def _reduce(module: nn.Module, protocol: Any) -> Any:
    # pickle cannot find a generated class by its name, but can generate it again.
    _, _, *state = tuple(object.__reduce_ex__(module, protocol))
    return (_rebuild, (getattr(type(module), _PATCH), original_class(module)), *state)


def _rebuild(patch: type[Patch], original: type[nn.Module]) -> nn.Module:
    cls = _patched_class(patch, original)
    return cls.__new__(cls)
