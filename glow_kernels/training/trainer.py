"""The training loop."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glow_kernels.errors import CheckpointError, MissingDependencyError, TrainingError
from glow_kernels.training import checkpoint, gallery, metrics, run_folder
from glow_kernels.training.config import TrainingConfig
from glow_kernels.training.data import BatchSampler, ImageData
from glow_kernels.training.distributed import SINGLE_PROCESS, Ranks, full_tensor, sharded_like, streamed_to_device
from glow_kernels.training.ema import MovingAverage
from glow_kernels.training.evaluation import (
    MAX_BATCH,
    BitsPerDim,
    batch_size_for,
    check_reconstruction,
    draws_for,
    evaluate,
)
from glow_kernels.training.interruption import Interruption
from glow_kernels.training.objective import Objective
from glow_kernels.training.update import Outcome, Update

MAX_NON_FINITE = 5
REMEDY = "Try a lower --learning-rate, a longer --warmup or a smaller --clip"
VALIDATION_SEED = 1
# Checked up front: a run would miss them only once it is under way.
PACKAGES = ("matplotlib", "PIL", "tensorboard", "tqdm")


@dataclass
class Progress:
    """The state of a run besides its tensors; saved with every checkpoint."""

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
        folder: the run folder, made by :func:`glow_kernels.training.run_folder.prepare`.
        device: where to train.
        resume: go on from the last checkpoint in ``folder``; on one CPU the losses are bit for bit those of a run that
            was never interrupted.
        show_progress: show a progress bar if standard error is a terminal.
        ranks: the processes that train together, all of which call the same methods. Only the writer needs ``folder``,
            except that on ``resume`` all of them read it.
        cuda_graph: make every decision of a step on the device and replay the step as a CUDA graph; if that is
            impossible, the reason is printed and training goes on without a graph.

    Raises:
        UsageError: the data do not fit the model, or a batch is too small for the ranks.
        CheckpointError: ``resume`` without a usable checkpoint.
        DataError: ``resume`` with data that differ from the run's.
        MissingDependencyError: a package that training needs is not installed.
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
        ranks: Ranks = SINGLE_PROCESS,
        cuda_graph: bool = False,
    ) -> None:
        self.config = config
        self.data = data
        self.folder = folder
        self.device = torch.device(device)
        self.show_progress = show_progress
        self.ranks = ranks
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingDependencyError(f"training needs {', '.join(missing)}: pip install 'glow_kernels[train]'")
        ranks.check_batch(min(len(data.train), config.batch_size))
        self.progress = Progress()
        self._outcome = Outcome(math.nan, math.nan, math.nan)
        self._saver = checkpoint.Saver()
        self._is_saved = False
        torch.manual_seed(config.seed)
        # A model that will be sharded may not fit on one device, so it is built on the host.
        self.model = config.build_model_for(data).to("cpu" if ranks.fsdp else self.device)
        if _prefers_channels_last(config, self.device) and not ranks.fsdp:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.sampler = BatchSampler(len(data.train), config.batch_size, config.seed)
        self.noise = torch.Generator(self.device).manual_seed(config.seed)
        path = folder / run_folder.LAST
        tensors, document = checkpoint.load(path) if resume else ({}, {})
        if resume:
            checkpoint.load_weights(self.model, run_folder.strip_prefix(tensors, "model."), path)
        else:
            self._initialize()
        self.average = MovingAverage(self.model, config.ema)
        if resume:
            checkpoint.load_weights(self.average.model, run_folder.strip_prefix(tensors, "average."), path)
        objective = ranks.wrap(Objective(self.model, config), self.device)
        ranks.shard(self.average.model, self.device)
        self.update = Update(objective, self.model, self.average, config, ranks, cuda_graph)
        self.optimizer = self.update.optimizer
        if resume:
            self._restore(path, tensors, document)
            run_folder.check_data(document, data, "resume with the data that the run began with")
        self._logged = self.progress.iteration, self.progress.seconds
        self._graph_reported = not cuda_graph

    def train(self) -> bool:
        """Train until the last iteration, an early stop, SIGINT, SIGTERM or SIGHUP.

        Returns:
            Whether training is complete; False after a signal, when everything is saved for ``resume``.

        Raises:
            TrainingError: too many non-finite steps in a row.
            CheckpointError: a file cannot be written; earlier checkpoints are intact.
        """
        try:
            return self._train()
        finally:
            self._saver.finish()

    def save(self) -> None:
        """Write a checkpoint from which the run can resume.

        Raises:
            CheckpointError: it cannot be written; an earlier one is intact.
        """
        self._save()
        self._saver.finish()

    def _train(self) -> bool:
        self.model.train()
        with Interruption() as interruption, self._writer() as writer, self._bar() as bar:
            if writer is not None:
                writer.truncate(self.progress.iteration)
            if not self._is_saved:
                self._save()
            while self.progress.iteration < self.config.iterations and not self._should_stop():
                if self.ranks.any(interruption.requested):
                    self._save()
                    return False
                self._step(writer)
                self._report_graph(bar)
                bar.set_postfix_str(self._summary(), refresh=False)
                bar.update()
                if self._is_due(self.config.validate_every):
                    report = self._validate(writer)
                    # Save first: writing the report fails if its reader has closed the pipe.
                    self._save()
                    if writer is not None:
                        bar.write(report)
        return True

    def _step(self, writer: metrics.MetricsWriter | None) -> None:
        progress = self.progress
        started = time.perf_counter()
        indices = self.sampler.next()
        x, labels = self._batch(indices)
        learning_rate = self.config.learning_rate_at(progress.iteration)
        self.update(x, labels, learning_rate, len(x) / len(indices))
        progress.iteration += 1
        is_logged = self._is_due(self.config.log_every)
        if self.update.decides_on_host or is_logged or self._is_due(self.config.validate_every):
            self._record_outcomes(self.update.outcomes())
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        if writer is not None and is_logged:
            iteration, earlier = self._logged
            images = (progress.iteration - iteration) * len(indices)
            self._logged = progress.iteration, progress.seconds
            writer.write(
                progress.iteration,
                train_bits_per_dim=self._outcome.bits_per_dim,
                gradient_norm=self._outcome.norm,
                learning_rate=learning_rate,
                images_per_second=images / (progress.seconds - earlier),
                skipped_steps=progress.skipped,
            )

    def _report_graph(self, bar: Any) -> None:
        if self._graph_reported or not self.update.is_settled:
            return
        self._graph_reported = True
        if self.update.reason and self.ranks.is_writer:
            bar.write(f"training without a CUDA graph: {self.update.reason}")

    def _record_outcomes(self, outcomes: list[Outcome]) -> None:
        """Update the counters with the outcomes of the latest steps.

        Raises:
            TrainingError: too many steps in a row were not finite.
        """
        progress = self.progress
        for number, outcome in enumerate(outcomes, start=progress.iteration - len(outcomes) + 1):
            self._outcome = outcome
            if outcome.is_finite:
                progress.updates += 1
                progress.skipped_in_a_row = 0
                continue
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            if progress.skipped_in_a_row >= MAX_NON_FINITE:
                raise TrainingError(self._divergence_report(number))

    def _batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """This rank's share of a joint batch. Every rank draws the noise of the whole batch, as one process would."""
        mine = self.ranks.share(len(indices))
        x = self.model.dequantize(self.data.train[indices].to(self.device), self.noise)[mine]
        labels = self.data.train_labels
        if not self.config.conditional or labels is None:
            return x, None
        return x, labels[indices][mine].to(self.device)

    def _initialize(self) -> None:
        self.ranks.broadcast_weights(self.model)
        # More images than one batch give better initial statistics, but of large images no more than a batch may fit.
        count = max(batch_size_for(self.data.image_size), min(MAX_BATCH, self.config.batch_size))
        x, labels = self._batch(torch.arange(min(count, len(self.data.train))))
        with streamed_to_device(self.model, self.device) if self.ranks.fsdp else nullcontext():
            self.model.initialize(x, labels)

    def _validate(self, writer: metrics.MetricsWriter | None) -> str:
        progress = self.progress
        result = self.evaluate_split("validation")
        progress.validation = result.mean
        error, warning = check_reconstruction(
            self.average.model, self.data.validation, self._labels("validation"), self.ranks
        )
        if writer is not None:
            writer.write(progress.iteration, validation_bits_per_dim=result.mean, reconstruction_error=error)
        if result.mean < progress.best:
            progress.best, progress.best_iteration, progress.stale_validations = result.mean, progress.iteration, 0
            self._save_best(result)
        else:
            progress.stale_validations += 1
        try:
            self._draw()
        except ValueError as error:
            raise TrainingError(self._unusable_weights_report(str(error))) from error
        return f"iteration {progress.iteration}: validation {result} bits/dim (best {progress.best:.4f}){warning}"

    def evaluate_split(self, split: str) -> BitsPerDim:
        """Bits per dimension of ``"validation"`` or ``"test"`` under the averaged weights."""
        levels = getattr(self.data, split)
        draws = draws_for(levels, 1024)
        return evaluate(
            self.average.model,
            levels,
            self._labels(split),
            draws=draws,
            seed=VALIDATION_SEED,
            ranks=self.ranks,
            show_progress=self.show_progress,
        )

    def _labels(self, split: str) -> Tensor | None:
        return getattr(self.data, f"{split}_labels") if self.config.conditional else None

    def _draw(self) -> None:
        model, data = self.average.model, self.data
        labels = self._labels("validation")
        # With sharded weights every rank must take part in the computation, though only one writes the pictures.
        folder = self.folder if self.ranks.is_writer else None
        gallery.draw_samples(model, folder and folder / "samples.png")
        gallery.draw_reconstruction(model, data.validation, labels, folder and folder / "reconstruction.png")
        if folder is not None:
            gallery.draw_curve(folder, folder / "curve.png")

    def _is_due(self, every: int) -> bool:
        return self.progress.iteration % every == 0 or self.progress.iteration == self.config.iterations

    def _should_stop(self) -> bool:
        return 0 < self.config.patience <= self.progress.stale_validations

    def _summary(self) -> str:
        validation = self.progress.validation
        val = f" val {validation:.3f}" if math.isfinite(validation) else ""  # none yet
        return f"train {self._outcome.bits_per_dim:.3f}{val} bits/dim"

    def _divergence_report(self, iteration: int) -> str:
        return (
            f"{MAX_NON_FINITE} steps in a row gave a non-finite loss or gradient, the last at iteration "
            f"{iteration}; they did not change the weights, and the last good checkpoint is "
            f"{self.folder / run_folder.LAST}. {REMEDY}"
        )

    def _unusable_weights_report(self, why: str) -> str:
        return (
            f"the weights are unusable at iteration {self.progress.iteration}: {why}; the last good "
            f"checkpoint is {self.folder / run_folder.LAST}. {REMEDY}"
        )

    def _save(self) -> None:
        self._record_outcomes(self.update.outcomes())
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
        self._write(run_folder.LAST, tensors, document)
        self._is_saved = True

    def _save_best(self, result: BitsPerDim) -> None:
        document: dict[str, Any] = {
            "model": run_folder.describe_model(self.config, self.data),
            "iteration": self.progress.iteration,
            "validation_bits_per_dim": result.mean,
        }
        tensors = _prefixed("average.", self.average.model.state_dict())
        self._write(run_folder.BEST, tensors, document)

    def _write(self, name: str, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
        gathered = {}
        for key, tensor in tensors.items():
            value = full_tensor(tensor)
            if self.ranks.is_writer:
                # Moved to the host one by one: together, the gathered tensors may not fit on one device.
                gathered[key] = value.to("cpu", copy=self._saves_in_background)
        if self.ranks.is_writer:
            save = self._saver.start if self._saves_in_background else checkpoint.save
            save(self.folder / name, gathered, document)

    @property
    def _saves_in_background(self) -> bool:
        """Whether training goes on while a checkpoint is written: on a GPU the host is free to write it."""
        return self.device.type != "cpu"

    def _restore(self, path: Path, tensors: dict[str, Tensor], document: Mapping[str, Any]) -> None:
        try:
            state = sharded_like(self.optimizer, run_folder.strip_prefix(tensors, "optimizer."))
            checkpoint.restore_optimizer(self.optimizer, state, document["optimizer"])
            sampler = document["sampler"]
            self.sampler.load_state_dict({**sampler, **run_folder.strip_prefix(tensors, "sampler.")})
            noise = tensors["noise"]
            # CPU and GPU generators have states of different sizes; after a change of device the noise starts afresh.
            if noise.shape == self.noise.get_state().shape:
                self.noise.set_state(noise)
            progress = document["progress"]
            finite_or_inf: dict[str, Any] = {
                name: math.inf if value is None else value for name, value in progress.items()
            }
            self.progress = Progress(**finite_or_inf)
            self.update.resume(self.progress.updates)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be resumed: {error!r}; it is from another version or data") from error

    def _writer(self) -> AbstractContextManager[metrics.MetricsWriter | None]:
        return metrics.MetricsWriter(self.folder) if self.ranks.is_writer else nullcontext()

    def _bar(self) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=self.config.iterations,
            initial=self.progress.iteration,
            unit="img",
            unit_scale=len(self.data.train[: self.config.batch_size]),
            desc="training",
            # None shows the bar only if standard error is a terminal.
            disable=None if self.show_progress and self.ranks.is_writer else True,
            dynamic_ncols=True,
        )


def _prefers_channels_last(config: TrainingConfig, device: torch.device) -> bool:
    # On a CPU it makes the networks up to 1.7 times faster; on a GPU, bfloat16 needs it to use the tensor cores.
    return device.type == "cpu" or config.precision == "bfloat16"


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    # JSON has no infinity and no NaN: both become null, which is read back as infinity.
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
