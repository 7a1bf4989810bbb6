"""One training step: forward, backward, clipping, the guard against non-finite steps, optimizer and moving average.

By default the host decides whether a step is good, and so waits for the device at every step. With ``capture`` the
device decides: then the whole step can be a CUDA graph, and the host reads the outcomes later.
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
from glow_kernels.training.distributed import Ranks, full_tensor
from glow_kernels.training.ema import MovingAverage


class Outcome(NamedTuple):
    """The outcome of a step: means over the joint batch, and the norm of the gradient before clipping."""

    loss: float
    bits_per_dim: float
    norm: float

    @property
    def is_finite(self) -> bool:
        """Whether the step was applied; otherwise weights, optimizer state and average are unchanged."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Update:
    """Takes batches and changes the weights, the optimizer's state and the average.

    Args:
        objective: a module around ``model`` that returns what
            :class:`~glow_kernels.training.objective.Objective` returns.
        model: the model whose weights are updated.
        average: the moving average of those weights.
        config: optimisation settings.
        ranks: the processes that train together.
        capture: make all decisions on the device, and record the step as a CUDA graph if possible.
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
        self._refusal = self._capture_refusal() if capture else "not asked for"
        self.decides_on_host = bool(self._refusal)
        self.optimizer = _build_optimizer(model, config, capturable=not self.decides_on_host)
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
        """Whether it has been decided if steps are replayed as a CUDA graph."""
        return bool(self._refusal) or self._step.is_settled

    def resume(self, updates: int) -> None:
        """Continue after ``updates`` good steps."""
        self._updates.fill_(updates)

    def __call__(self, x: Tensor, labels: Tensor | None, learning_rate: float, share: float) -> None:
        """One step.

        Args:
            x, labels: this rank's part of the batch.
            learning_rate: the learning rate of this step.
            share: this rank's fraction of the joint batch.
        """
        if self.decides_on_host:
            self._host_decides(x, labels, learning_rate, share)
            return
        self._learning_rate.fill_(learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate
        self._pending.append(self._step(x, *(() if labels is None else (labels,))).clone())

    def outcomes(self) -> list[Outcome]:
        """The outcomes of the steps since the last call; waits for the device."""
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
            # The fused optimizer skips its update if this is nonzero; GradScaler uses the same attribute.
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
            self.optimizer.step()
            self.average.update_unless(bad, self.model, self._updates)
            self._updates += 1.0 - bad
        return means

    def _gradients(self, x: Tensor, labels: Tensor | None, share: float) -> Tensor:
        """Compute and clip the gradients; returns this rank's contribution to the fields of an :class:`Outcome`."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, bits_per_dim = self.objective(x, labels)
        # Weights each rank by its number of images; times the number of ranks, since their gradients are averaged.
        (loss * (share * self.ranks.size)).backward()
        norm = full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip))
        return torch.stack((loss.detach() * share, bits_per_dim * share, norm / self.ranks.size))

    def _capture_refusal(self) -> str:
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
    # Decay favours simpler networks; decaying W or a log-scale would favour a particular change of volume.
    networks = [module for module in model.modules() if isinstance(module, CouplingNetwork)]
    return [convolution.weight for network in networks for convolution in (network.first, network.second, network.last)]
