"""Image data for training: :func:`load` makes :class:`ImageData` from a one-line specification.

Importing this module needs only torch; NumPy, scikit-learn and Pillow are imported when a source uses them.
"""

import os
from pathlib import Path

from glow_kernels.errors import DataError, UsageError
from glow_kernels.training.data import array, cifar10, digits, folder, patches
from glow_kernels.training.data.batches import BatchSampler
from glow_kernels.training.data.image_data import ImageData

__all__ = ["BatchSampler", "ImageData", "load"]

_BUILT_IN = {"digits": digits.load, "patches": patches.load}
_FROM_PATH = {"cifar10": cifar10.load, "folder": folder.load, "array": array.load}


def load(
    specification: str, *, n_bits: int = 8, image_size: int | None = None, show_progress: bool = False
) -> ImageData:
    """Read images and split them; the same call gives the same parts in the same order every time.

    Args:
        specification: ``digits``, ``patches``, ``cifar10:PATH`` (an archive of CIFAR-10 or a folder extracted
            from one), ``folder:PATH`` (image files) or ``array:PATH`` (a .npy or .npz file); see the module of
            each source.
        n_bits: Bits to keep of each 8-bit value, 1 .. 8; ``n_bins`` becomes ``2**n_bits``. Must be 8 for data with
            their own number of levels (``digits``, an array with ``n_bins``).
        image_size: Height and width in pixels for ``patches`` (32 if None) and ``folder`` (64 if None). For
            the other sources, which do not resize, it must be the size of the images.
        show_progress: Show a progress bar while a folder is read, if standard error is a terminal.

    Raises:
        DataError: the data is missing, damaged or not of the form expected.
        MissingDependencyError: a package that the source needs is not installed.
        UsageError: the specification or an option is invalid.
    """
    if not 1 <= n_bits <= 8:
        raise UsageError(f"n_bits must be from 1 to 8, not {n_bits}")
    if image_size is not None and image_size < 1:
        raise UsageError(f"image_size must be at least 1, not {image_size}")
    if specification in _BUILT_IN:
        return _BUILT_IN[specification](n_bits, image_size)
    source, path = parsed(specification)
    if source not in _FROM_PATH or path is None:
        forms = [*_BUILT_IN, *(f"{name}:PATH" for name in _FROM_PATH)]
        raise UsageError(f"unknown data '{specification}'; use one of {', '.join(forms)}")
    if not os.path.exists(path):
        raise DataError(
            f"{path} (from '{specification}') does not exist or cannot be reached; check the path, or name another "
            "with --dataset"
        )
    if source == "folder":
        return folder.load(specification, path, n_bits, image_size, show_progress)
    return _FROM_PATH[source](specification, path, n_bits, image_size)


def parsed(specification: str) -> tuple[str, Path | None]:
    """The source that ``specification`` names, and the path of its data, if it names one."""
    source, _, location = specification.partition(":")
    # The shell expands ~ only at the beginning of an argument, not after "folder:".
    return source, Path(os.path.expanduser(location)) if location else None
