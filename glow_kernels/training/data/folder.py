"""A folder of image files of any size and format that Pillow reads, converted to square RGB images of one size."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from glow_kernels.errors import DataError, one_line
from glow_kernels.progress import with_progress
from glow_kernels.training.data.image_data import ImageData, require, split_80_10_10, to_levels

_DEFAULT_SIZE = 64
_ADD_IMAGES = "add images, for example .png or .jpg files"


def load(name: str, path: Path, n_bits: int, image_size: int | None, show_progress: bool = False) -> ImageData:
    """The images below a folder, without labels, split 80/10/10 with at least one image in each part.

    An image is rotated upright (EXIF), converted to RGB (without transparency; only the first frame of an animation),
    resized so that its shorter side is ``image_size``, and cropped around its centre. The split depends only on the
    number of images and the order of their names.

    Args:
        name: The specification, for messages.
        path: The folder; sub-folders are searched too. Names that begin with a dot are skipped.
        n_bits: Bits to keep of each 8-bit value, 1 .. 8.
        image_size: Height and width in pixels; 64 if None.
        show_progress: Show a progress bar while the images are read, if standard error is a terminal.

    Raises:
        DataError: the folder cannot be read or has fewer than 3 images, or an image cannot be read.
        MissingDependencyError: Pillow or NumPy is not installed.
    """
    pillow = require("PIL.Image", "Pillow", f"the data '{name}'")
    size = _DEFAULT_SIZE if image_size is None else image_size
    files = _image_files(path, pillow)
    if not files:
        raise DataError(f"{path} has no image files, not even in sub-folders; {_ADD_IMAGES}")
    train, validation, test = split_80_10_10(len(files), str(path))
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes
        read = pool.map(functools.partial(_read, size=size, pillow=pillow), files)
        for index, image in enumerate(
            with_progress(read, "reading", "images", total=len(files), is_shown=show_progress)
        ):
            images[index] = image
    images = to_levels(images, n_bits)
    names = [f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n" for file in files]
    return ImageData(
        name=name,
        n_bins=2**n_bits,
        train=images[train],
        validation=images[validation],
        test=images[test],
        source="".join(names).encode(errors="surrogateescape"),
    )


def _image_files(path: Path, pillow: ModuleType) -> list[Path]:
    """The files with an extension of a format that Pillow reads, sorted by their path below ``path``.

    Hidden files are skipped: they are thumbnails or metadata that a system keeps beside an image under its name.
    """
    # Some formats, such as PDF, Pillow can write but not read.
    extensions = {extension for extension, kind in pillow.registered_extensions().items() if kind in pillow.OPEN}
    files: list[Path] = []
    try:
        for folder, inner, names in os.walk(path, onerror=_raise):
            # Hidden folders are not entered either; some of them cannot be listed.
            inner[:] = [name for name in inner if not name.startswith(".")]
            shown = (name for name in names if not name.startswith("."))
            files += (Path(folder, name) for name in shown if os.path.splitext(name)[1].lower() in extensions)
    except OSError as error:
        raise DataError(
            f"cannot list {path}: {one_line(error)}; name a folder of images and check its permissions"
        ) from error
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _raise(error: OSError) -> None:
    raise error


def _read(file: Path, size: int, pillow: ModuleType) -> Tensor:
    """One image file as uint8 of shape (3, size, size)."""
    try:
        with pillow.open(file) as image:
            square = _square(_to_rgb(image), size, pillow)
    except Exception as error:  # Pillow's readers may raise exceptions of any type
        raise DataError(f"cannot read image {file}: {one_line(error)}; replace or remove it") from error
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, 3).permute(2, 0, 1)


def _to_rgb(image: Any) -> Any:
    from PIL import ImageOps

    if image.mode == "F" or image.mode.startswith("I"):
        # Pillow would clip their values at 255.
        raise ValueError(f"it has more than 8 bits per value (mode {image.mode})")
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "P":
        # Through RGBA, since Pillow warns if a palette with transparency is converted to RGB directly.
        upright = upright.convert("RGBA")
    return upright.convert("RGB")


def _square(image: Any, size: int, pillow: ModuleType) -> Any:
    shorter = min(image.size)
    width, height = (round(side * size / shorter) for side in image.size)
    resized = image.resize((width, height), pillow.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))
