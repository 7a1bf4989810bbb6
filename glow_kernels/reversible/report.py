"""How exactly the steps of a model can be inverted, on data of the user's choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glow_kernels.backends.numerics import wide_dtype
from glow_kernels.nn.conv1x1 import ChannelMixing
from glow_kernels.ops._checks import check_module, check_number
from glow_kernels.reversible import guards
from glow_kernels.reversible.chain import ReversibleSequential


@dataclass(frozen=True)
class Reconstruction:
    """Relative L2 errors of inversion, each the largest over the samples; infinite where something is not finite.

    Attributes:
        error: error of inverting a whole chain, the largest over the chains; ``memory="invert"`` has this error.
        steps: error of inverting each step alone, by the step's name in the model.
        ill_conditioned: condition numbers of the 1x1 convolutions that are above the limit, by name.
    """

    error: float
    steps: dict[str, float]
    ill_conditioned: dict[str, float]

    def __str__(self) -> str:
        worst = max(self.steps, key=lambda name: self.steps[name])
        text = f"inverted chains are {self.error:.1e} off, the worst step, {worst}, {self.steps[worst]:.1e} by itself"
        named = ", ".join(f"{name} ({number:.0e})" for name, number in self.ill_conditioned.items())
        return f"{text}; ill-conditioned: {named}" if named else text


@torch.no_grad()
def reconstruction_error(model: nn.Module, *inputs: Any, condition_limit: float | None = 1e4) -> Reconstruction:
    """Invert every :class:`~glow_kernels.ReversibleSequential` in ``model``, and every step of it, on real data.

    Args:
        model: a chain, or a model that has some, such as :class:`~glow_kernels.models.Glow`, with any ``memory``.
        inputs: the arguments that ``model`` is called with; the states that arise in it are the test data.
        condition_limit: report 1x1 convolutions whose condition number, by which they may amplify rounding errors, is
            above this; None skips them.

    Raises:
        TypeError: ``model`` is not a module, or ``condition_limit`` not a number.
        ValueError: ``model`` has no chain, or a 1x1 convolution is singular.
    """
    check_module("model", model)
    if condition_limit is not None:
        check_number("condition_limit", condition_limit)
    chains = {name: module for name, module in model.named_modules() if isinstance(module, ReversibleSequential)}
    if not chains:
        raise ValueError("model must have a ReversibleSequential, got one without")
    calls: list[tuple[str, tuple[Any, ...]]] = []
    handles = [
        chain.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, args)))
        for name, chain in chains.items()
    ]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    errors = [0.0]
    steps: dict[str, float] = {}
    for name, (x, *context) in calls:
        z = x
        for index, step in enumerate(chains[name]):
            before, (z, _) = z, step(z, *context)
            back, _ = step.inverse(z, *context)  # type: ignore[operator]
            steps[f"{name}.{index}".lstrip(".")] = guards.drift(before, back).item()
        errors.append(guards.drift(x, chains[name].inverse(z, *context)[0]).item())
    mixings = {name: module for name, module in model.named_modules() if isinstance(module, ChannelMixing)}
    ill = {}
    if condition_limit is not None:
        conditions = {name: _condition(module) for name, module in mixings.items()}
        ill = {name: number for name, number in conditions.items() if not number <= condition_limit}
    return Reconstruction(max(errors), steps, ill)


def _condition(mixing: ChannelMixing) -> float:
    weight: Tensor = mixing.matrix()[0]
    return float(torch.linalg.cond(weight.to(wide_dtype(weight.device))))
