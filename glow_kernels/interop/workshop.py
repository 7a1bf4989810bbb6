"""Copies of layers for probing and proving: in another precision, with simple stand-ins for their networks.

A live model is never run, moved or changed to find out what it does.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glow_kernels.interop.patch import FLAG, INITIALIZED, Mismatch, Patch, apply
from glow_kernels.interop.probe import Coupling, find_coupling

if TYPE_CHECKING:
    from glow_kernels.interop.memory import Memory

# Small, and the same for every position that a 3x3 network could see.
SPATIAL = (4, 4)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class StandIn(nn.Module):
    """Takes the place of a network: a smooth function of the channels at each position, or a given ``answer``.

    Args:
        inputs, outputs: channels before and after.
        channels_last: whether the network may be given images whose channels lie next to each other in memory.
        pairs: the network returns halves of its channels as pairs in a last dimension.
    """

    mixing: Tensor

    def __init__(self, inputs: int, outputs: int, channels_last: bool, pairs: bool) -> None:
        super().__init__()
        self.inputs, self.outputs, self.channels_last, self.pairs = inputs, outputs, channels_last, pairs
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
        self.register_buffer("mixing", mixing)
        self.answer: Tensor | None = None
        self.seen: Tensor | None = None

    def forward(self, x: Any, *_: Any, **__: Any) -> Tensor:
        """(B, inputs, *spatial) to (B, outputs, *spatial); further arguments make no difference."""
        if isinstance(x, (tuple, list)):
            x = x[0]
        self.seen = x
        if self.answer is not None:
            h = self.answer.to(x.dtype).expand(x.shape[0], self.outputs, *x.shape[2:]).clone()
        else:
            h = 1.5 * torch.tanh(torch.einsum("oc,bc...->bo...", self.mixing.to(x), x[:, : self.inputs]))
        return torch.stack(h.chunk(2, 1), -1) if self.pairs else h


class PassThrough(nn.Module):
    """Takes the place of a layer that must not interfere.

    Args:
        with_log_det: return what was passed as the log-determinant too, as OpenAI's layers do.
    """

    def __init__(self, with_log_det: bool) -> None:
        super().__init__()
        self.with_log_det = with_log_det

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """``x`` as it is."""
        if not self.with_log_det:
            return x
        return x, args[0] if args else next((options[name] for name in ("logdet", "sldj") if name in options), None)


class Workshop:
    """What is known of a model while it is looked at, and the copies to find out more.

    Args:
        memory: what steps shall keep for backward; None for everything.

    Attributes:
        decisions: patch and options of each module that will be patched.
        memories: what each of them keeps.
        stand_ins: for networks of couplings.
        networks: of each module in which a coupling was found.
    """

    def __init__(self, memory: Memory | None = None) -> None:
        self.memory = memory
        self.decisions: dict[nn.Module, tuple[type[Patch], Any]] = {}
        self.memories: dict[nn.Module, Memory | None] = {}
        self.stand_ins: dict[nn.Module, StandIn] = {}
        self.networks: dict[nn.Module, list[nn.Module]] = {}

    def require(self, *layers: tuple[nn.Module, type[Patch]]) -> None:
        """These layers of a step will be patched in the given way, so that they can be computed together.

        Raises:
            Mismatch: one will not.
        """
        for layer, patch in layers:
            decided, _ = self.decisions.get(layer, (None, None))
            if decided is None or not issubclass(decided, patch):
                raise Mismatch(f"its {type(layer).__name__} was left alone")

    def find_coupling(
        self,
        module: nn.Module,
        network: nn.Module,
        run: Callable[[Any, Tensor], Tensor],
        *,
        channels: int | None = None,
        spatial: tuple[int, ...] = SPATIAL,
        skipped: Mapping[nn.Module, bool] | None = None,
        silenced: Sequence[nn.Module] = (),
        log_scale_gain: Callable[[Any], Tensor] | None = None,
    ) -> Coupling:
        """What the coupling in ``module`` computes.

        Args:
            module: the layer.
            network: its submodule that predicts scale and shift.
            run: calls a copy of the layer and returns the transformed input.
            channels: C, if something else than the network's own sizes tells.
            spatial: sizes to probe with.
            skipped: submodules that must do nothing meanwhile, and whether they return a log-determinant.
            silenced: other networks, which must return zeros meanwhile.
            log_scale_gain: reads the learned number per channel from a copy, if there is one.

        Raises:
            Mismatch: it is no coupling that the operators know, or it cannot be run.
        """
        inputs = _input_channels(network)
        stand_in = self._stand_in(network, inputs, spatial)
        options = [channels] if channels else [inputs + stand_in.outputs // 2, inputs + stand_in.outputs]
        replaced: dict[nn.Module, nn.Module] = {network: stand_in}
        replaced |= {other: PassThrough(with_log_det) for other, with_log_det in (skipped or {}).items()}
        for other in silenced:
            silent = self._stand_in(other, _input_channels(other), spatial)
            silent.answer = torch.zeros(())
            replaced[other] = silent
        reasons = []
        for option in options:
            copied = randomised(self.replica(module, replaced).double().cpu())
            stand_in.cpu()
            layer = _layer(copied, stand_in, run)
            gain = None if log_scale_gain is None else log_scale_gain(copied).detach().flatten()
            try:
                found = find_coupling(layer, option, stand_in.outputs, spatial, gain)
                self.networks.setdefault(module, []).append(network)
                return dataclasses.replace(found, channels_last=stand_in.channels_last)
            except Mismatch as mismatch:
                reasons.append(str(mismatch))
            except Exception as error:
                reasons.append(f"it does not run with chosen network outputs: {error}")
            finally:
                stand_in.answer = stand_in.seen = None
                for other in silenced:
                    self.stand_ins[other].answer = None
        raise Mismatch(reasons[0])

    def replica(self, module: nn.Module, replaced: Mapping[nn.Module, nn.Module] | None = None) -> Any:
        """A :func:`faithful_copy` of ``module`` with stand-ins for networks.

        Raises:
            Mismatch: it cannot be copied.
        """
        copies: dict[int, Any] = {
            id(net): copy.deepcopy(stand_in) for net, stand_in in self.stand_ins.items() if net is not module
        }
        copies |= {id(old): new for old, new in (replaced or {}).items()}
        return faithful_copy(module, copies)

    def patched_replica(self, module: nn.Module, patch: type[Patch], options: Any, memory: Memory | None = None) -> Any:
        """A copy as by :meth:`replica`, patched as decided for its submodules and as given for itself."""
        copied = self.replica(module)
        copies = dict(copied.named_modules())  # without what is inside of networks
        for name, layer in module.named_modules():
            replaced = isinstance(copies.get(name), StandIn)
            if layer is not module and layer in self.decisions and name in copies and not replaced:
                apply(copies[name], *self.decisions[layer])
        apply(copied, patch, options, memory)
        return copied

    def memory_for(self, module: nn.Module) -> Memory | None:
        """What a step in ``module`` may keep, if it is not to keep everything.

        Raises:
            Mismatch: its networks cannot be evaluated twice.
        """
        if self.memory is None:
            return None
        networks = [network for layer in module.modules() for network in self.networks.get(layer, ())]
        changing = [changes_buffers(network, self.stand_ins[network]) for network in networks]
        if any(changing):
            if self.memory.micro_batches > 1:
                raise Mismatch("its network changes its buffers, as BatchNorm does, which allows no micro-batches")
            return dataclasses.replace(self.memory, restores_buffers=True)
        return self.memory

    def _stand_in(self, network: nn.Module, channels: int, spatial: tuple[int, ...]) -> StandIn:
        if network not in self.stand_ins:
            self.stand_ins[network] = _stand_in(network, channels, spatial)
        return self.stand_ins[network]


def spatial_of(network: nn.Module) -> tuple[int, ...]:
    """Spatial sizes to try ``network`` with, by its first layer: of images, sequences or vectors."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            return ()
        if isinstance(layer, nn.Conv1d):
            return (8,)
        if isinstance(layer, nn.Conv2d):
            return SPATIAL
    return SPATIAL


def faithful_copy(module: Any, copies: dict[int, Any] | None = None) -> Any:
    """A deep copy of ``module`` without hooks, in which closures see the copy.

    Args:
        module: anything.
        copies: by identity, what takes the place of parts of it.

    Raises:
        Mismatch: it cannot be copied.
    """
    copies = {} if copies is None else copies
    for layer in module.modules():
        copies |= {id(getattr(layer, name)): OrderedDict() for name in _HOOKS}
        results = [value for value in vars(layer).values() if isinstance(value, Tensor) and not value.is_leaf]
        copies |= {id(value): value.detach().clone() for value in results}  # which deepcopy refuses
    try:
        copied = copy.deepcopy(module, copies)
    except Exception as error:
        raise Mismatch(f"it cannot be copied to try things out: {error}") from error
    for layer in copied.modules():
        for name, value in list(layer.__dict__.items()):
            if isinstance(value, types.FunctionType) and value.__closure__:
                layer.__dict__[name] = _rebind(value, copies)
    return copied


@torch.no_grad()
def randomised(module: Any) -> Any:
    """``module``, a copy, with parameters moved away from values that hide what they do, and ActNorms initialised."""
    generator = torch.Generator().manual_seed(1)
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        # What a layer keeps together with its inverse stays that.
        kept = name.endswith("_inv") or f"{name}_inv" in parameters
        if parameter.is_floating_point() and not kept:
            width = max(parameter.shape) if parameter.dim() and parameter.numel() > max(parameter.shape) else 4
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.2 / width**0.5 * noise).to(parameter))
    return with_flags(module, True)


@torch.no_grad()
def with_flags(module: Any, initialized: bool) -> Any:
    """``module``, a copy, whose ActNorms believe that they have been initialised, or that they have not."""
    for layer in module.modules():
        layer.__dict__.pop(FLAG, None)
        for name, meaning in INITIALIZED.items():
            flag = getattr(layer, name, None)
            if isinstance(flag, Tensor):
                flag.fill_(meaning == initialized)
            elif isinstance(flag, bool):
                setattr(layer, name, meaning == initialized)
    return module


def _layer(copied: Any, stand_in: StandIn, run: Callable[[Any, Tensor], Tensor]) -> Any:
    @torch.no_grad()
    def layer(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        stand_in.answer, stand_in.seen = h, None
        y, seen = run(copied, x), _seen(stand_in)
        return seen, y

    return layer


def _seen(stand_in: StandIn) -> Tensor:
    if stand_in.seen is None:
        raise Mismatch("its network is not called")
    return stand_in.seen


def _input_channels(network: nn.Module) -> int:
    for layer in network.modules():
        for name in ("in_channels", "in_features"):
            if isinstance(getattr(layer, name, None), int):
                return int(getattr(layer, name))
    raise Mismatch("how many channels its network takes is not known")


@torch.no_grad()
def _stand_in(network: nn.Module, channels: int, spatial: tuple[int, ...]) -> StandIn:
    """A stand-in with as many outputs as a copy of ``network`` has when it is run."""
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))
    x = torch.randn(2, channels, *spatial, dtype=like.dtype, device=like.device)
    try:
        output = faithful_copy(network)(x)
    except Exception as error:
        raise Mismatch(f"its network does not run on {channels} channels: {error}") from error
    pairs = isinstance(output, Tensor) and output.dim() == x.dim() + 1 and output.shape[-1] == 2
    if pairs:
        output = output.movedim(-1, 1).flatten(1, 2)
    if not isinstance(output, Tensor) or output.shape[:1] + output.shape[2:] != (2, *spatial):
        raise Mismatch("its network does not map channels to channels at every position")
    return StandIn(channels, output.shape[1], x.dim() == 4 and _takes_channels_last(network, x), pairs)


def changes_buffers(network: nn.Module, stand_in: StandIn) -> bool:
    """Whether a run of ``network`` changes its buffers.

    Raises:
        Mismatch: what it computes depends on that, on chance alone, or on parameters of others.
    """
    copied = randomised(faithful_copy(network)).train()
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))
    x = torch.randn(2, stand_in.inputs, *spatial_of(network), dtype=like.dtype, device=like.device)
    buffers = [buffer.clone() for buffer in copied.buffers()]
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        outputs.append(copied(x))
    if not torch.equal(*outputs):
        raise Mismatch("its network gives different results for the same input")
    own, nodes = {id(parameter) for parameter in copied.parameters()}, [outputs[0].grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) not in own:
                raise Mismatch("its network uses parameters that are not its own")
            nodes.extend(following for following, _ in node.next_functions)
    return any(not torch.equal(one, other) for one, other in zip(buffers, copied.buffers(), strict=True))


def _takes_channels_last(network: nn.Module, x: Tensor) -> bool:
    """Whether ``network``, with parameters that are not zero, says the same of ``x`` in another memory format."""
    for training in (False, True):
        copied = randomised(faithful_copy(network)).train(training)
        outputs = []
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(0)  # dropout must drop the same
            try:
                outputs.append(copied(x.contiguous(memory_format=layout)))
            except Exception:  # as from a view() of what is not contiguous
                return False
        if not torch.allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-4):
            return False
    return True


def _rebind(function: types.FunctionType, copies: Mapping[int, Any]) -> types.FunctionType:
    """``function`` whose closure holds the copies of what it held."""
    cells = tuple(
        types.CellType(copies.get(id(cell.cell_contents), cell.cell_contents)) for cell in function.__closure__ or ()
    )
    code, names = function.__code__, function.__globals__
    return types.FunctionType(code, names, function.__name__, function.__defaults__, cells)
