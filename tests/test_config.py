"""Settings of a run: they survive JSON, invalid values are refused by name, and options override presets."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from typing import Any

import pytest
import torch

from glow_kernels.errors import CheckpointError, UsageError
from glow_kernels.training.config import PRESETS, TrainingConfig
from glow_kernels.training.data import ImageData

# For each setting a value that is not its default.
OTHER = {
    "dataset": "patches",
    "n_bits": 5,
    "image_size": 16,
    "flow_steps": 3,
    "levels": 2,
    "hidden_channels": 5,
    "coupling": "additive",
    "mixing": "shuffle",
    "conditional": True,
    "class_weight": 0.5,
    "iterations": 12,
    "batch_size": 7,
    "optimizer": "adamax",
    "learning_rate": 0.1,
    "warmup": 0,
    "schedule": "constant",
    "weight_decay": 0.25,
    "clip": 1.5,
    "ema": 0.0,
    "memory": "anchor",
    "anchor_every": 3,
    "micro_batches": 2,
    "precision": "bfloat16",
    "seed": 3,
    "validate_every": 4,
    "patience": 2,
    "log_every": 1,
}


INVALID: dict[str, list[Any]] = {
    "image_size": [10**10],
    "flow_steps": [0, -1, 10**20],
    "levels": [0, 10**10],
    "hidden_channels": [0, 10**19],
    "iterations": [0, -5, 10**400],
    "batch_size": [0],
    "memory": ["less", None],
    "anchor_every": [0],
    "micro_batches": [0, -1, 2],
    "validate_every": [0],
    "log_every": [0],
    "warmup": [-1],
    "patience": [-1],
    "seed": [-1, 2**64],
    "weight_decay": [-0.1, math.nan, math.inf, 1001.0],
    "class_weight": [-0.1, math.nan, math.inf],
    "learning_rate": [0.0, -1e-3, math.nan, math.inf],
    "clip": [0.0, -1.0, math.nan],
    "ema": [-0.1, 1.0, 1.5, math.nan],
    "coupling": ["affin", "", None],
    "mixing": ["LU"],
    "optimizer": ["sgd"],
    "schedule": ["linear"],
    "precision": ["float16"],
}


def through_json(config: TrainingConfig) -> TrainingConfig:
    return TrainingConfig.from_json(json.loads(json.dumps(config.to_json())), "config.json")


@pytest.mark.parametrize("settings", [{}, OTHER], ids=["defaults", "no defaults"])
def test_settings_survive_json(settings: dict[str, Any]) -> None:
    config = TrainingConfig(**settings)
    assert through_json(config) == config
    assert config.to_json() == {**TrainingConfig().to_json(), **settings}


def test_every_setting_has_a_help_text_and_is_in_this_test() -> None:
    assert {option.name for option in fields(TrainingConfig)} == set(OTHER)
    assert all(option.metadata["help"] for option in fields(TrainingConfig))
    assert all(value != getattr(TrainingConfig(), name) for name, value in OTHER.items())


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in INVALID.items() for value in values])
def test_value_that_makes_no_sense_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^{name} must be .*got {re.escape(repr(value))}"):
        TrainingConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("warmup", 0), ("patience", 0), ("seed", 0), ("weight_decay", 0.0), ("class_weight", 0.0), ("ema", 0.0)],
)
def test_zero_is_allowed_where_it_switches_something_off(name: str, value: float) -> None:
    assert getattr(TrainingConfig(**{name: value}), name) == value


def test_given_settings_override_presets() -> None:
    preset = TrainingConfig.for_dataset("digits", flow_steps=None, levels=1)
    assert preset.flow_steps == PRESETS["digits"]["flow_steps"]
    assert preset.levels == 1
    other = TrainingConfig.for_dataset("folder:photos")
    assert other == TrainingConfig(dataset="folder:photos")


def test_false_and_zero_are_not_taken_for_not_given() -> None:
    config = TrainingConfig.for_dataset("digits", conditional=False, warmup=0, ema=0.0)
    assert (config.conditional, config.warmup, config.ema) == (False, 0, 0.0)


def test_unknown_settings_are_named_with_their_file() -> None:
    with pytest.raises(CheckpointError, match=r"^here.json has unknown settings colour, flow: "):
        TrainingConfig.from_json({"levels": 2, "flow": 1, "colour": "red"}, "here.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("levels", 0),
        ("levels", "2"),
        ("levels", None),
        ("levels", 1.5),
        ("batch_size", 2.5),
        ("seed", 0.5),
        ("n_bits", "8"),
        ("image_size", "16"),
        ("dataset", 5),
        ("conditional", "no"),
        ("learning_rate", "fast"),
        ("coupling", ["affine"]),
    ],
)
def test_damaged_setting_is_named_with_its_file(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"here.json has settings that do not make sense: .*{name}"):
        TrainingConfig.from_json({name: value}, "here.json")


def test_integers_are_accepted_as_floats() -> None:
    """Other programs may write 1.0 as 1 in JSON."""
    assert TrainingConfig.from_json({"clip": 1, "learning_rate": 1}, "here.json").clip == 1


@pytest.mark.parametrize(
    ("size", "levels", "fits"), [((8, 8), 3, True), ((8, 8), 4, False), ((6, 8), 1, True), ((5, 8), 1, False)]
)
def test_image_size_must_fit_the_levels(size: tuple[int, int], levels: int, fits: bool) -> None:
    config = TrainingConfig(flow_steps=1, levels=levels, hidden_channels=2)
    if fits:
        assert config.build_model(1, size, 4, None).image_size == size
    else:
        with pytest.raises(UsageError, match=rf"divisible by 2 \*\* levels.*levels = {levels}"):
            config.build_model(1, size, 4, None)


def test_labels_that_number_no_classes_are_refused() -> None:
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    numbered = ImageData("made up", 16, images, images, images, num_classes=2**62 + 1)
    with pytest.raises(
        UsageError, match=r"at most 65536 classes, and made up has 4611686018427387905: number them 0, 1"
    ):
        TrainingConfig(flow_steps=1, levels=1, hidden_channels=2, conditional=True).build_model_for(numbered)


@pytest.mark.parametrize(("conditional", "classes"), [(False, None), (True, 3)])
def test_model_has_classes_only_if_conditional(conditional: bool, classes: int | None) -> None:
    config = TrainingConfig(flow_steps=1, levels=1, hidden_channels=2, conditional=conditional)
    assert config.build_model(1, (4, 4), 4, 3).num_classes == classes


def test_model_is_what_the_settings_say() -> None:
    kept = {"memory": "anchor", "anchor_every": 3, "micro_batches": 2}
    config = TrainingConfig(flow_steps=3, levels=2, hidden_channels=5, coupling="additive", mixing="reverse", **kept)
    model = config.build_model(3, (8, 4), 16, None)
    assert (model.in_channels, model.image_size, model.n_bins) == (3, (8, 4), 16)
    assert [len(level.steps) for level in model.levels] == [3, 3]
    assert all(getattr(level.steps, name) == value for level in model.levels for name, value in kept.items())
    step = model.levels[0].steps[0]
    assert step.coupling.network.first.weight.shape[0] == 5
    # The additive coupling has one output per changed channel; the affine coupling has two.
    assert step.coupling.network.last.weight.shape[0] == 6
