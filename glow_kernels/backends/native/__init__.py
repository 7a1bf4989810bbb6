"""C++ on the CPU: opens the library ``_C.so`` that setup.py builds from csrc, or says why it cannot.

``_C.json`` beside the library tells what it was built for and from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import struct
from pathlib import Path

import torch

from glow_kernels.backends import BackendStatus

_PACKAGE = Path(__file__).resolve().parents[2]
_BUILD = "run 'make build' in a source tree, or GLOW_KERNELS_BUILD=cpu pip install --no-build-isolation ."

_log = logging.getLogger(__name__)


def status() -> BackendStatus:
    """Load the library and say what it is, or why it cannot be used."""
    library = _PACKAGE / "_C.so"
    if not library.exists():
        return BackendStatus("native", False, "the native library is not built", _BUILD)
    try:
        built = json.loads(library.with_suffix(".json").read_text())
    except (OSError, ValueError) as error:
        return _unusable(library, f"its description _C.json cannot be read: {error}")
    if built["machine"] != platform.machine():
        return _unusable(library, f"it is built for {built['machine']}, this is {platform.machine()}")
    if torch.__version__ < "2.10":  # a TorchVersion, which compares as a version
        reason = f"the native library needs torch 2.10 or newer, this is {torch.__version__}"
        return BackendStatus("native", False, reason, "install a newer torch")
    if _is_cut_short(library):
        return _unusable(library, "the file is cut short")
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        # torch only names the file; the cause is the loader's own message.
        return _unusable(library, str(error.__cause__ or error).splitlines()[0])

    reason = f"C++ on the CPU, {_isa()}, built with torch {built['torch']}"
    csrc = _PACKAGE.parent / "csrc"
    if (csrc / "cpu").is_dir() and _hash(csrc, "cpu") != built["csrc"]:
        _log.warning("the native library is out of date: csrc has changed since it was built; run 'make build'")
        return BackendStatus("native", True, f"{reason}, out of date: csrc has changed since", "run 'make build'")
    return BackendStatus("native", True, reason)


def _unusable(library: Path, reason: str) -> BackendStatus:
    # make and pip take the file for good while it is there.
    remedy = f"remove {library}, then {_BUILD}"
    return BackendStatus("native", False, f"the native library cannot be loaded: {reason}", remedy)


def _is_cut_short(library: Path) -> bool:
    """Whether the end of an ELF file, its section table, is missing; loading such a file kills the process."""
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):  # 64 bits, little-endian
        return False
    (table,) = struct.unpack_from("<Q", header, 40)
    entry_bytes, entries = struct.unpack_from("<HH", header, 58)
    return bool(library.stat().st_size < table + entry_bytes * entries)


def _isa() -> str:
    """Instruction set in use, and whether ``GLOW_KERNELS_ISA`` asked in vain for another."""
    isa: str = torch.ops.glow_kernels.native_isa()
    wanted = os.environ.get("GLOW_KERNELS_ISA") or isa
    return isa if wanted == isa else f"{isa} (GLOW_KERNELS_ISA={wanted} is not to be had here)"


def _hash(csrc: Path, part: str) -> str:
    """Fingerprint of the sources of a library; setup.py computes the same."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("include", part) for path in (csrc / folder).rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(csrc).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()
