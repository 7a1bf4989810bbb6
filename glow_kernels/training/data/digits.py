"""The handwritten digits that come with scikit-learn: 1797 images of 8x8 pixels with 17 grey levels."""

import torch

from glow_kernels.errors import UsageError
from glow_kernels.training.data.image_data import ImageData, check_image_size, require, split_indices

_LEVELS = 17
_VALIDATION, _TEST = 100, 297


def load(n_bits: int, image_size: int | None) -> ImageData:
    """The digits, with labels 0 .. 9: 1400 images to train, 100 to validate and 297 to test.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
        UsageError: ``n_bits`` is not 8, its default, or ``image_size`` is neither 8 nor None.
    """
    if n_bits != 8:
        raise UsageError(f"n_bits {n_bits} does not apply to digits, which always has 17 levels; leave it out")
    check_image_size(image_size, (8, 8), "digits")
    datasets = require("sklearn.datasets", "scikit-learn", "the data 'digits'")
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, validation, test = split_indices(len(images), _VALIDATION, _TEST)
    return ImageData(
        name="digits",
        n_bins=_LEVELS,
        train=images[train],
        validation=images[validation],
        test=images[test],
        train_labels=labels[train],
        validation_labels=labels[validation],
        test_labels=labels[test],
        num_classes=10,
    )
