"""Stand-ins for the networks of couplings, and what must be known about a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from glow_kernels.interop.copies import faithful_copy, randomised
from glow_kernels.interop.patch import Mismatch
from glow_kernels.reversible.randomness import RandomState, seed_generators
from glow_kernels.reversible.tensors import with_graph

# Sizes of images and volumes: small and all different, to expose layers that confuse two dimensions.
SPATIAL = (4, 6)
VOLUME = (2, 3, 4)


class OpaqueContext(Tensor):
    """A context that a layer may pass to its network or ignore, but not use itself.

    It is a tensor, for layers that check this; checking for another class or reading an attribute counts as use.
    """

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise Mismatch("it uses its context itself")

    def __getattr__(self, _: str) -> Any:
        raise Mismatch("it uses its context itself")

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise Mismatch("it uses its context itself")


OPAQUE_CONTEXT = OpaqueContext()


class StandIn(nn.Module):
    """Replaces a network: a smooth function of the channels at each position, or a given ``answer``.

    Args:
        inputs, outputs: channels of input and output.
        spatial: sizes that the network runs on.
        channels_last: whether the network may be given images in ``channels_last`` memory format.
        pairs: the network returns the two halves of its channels as pairs in a last dimension.
        context: channels of the network's context; 0 if it takes none.
    """

    mixing: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        spatial: tuple[int, ...],
        channels_last: bool = False,
        pairs: bool = False,
        context: int = 0,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.spatial = inputs, outputs, spatial
        self.channels_last, self.pairs, self.context = channels_last, pairs, context
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
        self.register_buffer("mixing", mixing)
        self.answer: Tensor | None = None
        self.seen: Tensor | None = None
        self.calls, self.had_autocast = 0, False
        self.max_output = 1.5  # in absolute value

    def forward(self, x: Any, *args: Any, **options: Any) -> Tensor:
        """(B, inputs, *spatial) to (B, outputs, *spatial).

        Raises:
            Mismatch: the layer passes other arguments too, which a patch would not pass.
        """
        contexts = [value for value in (*args, *options.values()) if value is not None]
        if not all(isinstance(value, OpaqueContext) for value in contexts):
            raise Mismatch("its network is given more than some of the channels")
        self.seen = x
        self.calls += 1
        self.had_autocast = torch.is_autocast_enabled(x.device.type)
        if self.answer is not None:
            if self.answer.dim() and self.answer.shape[2:] != x.shape[2:]:
                raise Mismatch("its network reads some of the positions, as of a checkerboard, not of the channels")
            h = self.answer.to(x.dtype).expand(x.shape[0], self.outputs, *x.shape[2:]).clone()
        else:
            h = self.max_output * torch.tanh(torch.einsum("oc,bc...->bo...", self.mixing.to(x), x).contiguous())
            h = h + len(contexts)  # reveals whether the layer passes its context on
        return torch.stack(h.chunk(2, 1), -1) if self.pairs else h


class PassThrough(nn.Module):
    """Replaces a layer by the identity.

    Args:
        with_log_det: return the given log-determinant too, as OpenAI's layers do.
    """

    def __init__(self, with_log_det: bool) -> None:
        super().__init__()
        self.with_log_det = with_log_det

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """``x`` unchanged."""
        if not self.with_log_det:
            return x
        return x, args[0] if args else next((options[name] for name in ("logdet", "sldj") if name in options), None)


def spatial_of(network: nn.Module) -> tuple[int, ...]:
    """Spatial sizes to run ``network`` on, from its first layer: of images, volumes, sequences or vectors."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            return ()
        if isinstance(layer, nn.Conv1d):
            return (8,)
        if isinstance(layer, nn.Conv3d):
            return VOLUME
        if isinstance(layer, nn.Conv2d):
            return SPATIAL
    return SPATIAL


def input_channels(network: nn.Module) -> int:
    """Input channels of ``network``, from the first layer that states them.

    Raises:
        Mismatch: none does.
    """
    for layer in network.modules():
        for name in ("in_channels", "in_features"):
            if isinstance(getattr(layer, name, None), int):
                return int(getattr(layer, name))
    raise Mismatch("how many channels its network takes is not known")


@torch.no_grad()
def stand_in_for(network: nn.Module, channels: int, spatial: tuple[int, ...], context: int = 0) -> StandIn:
    """A stand-in with as many output channels as a copy of ``network`` returns."""
    x, *others = _random_inputs(network, channels, spatial, context)
    try:
        output = faithful_copy(network)(x, *others)
    except Exception as error:
        raise Mismatch(f"its network does not run on an input of {tuple(x.shape)}: {error}") from error
    pairs = isinstance(output, Tensor) and output.dim() == x.dim() + 1 and output.shape[-1] == 2
    if pairs:
        output = output.movedim(-1, 1).flatten(1, 2)
    if not isinstance(output, Tensor) or output.shape[:1] + output.shape[2:] != (2, *spatial):
        raise Mismatch("its network does not map channels to channels at every position")
    channels_last = x.dim() == 4 and _takes_channels_last(network, x, *others)
    return StandIn(channels, output.shape[1], spatial, channels_last, pairs, context)


def changes_buffers(network: nn.Module, stand_in: StandIn) -> bool:
    """Whether a run of ``network`` changes its buffers.

    Raises:
        Mismatch: two runs from the same random state differ, it uses parameters of others, or it stores results, which
            would have no graph in a forward that keeps no activations.
    """
    copied = randomised(faithful_copy(network)).train()
    inputs = _random_inputs(network, stand_in.inputs, stand_in.spatial, stand_in.context)
    buffers = [buffer.clone() for buffer in copied.buffers()]
    before = with_graph(copied)
    outputs, state = [], RandomState(inputs[0].device)
    for _ in range(2):
        with state.replayed():
            outputs.append(copied(*inputs))
    if not torch.equal(*outputs):
        raise Mismatch("its network gives different results for the same input")
    hooks = [(layer, hook) for layer in copied.modules() for hook in layer._forward_pre_hooks.values()]
    weights = {id(getattr(layer, hook.name)) for layer, hook in hooks if isinstance(hook, WeightNorm)}
    for key, (name, _) in with_graph(copied).items():
        if key not in before and key not in weights:
            raise Mismatch(f"its network stores its {name}")
    own, nodes = {id(parameter) for parameter in copied.parameters()}, [outputs[0].grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) not in own:
                raise Mismatch("its network uses parameters that are not its own")
            nodes.extend(following for following, _ in node.next_functions)
    return any(not torch.equal(one, other) for one, other in zip(buffers, copied.buffers(), strict=True))


@torch.no_grad()
def mixes_samples(network: nn.Module, stand_in: StandIn) -> bool:
    """Whether the output of ``network`` for a sample depends on the other samples of the batch."""
    copied = randomised(faithful_copy(network)).train()
    one, other = (_random_inputs(network, stand_in.inputs, stand_in.spatial, stand_in.context) for _ in range(2))
    outputs, state = [], RandomState(one[0].device)
    for second in (one, other):
        with state.replayed():
            outputs.append(copied(*(torch.cat(pair) for pair in zip(one, second, strict=True)))[: len(one[0])])
    return not torch.allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-5)


def _random_inputs(network: nn.Module, channels: int, spatial: tuple[int, ...], context: int) -> list[Tensor]:
    """Random inputs for ``network``: data, and a context if it has channels."""
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))
    sizes = [channels, context] if context else [channels]
    return [torch.randn(2, size, *spatial, dtype=like.dtype, device=like.device) for size in sizes]


def _takes_channels_last(network: nn.Module, x: Tensor, *others: Tensor) -> bool:
    """Whether ``network``, with parameters that are not zero, gives the same result in ``channels_last`` format."""
    for training in (False, True):
        copied = randomised(faithful_copy(network)).train(training)
        outputs = []
        for layout in (torch.contiguous_format, torch.channels_last):
            seed_generators(x.device, 0)  # dropout must drop the same
            try:
                outputs.append(copied(x.contiguous(memory_format=layout), *others))
            except Exception:  # such as from view() on a tensor that is not contiguous
                return False
        if not torch.allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-4):
            return False
    return True
