"""Random crops of the two colour photographs, 427x640 pixels, that come with scikit-learn."""

from typing import Any

import torch
from torch import Tensor

from glow_kernels.errors import UsageError
from glow_kernels.training.data.image_data import SPLIT_SEED, ImageData, require, to_levels

_DEFAULT_SIZE = 32
# Each part is cropped from its own band of columns of both photographs: first column, end.
_TRAIN_BAND, _VALIDATION_BAND, _TEST_BAND = (0, 448), (448, 544), (544, 640)
_LARGEST_SIZE = 96
_TRAIN_CROPS, _VALIDATION_CROPS, _TEST_CROPS = 8192, 512, 1024


def load(n_bits: int, image_size: int | None) -> ImageData:
    """8192 RGB crops to train, 512 to validate and 1024 to test, each part from its own band of columns.

    The crops are ``image_size`` (32 if None) pixels high and wide, and the same at every call.

    Raises:
        MissingDependencyError: scikit-learn or Pillow is not installed.
        UsageError: ``image_size`` is larger than the bands for validation and test, 96.
    """
    size = _DEFAULT_SIZE if image_size is None else image_size
    if size > _LARGEST_SIZE:
        raise UsageError(f"image_size {size} is too large for patches; use at most {_LARGEST_SIZE}")
    require("PIL.Image", "Pillow", "the data 'patches'")
    datasets = require("sklearn.datasets", "scikit-learn", "the data 'patches'")
    numpy = require("numpy", "NumPy", "the data 'patches'")
    photographs = torch.from_numpy(numpy.stack(datasets.load_sample_images().images)).permute(0, 3, 1, 2)
    photographs = to_levels(photographs, n_bits)
    random = numpy.random.default_rng(SPLIT_SEED)
    return ImageData(
        name="patches",
        n_bins=2**n_bits,
        train=_crops(photographs, _TRAIN_BAND, size, _TRAIN_CROPS, random),
        validation=_crops(photographs, _VALIDATION_BAND, size, _VALIDATION_CROPS, random),
        test=_crops(photographs, _TEST_BAND, size, _TEST_CROPS, random),
        source=b"photographs of scikit-learn",
    )


def _crops(photographs: Tensor, band: tuple[int, int], size: int, count: int, random: Any) -> Tensor:
    """Crop at random positions: (photographs, C, height, width) to (count, C, size, size)."""
    which = random.integers(len(photographs), size=count).tolist()
    tops = random.integers(photographs.shape[2] - size + 1, size=count).tolist()
    lefts = random.integers(band[0], band[1] - size + 1, size=count).tolist()
    crops = [
        photographs[index, :, top : top + size, left : left + size]
        for index, top, left in zip(which, tops, lefts, strict=True)
    ]
    return torch.stack(crops)
