"""The dialect of NVIDIA/waveglow: a 1x1 convolution of sequences, whose log-determinant covers the whole batch.

WaveGlow's couplings are not layers: they are written out in the model's ``forward``, which returns unreduced
log-scales, so the whole model is recognised. Its ``infer`` is not patched: the original allocates CUDA tensors by name,
so without a GPU there is nothing to compare with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glow_kernels.backends.reference.affine_coupling import split
from glow_kernels.interop.copies import faithful_copy
from glow_kernels.interop.examiner import Examiner
from glow_kernels.interop.memory import run_alone
from glow_kernels.interop.patch import Call, Mismatch, Patch, has_hooks, options_of, original_class
from glow_kernels.interop.probe import Coupling
from glow_kernels.interop.stand_ins import StandIn
from glow_kernels.ops import ScaleMap, actnorm_conv1x1, actnorm_conv1x1_inverse

# Length of the sequences to run layers on.
LENGTH = 8


@dataclass(frozen=True)
class Inverse:
    """Options of a 1x1 convolution.

    Attributes:
        has_graph: whether the weight gets a gradient in reverse; NVIDIA's does not.
    """

    has_graph: bool

    def describe(self) -> str:
        """For the report."""
        return ""


class Invertible1x1Conv(Patch):
    """``W x`` with W the weight (C, C, 1) of a convolution without bias."""

    dialect, kind = "waveglow", "Invertible1x1Conv"
    better = (
        "the inverse of the 1x1 convolution follows its weight, instead of the one at the first inverse call",
        "log|det W| is finite for a negative determinant too",
    )
    mutable_attributes = ("W_inverse",)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        convolution = getattr(module, "conv", None)
        only = set(dict(module.named_children())) == {"conv"} and not list(module.parameters(recurse=False))
        if not only or not isinstance(convolution, nn.Conv1d) or convolution.bias is not None:
            return False
        size, *kernel = convolution.weight.shape
        return kernel == [size, 1]

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Inverse:
        copied = faithful_copy(module).requires_grad_()
        z = torch.zeros_like(copied.conv.weight)  # (C, C, 1), a batch of sequences
        return Inverse(_fresh_inverse(copied, z).requires_grad)

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        shape = (2, module.conv.in_channels, LENGTH)
        return [
            Call("forward", lambda module, z: module(z), (shape,)),
            Call("reverse", _fresh_inverse, (shape,)),
        ]

    @classmethod
    def inner(cls, module: Any) -> list[nn.Module]:
        return [module.conv]

    def forward(self: Any, z: Tensor, reverse: bool = False) -> Any:
        """``z`` and ``log_det`` () of all samples; in reverse ``z`` alone."""
        if has_hooks(self.conv):
            return original_class(self).forward(self, z, reverse)
        weight = self.conv.weight[:, :, 0]
        zeros = weight.new_zeros(weight.shape[0])
        if reverse:
            weight = weight if options_of(self).has_graph else weight.detach()
            return actnorm_conv1x1_inverse(z, zeros, zeros, weight)[0]
        z, log_det = actnorm_conv1x1(z, zeros, zeros, weight)
        return z, log_det.sum()


class WN(Patch):
    """The network of a coupling, called with a pair: half of the channels, and the conditions (B, n, T)."""

    dialect, kind = "waveglow", "WN"
    has_network = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        lists = ("in_layers", "res_skip_layers")
        single = ("start", "end")
        return (
            (hasattr(module, "cond_layer") or hasattr(module, "cond_layers"))  # RAD-TTS's takes other arguments
            and all(isinstance(getattr(module, name, None), nn.ModuleList) for name in lists)
            and all(isinstance(getattr(module, name, None), nn.Conv1d) for name in single)
        )

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> None:
        if examiner.memory is None:
            raise Mismatch("only another memory than 'store' changes it")

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        conditions = getattr(module, "cond_layer", None)
        if conditions is None:
            conditions = module.cond_layers[0]
        shapes = tuple((2, layer.in_channels, LENGTH) for layer in (module.start, conditions))
        return [Call("forward", lambda module, x, condition: module((x, condition)), shapes)]

    def forward(self: Any, forward_input: Any) -> Any:
        """(B, outputs, T)."""
        plain = original_class(self).forward

        def function(x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
            output = plain(self, (x, condition))
            return output, output.new_zeros(len(output))

        return run_alone(self, function, *forward_input)[0]


class WaveGlow(Patch):
    """The model: groups of audio samples (B, T) become channels, some output early; all steps share one formula."""

    dialect, kind = "waveglow", "WaveGlow"
    note = "infer keeps its own couplings: where it asks for memory on a GPU by name, no copy can show it is the same"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return {"WN", "convinv"} <= set(dict(module.named_children())) and hasattr(module, "n_early_every")

    @classmethod
    def examine(cls, module: Any, examiner: Examiner) -> Coupling:
        if not isinstance(getattr(module, "upsample", None), nn.ConvTranspose1d):
            raise Mismatch("its spectrogram is not upsampled by a transposed convolution")
        examiner.require(*((convolution, Invertible1x1Conv) for convolution in module.convinv))
        for network in module.WN:
            outputs = network.end.out_channels
            examiner.stand_ins[network] = _PairStandIn(network.start.in_channels, outputs, (LENGTH,))

        def run(copied: Any, x: Tensor) -> Tensor:
            copied.n_flows = 1
            audio = x.transpose(1, 2).flatten(1)
            copied.upsample = nn.Upsample(audio.shape[1])  # its input is zero, and a kernel of 1024 samples is slow
            y: Tensor = copied((x.new_zeros(len(x), *_spectrogram(module)), audio))[0]
            return y

        channels, first = module.n_group, {module.convinv[0]: True}
        found = examiner.find_coupling(
            module, module.WN[0], run, channels=channels, spatial=(LENGTH,), skipped=first
        ).require_halves()
        if found.scale_map != ScaleMap("exp") or found.inverted:
            raise Mismatch("its log-scales are not what its networks return")
        return found

    @classmethod
    def calls(cls, module: Any, options: Any) -> list[Call]:
        shapes = ((2, *_spectrogram(module)), (2, module.n_group * LENGTH))
        return [Call("forward", lambda module, spectrogram, audio: module((spectrogram, audio)), shapes)]

    def forward(self: Any, forward_input: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """``z`` (B, n_group, T / n_group), ``log_s`` (B, C / 2, T / n_group) and ``log_det`` () of every step."""
        spectrogram, audio = forward_input
        condition = self.upsample(spectrogram)
        if condition.shape[2] < audio.shape[1]:  # the original raises its own error
            result: tuple[Tensor, list[Tensor], list[Tensor]] = original_class(self).forward(self, forward_input)
            return result
        condition = condition[:, :, : audio.shape[1]].unfold(2, self.n_group, self.n_group)
        condition = condition.transpose(2, 3).flatten(1, 2)
        z = audio.unfold(1, self.n_group, self.n_group).transpose(1, 2)
        early, log_scales, log_dets = [], [], []
        for number in range(self.n_flows):
            if number and number % self.n_early_every == 0:
                early.append(z[:, : self.n_early_size])
                z = z[:, self.n_early_size :]
            z, log_det = self.convinv[number](z)
            coupling = _of_size(options_of(self), z.shape[1])
            read, transformed = coupling.split(z)
            h = self.WN[number]((read, condition))
            z = coupling.join(read, coupling.forward(transformed, h)[0])
            log_scales.append(split(h, coupling.layout)[0])
            log_dets.append(log_det)
        return torch.cat([*early, z], 1), log_scales, log_dets


class _PairStandIn(StandIn):
    """Replaces a :class:`WN`."""

    def forward(self, forward_input: Any) -> Tensor:
        """(B, inputs, T) and conditions (B, n, T) to (B, outputs, T)."""
        x, condition = forward_input
        h = super().forward(x)
        if self.answer is not None:
            return h
        weights = torch.linspace(-1.0, 1.0, condition.shape[1], dtype=condition.dtype, device=condition.device)
        return h + torch.tanh(torch.einsum("c,bct->bt", weights, condition)).unsqueeze(1)


def _spectrogram(module: Any) -> tuple[int, int]:
    """Channels and frames of a spectrogram for :data:`LENGTH` groups of samples."""
    (kernel,), (stride,) = module.upsample.kernel_size, module.upsample.stride
    missing = max(0, module.n_group * LENGTH - kernel)
    return module.upsample.in_channels, 1 - (-missing // stride)


def _of_size(coupling: Coupling, channels: int) -> Coupling:
    """The same coupling for another number of channels."""
    halves: Sequence[tuple[int, ...]] = tuple(range(channels // 2)), tuple(range(channels // 2, channels))
    read, transformed = halves if coupling.reads_first else reversed(halves)
    return dataclasses.replace(coupling, read=read, transformed=transformed)


def _fresh_inverse(module: Any, z: Tensor) -> Tensor:
    # The layer caches the inverse, although the weight may have changed since.
    module.__dict__.pop("W_inverse", None)
    x: Tensor = module(z, reverse=True)
    return torch.as_tensor(x)


PATCHES = (Invertible1x1Conv, WN, WaveGlow)
