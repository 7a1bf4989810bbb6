"""What every data source returns, and what the sources share: quantisation, splits and checks."""

import importlib
import zlib
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from glow_kernels.errors import DataError, MissingDependencyError, UsageError

# Never change it: with another seed, a resumed or new run would train on images that an old run held out.
SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images as integer levels, split into disjoint parts.

    Attributes:
        name: The specification that the data was made from, for example ``digits`` or ``folder:/x``.
        n_bins: Number of intensity levels; pixel values are 0 .. ``n_bins - 1``.
        train: Images to learn from, uint8 of shape (N, C, H, W); the other parts differ in N only.
        validation: Images for early stopping and the choice of the best checkpoint.
        test: Images held out: never trained on, never used to choose anything.
        train_labels: Classes 0 .. ``num_classes - 1`` of ``train``, int64 of shape (N,), or None.
        validation_labels: Classes of ``validation``, likewise.
        test_labels: Classes of ``test``, likewise.
        num_classes: Number of classes; None, like all labels, if the data has none.
        source: Bytes that identify the images if other machines may decode them slightly differently; empty if their
            pixel values identify them.
    """

    name: str
    n_bins: int
    train: Tensor
    validation: Tensor
    test: Tensor
    train_labels: Tensor | None = None
    validation_labels: Tensor | None = None
    test_labels: Tensor | None = None
    num_classes: int | None = None
    source: bytes = b""

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return self.train.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return self.train.shape[2], self.train.shape[3]

    @cached_property
    def fingerprint(self) -> dict[str, int]:
        """Numbers that identify the data: the image count of each part, and a checksum of all images.

        If the data has labels, their checksum is in ``labels``.
        """
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        checksum = zlib.crc32(self.source)
        if not self.source:
            for images in parts.values():
                checksum = zlib.crc32(images.contiguous().numpy().data, checksum)
        numbers = {**{name: len(images) for name, images in parts.items()}, "crc32": checksum}
        labels = [
            values for values in (self.train_labels, self.validation_labels, self.test_labels) if values is not None
        ]
        if labels:
            numbers["labels"] = zlib.crc32(torch.cat(labels).numpy().data)
        return numbers


def require(module: str, package: str, purpose: str) -> ModuleType:
    """Import a module of an optional package.

    Raises:
        MissingDependencyError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(f"{purpose} needs {package}: pip install 'glow_kernels[train]'") from error


def to_levels(images: Tensor, n_bits: int) -> Tensor:
    """Keep the ``n_bits`` most significant bits of 8-bit images (uint8, any shape)."""
    return images >> (8 - n_bits)


def check_image_size(image_size: int | None, actual: tuple[int, int], name: str) -> None:
    """Check a requested image size against data that are not resized.

    Raises:
        UsageError: ``image_size`` is given and differs from the height or width in ``actual``.
    """
    if image_size is not None and actual != (image_size, image_size):
        raise UsageError(
            f"image_size {image_size} does not fit {name}: its images are {actual[0]}x{actual[1]} and are not "
            "resized; leave image_size out"
        )


def split_indices(count: int, validation: int, test: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, int64, of the train, validation and test parts of ``count`` images; the same at every call.

    Raises:
        MissingDependencyError: NumPy is not installed.
    """
    # NumPy, not torch: a split must survive upgrades, and torch does not promise stable random numbers.
    numpy = require("numpy", "NumPy", "splitting data")
    order = torch.from_numpy(numpy.random.default_rng(SPLIT_SEED).permutation(count))
    return order[test + validation :], order[test : test + validation], order[:test]


def split_80_10_10(count: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Like :func:`split_indices`, with a tenth of the images, but at least one, each for validation and test.

    Raises:
        DataError: there are fewer than 3 images.
        MissingDependencyError: NumPy is not installed.
    """
    if count < 3:
        raise DataError(
            f"{name} has {count} image(s) and at least 3 are needed, one each to train, validate and test; add images"
        )
    tenth = max(1, count // 10)
    return split_indices(count, validation=tenth, test=tenth)
