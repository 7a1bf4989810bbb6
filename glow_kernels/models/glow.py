"""The multi-scale Glow (Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", 2018)."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from glow_kernels.models import likelihood
from glow_kernels.nn import FlowStep, SplitPrior, Squeeze, TopPrior
from glow_kernels.ops import ScaleMap
from glow_kernels.ops._checks import check_image, check_labels, check_tensor, check_whole, checked_temperature
from glow_kernels.reversible import ReversibleSequential
from glow_kernels.reversible.general_step import in_modes


class FlowLevel(nn.Module):
    """Squeeze, steps of flow and, except in the last level, a split (figure 2b of the paper).

    Args:
        in_channels: channels before squeezing.
        steps: number of steps K.
        split: whether half of the channels is factored out here.
        chain_options: options of :class:`~glow_kernels.ReversibleSequential`.
        step_options: options of :class:`~glow_kernels.nn.FlowStep`.
    """

    def __init__(
        self, in_channels: int, steps: int, split: bool, chain_options: dict[str, Any], **step_options: Any
    ) -> None:
        super().__init__()
        channels = 4 * in_channels
        self.squeeze = Squeeze()
        self.steps = ReversibleSequential((FlowStep(channels, **step_options) for _ in range(steps)), **chain_options)
        self.split = SplitPrior(channels) if split else None
        self.out_channels = channels // 2 if split else channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` (B, C, H, W) to the input of the next level, and this level's share (B,) of the log-likelihood."""
        z, log_likelihood = self.transform(x)
        if self.split is not None:
            z, log_prob = self.split(z)
            log_likelihood = log_likelihood + log_prob
        return z, log_likelihood

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Squeeze and steps: ``x`` (B, C, H, W) to ``z`` (B, 4 C, H/2, W/2) and ``log_det`` (B,)."""
        z, log_det = self.steps(self.squeeze(x)[0])
        return z, log_det

    def invert(self, z: Tensor) -> Tensor:
        """The inverse of :meth:`transform`."""
        x: Tensor = self.squeeze.inverse(self.steps.inverse(z)[0])[0]
        return x


class Glow(nn.Module):
    """Multi-scale Glow: ``levels`` times (squeeze, ``steps`` steps of flow, split).

    ``coupling="additive", mixing="reverse"`` makes it a NICE-style flow, ``coupling="affine", mixing="reverse"`` a
    RealNVP-style flow. The model takes images as ``x = dequantize(levels)`` in [-1/2, 1/2).

    Args:
        in_channels: image channels, 1, 3 or any other number.
        image_size: one number for both height and width, or ``(height, width)``, divisible by ``2 ** levels``.
        steps: steps of flow per level, K.
        levels: number of levels, L.
        hidden_channels: width of the coupling networks.
        coupling: ``"affine"`` or ``"additive"``.
        mixing: ``"lu"``, ``"plain"``, ``"reverse"`` or ``"shuffle"``; see :class:`~glow_kernels.nn.FlowStep`.
        scale_map: scale map of the affine coupling, see :func:`glow_kernels.affine_coupling`.
        learn_top: learn the prior of the deepest latent; otherwise it is standard normal.
        num_classes: condition this prior on classes, and add the classification head of the paper.
        n_bins: number of levels of a pixel value, 256 for 8-bit images.
        memory, anchor_every, micro_batches, check, memory_budget, offload_anchors: what the steps of a level keep for
            backward, see :class:`~glow_kernels.ReversibleSequential`; ``"store"`` keeps everything. The weights do not
            depend on these.

    Raises:
        TypeError, ValueError: sizes that are not whole numbers or do not fit together, or an unknown option.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int | Sequence[int] = 32,
        steps: int = 32,
        levels: int = 3,
        hidden_channels: int = 512,
        *,
        coupling: str = "affine",
        mixing: str = "lu",
        scale_map: str | ScaleMap = "sigmoid",
        learn_top: bool = True,
        num_classes: int | None = None,
        n_bins: int = 256,
        memory: str = "store",
        anchor_every: int = 4,
        micro_batches: int | str = 1,
        check: str = "off",
        memory_budget: float | None = None,
        offload_anchors: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"in_channels": in_channels, "steps": steps, "levels": levels}.items():
            check_whole(name, value, 1)
        check_whole("n_bins", n_bins, 2)
        self.in_channels = in_channels
        self.image_size = _height_and_width(image_size, levels)
        self.num_classes = num_classes
        self.n_bins = n_bins
        self.levels = nn.ModuleList()
        channels = in_channels
        for level in range(levels):
            flow_level = FlowLevel(
                channels,
                steps,
                split=level < levels - 1,
                chain_options={
                    "memory": memory,
                    "anchor_every": anchor_every,
                    "micro_batches": micro_batches,
                    "check": check,
                    "memory_budget": memory_budget,
                    "offload_anchors": offload_anchors,
                },
                hidden_channels=hidden_channels,
                coupling=coupling,
                mixing=mixing,
                scale_map=scale_map,
            )
            self.levels.append(flow_level)
            channels = flow_level.out_channels
        self.top_prior = TopPrior(channels, learn_top, num_classes)
        self.classifier = None
        if num_classes is not None:
            self.classifier = nn.Linear(channels, num_classes)
            nn.init.zeros_(self.classifier.weight)
            nn.init.zeros_(self.classifier.bias)

    @property
    def dimensions(self) -> int:
        """M = C H W, the number of values in an image."""
        height, width = self.image_size
        return self.in_channels * height * width

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The same as :meth:`log_prob`, so that module wrappers (such as DistributedDataParallel) work."""
        return self.log_prob(x, labels)

    def log_prob(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log-density in nats.

        The first call in training mode initialises every ActNorm from ``x``.

        Args:
            x: ``(B, in_channels, height, width)``, floating-point, as :meth:`dequantize` makes it.
            labels: ``(B,)`` int64 classes, if and only if the model has classes.

        Returns:
            ``(B,)`` float32 (float64 for float64 ``x``).

        Raises:
            TypeError, ValueError: ``x`` or ``labels`` do not fit the model.
            RuntimeError: ActNorm is not initialised, and the model is not in training mode.
        """
        z, log_likelihood = self._to_top(x, labels)
        log_prob: Tensor = log_likelihood + self.top_prior(z, labels)
        return log_prob

    def log_prob_and_logits(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-density (B,) and, from the deepest latent, the logits (B, num_classes) of the classification head.

        Raises:
            ValueError: the model has no classes. Other errors as for :meth:`log_prob`.
        """
        if self.classifier is None:
            raise ValueError("num_classes must be given to the model to classify, got None")
        z, log_likelihood = self._to_top(x, labels)
        # As in the published code: a linear map of the mean over positions, zero at the start.
        logits: Tensor = self.classifier(z.mean(dim=(2, 3)))
        return log_likelihood + self.top_prior(z, labels), logits

    def bits_per_dim(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """``(-log_prob(x) + M log n_bins) / (M log 2)``, (B,): bits per pixel value, with M = C H W.

        For ``x = dequantize(levels)`` its mean bounds the code length of the levels from above. Arguments and errors
        are those of :meth:`log_prob`.
        """
        return self.to_bits_per_dim(self.log_prob(x, labels))

    def to_bits_per_dim(self, log_prob: Tensor) -> Tensor:
        """:func:`glow_kernels.models.bits_per_dim` with the model's dimensions and number of levels."""
        return likelihood.bits_per_dim(log_prob, self.dimensions, self.n_bins)

    def encode(self, x: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """The latents of ``x``, one per level, the deepest last; standard normal under the model.

        A latent is ``(z - mean) / sd`` with the mean and standard deviation of its prior. Arguments and errors are
        those of :meth:`log_prob`.
        """
        self._check_image(x)
        latents = []
        z = x
        for level in self._levels():
            z, _ = level.transform(z)
            if level.split is not None:
                z, eps = level.split.encode(z)
                latents.append(eps)
        latents.append(self.top_prior.encode(z, self._checked_labels(labels, x)))
        return latents

    def decode(self, latents: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The inverse of :meth:`encode`.

        Args:
            latents: as :meth:`encode` returns them; the shapes are :meth:`latent_shapes`.
            labels: as for :meth:`log_prob`.

        Returns:
            ``x`` ``(B, in_channels, height, width)``.

        Raises:
            TypeError: ``latents`` is not a sequence of tensors.
            ValueError: a latent has the wrong shape, or a 1x1 convolution is singular (on a GPU the result is then
                not finite instead).
            RuntimeError: ActNorm is not initialised.
        """
        if not isinstance(latents, Sequence):
            raise TypeError(f"latents must be a sequence of tensors, got {type(latents).__name__}")
        for number, latent in enumerate(latents):
            check_tensor(f"latents[{number}]", latent)
        got = [tuple(latent.shape[1:]) for latent in latents]
        if got != self.latent_shapes():
            raise ValueError(f"latents must have the shapes (B, *) with * = {self.latent_shapes()}, got {got}")
        # Not compared by a set: under torch.export sizes may be symbols, which are not hashable.
        if any(latent.shape[0] != latents[0].shape[0] for latent in latents):
            sizes = ", ".join(str(latent.shape[0]) for latent in latents)
            raise ValueError(f"latents must have the same batch size, got {sizes}")
        *split_latents, top = latents
        z = self.top_prior.decode(top, self._checked_labels(labels, top))
        for level in reversed(self._levels()):
            if level.split is not None:
                z = level.split.decode(z, split_latents.pop())
            z = level.invert(z)
        return z

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: float | Tensor = 0.7,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Images from the model: :meth:`decode` of normal latents with standard deviation ``temperature``.

        Args:
            n: number of images.
            temperature: 1 samples the model's density; less gives likelier, less varied images (the paper uses 0.7).
            labels: ``(n,)`` int64 classes, if and only if the model has classes.
            generator: source of the noise, on the device of the model.

        Returns:
            ``(n, in_channels, height, width)``; :meth:`quantize` converts it to pixels.

        Raises:
            TypeError: ``n`` is not a whole number, or ``temperature`` not a number.
            ValueError: ``n`` is negative, or ``temperature`` has more than one element, is negative or is not finite
                (the value of a tensor on a GPU is not checked, since that would wait for the device). Other errors as
                for :meth:`decode`.
        """
        check_whole("n", n, 0)
        temperature = checked_temperature(temperature)
        parameter = next(self.parameters())
        latents = []
        for shape in self.latent_shapes():
            # Not randn: with a generator argument, even None, it accepts no symbolic sizes under torch.compile.
            noise = torch.empty((n, *shape), device=parameter.device, dtype=parameter.dtype)
            latents.append(temperature * noise.normal_(generator=generator))
        return self.decode(latents, labels)

    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes (C, H, W) of the latents without the batch, one per level, the deepest last."""
        height, width = self.image_size
        shapes = []
        for number, level in enumerate(self._levels(), start=1):
            shapes.append((level.out_channels, height >> number, width >> number))
        return shapes

    @torch.no_grad()
    def initialize(self, x: Tensor, labels: Tensor | None = None) -> None:
        """Initialise every ActNorm that has not been initialised yet from ``x`` (B, in_channels, height, width).

        The first :meth:`log_prob` in training mode does the same.
        """
        with in_modes([(module, True) for module in self.modules()]):
            self.log_prob(x, labels)

    def dequantize(self, levels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """:func:`glow_kernels.models.dequantize` with the model's number of levels."""
        return likelihood.dequantize(levels, self.n_bins, generator)

    def quantize(self, x: Tensor) -> Tensor:
        """:func:`glow_kernels.models.quantize` with the model's number of levels."""
        return likelihood.quantize(x, self.n_bins)

    def _levels(self) -> list[FlowLevel]:
        return cast("list[FlowLevel]", list(self.levels))

    def _to_top(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        self._check_image(x)
        self._checked_labels(labels, x)
        first, *others = self._levels()
        z, log_likelihood = first(x)
        for level in others:
            z, level_log_likelihood = level(z)
            log_likelihood = log_likelihood + level_log_likelihood
        return z, log_likelihood

    def _check_image(self, x: Tensor) -> None:
        if isinstance(x, Tensor) and not x.is_floating_point():
            raise TypeError(
                f"x must be a floating-point tensor, got {str(x.dtype).removeprefix('torch.')}: "
                "convert integer pixels with model.dequantize(levels)"
            )
        check_image("x", x)
        expected = (self.in_channels, *self.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"x must be (B, C, H, W) with (C, H, W) = {expected}, got {tuple(x.shape)}")

    def _checked_labels(self, labels: Tensor | None, x: Tensor) -> Tensor | None:
        if labels is not None:
            check_labels(labels, x)
        return labels


def _height_and_width(image_size: int | Sequence[int], levels: int) -> tuple[int, int]:
    if not isinstance(image_size, (numbers.Integral, Iterable)):
        raise TypeError(f"image_size must be a whole number or two, (height, width), got {image_size!r}")
    sizes = tuple(image_size) if isinstance(image_size, Iterable) else (image_size, image_size)
    for size in sizes:
        check_whole("image_size", size)
    if len(sizes) != 2 or any(size < 1 or size % 2**levels for size in sizes):
        raise ValueError(
            f"image_size must be divisible by 2 ** levels = {2**levels}, got {image_size} with levels = {levels}"
        )
    return sizes[0], sizes[1]
