"""Images saved as NumPy arrays in a ``.npy`` or ``.npz`` file; they are neither resized nor rescaled.

An array of images has an integer type, values 0 .. 255 and shape (N, H, W), (N, C, H, W) or (N, H, W, C) with 1, 3 or
4 channels; if both of the latter fit, it is taken as (N, C, H, W). A ``.npz`` file holds

- ``train``, ``validation`` and ``test``, optionally with ``train_labels``, ``validation_labels`` and ``test_labels``;
  or
- ``x``, optionally with labels ``y``, which is split 80/10/10; or
- a single array of any name, which is split 80/10/10 too;

and optionally ``n_bins``, the number of levels if it is not 256.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from glow_kernels.errors import DataError, UsageError, one_line
from glow_kernels.training.data.image_data import (
    ImageData,
    check_image_size,
    require,
    split_80_10_10,
    to_levels,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"

_PARTS = ("train", "validation", "test")
_CHANNELS = (1, 3, 4)


def load(name: str, path: Path, n_bits: int, image_size: int | None) -> ImageData:
    """The images of a ``.npy`` or ``.npz`` file, with labels if it has any.

    Args:
        name: The specification, for messages.
        path: The file.
        n_bits: Bits to keep of each 8-bit value, 1 .. 8; must be 8 if the file has ``n_bins``.
        image_size: The height and width of the images, or None.

    Raises:
        DataError: the file cannot be read or its arrays do not have the form in this module's description.
        MissingDependencyError: NumPy is not installed.
        UsageError: ``n_bits`` or ``image_size`` does not fit the file.
    """
    arrays = _read(path)
    n_bins = _n_bins(path, arrays.pop("n_bins")) if "n_bins" in arrays else None
    if n_bins is not None and n_bits != 8:
        raise UsageError(f"n_bits {n_bits} does not apply to {name}, which says n_bins {n_bins}; leave it out")
    parts = _given_parts(path, arrays) if set(_PARTS) & set(arrays) else _split_parts(path, arrays)
    train, validation, test = (parts[part] for part in _PARTS)
    check_image_size(image_size, (train.shape[2], train.shape[3]), name)
    largest = max(int(parts[part].max()) for part in _PARTS)
    if n_bins is not None and largest >= n_bins:
        raise DataError(f"{path} says n_bins {n_bins} but has the value {largest}; correct n_bins")
    labels = {part: parts.get(f"{part}_labels") for part in _PARTS}
    found = [int(values.max()) for values in labels.values() if values is not None]
    return ImageData(
        name=name,
        n_bins=2**n_bits if n_bins is None else n_bins,
        train=to_levels(train, n_bits),
        validation=to_levels(validation, n_bits),
        test=to_levels(test, n_bits),
        train_labels=labels["train"],
        validation_labels=labels["validation"],
        test_labels=labels["test"],
        num_classes=1 + max(found) if found else None,
    )


def _read(path: Path) -> dict[str, Array]:
    """The arrays of the file by name; the array of a .npy file is named ""."""
    numpy = require("numpy", "NumPy", f"reading {path}")
    try:
        # Opened here, because NumPy does not close a damaged .npz file that it has opened itself.
        with path.open("rb") as file:
            content = numpy.load(file, allow_pickle=False)
            if isinstance(content, numpy.ndarray):
                return {"": content}
            return {key: content[key] for key in content.files}
    except OSError as error:
        raise DataError(f"cannot read {path}: {one_line(error)}; name a .npy or .npz file") from error
    except Exception as error:  # damaged files fail in numpy, zipfile, zlib, tokenize, ... each in its own way
        # NumPy's message is not repeated: it may advise unpickling the file, which could run any code.
        raise DataError(
            f"{path} is not a .npy or .npz file of numbers, or it is damaged ({type(error).__name__}); save "
            "the arrays again with numpy.save or numpy.savez"
        ) from error


def _n_bins(path: Path, value: Array) -> int:
    if value.shape != () or value.dtype.kind not in "iu" or not 2 <= int(value) <= 256:
        raise DataError(f"{path}[n_bins] must be one integer from 2 to 256; correct it or leave it out")
    return int(value)


def _given_parts(path: Path, arrays: dict[str, Array]) -> dict[str, Tensor]:
    """Images and labels of the parts if the file is split; labels are named ``<part>_labels``."""
    labels = [f"{part}_labels" for part in _PARTS]
    expected = [*_PARTS, *(labels if set(labels) & set(arrays) else [])]
    missing = [key for key in expected if key not in arrays]
    if missing:
        raise DataError(
            f"{path} has {', '.join(sorted(arrays))} but no {', '.join(missing)}; add it, or save all images as "
            "x to have them split"
        )
    parts = {part: _images(f"{path}[{part}]", arrays[part]) for part in _PARTS}
    shapes = {part: list(images.shape[1:]) for part, images in parts.items()}
    if not shapes["train"] == shapes["validation"] == shapes["test"]:
        raise DataError(f"{path} has images of different [C, H, W]: {shapes}; save images of one shape")
    for part, key in zip(_PARTS, labels, strict=True):
        if key in arrays:
            parts[key] = _labels(f"{path}[{key}]", arrays[key], len(parts[part]))
    return parts


def _split_parts(path: Path, arrays: dict[str, Array]) -> dict[str, Tensor]:
    """Like :func:`_given_parts`, from one array of images, split 80/10/10."""
    if "x" not in arrays and len(arrays) != 1:
        raise DataError(
            f"{path} has the arrays {', '.join(sorted(arrays)) or '(none)'}; expected train, validation and test, "
            "or x, or one array; save it again with these names"
        )
    key = "x" if "x" in arrays else next(iter(arrays))
    images = _images(f"{path}[{key}]" if key else str(path), arrays[key])
    labels = _labels(f"{path}[y]", arrays["y"], len(images)) if key == "x" and "y" in arrays else None
    parts = {}
    for part, indices in zip(_PARTS, split_80_10_10(len(images), str(path)), strict=True):
        parts[part] = images[indices]
        if labels is not None:
            parts[f"{part}_labels"] = labels[indices]
    return parts


def _images(where: str, array: Array) -> Tensor:
    """Check images and convert them to shape (N, C, H, W) and dtype uint8."""
    _check_is_integer(where, array, "images as integers 0 .. 255, for example (x * 255).round().astype('uint8')")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in _CHANNELS and array.shape[3] in _CHANNELS:
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in _CHANNELS or array.size == 0:
        raise DataError(
            f"{where} has shape {list(array.shape)}; expected [N, H, W], [N, C, H, W] or [N, H, W, C] with 1, 3 "
            "or 4 channels and at least one image; reshape it"
        )
    smallest, largest = int(array.min()), int(array.max())
    if smallest < 0 or largest > 255:
        raise DataError(f"{where} has values from {smallest} to {largest}; scale them to 0 .. 255")
    return torch.from_numpy(array.astype("uint8", order="C", copy=False))


def _labels(where: str, array: Array, count: int) -> Tensor:
    _check_is_integer(where, array, "labels as integers 0, 1, 2, ...")
    if array.shape != (count,):
        raise DataError(f"{where} has shape {list(array.shape)}; expected [{count}], one label for each image")
    labels = torch.from_numpy(array.astype("int64"))
    if labels.min() < 0:
        raise DataError(f"{where} has the label {int(labels.min())}; number the classes 0, 1, 2, ...")
    return labels


def _check_is_integer(where: str, array: Array, remedy: str) -> None:
    if array.dtype.kind in "iu":
        return
    # NaN is the only value that differs from itself.
    with_nan = ", with NaN among them" if array.dtype.kind == "f" and (array != array).any() else ""
    raise DataError(f"{where} has {array.dtype} values{with_nan}, not integers; save {remedy}")
