"""The training loop: exact resume after any interruption, the guard against non-finite steps, and single steps.

Bit for bit means equal bytes of everything that a run keeps, except times and speeds.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

from glow_kernels.errors import CheckpointError, MissingDependencyError, TrainingError
from glow_kernels.models import Glow
from glow_kernels.training import checkpoint, evaluation, gallery, metrics
from glow_kernels.training.config import TrainingConfig
from glow_kernels.training.data import ImageData
from glow_kernels.training.ema import MovingAverage
from glow_kernels.training.evaluation import BitsPerDim
from glow_kernels.training.objective import Objective
from glow_kernels.training.run_folder import BEST, LAST, METRICS
from glow_kernels.training.trainer import MAX_NON_FINITE, PACKAGES, Trainer

# Seven steps cross the end of an epoch of four batches; the last has neither a regular validation nor a log entry.
SETTINGS: dict[str, Any] = {
    "flow_steps": 1,
    "levels": 2,
    "hidden_channels": 4,
    "iterations": 7,
    "batch_size": 4,
    "learning_rate": 0.01,
    "warmup": 3,
    "validate_every": 3,
    "log_every": 2,
}
# Every setting that changes how a step is computed occurs at least once.
KINDS: dict[str, dict[str, Any]] = {
    "adam": {},
    "adamax, conditional": {"optimizer": "adamax", "conditional": True},
    "adamax, bfloat16, decay, clipping": {
        "optimizer": "adamax",
        "precision": "bfloat16",
        "weight_decay": 0.1,
        "clip": 0.5,
    },
    "bfloat16, conditional, constant": {"precision": "bfloat16", "conditional": True, "schedule": "constant"},
}


@pytest.fixture(scope="module", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Draw nothing: that takes most of the time of a run this small, and the command line's tests check pictures."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_samples", "draw_reconstruction", "draw_curve"):
            patch.setattr(gallery, name, lambda *_, **__: 0.0)
        yield


def make_config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{**SETTINGS, **changes})


def make_data(train: int = 18) -> ImageData:
    """Images of 1x4x4 pixels and 16 levels in three classes; the brightness tells the class."""
    labels = {part: torch.arange(size) % 3 for part, size in (("train", train), ("validation", 256), ("test", 64))}
    generator = torch.Generator().manual_seed(11)
    images = {
        part: (torch.randint(0, 8, (len(classes), 1, 4, 4), generator=generator) + 4 * classes[:, None, None, None])
        for part, classes in labels.items()
    }
    return ImageData(
        "made up",
        16,
        **{part: values.to(torch.uint8) for part, values in images.items()},
        **{f"{part}_labels": classes for part, classes in labels.items()},
        num_classes=3,
    )


def make_trainer(
    folder: Path, config: TrainingConfig | None = None, data: ImageData | None = None, *, resume: bool = False
) -> Trainer:
    return Trainer(config or make_config(), data or make_data(), folder, resume=resume, show_progress=False)


def before_step(trainer: Trainer, action: Callable[[int], object]) -> None:
    """Call ``action`` with the number of each step, from 1, during that step."""
    next_batch = trainer.sampler.next

    def act_and_go_on() -> Tensor:
        action(trainer.progress.iteration + 1)
        return next_batch()

    trainer.sampler.next = act_and_go_on  # type: ignore[method-assign]


def send(number: int, at: int) -> Callable[[int], None]:
    """An action that sends this process a signal in step ``at``."""
    return lambda step: os.kill(os.getpid(), number) if step == at else None


def contents(folder: Path) -> dict[str, Any]:
    """Everything that a run keeps except times and speeds, with tensors as bytes."""
    result: dict[str, Any] = {}
    for name in (LAST, BEST):
        tensors, document = checkpoint.load(folder / name)
        document.get("progress", {}).pop("seconds", None)
        result[name] = {key: (str(value.dtype), value.numpy().tobytes()) for key, value in tensors.items()}, document
    unlike = ("time", "images_per_second")
    result[METRICS] = [
        {key: value for key, value in record.items() if key not in unlike} for record in metrics.read(folder)
    ]
    return result


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of the weights, the averaged weights and the optimizer's state."""
    optimizer, _ = checkpoint.flatten_optimizer(trainer.optimizer)
    model, average = trainer.model.state_dict(), trainer.average.model.state_dict()
    tensors = {"model": model, "average": average, "optimizer": optimizer}
    return {f"{kind}.{name}": value.clone() for kind, values in tensors.items() for name, value in values.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def steps_of(folder: Path, key: str) -> list[int]:
    return [record["step"] for record in metrics.read(folder) if key in record]


def values_of(folder: Path, key: str) -> list[float]:
    return [record[key] for record in metrics.read(folder) if key in record]


# Interruption and resume


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    config = make_config(**request.param)
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert make_trainer(folder, config).train()
    return config, contents(folder)


@pytest.mark.parametrize("stops", [(1,), (3,), (5,), (1, 2, 3, 4, 5, 6)], ids=str)
def test_stopped_and_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    uninterrupted: tuple[Any, Any], stops: tuple[int, ...], tmp_path: Path
) -> None:
    config, expected = uninterrupted
    for stop in stops:
        trainer = make_trainer(tmp_path, config, resume=stop != stops[0])
        before_step(trainer, send(signal.SIGTERM, at=stop))
        assert not trainer.train()
        assert trainer.progress.iteration == stop
    assert make_trainer(tmp_path, config, resume=True).train()
    assert contents(tmp_path) == expected


def test_a_checkpoint_written_in_the_background_is_of_when_it_was_due(
    uninterrupted: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()

    def late(*arguments: Any) -> None:
        if len(metrics.read(tmp_path)) > 1:
            assert goes_on.wait(60)
        save(*arguments)

    def fail(step: int) -> None:
        if step == 6:
            goes_on.set()
            raise ConnectionError("power cut")

    config, expected = uninterrupted
    save = checkpoint.save
    monkeypatch.setattr(Trainer, "_saves_in_background", True)
    monkeypatch.setattr(checkpoint, "save", late)
    # Writing a checkpoint waits for the previous one, which here waits for later steps.
    monkeypatch.setattr(Trainer, "_save_best", lambda self, result: None)
    trainer = make_trainer(tmp_path, config)
    before_step(trainer, fail)
    with pytest.raises(ConnectionError, match="power cut"):
        trainer.train()
    monkeypatch.undo()
    resumed = make_trainer(tmp_path, config, resume=True)
    assert resumed.progress.iteration == 3
    assert resumed.train()
    assert contents(tmp_path) == expected


def test_a_checkpoint_that_cannot_be_written_in_the_background_ends_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise CheckpointError("cannot write: no space left")

    monkeypatch.setattr(Trainer, "_saves_in_background", True)
    monkeypatch.setattr(checkpoint, "save", fail)
    trainer = make_trainer(tmp_path, make_config())
    with pytest.raises(CheckpointError, match="no space left"):
        trainer.train()
    assert trainer.progress.iteration == 3  # when the next one was due


def test_save_returns_after_the_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*arguments: Any) -> None:
        time.sleep(0.1)
        save(*arguments)

    save = checkpoint.save
    monkeypatch.setattr(Trainer, "_saves_in_background", True)
    monkeypatch.setattr(checkpoint, "save", late)
    make_trainer(tmp_path).save()
    assert (tmp_path / LAST).exists()


def test_steps_whose_outcomes_are_pending_count_in_a_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(make_config(), make_data(), tmp_path, show_progress=False, cuda_graph=True)
    before_step(trainer, send(signal.SIGTERM, at=1))
    assert not trainer.train()
    assert make_trainer(tmp_path, resume=True).progress.updates == 1


@pytest.mark.parametrize("crash", [1, 3, 6])
def test_run_that_crashed_resumes_from_its_last_checkpoint(
    uninterrupted: tuple[Any, Any], crash: int, tmp_path: Path
) -> None:
    def fail(step: int) -> None:
        if step == crash:
            raise ConnectionError("power cut")

    config, expected = uninterrupted
    trainer = make_trainer(tmp_path, config)
    before_step(trainer, fail)
    with pytest.raises(ConnectionError, match="power cut"):
        trainer.train()
    resumed = make_trainer(tmp_path, config, resume=True)
    assert resumed.progress.iteration == (crash - 1) // 3 * 3
    assert resumed.train()
    assert contents(tmp_path) == expected


def test_two_runs_with_equal_settings_are_bit_for_bit_equal_and_another_seed_is_not(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("one", "two", "other")}
    for number, (name, folder) in enumerate(folders.items()):
        torch.manual_seed(number)
        make_trainer(folder, make_config(seed=7 if name == "other" else 0)).train()
    assert contents(folders["one"]) == contents(folders["two"])
    assert values_of(folders["one"], "train_bits_per_dim") != values_of(folders["other"], "train_bits_per_dim")


@pytest.mark.parametrize("optimizer", ["adam", "adamax"])
def test_extended_run_is_bit_for_bit_the_long_one(optimizer: str, tmp_path: Path) -> None:
    long = make_config(schedule="constant", optimizer=optimizer, iterations=9, log_every=1)
    short = dataclasses.replace(long, iterations=6)
    make_trainer(tmp_path / "long", long).train()
    make_trainer(tmp_path / "short", short).train()
    make_trainer(tmp_path / "short", long, resume=True).train()
    assert contents(tmp_path / "short") == contents(tmp_path / "long")


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    make_trainer(tmp_path).train()
    before = [(tmp_path / name).read_bytes() for name in (LAST, BEST, METRICS)]
    assert make_trainer(tmp_path, resume=True).train()
    assert [(tmp_path / name).read_bytes() for name in (LAST, BEST, METRICS)] == before


def test_a_finished_run_is_not_shortened(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    resumed = make_trainer(tmp_path, make_config(iterations=3), resume=True)
    assert resumed.train()
    assert not changed(state_of(trainer), state_of(resumed))
    assert steps_of(tmp_path, "train_bits_per_dim") == [2, 4, 6, 7]


def test_records_are_where_the_settings_say(tmp_path: Path) -> None:
    make_trainer(tmp_path).train()
    assert steps_of(tmp_path, "train_bits_per_dim") == [2, 4, 6, 7]
    assert steps_of(tmp_path, "validation_bits_per_dim") == [3, 6, 7]


def test_the_bar_shows_no_validation_before_there_is_one(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    summaries: list[str] = []
    before_step(trainer, lambda _: summaries.append(trainer._summary()))
    trainer.train()
    assert "val" not in summaries[0]
    assert re.fullmatch(r"train \d+\.\d+ val \d+\.\d+ bits/dim", trainer._summary())


def test_training_time_adds_up_over_a_resume(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before_step(trainer, send(signal.SIGTERM, at=4))
    trainer.train()
    resumed = make_trainer(tmp_path, resume=True)
    assert resumed.progress.seconds == trainer.progress.seconds > 0
    resumed.train()
    assert resumed.progress.seconds > trainer.progress.seconds


def test_images_per_second_are_those_since_the_last_record_or_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = (number**2 for number in itertools.count())  # the steps take 1, 5, 9, 13, ... seconds
    monkeypatch.setattr(time, "perf_counter", times.__next__)
    trainer = make_trainer(tmp_path)
    before_step(trainer, send(signal.SIGTERM, at=3))
    trainer.train()
    make_trainer(tmp_path, resume=True).train()
    assert values_of(tmp_path, "images_per_second") == [8 / (1 + 5), 4 / 13, 8 / (17 + 21), 4 / 25]


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def _with_a_terminal() -> Iterator[None]:
    """Restore the default handling of SIGHUP if the tests run under nohup."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, handler)


@pytest.mark.usefixtures("_with_a_terminal")
@pytest.mark.parametrize("number", SIGNALS)
def test_signal_stops_after_the_step_and_saves(number: int, tmp_path: Path) -> None:
    handlers = [signal.getsignal(kind) for kind in SIGNALS]
    trainer = make_trainer(tmp_path)
    before_step(trainer, send(number, at=5))
    assert not trainer.train()
    assert [signal.getsignal(kind) for kind in SIGNALS] == handlers
    assert not changed(state_of(trainer), state_of(make_trainer(tmp_path, resume=True)))
    assert checkpoint.load(tmp_path / LAST)[1]["progress"]["iteration"] == 5


@pytest.mark.usefixtures("_with_a_terminal")
def test_nohup_lets_a_run_go_on(tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    trainer = make_trainer(tmp_path)
    before_step(trainer, send(signal.SIGHUP, at=5))
    assert trainer.train()


def test_a_reader_of_the_reports_that_leaves_costs_no_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(tqdm, "write", leave)
    with pytest.raises(BrokenPipeError):
        make_trainer(tmp_path).train()
    assert checkpoint.load(tmp_path / LAST)[1]["progress"]["iteration"] == SETTINGS["validate_every"]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named_before_training(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"training needs {package}: pip install 'glow_kernels\[train\]'"):
        make_trainer(tmp_path)


def test_signal_in_the_last_step_does_not_make_a_complete_run_incomplete(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before_step(trainer, send(signal.SIGTERM, at=7))
    assert trainer.train()


def test_second_interrupt_stops_at_once_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(tmp_path)
    before_step(trainer, send(signal.SIGINT, at=5))
    before_step(trainer, send(signal.SIGINT, at=5))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert make_trainer(tmp_path, resume=True).progress.iteration == 3


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(make_trainer(tmp_path).train()))
    thread.start()
    thread.join(timeout=60)
    assert results == [True]


@pytest.mark.parametrize("key", ["optimizer", "sampler", "progress"])
def test_checkpoint_without_a_part_of_the_state_is_refused(key: str, tmp_path: Path) -> None:
    make_trainer(tmp_path).train()
    tensors, document = checkpoint.load(tmp_path / LAST)
    del document[key]
    checkpoint.save(tmp_path / LAST, tensors, document)
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / LAST} cannot be resumed")):
        make_trainer(tmp_path, resume=True)


def test_a_run_goes_on_on_another_kind_of_device(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before_step(trainer, send(signal.SIGTERM, at=4))
    trainer.train()
    tensors, document = checkpoint.load(tmp_path / LAST)
    checkpoint.save(tmp_path / LAST, {**tensors, "noise": torch.zeros(16, dtype=torch.uint8)}, document)  # a GPU's size
    assert make_trainer(tmp_path, resume=True).train()


def test_resuming_with_another_number_of_images_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path).train()
    with pytest.raises(CheckpointError, match=r"of 18 images, not of 21; resume with the data"):
        make_trainer(tmp_path, data=make_data(train=21), resume=True)


# The guard against non-finite steps


def poison(trainer: Trainer, steps: set[int], kind: str) -> None:
    """Make the loss, or one gradient with a finite loss, non-finite in these steps."""

    def is_poisoned() -> bool:
        return trainer.progress.iteration + 1 in steps

    if kind.endswith("loss"):
        value = math.nan if kind == "nan loss" else math.inf
        bits_per_dim = trainer.model.bits_per_dim
        trainer.model.bits_per_dim = lambda x: bits_per_dim(x) * (value if is_poisoned() else 1.0)  # type: ignore
    else:
        value = math.nan if kind == "nan gradient" else math.inf
        parameter = list(trainer.model.parameters())[-1]
        parameter.register_hook(lambda gradient: torch.full_like(gradient, value) if is_poisoned() else gradient)


@pytest.mark.parametrize("optimizer", ["adam", "adamax"])
@pytest.mark.parametrize("kind", ["nan loss", "inf loss", "nan gradient", "inf gradient"])
def test_non_finite_step_changes_no_state_and_training_goes_on(kind: str, optimizer: str, tmp_path: Path) -> None:
    states: list[dict[str, Tensor]] = []
    trainer = make_trainer(tmp_path, make_config(optimizer=optimizer, log_every=1))
    poison(trainer, {4}, kind)
    before_step(trainer, lambda _: states.append(state_of(trainer)) if trainer.progress.iteration else None)
    assert trainer.train()
    # states[0] is the state before step 2, since an optimizer has no state before its first step.
    assert not changed(states[2], states[3])
    for before, after in ((1, 2), (3, 4)):
        kinds = {name.split(".")[0] for name in changed(states[before], states[after])}
        assert kinds == {"model", "average", "optimizer"}
    assert all(value.isfinite().all() for value in state_of(trainer).values())
    assert values_of(tmp_path, "skipped_steps") == [0, 0, 0, 1, 1, 1, 1]
    assert (trainer.progress.skipped, trainer.progress.updates, trainer.progress.iteration) == (1, 6, 7)
    if kind.endswith("loss"):
        assert values_of(tmp_path, "train_bits_per_dim")[3] is None


def test_run_with_a_skipped_step_resumes_bit_for_bit(tmp_path: Path) -> None:
    """The moving average counts updates, not iterations, and that count is saved too."""
    for name, stop in (("whole", None), ("parts", 5)):
        trainer = make_trainer(tmp_path / name)
        poison(trainer, {4}, "nan loss")
        if stop:
            before_step(trainer, send(signal.SIGTERM, at=stop))
            assert not trainer.train()
            trainer = make_trainer(tmp_path / name, resume=True)
        assert trainer.train()
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_many_non_finite_steps_in_a_row_end_training_with_a_good_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_config(iterations=12, validate_every=2))
    poison(trainer, set(range(4, 13)), "nan loss")
    message = (
        f"{MAX_NON_FINITE} steps in a row gave a non-finite loss or gradient, the last at iteration "
        f"{3 + MAX_NON_FINITE}; .*{re.escape(str(tmp_path / LAST))}.*--learning-rate"
    )
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    tensors, _ = checkpoint.load(tmp_path / LAST)
    assert all(value.isfinite().all() for value in tensors.values())
    resumed = make_trainer(tmp_path, make_config(iterations=12, validate_every=2), resume=True)
    assert not changed(state_of(trainer), state_of(resumed))
    assert resumed.train()


def test_a_good_step_starts_the_count_anew(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_config(iterations=2 * MAX_NON_FINITE + 1))
    poison(trainer, set(range(1, 2 * MAX_NON_FINITE)) - {MAX_NON_FINITE}, "nan loss")
    assert trainer.train()
    assert trainer.progress.skipped == 2 * (MAX_NON_FINITE - 1)


def test_a_resume_does_not_start_the_count_anew(tmp_path: Path) -> None:
    config = make_config(iterations=12)
    trainer = make_trainer(tmp_path, config)
    poison(trainer, {3, 4}, "nan loss")
    before_step(trainer, send(signal.SIGTERM, at=4))
    assert not trainer.train()
    resumed = make_trainer(tmp_path, config, resume=True)
    poison(resumed, set(range(5, 13)), "nan loss")
    with pytest.raises(TrainingError, match=f"at iteration {2 + MAX_NON_FINITE};"):
        resumed.train()


def test_non_finite_validation_is_no_best_one(tmp_path: Path) -> None:
    results = [3.0, math.nan, math.inf, 2.0, math.nan]
    trainer = make_trainer(tmp_path, make_config(iterations=5, validate_every=1))
    script_validation(trainer, results)
    assert trainer.train()
    assert (trainer.progress.best, trainer.progress.best_iteration) == (2.0, 4)


# Validation, the best checkpoint and early stopping


def script_validation(trainer: Trainer, results: list[float]) -> None:
    """Let the validations return these results in turn."""
    remaining = iter(results)
    trainer.evaluate_split = lambda split: BitsPerDim(next(remaining), 0.0, 1, 1)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("patience", "results", "stop", "best"),
    [
        (1, [5, 4, 4.5, 3, 2, 1, 0], 3, 2),
        (2, [5, 4, 4.5, 4.2, 3, 2, 1], 4, 2),
        (2, [5, 4, 4.5, 3, 3.5, 2, 2.5], 7, 6),
        (2, [5, 5, 5, 1, 1, 1, 1], 3, 1),
        (2, [math.nan, math.nan, 1, 1, 1, 1, 1], 2, 0),
        (0, [1, 2, 3, 4, 5, 6, 7], 7, 1),
    ],
)
def test_training_stops_after_so_many_validations_without_improvement(
    patience: int, results: list[float], stop: int, best: int, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, make_config(validate_every=1, patience=patience))
    script_validation(trainer, results)
    assert trainer.train()
    assert (trainer.progress.iteration, trainer.progress.best_iteration) == (stop, best)


def test_patience_is_kept_over_a_resume_and_can_be_raised(tmp_path: Path) -> None:
    def go_on(results: list[float], patience: int, resume: bool = True) -> Trainer:
        trainer = make_trainer(tmp_path, make_config(validate_every=1, patience=patience), resume=resume)
        script_validation(trainer, results)
        before_step(trainer, send(signal.SIGTERM, at=2))
        trainer.train()
        return trainer

    assert go_on([4, 5], patience=2, resume=False).progress.stale_validations == 1
    assert go_on([6], patience=2).progress.iteration == 3
    assert go_on([], patience=2).progress.iteration == 3
    assert go_on([6, 7], patience=4).progress.iteration == 5


def test_best_checkpoint_has_the_averaged_weights_of_the_best_validation(tmp_path: Path) -> None:
    averages = {}
    trainer = make_trainer(tmp_path, make_config(validate_every=1))
    results = iter([5.0, 3.0, 4.0, 2.0, 2.0, 6.0, 3.0])

    def validate(split: str) -> BitsPerDim:
        assert split == "validation"
        averages[trainer.progress.iteration] = copy.deepcopy(trainer.average.model.state_dict())
        return BitsPerDim(next(results), 0.0, 1, 1)

    trainer.evaluate_split = validate  # type: ignore[method-assign]
    trainer.train()
    tensors, document = checkpoint.load(tmp_path / BEST)
    assert (document["iteration"], document["validation_bits_per_dim"]) == (4, 2.0)
    assert not changed(tensors, {f"average.{name}": value for name, value in averages[4].items()})


def test_few_large_images_are_evaluated_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    large = dataclasses.replace(trainer.data, validation=torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    monkeypatch.setattr(trainer, "data", large)
    calls = []
    monkeypatch.setattr("glow_kernels.training.trainer.evaluate", lambda *_, draws, **__: calls.append(draws))
    trainer.evaluate_split("validation")
    assert calls == [5]


def perturb(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)


@pytest.mark.parametrize("conditional", [False, True])
def test_validation_is_deterministic_and_of_the_averaged_weights(conditional: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_config(conditional=conditional))
    trainer.train()
    torch.manual_seed(12345)
    result = trainer.evaluate_split("validation")
    trainer.progress.iteration += 1
    assert result == trainer.evaluate_split("validation")
    assert result.mean == values_of(tmp_path, "validation_bits_per_dim")[-1]
    assert result.images == 256
    perturb(trainer.model)
    assert trainer.evaluate_split("validation") == result
    perturb(trainer.average.model)
    assert trainer.evaluate_split("validation") != result
    assert trainer.evaluate_split("test").images == 64


@pytest.mark.parametrize("part", ["validation", "test"])
def test_held_out_images_change_no_weights(part: str, tmp_path: Path) -> None:
    """Neither validation nor test images do; only the fingerprint depends on the test images."""
    data = make_data()
    other = dataclasses.replace(data, **{part: 15 - getattr(data, part)})
    kept = []
    for name, images in (("data", data), ("other", other)):
        trainer = make_trainer(tmp_path / name, data=images)
        trainer.train()
        found = contents(tmp_path / name)
        assert all(found[file][1]["model"].pop("data") == images.fingerprint for file in (LAST, BEST))
        kept.append((state_of(trainer), found))
    assert not changed(kept[0][0], kept[1][0])
    assert (kept[0][1] == kept[1][1]) == (part == "test")


def test_all_training_images_are_used(tmp_path: Path) -> None:
    seen: set[int] = set()
    data = make_data()
    data.train[:] = torch.arange(18, dtype=torch.uint8)[:, None, None, None] % 16
    trainer = make_trainer(tmp_path, make_config(iterations=30, validate_every=30), data)
    dequantize = trainer.model.dequantize

    def spy(levels: Tensor, noise: torch.Generator) -> Tensor:
        assert len(levels) == 4
        seen.update(levels.flatten().tolist())
        return dequantize(levels, noise)

    trainer.model.dequantize = spy  # type: ignore[method-assign]
    trainer.train()
    assert seen == set(range(16))


@pytest.mark.parametrize("batch_size", [3, 20])
def test_large_images_are_processed_in_smaller_batches(
    batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "MAX_BATCH", 64)
    monkeypatch.setattr(evaluation, "MAX_BATCH_IMAGE_SIDE", 1)  # makes 4x4 count as large
    seen: list[int] = []
    dequantize, sample = Glow.dequantize, Glow.sample

    def counted(model: Glow, x: Tensor, *others: Any) -> Tensor:
        seen.append(len(x))
        return dequantize(model, x, *others)

    def sampled(model: Glow, n: int, *others: Any) -> Tensor:
        seen.append(n)
        return sample(model, n, *others)

    monkeypatch.setattr(Glow, "dequantize", counted)
    monkeypatch.setattr(Glow, "sample", sampled)
    make_trainer(tmp_path, make_config(batch_size=batch_size), make_data(train=40)).train()
    assert seen[0] == max(4, batch_size)  # to initialise the model
    assert set(seen) == {4, batch_size}


# One step


@pytest.mark.parametrize("warmup", [0, 1, 4, 100])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_rate_follows_warmup_and_schedule(warmup: int, schedule: str, tmp_path: Path) -> None:
    config = make_config(warmup=warmup, schedule=schedule, learning_rate=0.02, iterations=8, log_every=1)
    used: list[set[float]] = []
    trainer = make_trainer(tmp_path, config)
    trainer.optimizer.register_step_pre_hook(lambda opt, *_: used.append({group["lr"] for group in opt.param_groups}))
    trainer.train()
    rising = [min(1.0, step / warmup) if warmup else 1.0 for step in range(1, 9)]
    falling = [math.cos(math.pi * step / 16) ** 2 if schedule == "cosine" else 1.0 for step in range(8)]
    expected = [0.02 * up * down for up, down in zip(rising, falling, strict=True)]
    assert values_of(tmp_path, "learning_rate") == pytest.approx(expected, rel=1e-9)
    assert used == [{rate} for rate in values_of(tmp_path, "learning_rate")]


@pytest.mark.parametrize("clip", [1e-3, 1e6])
def test_gradients_are_scaled_down_to_the_largest_norm(clip: float, tmp_path: Path) -> None:
    norms: list[float] = []
    trainer = make_trainer(tmp_path, make_config(clip=clip, log_every=1))

    def record(*_: object) -> None:
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(math.sqrt(sum(g.double().square().sum().item() for g in gradients)))

    trainer.optimizer.register_step_pre_hook(record)
    trainer.train()
    before = values_of(tmp_path, "gradient_norm")
    assert min(before) > 1e-2
    assert norms == pytest.approx([min(norm, clip) for norm in before], rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "adamax"])
def test_weight_decay_shrinks_the_convolutions_of_couplings_alone(optimizer: str, tmp_path: Path) -> None:
    """A step with decay gives the weights of a step without, minus learning rate times decay times the old weights."""
    settings = {"optimizer": optimizer, "iterations": 1, "warmup": 2, "learning_rate": 0.2}
    states = []
    for decay in (0.0, 0.5):
        trainer = make_trainer(tmp_path / str(decay), make_config(weight_decay=decay, **settings))
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(0.1)
        before = state_of(trainer)
        trainer.train()
        states.append(state_of(trainer))
    decayed = set()
    for name, _ in trainer.model.named_parameters():
        without, with_decay = (state[f"model.{name}"] for state in states)
        if re.fullmatch(r"levels\.\d\.steps\.\d\.coupling\.network\.(first|second|last)\.weight", name):
            decayed.add(name)
            expected = 0.1 * 0.5 * before[f"model.{name}"]
            torch.testing.assert_close(without - with_decay, expected, rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(without, with_decay), name
    assert len(decayed) == 6


def test_average_of_known_weights() -> None:
    """Compare with the definition in plain floats, with decay min(decay, (1 + n) / (10 + n)) after n updates."""
    model = torch.nn.BatchNorm1d(1)
    average = MovingAverage(model, 0.5)
    expected = 1.0
    for updates, weight in enumerate([3.0, -2.0, 5.0, 0.25, 8.0, 1.0, 1.0, 2.0, -7.0, 4.0, 4.0, 0.5]):
        model.weight.data.fill_(weight)
        average.update(model, updates)
        decay = min(0.5, (1 + updates) / (10 + updates))
        expected = decay * expected + (1 - decay) * weight
        assert average.model.weight.item() == pytest.approx(expected, rel=1e-6)
    assert not average.model.training
    assert not average.model.weight.requires_grad


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_average_follows_training(decay: float, tmp_path: Path) -> None:
    """Compare after every update; a skipped step is not an update."""
    trainer = make_trainer(tmp_path, make_config(ema=decay))
    poison(trainer, {3}, "nan loss")
    weights = [[parameter.detach().double() for parameter in trainer.model.parameters()]]
    expected = weights[0]
    trainer.optimizer.register_step_post_hook(
        lambda *_: weights.append([parameter.detach().double() for parameter in trainer.model.parameters()])
    )
    trainer.train()
    for updates, latest in enumerate(weights[1:]):
        d = min(decay, (1 + updates) / (10 + updates))
        expected = [d * old + (1 - d) * new for old, new in zip(expected, latest, strict=True)]
    for value, mean in zip(trainer.average.model.parameters(), expected, strict=True):
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)


def test_classification_counts_as_much_as_its_weight(tmp_path: Path) -> None:
    """With a large weight the head learns the classes, without it does not. Bits per dimension exclude this loss."""
    right = {}
    for weight in (0.0, 10.0):
        config = make_config(conditional=True, class_weight=weight, iterations=30, validate_every=30)
        trainer = make_trainer(tmp_path / str(weight), config)
        trainer.train()
        x = trainer.model.dequantize(trainer.data.validation)
        with torch.no_grad():
            _, logits = trainer.model.log_prob_and_logits(x, trainer.data.validation_labels)
        right[weight] = (logits.argmax(1) == trainer.data.validation_labels).float().mean().item()
        assert max(values_of(tmp_path / str(weight), "train_bits_per_dim")) < 6
    assert right[0.0] < 0.4
    assert right[10.0] > 0.6


def test_classification_is_counted_in_bits() -> None:
    """The initial head cannot distinguish the three classes."""
    config, data = make_config(conditional=True, class_weight=10.0), make_data()
    model = config.build_model_for(data)
    loss, bits = Objective(model, config)(model.dequantize(data.train), data.train_labels)
    assert (loss - bits).item() == pytest.approx(10.0 * math.log2(3), rel=1e-5)
