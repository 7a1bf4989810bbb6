"""Examines a model: copies of its layers, with stand-ins for their networks, are probed and compared.

The live model is never run, moved or changed for this.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glow_kernels.interop.copies import faithful_copy, randomised
from glow_kernels.interop.patch import Mismatch, Patch, apply
from glow_kernels.interop.probe import Coupling, find_coupling
from glow_kernels.interop.stand_ins import (
    SPATIAL,
    PassThrough,
    StandIn,
    changes_buffers,
    input_channels,
    mixes_samples,
    stand_in_for,
)

if TYPE_CHECKING:
    from glow_kernels.interop.memory import Memory
    from glow_kernels.interop.report import LayerReport


class Examiner:
    """Records what is known about a model while it is examined, and finds out more on copies of its layers.

    Args:
        memory: what steps are to keep for backward; None for everything.

    Attributes:
        decisions: patch and options of each module that will be patched.
        memories: what each of these modules keeps for backward.
        stand_ins: the stand-in for each coupling network.
        networks: the networks of each module in which a coupling was found.
        rows: the rows of the report, one for each flow layer that was examined.
    """

    def __init__(self, memory: Memory | None = None) -> None:
        self.memory = memory
        self.decisions: dict[nn.Module, tuple[type[Patch], Any]] = {}
        self.memories: dict[nn.Module, Memory | None] = {}
        self.stand_ins: dict[nn.Module, StandIn] = {}
        self.networks: dict[nn.Module, list[nn.Module]] = {}
        self.rows: dict[nn.Module, LayerReport] = {}

    def require(self, *layers: tuple[nn.Module, type[Patch]]) -> None:
        """Check that these layers of a step will be patched as given, so that they can be computed together.

        Raises:
            Mismatch: one of them will not.
        """
        for layer, patch in layers:
            decided, _ = self.decisions.get(layer, (None, None))
            if decided is None:
                reason = self.rows[layer].reason if layer in self.rows else "it is not a known layer"
                raise Mismatch(f"its {type(layer).__name__} is not patched: {reason}")
            if not issubclass(decided, patch):
                raise Mismatch(f"its {type(layer).__name__} is {decided.dialect}'s {decided.kind}")

    def find_coupling(
        self,
        module: nn.Module,
        network: nn.Module,
        run: Callable[[Any, Tensor], Tensor],
        *,
        channels: int | None = None,
        inputs: int | None = None,
        context: int = 0,
        spatial: tuple[int, ...] = SPATIAL,
        skipped: Mapping[nn.Module, bool] | None = None,
        zeroed: Sequence[nn.Module] = (),
        log_scale_gain: Callable[[Any], Tensor] | None = None,
    ) -> Coupling:
        """Find out what the coupling in ``module`` computes.

        Args:
            module: the layer.
            network: its submodule that predicts scale and shift.
            run: calls a copy of the layer on an input and returns its output, without the log-determinant.
            channels: C; by default, guessed from the sizes of the network.
            inputs: channels that the network reads; by default, those that its first layer takes.
            context: channels of the network's context, 0 for none.
            spatial: sizes to probe with.
            skipped: submodules to replace by the identity, and whether they return a log-determinant.
            zeroed: other networks, to be replaced by zeros.
            log_scale_gain: reads the learned gain of each channel's log-scale from a copy, if there is one.

        Raises:
            Mismatch: it is not a coupling that the operators can compute, or it cannot be run.
        """
        inputs = input_channels(network) if inputs is None else inputs
        stand_in = self._stand_in(network, inputs, spatial, context)
        options = [channels] if channels else [inputs + stand_in.outputs // 2, inputs + stand_in.outputs]
        options.sort(key=lambda option: option != 2 * inputs)  # halves first: if all fail, their reason is reported
        replaced: dict[nn.Module, nn.Module] = {network: stand_in}
        replaced |= {other: PassThrough(with_log_det) for other, with_log_det in (skipped or {}).items()}
        for other in zeroed:
            zero_network = self._stand_in(other, input_channels(other), spatial)
            zero_network.answer = torch.zeros(())
            replaced[other] = zero_network
        reasons = []
        for option in options:
            copied = randomised(self.replica(module, replaced).double().cpu())
            stand_in.cpu()
            layer = _layer(copied, stand_in, run)
            gain = None if log_scale_gain is None else log_scale_gain(copied).detach().flatten()
            try:
                found = find_coupling(layer, option, stand_in.outputs, spatial, gain)
                given = _seen(stand_in).shape[1]
                if channels is None and not len(found.read) == given == inputs:
                    raise Mismatch(f"its network takes {inputs} channels and is given {given}")
                self.networks.setdefault(module, []).append(network)
                return dataclasses.replace(found, channels_last=stand_in.channels_last)
            except Mismatch as mismatch:
                reasons.append(str(mismatch))
            except Exception as error:
                guess = "" if channels else f" on {option} channels, as its network suggests"
                reasons.append(f"it does not run with chosen network outputs{guess}: {error}")
            finally:
                stand_in.answer = stand_in.seen = None
                for other in zeroed:
                    self.stand_ins[other].answer = None
        raise Mismatch(reasons[0])

    def replica(self, module: nn.Module, replaced: Mapping[nn.Module, nn.Module] | None = None) -> Any:
        """A :func:`faithful_copy` of ``module`` with stand-ins for its networks.

        Raises:
            Mismatch: it cannot be copied.
        """
        copies: dict[int, Any] = {
            id(part): copy.deepcopy(self.stand_ins[part])
            for part in module.modules()
            if part in self.stand_ins and part is not module
        }
        copies |= {id(old): new for old, new in (replaced or {}).items()}
        return faithful_copy(module, copies)

    def patched_replica(self, module: nn.Module, patch: type[Patch], options: Any, memory: Memory | None = None) -> Any:
        """A :meth:`replica` of ``module``, itself patched as given and its submodules as decided."""
        copied = self.replica(module)
        copies = dict(copied.named_modules())  # without the submodules of networks
        for name, layer in module.named_modules():
            replaced = isinstance(copies.get(name), StandIn)
            if layer is not module and layer in self.decisions and name in copies and not replaced:
                apply(copies[name], *self.decisions[layer])
        apply(copied, patch, options, memory)
        return copied

    def memory_for(self, module: nn.Module) -> Memory | None:
        """What the step in ``module`` keeps for backward; None for everything.

        Raises:
            Mismatch: its networks cannot be evaluated twice, or not in micro-batches.
        """
        if self.memory is None:
            return None
        networks = [network for layer in module.modules() for network in self.networks.get(layer, ())]
        changing = [changes_buffers(network, self.stand_ins[network]) for network in networks]
        if any(changing):
            if self.memory.micro_batches > 1:
                raise Mismatch("its network changes its buffers, as BatchNorm does, which allows no micro-batches")
            return dataclasses.replace(self.memory, restores_buffers=True)
        if self.memory.micro_batches > 1 and any(mixes_samples(net, self.stand_ins[net]) for net in networks):
            raise Mismatch("its network mixes samples, as BatchNorm does, which allows no micro-batches")
        return self.memory

    def _stand_in(self, network: nn.Module, channels: int, spatial: tuple[int, ...], context: int = 0) -> StandIn:
        if network not in self.stand_ins:
            self.stand_ins[network] = stand_in_for(network, channels, spatial, context)
        return self.stand_ins[network]


def _layer(copied: Any, stand_in: StandIn, run: Callable[[Any, Tensor], Tensor]) -> Any:
    @torch.no_grad()
    def layer(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        stand_in.answer, stand_in.seen = h, None
        y, seen = run(copied, x.clone()), _seen(stand_in)  # some layers overwrite their input
        return seen, y

    return layer


def _seen(stand_in: StandIn) -> Tensor:
    if stand_in.seen is None:
        raise Mismatch("its network is not called")
    return stand_in.seen
