"""The data sources on synthetic data: what they return, how they split it, and their messages about bad input."""

import io
import os
import re
import struct
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image

from glow_kernels.errors import CheckpointError, DataError, GlowKernelsError, MissingDependencyError, UsageError
from glow_kernels.training.data import BatchSampler, ImageData, load

PARTS = ("train", "validation", "test")
IMAGES_PER_BATCH = 6


def images_of(data: ImageData) -> list[torch.Tensor]:
    return [data.train, data.validation, data.test]


def labels_of(data: ImageData) -> list[Any]:
    return [data.train_labels, data.validation_labels, data.test_labels]


def assert_same(one: ImageData, other: ImageData) -> None:
    for a, b in zip(images_of(one) + labels_of(one), images_of(other) + labels_of(other), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def assert_fails(kind: type[GlowKernelsError], message: str, specification: str, **options: Any) -> None:
    """Check that loading fails with one line that matches the regular expression ``message``."""
    with pytest.raises(kind, match=message) as caught:
        load(specification, **options)
    assert "\n" not in str(caught.value)


def noise(*shape: int, below: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(below, size=shape, dtype=np.uint8)


# Options and specifications


@pytest.mark.parametrize("specification", ["", "digit", "folder", "folder:", "digits:/x", "cifar10", "array"])
def test_unknown_specification_lists_the_valid_ones(specification: str) -> None:
    forms = re.escape("digits, patches, cifar10:PATH, folder:PATH, array:PATH")
    assert_fails(UsageError, f"unknown data '{specification}'; .*{forms}", specification)


@pytest.mark.parametrize("n_bits", [-1, 0, 9])
def test_n_bits_out_of_range(n_bits: int) -> None:
    assert_fails(UsageError, f"n_bits must be from 1 to 8, not {n_bits}", "patches", n_bits=n_bits)


@pytest.mark.parametrize("image_size", [-3, 0])
def test_image_size_not_positive(image_size: int) -> None:
    assert_fails(UsageError, f"image_size must be at least 1, not {image_size}", "patches", image_size=image_size)


@pytest.mark.parametrize("source", ["cifar10", "folder", "array"])
def test_missing_path(source: str, tmp_path: Path) -> None:
    assert_fails(DataError, f"{tmp_path}/none .*does not exist", f"{source}:{tmp_path}/none")


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "x.npy", noise(5, 4, 4))
    assert load("array:~/x.npy").image_size == (4, 4)


@pytest.mark.parametrize(
    ("module", "specification", "package"),
    [
        ("sklearn.datasets", "digits", "scikit-learn"),
        ("sklearn.datasets", "patches", "scikit-learn"),
        ("PIL.Image", "patches", "Pillow"),
        ("PIL.Image", "folder:.", "Pillow"),
        ("numpy", "array:pyproject.toml", "NumPy"),
    ],
)
def test_missing_package(
    module: str, specification: str, package: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.chdir(pytestconfig.rootpath)
    monkeypatch.setitem(sys.modules, module, None)
    assert_fails(MissingDependencyError, rf"needs {package}: pip install 'glow_kernels\[train\]'", specification)


def test_import_needs_torch_only() -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(['numpy', 'sklearn', 'PIL']))"
    code = f"{block}; import glow_kernels.training.data"
    subprocess.run([sys.executable, "-c", code], check=True)


# digits and patches


def test_digits() -> None:
    data = load("digits")
    assert [tuple(images.shape) for images in images_of(data)] == [(n, 1, 8, 8) for n in (1400, 100, 297)]
    assert (data.name, data.n_bins, data.num_classes) == ("digits", 17, 10)
    assert (data.channels, data.image_size) == (1, (8, 8))
    assert data.train.dtype == torch.uint8
    assert data.train_labels is not None
    assert labels_of(data)[0].dtype == torch.int64
    assert (int(data.train.min()), int(data.train.max())) == (0, 16)
    assert_same(data, load("digits", image_size=8))


def test_digits_parts_are_the_whole_set_with_its_labels() -> None:
    data = load("digits")
    source = sklearn.datasets.load_digits()
    found = [
        (image.flatten().tolist(), int(label))
        for images, labels in zip(images_of(data), labels_of(data), strict=True)
        for image, label in zip(images, labels, strict=True)
    ]
    expected = [(x.astype(int).tolist(), int(y)) for x, y in zip(source.data, source.target, strict=True)]
    assert sorted(found) == sorted(expected)
    test = np.random.default_rng(0).permutation(1797)[:297]
    assert torch.equal(labels_of(data)[2], torch.from_numpy(source.target[test]))


def test_digits_refuses_options() -> None:
    assert_fails(UsageError, "n_bits 5 does not apply to digits", "digits", n_bits=5)
    assert_fails(UsageError, "image_size 16 does not fit digits: its images are 8x8", "digits", image_size=16)


@pytest.fixture
def numbered_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the photographs by images of the same size in which no two pixels have the same colour."""
    numbers = np.arange(2 * 427 * 640, dtype="<u4").view(np.uint8).reshape(2, 427, 640, 4)
    photographs = SimpleNamespace(images=[np.ascontiguousarray(each[..., :3]) for each in numbers])
    monkeypatch.setattr(sklearn.datasets, "load_sample_images", lambda: photographs)


@pytest.mark.usefixtures("numbered_photographs")
@pytest.mark.parametrize("size", [32, 64])
def test_no_pixel_of_a_photograph_is_in_two_parts(size: int) -> None:
    data = load("patches", image_size=size)
    seen = [torch.zeros(2 * 427 * 640, dtype=torch.bool) for _ in PARTS]
    for pixels, images in zip(seen, images_of(data), strict=True):
        number = images[:, 0].int() + 256 * images[:, 1].int() + 65536 * images[:, 2].int()
        # A crop is a contiguous piece of a photograph: its neighbouring pixels are neighbours there.
        assert (number[:, :, 1:] - number[:, :, :-1] == 1).all()
        assert (number[:, 1:] - number[:, :-1] == 640).all()
        pixels[number.flatten()] = True
        assert pixels[: 427 * 640].any()
        assert pixels[427 * 640 :].any()
    assert int(torch.stack(seen).sum(0).max()) == 1


def test_patches() -> None:
    data = load("patches")
    assert [tuple(images.shape) for images in images_of(data)] == [(n, 3, 32, 32) for n in (8192, 512, 1024)]
    assert (data.n_bins, data.num_classes, labels_of(data)) == (256, None, [None] * 3)
    assert_same(data, load("patches"))
    coarse = load("patches", n_bits=5)
    assert coarse.n_bins == 32
    assert torch.equal(coarse.test, data.test // 8)


def test_largest_patches() -> None:
    assert load("patches", image_size=96).image_size == (96, 96)
    assert_fails(UsageError, "image_size 97 is too large .* at most 96", "patches", image_size=97)


# CIFAR-10


def python2_pickle(value: Any) -> bytes:
    """``value`` as Python 2's cPickle wrote it, in protocol 2 with the module names of NumPy at that time."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, list):
        return b"](" + b"".join(map(python2_pickle, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(python2_pickle, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2_pickle(item) for pair in value.items() for item in pair) + b"u"
    code = value.dtype.str[1:].encode()
    dtype = b"cnumpy\ndtype\n" + python2_pickle((code, 0, 1)) + b"R"
    dtype += python2_pickle((3, b"|", None, None, None, -1, -1, 0)) + b"b"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + python2_pickle((0,)) + b"U\x01btR"
    state = b"(" + python2_pickle(1) + python2_pickle(value.shape) + dtype
    return array + state + python2_pickle(value.flags.fnc) + python2_pickle(value.tobytes("A")) + b"tb"


def batch_file(pixels: Any, labels: Any) -> bytes:
    batch = {b"batch_label": b"a batch", b"labels": labels, b"data": pixels, b"filenames": [b"a.png"]}
    return b"\x80\x02" + python2_pickle(batch) + b"."


def cifar_files(suffix: str) -> tuple[dict[str, bytes], np.ndarray, list[int]]:
    """Files of CIFAR-10, python ("") or binary (".bin"), and their images and labels in order."""
    pixels = noise(6 * IMAGES_PER_BATCH, 3072)
    labels = noise(len(pixels), below=10, seed=1).tolist()
    files = {"readme.html": b"<p>"}
    for index, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        part = slice(index * IMAGES_PER_BATCH, (index + 1) * IMAGES_PER_BATCH)
        records = np.concatenate([np.array(labels[part], dtype=np.uint8)[:, None], pixels[part]], axis=1)
        files[name + suffix] = records.tobytes() if suffix else batch_file(pixels[part], labels[part])
    return files, pixels.reshape(-1, 3, 32, 32), labels


def write_archive(path: Path, files: dict[str, bytes], folder: str) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


FOLDERS = {"": "cifar-10-batches-py", ".bin": "cifar-10-batches-bin"}


@pytest.mark.parametrize("suffix", FOLDERS)
@pytest.mark.parametrize("form", ["archive", "folder", "parent"])
def test_cifar10(suffix: str, form: str, tmp_path: Path) -> None:
    files, pixels, labels = cifar_files(suffix)
    if form == "archive":
        path = write_archive(tmp_path / "cifar.tar.gz", files, FOLDERS[suffix])
    else:
        path = write_folder(tmp_path / FOLDERS[suffix], files)
    name = f"cifar10:{path.parent if form == 'parent' else path}"
    data = load(name)
    assert (data.name, data.n_bins, data.num_classes) == (name, 256, 10)
    assert [len(images) for images in images_of(data)] == [29, 1, 6]
    assert torch.equal(torch.cat(images_of(data)), torch.from_numpy(pixels))
    assert torch.cat(labels_of(data)).tolist() == labels
    assert labels_of(data)[0].dtype == torch.int64
    coarse = load(name, n_bits=3, image_size=32)
    assert coarse.n_bins == 8
    assert torch.equal(coarse.test, data.test // 32)


def test_made_up_cifar10_pickle_is_a_true_pickle() -> None:
    """Guards the test above: read as the CIFAR-10 page says, with pickle and NumPy, it has the same contents."""
    import pickle

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy 2 warns about the old module names
        batch = pickle.loads(batch_file(noise(2, 3072), [3, 4]), encoding="bytes")
    assert np.array_equal(batch[b"data"], noise(2, 3072))
    assert batch[b"labels"] == [3, 4]


@pytest.mark.parametrize("suffix", FOLDERS)
def test_cifar10_missing_batches(suffix: str, tmp_path: Path) -> None:
    files, _, _ = cifar_files(suffix)
    del files[f"data_batch_3{suffix}"], files[f"test_batch{suffix}"]
    path = write_archive(tmp_path / "a.tar.gz", files, "cifar")
    assert_fails(DataError, f"{path} has no data_batch_3{suffix}, test_batch{suffix}; ", f"cifar10:{path}")


def test_cifar10_wrong_contents(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "other.tar.gz", {"train": b"", "test": b""}, "cifar-100-python")
    assert_fails(DataError, f"{path} has no data_batch_1, .* cifar-10-python.tar.gz", f"cifar10:{path}")
    assert_fails(DataError, f"{tmp_path} has no data_batch_1, .* cifar-10", f"cifar10:{tmp_path}")


def test_cifar10_damaged_archive(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.tar.gz", cifar_files(".bin")[0], "cifar")
    content = path.read_bytes()
    wrong_bit = bytearray(content)
    wrong_bit[-5] ^= 1  # in the checksum: the data itself still decompresses
    for damaged in (content[:-100], content[:50_000], bytes(wrong_bit), b"", b"no archive"):
        path.write_bytes(damaged)
        assert_fails(DataError, f"{path} is not a readable .tar.gz archive: .*; download", f"cifar10:{path}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a CIFAR-10 batch"),
        (batch_file(noise(6, 3072), [0] * 6)[:5000], "is not a CIFAR-10 batch"),
        (b"\x80\x02" + python2_pickle({b"x": 1}) + b".", "is not a CIFAR-10 batch: .*data"),
        (b"\x80\x02" + python2_pickle([1, 2]) + b".", "is not a CIFAR-10 batch"),
        (batch_file(noise(6, 3072).astype("i2"), [0] * 6), "not a row-major array of bytes"),
        (batch_file(np.asfortranarray(noise(6, 3072)), [0] * 6), "not a row-major array of bytes"),
        (batch_file(noise(0, 3072), []), "or is empty"),
        (batch_file(noise(6, 1024), [0] * 6), r"data of shape \[6, 1024\] and 6 labels"),
        (batch_file(noise(6, 3072), [0] * 5), r"data of shape \[6, 3072\] and 5 labels"),
        (batch_file(noise(2, 3072), [0, 10]), "labels other than the integers 0 to 9"),
        (batch_file(noise(2, 3072), [0, b"1"]), "labels other than the integers 0 to 9"),
    ],
)
def test_cifar10_bad_python_batch(content: bytes, message: str, tmp_path: Path) -> None:
    path = write_folder(tmp_path / "a", cifar_files("")[0] | {"data_batch_2": content})
    assert_fails(DataError, f"{path}: data_batch_2 .*{message}.*; download", f"cifar10:{path}")


@pytest.mark.parametrize("content", [b"", bytes(3073 + 5), b"\x0a" + bytes(3072)])
def test_cifar10_bad_binary_batch(content: bytes, tmp_path: Path) -> None:
    path = write_folder(tmp_path / "a", cifar_files(".bin")[0] | {"test_batch.bin": content})
    assert_fails(DataError, f"{path}: test_batch.bin has .*; download", f"cifar10:{path}")


@pytest.mark.parametrize(
    ("module", "name", "argument"),
    [
        ("os", "system", b"touch {}"),
        ("builtins", "eval", b"open('{}', 'w')"),
        ("numpy", "save", b"{}"),
        ("torch", "load", b"{}"),
    ],
)
def test_malicious_pickle_is_refused(module: str, name: str, argument: bytes, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    call = f"c{module}\n{name}\n".encode() + python2_pickle((argument.replace(b"{}", bytes(trace)),)) + b"R"
    path = write_folder(tmp_path / "a", cifar_files("")[0] | {"data_batch_1": b"\x80\x02" + call + b"."})
    assert_fails(DataError, f"data_batch_1 .*asks for {module}.{name}, .*do not trust", f"cifar10:{path}")
    assert not trace.exists()


def test_cifar10_other_image_size(tmp_path: Path) -> None:
    assert_fails(UsageError, "image_size 64 .*32x32", f"cifar10:{tmp_path}", image_size=64)


# Folders of images


def write_images(folder: Path, count: int, *, size: tuple[int, int] = (9, 7)) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.fromarray(noise(size[1], size[0], 3, seed=index)).save(folder / f"{index:03}.png")
    return folder


@pytest.mark.parametrize(("count", "parts"), [(3, [1, 1, 1]), (9, [7, 1, 1]), (25, [21, 2, 2])])
def test_folder_split(count: int, parts: list[int], tmp_path: Path) -> None:
    name = f"folder:{write_images(tmp_path, count)}"
    data = load(name, image_size=7)
    assert [len(images) for images in images_of(data)] == parts
    assert (data.name, data.n_bins, data.channels, data.image_size) == (name, 256, 3, (7, 7))
    assert labels_of(data) == [None] * 3
    assert len({tuple(image.flatten().tolist()) for image in torch.cat(images_of(data))}) == count
    assert_same(data, load(name, image_size=7))
    coarse = load(name, image_size=7, n_bits=1)
    assert coarse.n_bins == 2
    assert torch.equal(coarse.train, data.train // 128)


def test_folder_is_searched_recursively_for_images_only(tmp_path: Path) -> None:
    write_images(tmp_path / "cats", 2)
    write_images(tmp_path / "dogs", 2)
    (tmp_path / "cats" / "000.png").rename(tmp_path / "cats" / "000.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "print.pdf").write_text("a format that Pillow writes and does not read")
    write_images(tmp_path / ".thumbnails", 2)
    (tmp_path / "cats" / "._001.png").write_text("what macOS keeps beside a file")
    data = load(f"folder:{tmp_path}")
    assert [tuple(images.shape) for images in images_of(data)] == [(n, 3, 64, 64) for n in (2, 1, 1)]


def test_fingerprint_is_of_the_images_and_not_of_where_they_are(tmp_path: Path) -> None:
    folders = [write_images(tmp_path / name, 9) for name in ("one", "two", "other")]
    (folders[2] / "000.png").rename(folders[2] / "9.png")
    one, two, other = (load(f"folder:{folder}", image_size=4).fingerprint for folder in folders)
    assert one == two != other
    assert one == {"train": 7, "validation": 1, "test": 1, "crc32": one["crc32"]}
    # Arrays are identified by their values, not by the file's name.
    arrays = [save(folder, x=noise(9, 4, 4, seed=seed)) for folder, seed in zip(folders, (0, 0, 1), strict=True)]
    one, two, other = (load(array).fingerprint for array in arrays)
    assert one == two != other
    # Labels have a checksum of their own.
    labelled = [
        load(save(folders[0], x=noise(9, 4, 4), y=classes)).fingerprint for classes in (np.arange(9), np.ones(9, int))
    ]
    assert {name for name, number in labelled[0].items() if labelled[1][name] != number} == {"labels"}
    assert load("patches", image_size=8).fingerprint == load("patches", image_size=8, n_bits=5).fingerprint


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_fingerprint_is_of_all_parts(part: str) -> None:
    parts = {name: torch.zeros(2, 1, 2, 2, dtype=torch.uint8) for name in ("train", "validation", "test")}
    labels = {f"{name}_labels": torch.zeros(2, dtype=torch.int64) for name in parts}
    before = ImageData("made up", 4, **parts, **labels).fingerprint
    images = ImageData("made up", 4, **{**parts, part: parts[part] + 1}, **labels).fingerprint
    classes = ImageData("made up", 4, **parts, **{**labels, f"{part}_labels": labels[f"{part}_labels"] + 1}).fingerprint
    assert [name for name, number in images.items() if before[name] != number] == ["crc32"]
    assert [name for name, number in classes.items() if before[name] != number] == ["labels"]


def test_folder_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "b", 4)
    write_images(tmp_path / "a", 7)
    data = load(f"folder:{tmp_path}", image_size=7)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **b: reversed([(x, y, z[::-1]) for x, y, z in walk(*a, **b)]))
    assert_same(data, load(f"folder:{tmp_path}", image_size=7))


def read_one(folder: Path, image: Image.Image, size: int) -> np.ndarray:
    """The given image as the folder source reads it: (size, size, 3)."""
    for index in range(3):
        image.save(folder / f"{index}.png", exif=image.getexif())
    return load(f"folder:{folder}", image_size=size).train[0].permute(1, 2, 0).numpy()


def test_folder_crops_the_centre_and_leaves_pixels_of_the_right_size_alone(tmp_path: Path) -> None:
    pixels = noise(6, 10, 3)
    assert np.array_equal(read_one(tmp_path, Image.fromarray(pixels), 6), pixels[:, 2:8])


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (10, 16), (4, 6)])
def test_folder_resizes_the_shorter_side(shape: tuple[int, int], tmp_path: Path) -> None:
    # The left half in one colour and the upper half in another: both edges stay in the middle.
    pixels = np.zeros((*shape, 3), dtype=np.uint8)
    pixels[:, : shape[1] // 2, 0] = 200
    pixels[: shape[0] // 2, :, 1] = 200
    found = read_one(tmp_path, Image.fromarray(pixels), 8)
    assert found.shape == (8, 8, 3)
    assert np.all(abs(found[0, 0].astype(int) - [200, 200, 0]) < 40)
    assert np.all(abs(found[7, 7].astype(int) - [0, 0, 0]) < 40)


def test_folder_converts_to_upright_rgb(tmp_path: Path) -> None:
    grey = noise(4, 4)
    assert np.array_equal(read_one(tmp_path, Image.fromarray(grey), 4), np.stack([grey] * 3, axis=-1))
    colour = noise(4, 4, 4)
    assert np.array_equal(read_one(tmp_path, Image.fromarray(colour), 4), colour[..., :3])
    palette = Image.fromarray(colour[..., :3]).convert("P")
    expected = np.asarray(palette.convert("RGB"))
    palette.info["transparency"] = bytes(range(256))
    assert np.array_equal(read_one(tmp_path, palette, 4), expected)
    sideways = Image.fromarray(colour[..., :3])
    sideways.getexif()[0x0112] = 3  # the camera was upside down
    assert np.array_equal(read_one(tmp_path, sideways, 4), colour[::-1, ::-1, :3])


def test_folder_with_too_few_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    assert_fails(DataError, f"{tmp_path} has no image files", f"folder:{tmp_path}")
    write_images(tmp_path, 2)
    assert_fails(DataError, f"{tmp_path} has 2 .*at least 3", f"folder:{tmp_path}")


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert_fails(DataError, f"cannot list {tmp_path}/a.png: .*name a folder", f"folder:{tmp_path}/a.png")


@pytest.mark.parametrize("name", ["locked", ".Trashes"])
def test_folder_that_may_not_be_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, 4)
    locked = write_images(tmp_path / name, 4)
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path) == str(locked):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # not chmod, which does not stop root
    if name.startswith("."):
        assert len(load(f"folder:{tmp_path}").train) == 2
    else:
        assert_fails(DataError, f"cannot list {tmp_path}: .*{locked}.*permissions", f"folder:{tmp_path}")


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "bmp", "webp", "tiff"])
def test_folder_with_a_damaged_image(extension: str, tmp_path: Path) -> None:
    file = write_images(tmp_path, 4) / f"bad.{extension}"
    Image.fromarray(noise(60, 60, 3)).save(file)
    content = file.read_bytes()
    for damaged in (b"", b"no image", content[: len(content) // 2]):
        file.write_bytes(damaged)
        assert_fails(DataError, f"cannot read image {file}: .*; replace or remove it", f"folder:{tmp_path}")


def test_folder_with_16_bit_image(tmp_path: Path) -> None:
    Image.fromarray(noise(8, 8).astype(np.uint16) * 200).save(write_images(tmp_path, 4) / "deep.png")
    assert_fails(DataError, "deep.png: it has more than 8 bits per value", f"folder:{tmp_path}")


# Arrays


def save(path: Path, **arrays: Any) -> str:
    """Save arrays, or one as .npy if its name is ``npy``, and return the specification."""
    if "npy" in arrays:
        np.save(path / "a.npy", arrays["npy"])
        return f"array:{path}/a.npy"
    np.savez(path / "a.npz", **arrays)
    return f"array:{path}/a.npz"


@pytest.mark.parametrize(
    ("shape", "channels", "image_size"),
    [
        ((20, 6, 5), 1, (6, 5)),
        ((20, 1, 6, 5), 1, (6, 5)),
        ((20, 3, 6, 5), 3, (6, 5)),
        ((20, 4, 6, 5), 4, (6, 5)),
        ((20, 6, 5, 1), 1, (6, 5)),
        ((20, 6, 5, 3), 3, (6, 5)),
        ((20, 3, 8, 4), 3, (8, 4)),  # ambiguous: taken as channels first
    ],
)
def test_array_shapes(shape: tuple[int, ...], channels: int, image_size: tuple[int, int], tmp_path: Path) -> None:
    array = noise(*shape)
    data = load(save(tmp_path, npy=array))
    assert [len(images) for images in images_of(data)] == [16, 2, 2]
    assert (data.channels, data.image_size, data.n_bins) == (channels, image_size, 256)
    if array.ndim == 3:
        array = array[:, None]
    elif channels != shape[1]:
        array = array.transpose(0, 3, 1, 2)
    assert sorted(torch.cat(images_of(data)).flatten(1).tolist()) == sorted(array.reshape(20, -1).tolist())
    order = np.random.default_rng(0).permutation(20)
    assert torch.equal(data.test, torch.from_numpy(array[order[:2]]))


def test_array_other_integers_and_memory_orders(tmp_path: Path) -> None:
    array = noise(10, 6, 5, 3)
    data = load(save(tmp_path, npy=array), n_bits=4)
    assert data.n_bins == 16
    for same in (array.astype(">i4"), array.astype(np.int64), np.asfortranarray(array)):
        assert_same(data, load(save(tmp_path, npy=same), n_bits=4, image_size=None))


def test_array_with_parts_and_labels(tmp_path: Path) -> None:
    arrays = {part: noise(5 + i, 4, 4, seed=i) for i, part in enumerate(PARTS)}
    labels = {f"{part}_labels": np.arange(5 + i) for i, part in enumerate(PARTS)}
    data = load(save(tmp_path, **arrays))
    for part, images in zip(PARTS, images_of(data), strict=True):
        assert torch.equal(images[:, 0], torch.from_numpy(arrays[part]))
    assert (labels_of(data), data.num_classes) == ([None] * 3, None)
    data = load(save(tmp_path, **arrays, **labels), image_size=4)
    assert [values.tolist() for values in labels_of(data)] == [list(range(n)) for n in (5, 6, 7)]
    assert data.num_classes == 7


def test_array_with_x_and_y(tmp_path: Path) -> None:
    x = noise(30, 4, 4)
    data = load(save(tmp_path, x=x, y=x[:, 0, 0].astype(np.int32), names=np.array(["ignored"])))
    for images, labels in zip(images_of(data), labels_of(data), strict=True):
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
    assert_same(load(save(tmp_path, anything=x)), load(save(tmp_path, npy=x)))


def test_array_n_bins(tmp_path: Path) -> None:
    name = save(tmp_path, x=noise(10, 4, 4, below=17), n_bins=17)
    assert load(name).n_bins == 17
    assert_fails(UsageError, f"n_bits 5 does not apply to {name}, .*n_bins 17", name, n_bits=5)
    assert_fails(DataError, "says n_bins 5 but has the value", save(tmp_path, x=noise(9, 4, 4), n_bins=5))
    for bad in (1, 257, 3.0, [4]):
        assert_fails(DataError, r"\[n_bins\] must be one integer", save(tmp_path, x=noise(9, 4, 4), n_bins=bad))


def test_array_is_not_resized(tmp_path: Path) -> None:
    name = save(tmp_path, npy=noise(9, 4, 5))
    assert_fails(UsageError, "image_size 4 does not fit .*: its images are 4x5", name, image_size=4)


GOOD = noise(9, 4, 4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"npy": GOOD.astype(np.float32)}, r"a.npy has float32 values, not integers; .*astype"),
        ({"npy": np.full((9, 4, 4), np.nan)}, "float64 values, with NaN among them"),
        ({"npy": GOOD > 5}, "has bool values"),
        ({"npy": np.array(["a"])}, "has <U1 values"),
        ({"npy": GOOD.astype(int) + 300}, "has values from 3.. to 5..; scale"),
        ({"npy": GOOD.astype(int) - 300}, "has values from -"),
        ({"npy": noise(9)}, r"has shape \[9\]; expected \[N, H, W\]"),
        ({"npy": noise(9, 5, 5, 2)}, r"has shape \[9, 5, 5, 2\]"),
        ({"npy": noise(9, 2, 2, 2, 2)}, r"has shape \[9, 2, 2, 2, 2\]"),
        ({"npy": noise(0, 4, 4)}, "has shape .*at least one image"),
        ({"npy": noise(9, 3, 0, 4)}, "has shape "),
        ({"npy": noise(2, 4, 4)}, "has 2 .*at least 3"),
        ({"npy": np.array([{}], dtype=object)}, "is not a .npy or .npz file of numbers"),
        ({"x": np.array([{}], dtype=object)}, "is not a .npy or .npz file of numbers"),
        ({}, r"has the arrays \(none\); expected train"),
        ({"a": GOOD, "b": GOOD}, "has the arrays a, b; expected train"),
        ({"train": GOOD, "test": GOOD}, "has test, train but no validation"),
        ({"train": GOOD, "validation": GOOD, "test": noise(9, 4, 5)}, "different .C, H, W.: .*'test': .1, 4, 5"),
        (
            {"train": GOOD, "validation": GOOD, "test": GOOD, "test_labels": np.arange(9)},
            "but no train_labels, validation_labels",
        ),
        ({"x": GOOD, "y": np.arange(8)}, r"\[y\] has shape \[8\]; expected \[9\]"),
        ({"x": GOOD, "y": np.arange(9) / 2}, r"\[y\] has float64 values"),
        ({"x": GOOD, "y": np.arange(9) - 1}, r"\[y\] has the label -1"),
    ],
)
def test_bad_array(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert_fails(DataError, f"^{tmp_path}.*{message}", save(tmp_path, **arrays))


@pytest.mark.parametrize("kind", ["npy", "x"])
def test_damaged_array_file(kind: str, tmp_path: Path) -> None:
    name = save(tmp_path, **{kind: noise(9, 40, 40)})
    path = Path(name.removeprefix("array:"))
    content = path.read_bytes()
    for damaged in (b"", b"no array", content[:20], content[:5000], content[:200] + b"?" * 100):
        path.write_bytes(damaged)
        assert_fails(DataError, f"^{path} is not .* it is damaged .*save the arrays again", name)


def test_array_that_is_a_folder(tmp_path: Path) -> None:
    assert_fails(DataError, f"cannot read {tmp_path}: .*name a .npy", f"array:{tmp_path}")


# Batches


def batches(sampler: BatchSampler, count: int) -> list[list[int]]:
    return [sampler.next().tolist() for _ in range(count)]


def test_batches_of_an_epoch_are_a_permutation_without_its_tail() -> None:
    sampler = BatchSampler(11, 4, seed=0)
    epochs = []
    for epoch in range(3):
        found = [*sampler.next().tolist(), *sampler.next().tolist()]
        assert (len(found), len(set(found)), sampler.epoch) == (8, 8, epoch)
        assert set(found) <= set(range(11))
        epochs.append(found)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sampler.next().dtype == torch.int64


def test_every_image_comes_in_an_epoch_that_fits() -> None:
    found = batches(BatchSampler(12, 4, seed=0), 3)
    assert sorted(index for batch in found for index in batch) == list(range(12))


def test_batch_is_the_whole_set_if_that_is_smaller() -> None:
    sampler = BatchSampler(3, 8, seed=0)
    assert [sorted(batch) for batch in batches(sampler, 5)] == [[0, 1, 2]] * 5
    assert sampler.epoch == 4


def test_batches_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    one = batches(BatchSampler(50, 8, seed=5), 20)
    torch.manual_seed(2)
    assert batches(BatchSampler(50, 8, seed=5), 20) == one
    assert batches(BatchSampler(50, 8, seed=6), 20) != one


@pytest.mark.parametrize("taken", range(12))
def test_batches_resume_exactly(taken: int) -> None:
    """At the beginning, in the middle, at the end and past the end of an epoch; the state is a copy."""
    sampler = BatchSampler(22, 4, seed=3)
    batches(sampler, taken)
    state, epoch = sampler.state_dict(), sampler.epoch
    expected = batches(sampler, 15)
    resumed = BatchSampler(22, 4, seed=99)
    batches(resumed, 2)
    resumed.load_state_dict(state)
    assert resumed.epoch == epoch
    assert batches(resumed, 15) == expected
    resumed.load_state_dict(state)
    assert batches(resumed, 15) == expected


def test_batch_state_is_small_and_plain() -> None:
    state = BatchSampler(1_000_000, 4, seed=3).state_dict()
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert [tensor.dtype for tensor in tensors] == [torch.uint8]
    assert tensors[0].numel() < 10_000
    assert all(type(value) is int for value in state.values() if value is not tensors[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 9}, "are of 9 images, not of 10"),
        ({"generator": torch.zeros(3, dtype=torch.uint8)}, "damaged"),
        ({"epoch": None}, "damaged"),
        ({"position": 11}, "position 11"),
    ],
)
def test_bad_batch_state_changes_nothing(change: dict[str, Any], message: str) -> None:
    sampler, other = BatchSampler(10, 4, seed=0), BatchSampler(10, 4, seed=0)
    with pytest.raises(CheckpointError, match=message):
        sampler.load_state_dict(other.state_dict() | change)
    with pytest.raises(CheckpointError):
        sampler.load_state_dict({})
    assert batches(sampler, 5) == batches(other, 5)


@pytest.mark.parametrize(("size", "batch_size", "name"), [(0, 4, "size"), (4, 0, "batch_size"), (4, -1, "batch_size")])
def test_bad_batch_arguments(size: int, batch_size: int, name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name} must be at least 1"):
        BatchSampler(size, batch_size, seed=0)
