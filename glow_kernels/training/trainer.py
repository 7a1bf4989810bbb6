"""The training loop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow_kernels.errors import CheckpointError, MissingDependencyError, TrainingError
from glow_kernels.nn import CouplingNetwork
from glow_kernels.training import checkpoint, gallery, metrics, run_folder
from glow_kernels.training.config import TrainingConfig
from glow_kernels.training.data import BatchSampler, ImageData
from glow_kernels.training.ema import MovingAverage
from glow_kernels.training.evaluation import BitsPerDim, evaluate
from glow_kernels.training.interruption import Interruption

MAX_NON_FINITE = 5
REMEDY = "Try a lower --learning-rate, a longer --warmup or a smaller --clip"
INITIALIZATION_BATCH = 256
VALIDATION_SEED = 1


@dataclass
class Progress:
    """What changes while a run goes on, besides tensors; saved with every checkpoint."""

    iteration: int = 0
    updates: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float = math.inf
    best_iteration: int = 0
    stale_validations: int = 0
    seconds: float = 0.0
    validation: float = math.inf


class Trainer:
    """Trains a Glow and keeps a run folder: checkpoints, metrics and pictures.

    Args:
        config: what to train and how.
        data: what to train on.
        folder: the run folder, prepared by :func:`glow_kernels.training.run_folder.prepare`.
        device: where to train.
        resume: go on from the last checkpoint in ``folder``; on one CPU the losses are bit for bit those of a run that
            was never interrupted.
        show_progress: a progress bar, where standard error is a terminal.

    Raises:
        UsageError: the data do not fit the model.
        CheckpointError: ``resume`` without a usable checkpoint.
    """

    def __init__(
        self,
        config: TrainingConfig,
        data: ImageData,
        folder: Path,
        *,
        device: str | torch.device = "cpu",
        resume: bool = False,
        show_progress: bool = True,
    ) -> None:
        self.config = config
        self.data = data
        self.folder = folder
        self.device = torch.device(device)
        self.show_progress = show_progress
        self.progress = Progress()
        self._train_bits = math.nan
        torch.manual_seed(config.seed)
        self.model = config.build_model_for(data).to(self.device)
        self.optimizer = _build_optimizer(self.model, config)
        self.decayed = _convolution_weights(self.model)
        self.sampler = BatchSampler(len(data.train), config.batch_size, config.seed)
        self.noise = torch.Generator(self.device).manual_seed(config.seed)
        if not resume:
            self._initialize()
        self.average = MovingAverage(self.model, config.ema)
        if resume:
            self._restore()

    def train(self) -> bool:
        """Train until the last iteration, an early stop, SIGINT or SIGTERM.

        Returns:
            Whether training is complete; False after a signal, when everything is saved for ``resume``.

        Raises:
            TrainingError: too many non-finite steps in a row.
            CheckpointError: something cannot be written; earlier checkpoints are intact.
        """
        self.model.train()
        with Interruption() as interruption, metrics.MetricsWriter(self.folder) as writer, self._bar() as bar:
            writer.truncate(self.progress.iteration)
            self._save()
            while self.progress.iteration < self.config.iterations and not self._should_stop():
                if interruption.requested:
                    self._save()
                    return False
                self._step(writer)
                bar.set_postfix_str(self._summary(), refresh=False)
                bar.update()
                if self._is_due(self.config.validate_every):
                    bar.write(self._validate(writer))
                    self._save()
        return True

    def _step(self, writer: metrics.MetricsWriter) -> None:
        config, progress = self.config, self.progress
        started = time.perf_counter()
        learning_rate = _learning_rate(config, progress.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        x, labels = self._batch(self.sampler.next())
        self.optimizer.zero_grad(set_to_none=True)
        loss, train_bits = self._loss(x, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        progress.iteration += 1
        if math.isfinite(loss.item()) and math.isfinite(norm.item()):
            with torch.no_grad():
                torch._foreach_mul_(self.decayed, 1.0 - learning_rate * config.weight_decay)
            self.optimizer.step()
            self.average.update(self.model, progress.updates)
            progress.updates += 1
            progress.skipped_in_a_row = 0
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        self._train_bits = train_bits.item()
        if self._is_due(config.log_every):
            writer.write(
                progress.iteration,
                train_bits_per_dim=self._train_bits,
                gradient_norm=norm.item(),
                learning_rate=learning_rate,
                images_per_second=len(x) / seconds,
                skipped_steps=progress.skipped,
            )
        if progress.skipped_in_a_row >= MAX_NON_FINITE:
            raise TrainingError(self._divergence_report())

    def _loss(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")
        with autocast:
            if labels is None:
                bits = self.model.bits_per_dim(x).mean()
                return bits, bits.detach()
            log_prob, logits = self.model.log_prob_and_logits(x, labels)
        bits = self.model.to_bits_per_dim(log_prob).mean()
        cross_entropy_bits = F.cross_entropy(logits.float(), labels) / math.log(2.0)
        return bits + self.config.class_weight * cross_entropy_bits, bits.detach()

    def _batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.model.dequantize(self.data.train[indices].to(self.device), self.noise)
        labels = self.data.train_labels
        if not self.config.conditional or labels is None:
            return x, None
        return x, labels[indices].to(self.device)

    def _initialize(self) -> None:
        # Statistics of more images than one batch has make a better start.
        x, labels = self._batch(torch.arange(min(INITIALIZATION_BATCH, len(self.data.train))))
        self.model.initialize(x, labels)

    def _validate(self, writer: metrics.MetricsWriter) -> str:
        progress = self.progress
        result = self.evaluate_split("validation")
        progress.validation = result.mean
        writer.write(progress.iteration, validation_bits_per_dim=result.mean)
        if result.mean < progress.best:
            progress.best, progress.best_iteration, progress.stale_validations = result.mean, progress.iteration, 0
            self._save_best(result)
        else:
            progress.stale_validations += 1
        try:
            self._draw()
        except ValueError as error:
            raise TrainingError(self._nonsense_report(str(error))) from error
        return f"iteration {progress.iteration}: validation {result} bits/dim (best {progress.best:.4f})"

    def evaluate_split(self, split: str) -> BitsPerDim:
        """Bits per dimension of ``"validation"`` or ``"test"`` under the averaged weights."""
        levels = getattr(self.data, split)
        labels = getattr(self.data, f"{split}_labels") if self.config.conditional else None
        # Small splits get several draws of the noise, so that it does not drown the differences between models.
        draws = max(1, 1024 // len(levels))
        return evaluate(self.average.model, levels, labels, draws=draws, seed=VALIDATION_SEED)

    def _draw(self) -> None:
        model, data = self.average.model, self.data
        labels = data.validation_labels if self.config.conditional else None
        gallery.draw_samples(model, self.folder / "samples.png")
        gallery.draw_reconstruction(model, data.validation, labels, self.folder / "reconstruction.png")
        gallery.draw_curve(self.folder, self.folder / "curve.png")

    def _is_due(self, every: int) -> bool:
        return self.progress.iteration % every == 0 or self.progress.iteration == self.config.iterations

    def _should_stop(self) -> bool:
        return 0 < self.config.patience <= self.progress.stale_validations

    def _summary(self) -> str:
        return f"train {self._train_bits:.3f} val {self.progress.validation:.3f} bits/dim"

    def _divergence_report(self) -> str:
        return (
            f"{MAX_NON_FINITE} steps in a row gave a non-finite loss or gradient, the last at iteration "
            f"{self.progress.iteration}; the weights were not touched by them, and the last good checkpoint is "
            f"{self.folder / run_folder.LAST}. {REMEDY}"
        )

    def _nonsense_report(self, why: str) -> str:
        return (
            f"the weights make no sense any more at iteration {self.progress.iteration}: {why}; the last good "
            f"checkpoint is {self.folder / run_folder.LAST}. {REMEDY}"
        )

    def _save(self) -> None:
        optimizer_tensors, optimizer_document = checkpoint.flatten_optimizer(self.optimizer)
        sampler = self.sampler.state_dict()
        tensors = {
            **_prefixed("model.", self.model.state_dict()),
            **_prefixed("average.", self.average.model.state_dict()),
            **_prefixed("optimizer.", optimizer_tensors),
            **_prefixed("sampler.", {name: value for name, value in sampler.items() if isinstance(value, Tensor)}),
            "noise": self.noise.get_state(),
        }
        document: dict[str, Any] = {
            "model": run_folder.describe_model(self.config, self.data),
            "optimizer": optimizer_document,
            "sampler": {name: value for name, value in sampler.items() if not isinstance(value, Tensor)},
            "progress": _finite(vars(self.progress)),
        }
        checkpoint.save(self.folder / run_folder.LAST, tensors, document)

    def _save_best(self, result: BitsPerDim) -> None:
        document: dict[str, Any] = {
            "model": run_folder.describe_model(self.config, self.data),
            "iteration": self.progress.iteration,
            "validation_bits_per_dim": result.mean,
        }
        tensors = _prefixed("average.", self.average.model.state_dict())
        checkpoint.save(self.folder / run_folder.BEST, tensors, document)

    def _restore(self) -> None:
        path = self.folder / run_folder.LAST
        tensors, document = checkpoint.load(path)
        checkpoint.load_weights(self.model, run_folder.take(tensors, "model."), path)
        checkpoint.load_weights(self.average.model, run_folder.take(tensors, "average."), path)
        try:
            checkpoint.restore_optimizer(self.optimizer, run_folder.take(tensors, "optimizer."), document["optimizer"])
            sampler: Any = document["sampler"]
            self.sampler.load_state_dict({**sampler, **run_folder.take(tensors, "sampler.")})
            self.noise.set_state(tensors["noise"])
            progress: Any = document["progress"]
            finite_or_inf: dict[str, Any] = {
                name: math.inf if value is None else value for name, value in progress.items()
            }
            self.progress = Progress(**finite_or_inf)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be resumed: {error!r}; it is from another version or data") from error

    def _bar(self) -> Any:
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise MissingDependencyError("training needs tqdm: pip install 'glow_kernels[train]'") from error
        return tqdm(
            total=self.config.iterations,
            initial=self.progress.iteration,
            unit="img",
            unit_scale=len(self.data.train[: self.config.batch_size]),
            desc="training",
            # None shows the bar where standard error is a terminal.
            disable=None if self.show_progress else True,
            dynamic_ncols=True,
        )


def _build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamax":
        return torch.optim.Adamax(model.parameters(), lr=config.learning_rate)
    return torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)


def _convolution_weights(model: nn.Module) -> list[Tensor]:
    # Decay pulls towards a simpler network; decaying W or a log-scale would pull towards a particular volume.
    networks = [module for module in model.modules() if isinstance(module, CouplingNetwork)]
    return [convolution.weight for network in networks for convolution in (network.first, network.second, network.last)]


def _learning_rate(config: TrainingConfig, iteration: int) -> float:
    warm = min(1.0, (iteration + 1) / max(1, config.warmup))
    if config.schedule == "constant":
        return config.learning_rate * warm
    return config.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * iteration / config.iterations))


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    # JSON has no infinity; only values that start infinite or unknown can be non-finite here.
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
