"""Converts weights from one implementation of Glow to another: :func:`convert`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from glow_kernels.interop.state_dicts import DIALECTS
from glow_kernels.interop.weights import State, StateReader, Weights
from glow_kernels.ops._checks import check_choice


class Conversion(NamedTuple):
    """What :func:`convert` returns; ``print`` shows what was lost.

    Attributes:
        state_dict: for ``load_state_dict`` of the target, in the source's type, or float32 if that has half precision.
        inexact: what the target cannot express, so that its outputs differ; empty if they do not.
        ignored: names in the source that have no counterpart, such as buffers for bookkeeping.
    """

    state_dict: State
    inexact: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether the target computes what the source did."""
        return not self.inexact

    def __str__(self) -> str:
        lines = [f"{len(self.state_dict)} tensors, {'exact' if self.exact else 'not exact:'}"]
        lines += [f"  {line}" for line in self.inexact]
        lines += [f"ignored: {', '.join(self.ignored)}"] if self.ignored else []
        return "\n".join(lines)


def convert(state_dict: Mapping[str, Tensor], *, source: str, target: str, lu: bool | None = None) -> Conversion:
    """Rewrite the weights of one implementation of a multi-scale Glow for another.

    What a ``state_dict`` does not record is assumed to be the default of all implementations: three convolutions in a
    coupling network, ReLU, ``s = sigmoid(u + 2)``, the network reads the first half. The prefix ``module.`` of parallel
    wrappers is accepted. Values outside the triangles of LU factors are dropped; negative scales of ActNorm are folded
    into the 1x1 convolution if the target's scales are exponentials, and the scales of hidden layers into their
    convolutions if the target has none.

    Args:
        state_dict: of the source.
        source, target: ``"glow_kernels"`` (:class:`glow_kernels.models.Glow`), ``"openai"`` (the variables of the
            TensorFlow original as tensors), ``"rosinality"``, ``"chaiyujin"``, ``"y0ast"`` or ``"normflows"`` (a
            ``MultiscaleFlow`` of ``GlowBlock``, with ``GlowBase`` densities).
        lu: whether the 1x1 convolutions of the target are LU-decomposed; as in the source by default. Not for target
            ``"openai"``.

    Raises:
        TypeError: ``state_dict`` is not a mapping, but for example a model, or holds something other than tensors.
        ValueError: an unknown dialect, ``lu`` for ``"openai"``, or a state dict of something else or of a part of a
            model; the message names the first missing tensor.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    check_choice("source", source, tuple(DIALECTS))
    check_choice("target", target, tuple(DIALECTS))
    if lu and target == "openai":
        raise ValueError("lu must not be True for target='openai', whose 1x1 convolutions are matrices")
    reader, inexact = StateReader(state_dict), list[str]()
    try:
        weights = DIALECTS[source].read(reader, inexact)
    except KeyError as error:
        raise ValueError(f"state_dict must be that of a Glow of {source}: it has no {error.args[0]}") from None
    if not weights.levels:
        names = list(state_dict)[:3]
        raise ValueError(f"state_dict must be that of a Glow of {source}: it has no steps, its first names are {names}")
    _check_complete(weights, source)
    if lu is None:  # the same at all levels, even if the source's last level differs, as rosinality's does
        lu = weights.levels[0][0].mixing.factors is not None
    written = DIALECTS[target].write(weights, lu, inexact)
    contiguous = {name: tensor.detach().clone().contiguous() for name, tensor in written.items()}
    return Conversion(contiguous, tuple(inexact), tuple(reader.unread()))


def _check_complete(weights: Weights, source: str) -> None:
    if not all(weights.levels):
        level = next(level for level, steps in enumerate(weights.levels) if not steps)
        raise ValueError(f"state_dict must be that of a Glow of {source}: its level {level} has no steps")
    levels, splits = len(weights.levels), len(weights.splits)
    if splits != levels - 1:
        raise ValueError(
            f"state_dict must be that of a Glow of {source}: it has {splits} splits, {levels} levels have {levels - 1}"
        )
    channels = len(weights.levels[-1][0].bias)
    if weights.top is not None and len(weights.top.bias) != 2 * channels:
        raise ValueError(
            f"state_dict must be that of a Glow of {source}: "
            f"its last prior has {len(weights.top.bias) // 2} channels, its last level {channels}"
        )
