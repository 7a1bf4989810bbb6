"""Loads a shared library that setup.py builds from csrc, or says why it cannot be used.

The ``.json`` file next to a library describes what it was built for and from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parents[2]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """A library that may or may not have been built.

    Attributes:
        file: its file name in the package.
        part: the folder of csrc that it is built from, besides ``include``.
        name: its name in messages.
        target: the ``make`` target that builds it.
        mode: the value of ``GLOW_KERNELS_BUILD`` that builds it.
    """

    file: str
    part: str
    name: str
    target: str
    mode: str

    @property
    def build(self) -> str:
        """Instructions for building it."""
        mode = f"GLOW_KERNELS_BUILD={self.mode} pip install --no-build-isolation ."
        return f"run 'make {self.target}' in a source tree, or {mode}"


class UnusableError(Exception):
    """Why a library cannot be used, and what to do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


def load(library: Library, why_not: Callable[[dict[str, Any]], str] = lambda built: "") -> tuple[dict[str, Any], bool]:
    """Load ``library``.

    Args:
        library: the library to load.
        why_not: given the library's description, returns why it must not be loaded; empty if it may be.

    Returns:
        Its description, and whether csrc has changed since it was built, which is also logged.

    Raises:
        UnusableError: the library is not built or cannot be used.
    """
    path = PACKAGE / library.file
    if not path.exists():
        raise UnusableError(f"{library.name} is not built", library.build)

    def unusable(reason: str) -> UnusableError:
        # While the file exists, make and pip consider it up to date.
        return UnusableError(f"{library.name} cannot be loaded: {reason}", f"remove {path}, then {library.build}")

    try:
        built: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError) as error:
        raise unusable(f"its description {path.with_suffix('.json').name} cannot be read: {error}") from None
    if built["machine"] != platform.machine():
        raise unusable(f"it is built for {built['machine']}, this is {platform.machine()}")
    if torch.__version__ < "2.10":  # a TorchVersion, which compares as a version
        reason = f"{library.name} needs torch 2.10 or newer, this is {torch.__version__}"
        raise UnusableError(reason, "install a newer torch")
    if reason := why_not(built):
        raise unusable(reason)
    if _is_cut_short(path):
        raise unusable("the file is cut short")
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        # The message of torch only names the file; that of the dynamic loader is the cause.
        raise unusable(str(error.__cause__ or error).splitlines()[0]) from None
    return built, _is_stale(library, built)


def _is_cut_short(path: Path) -> bool:
    """Whether the end of an ELF file, its section table, is missing; loading such a file kills the process."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):  # 64 bits, little-endian
        return False
    (table,) = struct.unpack_from("<Q", header, 40)
    entry_bytes, entries = struct.unpack_from("<HH", header, 58)
    return bool(path.stat().st_size < table + entry_bytes * entries)


def _is_stale(library: Library, built: dict[str, Any]) -> bool:
    csrc = PACKAGE.parent / "csrc"
    if not (csrc / library.part).is_dir() or source_hash(csrc, library.part) == built["csrc"]:
        return False
    _log.warning("%s is out of date: csrc has changed since it was built; run 'make %s'", library.name, library.target)
    return True


def source_hash(csrc: Path, part: str) -> str:
    """Fingerprint of the sources of a library; setup.py computes the same."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("include", part) for path in (csrc / folder).rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(csrc).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()
