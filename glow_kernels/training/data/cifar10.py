"""CIFAR-10 from https://www.cs.toronto.edu/~kriz/cifar.html: 60000 RGB images, 32x32, in 10 classes.

The five training batches and the test batch are read directly from the python or the binary archive, or from a folder
extracted from one. The python batches are pickles, which could run any code when loaded; here a restricted unpickler
makes only plain data of them.
"""

import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from glow_kernels.errors import DataError, one_line
from glow_kernels.training.data.image_data import ImageData, check_image_size, to_levels

_TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_BATCHES = (*_TRAIN_BATCHES, "test_batch")
_FILES = (*_BATCHES, *(f"{batch}.bin" for batch in _BATCHES))
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_IMAGE_SHAPE = (3, 32, 32)
_IMAGE_BYTES = 3072
_CLASSES = 10
# With 25, the last 2000 of the 50000 training images are for validation.
_TRAIN_IMAGES_PER_VALIDATION_IMAGE = 25
_REMEDY = "download cifar-10-python.tar.gz or cifar-10-binary.tar.gz again and use it, or a folder extracted from it"


def load(name: str, path: Path, n_bits: int, image_size: int | None) -> ImageData:
    """CIFAR-10 with labels 0 .. 9: 48000 images to train, the last 2000 training images to validate, 10000 to test.

    Args:
        name: The specification, for messages.
        path: One of the two archives, a folder extracted from one, or the parent of that folder.
        n_bits: Bits to keep of each 8-bit value, 1 .. 8.
        image_size: 32 or None.

    Raises:
        DataError: a file cannot be read, is damaged, is missing in the archive or folder, or a pickle asks
            for more than plain data.
        UsageError: ``image_size`` is not 32.
    """
    check_image_size(image_size, (32, 32), name)
    files = _read_folder(path) if path.is_dir() else _read_archive(path)
    binary = any(file.endswith(".bin") for file in files)
    parse, suffix = (_parse_binary, ".bin") if binary else (_parse_pickle, "")
    missing = [batch + suffix for batch in _BATCHES if batch + suffix not in files]
    if missing:
        raise DataError(f"{path} has no {', '.join(missing)}; {_REMEDY}")
    batches = {batch: parse(f"{path}: {batch}{suffix}", files.pop(batch + suffix)) for batch in _BATCHES}
    images = torch.cat([batches[batch][0] for batch in _TRAIN_BATCHES])
    labels = torch.cat([batches[batch][1] for batch in _TRAIN_BATCHES])
    test, test_labels = batches["test_batch"]
    validation = max(1, len(images) // _TRAIN_IMAGES_PER_VALIDATION_IMAGE)
    return ImageData(
        name=name,
        n_bins=2**n_bits,
        train=to_levels(images[:-validation], n_bits),
        validation=to_levels(images[-validation:], n_bits),
        test=to_levels(test, n_bits),
        train_labels=labels[:-validation],
        validation_labels=labels[-validation:],
        test_labels=test_labels,
        num_classes=_CLASSES,
    )


def _read_folder(path: Path) -> dict[str, bytes]:
    candidates = [folder / name for folder in (path, *(path / sub for sub in _FOLDERS)) for name in _FILES]
    try:
        return {file.name: file.read_bytes() for file in candidates if file.is_file()}
    except OSError as error:
        raise DataError(f"cannot read {path}: {one_line(error)}; check its permissions") from error


def _read_archive(path: Path) -> dict[str, bytes]:
    files = {}
    try:
        # Decompress everything first: the checksum that reveals a damaged archive is at its very end.
        content = io.BytesIO(gzip.decompress(path.read_bytes()))
        with tarfile.open(fileobj=content, mode="r:") as archive:
            for member in archive:
                file = archive.extractfile(member)
                name = PurePosixPath(member.name).name
                if file is not None and name in _FILES:
                    files[name] = file.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path} is not a readable .tar.gz archive: {one_line(error)}; {_REMEDY}") from error
    return files


def _parse_binary(where: str, content: bytes) -> tuple[Tensor, Tensor]:
    """Parse records of one byte for the class, then 3072 for the image."""
    record = 1 + _IMAGE_BYTES
    if not content or len(content) % record:
        raise DataError(f"{where} has {len(content)} bytes, not a multiple of {record}; {_REMEDY}")
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, record)
    return _images_and_labels(where, records[:, 1:], records[:, 0].tolist())


def _parse_pickle(where: str, content: bytes) -> tuple[Tensor, Tensor]:
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        images, labels = batch[b"data"].to_tensor(), list(batch[b"labels"])
    except Exception as error:  # damaged bytes are an arbitrary program to pickle, which can fail in any way
        raise DataError(f"{where} is not a CIFAR-10 batch: {one_line(error)}; {_REMEDY}") from error
    return _images_and_labels(where, images, labels)


def _images_and_labels(where: str, images: Tensor, labels: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Check one batch, with images of shape (N, 3072), and return tensors of shapes (N, 3, 32, 32) and (N,)."""
    if images.dim() != 2 or images.shape[1] != _IMAGE_BYTES or len(images) != len(labels):
        raise DataError(
            f"{where} has data of shape {list(images.shape)} and {len(labels)} labels, not [N, {_IMAGE_BYTES}] "
            f"and N; {_REMEDY}"
        )
    if not all(type(label) is int and 0 <= label < _CLASSES for label in labels):
        raise DataError(f"{where} has labels other than the integers 0 to {_CLASSES - 1}; {_REMEDY}")
    return images.reshape(-1, *_IMAGE_SHAPE), torch.tensor(labels, dtype=torch.int64)


class _PickledType:
    """Stands in for a pickled numpy.dtype. Only its code matters, as one-byte integers have no byte order."""

    def __init__(self, code: bytes, *_flags: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        pass


class _PickledArray:
    """Stands in for a pickled numpy.ndarray: keeps its contents as plain data."""

    def __init__(self, *_placeholders: object) -> None:
        pass

    def __setstate__(self, state: tuple[int, tuple[int, ...], _PickledType, bool, bytes]) -> None:
        _, self.shape, self.type, self.column_major, self.content = state

    def to_tensor(self) -> Tensor:
        if self.type.code != b"u1" or self.column_major or not self.content:
            raise ValueError("its data is not a row-major array of bytes or is empty")
        return torch.frombuffer(bytearray(self.content), dtype=torch.uint8).view(self.shape)


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledType,
}


class _Unpickler(pickle.Unpickler):
    """Makes plain data only: the three names that a pickled array needs resolve to inert stand-ins.

    NumPy's own functions are not used, since they trust a pickle's shapes and types and have moved since 2009.
    """

    def find_class(self, module_name: str, global_name: str) -> type[_PickledArray] | type[_PickledType]:
        try:
            return _STAND_INS[module_name, global_name]
        except KeyError:
            message = f"it asks for {module_name}.{global_name}, which CIFAR-10 does not need; do not trust it"
            raise pickle.UnpicklingError(message) from None
