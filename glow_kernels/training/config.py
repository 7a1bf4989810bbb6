"""What a training run is made of: the model, the data and the optimisation, as plain values that JSON can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glow_kernels.errors import CheckpointError, UsageError
from glow_kernels.models import Glow
from glow_kernels.training.data import ImageData


@dataclass
class TrainingConfig:
    """Everything that decides a run; two runs with equal values on one CPU give equal weights, bit for bit.

    Attributes:
        dataset: as :func:`glow_kernels.training.data.load` takes it.
        n_bits: bits kept of every pixel value, 1 to 8.
        image_size: size to crop or resize to, or None for the data's own.
        flow_steps, levels, hidden_channels, coupling, mixing: of :class:`glow_kernels.models.Glow`.
        conditional: condition the top prior on the classes of the data, and train the classification head.
        class_weight: weight of the classification loss, in bits per dimension per bit of cross-entropy.
        iterations: number of optimisation steps.
        batch_size: images per step.
        optimizer: ``"adam"`` or ``"adamax"``.
        learning_rate: after the warm-up.
        warmup: steps over which the learning rate rises linearly from zero.
        schedule: ``"constant"``, or ``"cosine"`` to fall to zero at the last step.
        weight_decay: decoupled, of the convolutions' weights in the coupling networks.
        clip: largest norm of the gradient; larger ones are scaled down.
        ema: decay of the moving average of the weights, which is what is evaluated and sampled.
        precision: ``"float32"``, or ``"bfloat16"`` to run the coupling networks under autocast.
        seed: of weights, noise and order of the data.
        validate_every: steps between validations.
        patience: validations without improvement before training stops; 0 never stops early.
        log_every: steps between entries of the metrics.
    """

    dataset: str = "digits"
    n_bits: int = 8
    image_size: int | None = None
    flow_steps: int = 32
    levels: int = 3
    hidden_channels: int = 512
    coupling: str = "affine"
    mixing: str = "lu"
    conditional: bool = False
    class_weight: float = 0.01
    iterations: int = 100_000
    batch_size: int = 64
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    warmup: int = 100
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 100.0
    ema: float = 0.999
    precision: str = "float32"
    seed: int = 0
    validate_every: int = 100
    patience: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in (
            "flow_steps",
            "levels",
            "hidden_channels",
            "iterations",
            "batch_size",
            "validate_every",
            "log_every",
        ):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("warmup", "weight_decay", "patience", "class_weight", "seed"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("learning_rate", "clip"):
            _require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        _require(0 <= self.ema < 1, "ema", "in [0, 1)", self.ema)
        for name, choices in CHOICES.items():
            _require(getattr(self, name) in choices, name, "one of " + ", ".join(choices), getattr(self, name))

    @classmethod
    def for_dataset(cls, dataset: str, **options: Any) -> TrainingConfig:
        """A configuration with defaults that suit the data; ``options`` that are not None win."""
        chosen = {name: value for name, value in options.items() if value is not None}
        return cls(dataset=dataset, **{**PRESETS.get(dataset, {}), **chosen})

    @classmethod
    def from_json(cls, document: Mapping[str, Any], source: str) -> TrainingConfig:
        """The configuration that :meth:`to_json` wrote; ``source`` names it in errors."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(document) - known)
        if unknown:
            raise CheckpointError(f"{source} has unknown settings {', '.join(unknown)}: it is from another version")
        try:
            return cls(**document)
        except (TypeError, UsageError) as error:
            raise CheckpointError(f"{source} has settings that do not make sense: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

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
            )
        except ValueError as error:
            raise UsageError(f"the data do not fit the model: {error}") from error

    def build_model_for(self, data: ImageData) -> Glow:
        """The model for these data.

        Raises:
            UsageError: the sizes do not fit together, or ``conditional`` without classes in the data.
        """
        if self.conditional and data.num_classes is None:
            raise UsageError(f"conditional needs data with classes, and {data.name} has none")
        return self.build_model(data.channels, data.image_size, data.n_bins, data.num_classes)


CHOICES = {
    "coupling": ("affine", "additive"),
    "mixing": ("lu", "plain", "reverse", "shuffle"),
    "optimizer": ("adam", "adamax"),
    "schedule": ("constant", "cosine"),
    "precision": ("float32", "bfloat16"),
}

# Small data and small images want small models; everything else gets the paper's size.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"flow_steps": 8, "levels": 2, "hidden_channels": 64, "iterations": 1500},
    "patches": {"flow_steps": 8, "levels": 3, "hidden_channels": 64, "iterations": 2000, "batch_size": 32},
}


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise UsageError(f"{name} must be {expected}, got {got!r}")
