"""The settings of a training run: model, data and optimisation, as plain values that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from glow_kernels.errors import CheckpointError, UsageError
from glow_kernels.models import Glow
from glow_kernels.reversible import POLICIES
from glow_kernels.training.data import ImageData


def _option(default: Any, description: str, *, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": description, "choices": choices})


@dataclass
class TrainingConfig:
    """Everything that determines a run; two runs with equal values on one CPU give equal weights, bit for bit.

    Raises:
        UsageError: a value has the wrong type or is out of range; the message names it.
    """

    dataset: str = _option("digits", "digits, patches, cifar10:PATH, folder:PATH or array:PATH")
    n_bits: int = _option(8, "bits kept of every pixel value, 1 to 8")
    image_size: int | None = _option(None, "height and width of patches (default: 32) or images (default: 64)")
    flow_steps: int = _option(32, "steps of flow per level")
    levels: int = _option(3, "levels of the multi-scale architecture")
    hidden_channels: int = _option(512, "width of the coupling networks")
    coupling: str = _option("affine", "coupling layer", choices=("affine", "additive"))
    mixing: str = _option("lu", "how channels are mixed", choices=("lu", "plain", "reverse", "shuffle"))
    conditional: bool = _option(False, "condition on the classes of the data, and learn to classify")
    class_weight: float = _option(0.01, "weight of the classification loss beside bits per dimension")
    iterations: int = _option(100_000, "optimisation steps")
    batch_size: int = _option(64, "images per step")
    optimizer: str = _option("adam", "optimiser", choices=("adam", "adamax"))
    learning_rate: float = _option(1e-3, "learning rate after the warm-up")
    warmup: int = _option(100, "steps over which the learning rate rises from zero")
    schedule: str = _option("cosine", "what the learning rate does after the warm-up", choices=("constant", "cosine"))
    weight_decay: float = _option(0.0, "decoupled weight decay of the coupling networks")
    clip: float = _option(100.0, "largest norm of the gradient; larger ones are scaled down")
    ema: float = _option(0.999, "decay of the moving average of the weights, which is what is evaluated")
    memory: str = _option("store", "what is kept for backward, see docs/memory.md", choices=POLICIES)
    anchor_every: int = _option(4, "steps of flow from one state that --memory anchor keeps to the next")
    micro_batches: int = _option(1, "parts of the batch in which a step of flow is computed, unless --memory store")
    precision: str = _option("float32", "precision of the coupling networks", choices=("float32", "bfloat16"))
    seed: int = _option(0, "seed of the weights, the noise and the order of the data")
    validate_every: int = _option(100, "steps between validations")
    patience: int = _option(0, "validations without improvement before stopping early; 0 never stops early")
    log_every: int = _option(10, "steps between records of the metrics")

    def __post_init__(self) -> None:
        for option in fields(self):
            kind, description = KINDS[str(option.type)]
            value = getattr(self, option.name)
            # In Python a bool is also an int.
            right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            _require(right or (value is None and "None" in str(option.type)), option.name, description, value)
            choices = option.metadata["choices"]
            if choices is not None:
                _require(value in choices, option.name, "one of " + ", ".join(choices), value)
        for name in (
            "flow_steps",
            "levels",
            "hidden_channels",
            "iterations",
            "batch_size",
            "anchor_every",
            "micro_batches",
            "validate_every",
            "log_every",
        ):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for option in fields(self):
            value, limit = getattr(self, option.name), LARGEST.get(option.name, LARGEST_SEED)
            if isinstance(value, int):
                _require(value <= limit, option.name, f"at most {limit}", value)
        _require(
            self.memory != "store" or self.micro_batches == 1,
            "micro_batches",
            "1 with memory store",
            self.micro_batches,
        )
        for name in ("warmup", "weight_decay", "patience", "class_weight", "seed"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("learning_rate", "clip"):
            _require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("learning_rate", "weight_decay", "class_weight"):
            _require(math.isfinite(getattr(self, name)), name, "finite", getattr(self, name))
        # With more, the decay alone would flip the signs of the weights at every step and could make them diverge.
        most = 1.0 / self.learning_rate
        _require(self.weight_decay <= most, "weight_decay", f"at most 1 / learning_rate = {most:g}", self.weight_decay)
        _require(0 <= self.ema < 1, "ema", "in [0, 1)", self.ema)

    @classmethod
    def for_dataset(cls, dataset: str, **options: Any) -> TrainingConfig:
        """A configuration with defaults that suit the data; ``options`` that are not None override them."""
        chosen = {name: value for name, value in options.items() if value is not None}
        return cls(dataset=dataset, **{**PRESETS.get(dataset, {}), **chosen})

    @classmethod
    def from_json(cls, document: Mapping[str, Any], source: str) -> TrainingConfig:
        """The configuration that :meth:`to_json` wrote; ``source`` names it in errors."""
        known = {option.name for option in fields(cls)}
        unknown = sorted(set(document) - known)
        if unknown:
            raise CheckpointError(f"{source} has unknown settings {', '.join(unknown)}: it is from another version")
        try:
            return cls(**document)
        except (TypeError, UsageError) as error:
            raise CheckpointError(f"{source} has settings that do not make sense: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def learning_rate_at(self, iteration: int) -> float:
        """The learning rate of the step that follows ``iteration`` earlier ones."""
        warm = min(1.0, (iteration + 1) / max(1, self.warmup))
        if self.schedule == "constant":
            return self.learning_rate * warm
        return self.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * iteration / self.iterations))

    def build_model(self, channels: int, image_size: tuple[int, int], n_bins: int, num_classes: int | None) -> Glow:
        """The model for images of this shape, with freshly drawn weights.

        Raises:
            UsageError: the sizes do not fit together; the message names the option.
        """
        try:
            return Glow(
                channels,
                image_size,
                self.flow_steps,
                self.levels,
                self.hidden_channels,
                coupling=self.coupling,
                mixing=self.mixing,
                num_classes=num_classes if self.conditional else None,
                n_bins=n_bins,
                memory=self.memory,
                anchor_every=self.anchor_every,
                micro_batches=self.micro_batches,
            )
        except ValueError as error:
            raise UsageError(f"the data do not fit the model: {error}") from error

    def build_model_for(self, data: ImageData) -> Glow:
        """The model for these data.

        Raises:
            UsageError: the sizes do not fit together, or ``conditional`` is set and the data have no or too many
                classes.
        """
        if self.conditional and data.num_classes is None:
            raise UsageError(f"conditional needs data with classes, and {data.name} has none")
        if self.conditional and data.num_classes is not None and data.num_classes > MOST_CLASSES:
            raise UsageError(
                f"conditional takes at most {MOST_CLASSES} classes, and {data.name} has {data.num_classes}: number "
                "them 0, 1, 2, ..."
            )
        return self.build_model(data.channels, data.image_size, data.n_bins, data.num_classes)


# The largest seed that random generators accept.
LARGEST_SEED = 2**63 - 1
# Larger models are never trainable: building them takes hours or their sizes overflow.
LARGEST = {"flow_steps": 10_000, "levels": 32, "hidden_channels": 2**20, "image_size": 2**16}
MOST_CLASSES = 2**16

# Types of the settings, and their names in messages.
KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "int | None": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "a string"),
}

# Small data and small images need small models; everything else gets the size in the Glow paper.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"flow_steps": 8, "levels": 2, "hidden_channels": 64, "iterations": 1200, "weight_decay": 4.0},
    "patches": {"flow_steps": 8, "levels": 3, "hidden_channels": 64, "iterations": 2000, "batch_size": 32},
}


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise UsageError(f"{name} must be {expected}, got {got!r}")
