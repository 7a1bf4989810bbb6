"""One step of optimisation: forward, backward, clipping, the guard against non-finite steps, optimizer and average.

The host decides whether a step is good, which makes it wait for the device at every step; or, with ``capture``, the
device does, so that the whole step can be a CUDA graph and the host reads what came of it when it wants to.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glow_kernels.graphs import CapturedStep
from glow_kernels.models import Glow
from glow_kernels.nn import CouplingNetwork
from glow_kernels.training.config import TrainingConfig
from glow_kernels.training.distributed import Ranks, whole
from glow_kernels.training.ema import MovingAverage


class Outcome(NamedTuple):
    """What came of a step: means over the joint batch, and the norm of the gradient before clipping."""

    loss: float
    bits_per_dim: float
    norm: float

    @property
    def is_finite(self) -> bool:
        """Whether the weights took the step in; otherwise nothing has changed."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Update:
    """Takes batches and changes the weights, the optimizer's state and the average.

    Args:
        objective: what is minimised, over ``model``, as :class:`~glow_kernels.training.objective.Objective` has it.
        model: whose weights are updated.
        average: of those weights.
        config: optimisation settings.
        ranks: the processes that train together.
        capture: leave all decisions to the device, and record the step as a CUDA graph where that can be.
    """

    def __init__(
        self,
        objective: nn.Module,
        model: Glow,
        average: MovingAverage[Glow],
        config: TrainingConfig,
        ranks: Ranks,
        capture: bool = False,
    ) -> None:
        self.objective, self.model, self.average, self.config, self.ranks = objective, model, average, config, ranks
        self._refusal = self._reason_against() if capture else "not asked for"
        self.waits = bool(self._refusal)
        self.optimizer = _build_optimizer(model, config, capturable=not self.waits)
        self._decayed = _convolution_weights(model)
        self._pending: list[Tensor] = []
        device = next(model.parameters()).device
        self._updates = torch.zeros((), device=device)
        self._learning_rate = torch.zeros((), device=device)
        self._step = CapturedStep(self._device_decides)

    @property
    def reason(self) -> str:
        """Why steps are not replayed as a CUDA graph; empty if they are."""
        return self._refusal or self._step.reason

    @property
    def is_settled(self) -> bool:
        """Whether it is known if steps are replayed as a CUDA graph."""
        return bool(self._refusal) or self._step.is_settled

    def resume(self, updates: int) -> None:
        """Continue after this many good steps."""
        self._updates.fill_(updates)

    def __call__(self, x: Tensor, labels: Tensor | None, learning_rate: float, share: float) -> None:
        """One step.

        Args:
            x, labels: this rank's part of the batch.
            learning_rate: of this step.
            share: the part of the joint batch that this is.
        """
        if self.waits:
            self._host_decides(x, labels, learning_rate, share)
            return
        self._learning_rate.fill_(learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate
        self._pending.append(self._step(x, *(() if labels is None else (labels,))).clone())

    def outcomes(self) -> list[Outcome]:
        """Of the steps since the last call; waits for the device."""
        rows = torch.stack(self._pending).tolist() if self._pending else []
        self._pending.clear()
        return [Outcome(*row) for row in rows]

    def _host_decides(self, x: Tensor, labels: Tensor | None, learning_rate: float, share: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        means = self.ranks.sum(self._gradients(x, labels, share))
        self._pending.append(means)
        if Outcome(*means.tolist()).is_finite:
            with torch.no_grad():
                torch._foreach_mul_(self._decayed, 1.0 - learning_rate * self.config.weight_decay)
            self.optimizer.step()
            self.average.update(self.model, int(self._updates))
            self._updates += 1

    def _device_decides(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        means = self._gradients(x, labels, 1.0)
        with torch.no_grad():
            bad = (~means.isfinite()).any().to(means.dtype)
            torch._foreach_mul_(self._decayed, 1.0 - self._learning_rate * self.config.weight_decay * (1.0 - bad))
            # The fused optimizer leaves everything as it is where this is set, as GradScaler has it.
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
            self.optimizer.step()
            self.average.update_unless(bad, self.model, self._updates)
            self._updates += 1.0 - bad
        return means

    def _gradients(self, x: Tensor, labels: Tensor | None, share: float) -> Tensor:
        """Compute and clip the gradients; returns this rank's part of what an :class:`Outcome` holds."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, bits_per_dim = self.objective(x, labels)
        # Ranks weigh as much as they have images, also where their gradients are averaged.
        (loss * (share * self.ranks.size)).backward()
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip))
        return torch.stack((loss.detach() * share, bits_per_dim * share, norm / self.ranks.size))

    def _reason_against(self) -> str:
        if self.ranks.size > 1 or self.ranks.fsdp:
            return "several processes have to agree on every step"
        if self.config.optimizer != "adam":
            return f"{self.config.optimizer} cannot leave out a step on the device: use adam"
        return ""


def _build_optimizer(model: nn.Module, config: TrainingConfig, capturable: bool) -> torch.optim.Optimizer:
    if config.optimizer == "adamax":
        return torch.optim.Adamax(model.parameters(), lr=config.learning_rate)
    return torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True, capturable=capturable)


def _convolution_weights(model: nn.Module) -> list[Tensor]:
    # Decay pulls towards a simpler network; decaying W or a log-scale would pull towards a particular volume.
    networks = [module for module in model.modules() if isinstance(module, CouplingNetwork)]
    return [convolution.weight for network in networks for convolution in (network.first, network.second, network.last)]
