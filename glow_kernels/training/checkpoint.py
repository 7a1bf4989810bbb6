"""Checkpoints: one safetensors file with the tensors and, in its metadata, one JSON document.

Weights and the state that belongs to them share one file, so they cannot get out of step. Nothing is ever unpickled.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from glow_kernels.errors import CheckpointError, MissingDependencyError

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

FORMAT_VERSION = 1

_METADATA_KEY = "glow_kernels"
# How this machine computes a step; never read from a checkpoint, which may come from another machine.
_MACHINE_SETTINGS = ("capturable", "foreach", "fused")


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingDependencyError("checkpoints need safetensors: pip install 'glow_kernels[train]'") from error
    return safetensors


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that, whatever happens, ``path`` holds either all of the old or all of the new content.

    Two processes must not write the same path at the same time.

    Raises:
        CheckpointError: the file cannot be written, for example because the disk is full. The previous file
            is untouched and no temporary file remains.
    """
    # The name is fixed, so the next write overwrites what a killed process left behind.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; free some space or use another folder "
            "(an earlier file of that name is untouched)"
        ) from error
    # The new file is in place by now, so do not fail on network file systems that cannot sync a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save(path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, JSON]) -> None:
    """Write a checkpoint atomically; the previous one is untouched until the new one is complete on disk.

    Needs as much free host memory as the checkpoint has bytes.

    Args:
        path: The file to write; its folder must exist.
        tensors: Tensors of any shape, dtype and device; they may be non-contiguous and share memory.
        document: Anything JSON can hold, non-finite floats included. Tuples come back as lists.

    Raises:
        CheckpointError: the checkpoint cannot be written.
        MissingDependencyError: safetensors is not installed.
        TypeError: the document holds something that is not JSON.
    """
    safetensors = _safetensors()
    metadata = {_METADATA_KEY: json.dumps({"format_version": FORMAT_VERSION, "document": document})}
    try:
        # Not save_file, which makes the file readable by its owner only and does not sync it.
        content = safetensors.torch.save(_independent(tensors), metadata)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"cannot write {path}: {error}; save other kinds of tensors") from error
    write_atomically(path, content)


class Saver:
    """Writes checkpoints in a background thread, one at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def start(self, path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, JSON]) -> None:
        """Wait for the previous write, then :func:`save` in the background; its arguments must not change meanwhile.

        Raises:
            CheckpointError, MissingDependencyError, TypeError: the previous checkpoint could not be written.
        """
        self.finish()
        self._writing = self._pool.submit(save, path, tensors, document)

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            CheckpointError, MissingDependencyError, TypeError: the last checkpoint could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as contiguous host tensors, no two of which share memory, which safetensors would refuse."""
    storages: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in storages:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        result[name] = value
    return result


def load(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, JSON]]:
    """Read a checkpoint: the tensors, on ``device``, and the JSON document.

    Raises:
        CheckpointError: the file is missing, cut short, not a glow_kernels checkpoint, or too new.
        MissingDependencyError: safetensors is not installed.
    """
    safetensors = _safetensors()
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a checkpoint; name the checkpoint file in it")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            document = _read_document(path, file.metadata() or {})
            names = file.keys()
            # Copy: memory-mapped tensors would keep the file's disk space in use after it is replaced.
            tensors = {name: file.get_tensor(name).to(device, copy=True) for name in names}
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} does not exist; check the path") from error
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error}; check its permissions") from error
    except safetensors.SafetensorError as error:
        if _starts_like_safetensors(path):
            message = f"checkpoint {path} is damaged or cut short ({error}); use another checkpoint"
        else:
            message = f"{path} is not a glow_kernels checkpoint; name a file that glow_kernels saved"
        raise CheckpointError(message) from error
    return tensors, document


def _starts_like_safetensors(path: Path) -> bool:
    """Whether a file that safetensors refused begins like a safetensors file: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) < 9 or start.endswith(b"{")


def _read_document(path: Path, metadata: Mapping[str, str]) -> dict[str, JSON]:
    try:
        content = json.loads(metadata[_METADATA_KEY])
        version, document = int(content["format_version"]), dict(content["document"])
    except (KeyError, TypeError, ValueError) as error:
        message = f"{path} is a safetensors file but not a glow_kernels checkpoint; name one that glow_kernels saved"
        raise CheckpointError(message) from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format {version} and this glow_kernels reads up to format "
            f"{FORMAT_VERSION}; upgrade glow_kernels"
        )
    return document


def flatten_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], JSON]:
    """The state of an optimizer as tensors named ``state.<parameter index>.<name>`` and a JSON document.

    The tensors are the optimizer's own, not copies.
    """
    tensors = {}
    rest: dict[str, dict[str, JSON]] = {}
    state = optimizer.state_dict()
    for index, values in state["state"].items():
        rest[str(index)] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"state.{index}.{name}"] = value
            else:
                rest[str(index)][name] = value
    groups = [
        {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return tensors, {"class": type(optimizer).__name__, "state": rest, "param_groups": groups}


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], document: JSON) -> None:
    """Give ``optimizer`` the state that :func:`flatten_optimizer` took from one for the same parameters.

    The optimizer may keep the tensors themselves and change them in its next step. Settings of the machine
    (``foreach``, ``fused``, ``capturable``) stay those of ``optimizer``.

    Raises:
        CheckpointError: the state comes from another kind of optimizer or is for other parameters.
    """
    name = type(optimizer).__name__
    remedy = "resume with the model and optimizer settings of the checkpoint"
    saved = document.get("class") if isinstance(document, Mapping) else None
    if not isinstance(document, Mapping) or saved != name:
        raise CheckpointError(f"the checkpoint has optimizer state of {saved}, not of {name}; {remedy}")
    try:
        optimizer.load_state_dict(_unflatten(optimizer, tensors, document))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's optimizer state does not fit: {error}; {remedy}") from error


def _unflatten(optimizer: Optimizer, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> dict[str, Any]:
    state = {int(index): dict(values) for index, values in document["state"].items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, tensor in tensors.items():
        _, index, name = key.split(".", 2)
        # Most optimizers keep "step" on the host: on a GPU every step would wait for it. load_state_dict moves it to
        # the device for a fused or capturable optimizer, but never back.
        value = tensor.cpu() if name == "step" else _with_parameter_strides(parameters, int(index), tensor)
        state[int(index)][name] = value
    groups = [dict(group) for group in document["param_groups"]]
    # Not strict: load_state_dict itself refuses another number of groups.
    for group, current in zip(groups, optimizer.param_groups, strict=False):
        for key, value in current.items():
            if key in _MACHINE_SETTINGS:
                group[key] = value
            elif isinstance(value, Tensor):
                group[key] = torch.full_like(value, group[key])
            elif isinstance(value, tuple):
                group[key] = tuple(group[key])
    return {"state": state, "param_groups": groups}


def _with_parameter_strides(parameters: Sequence[Tensor], index: int, tensor: Tensor) -> Tensor:
    """``tensor`` with the strides of its parameter, as fused optimizers assume."""
    parameter = parameters[index] if index < len(parameters) else tensor
    if tensor.shape != parameter.shape or tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy ``tensors`` into the parameters and buffers of ``module``; names and shapes must match.

    ``path`` is the file that the tensors come from, for the message.

    Raises:
        CheckpointError: names or shapes differ; ``module`` is unchanged.
    """
    expected = module.state_dict()
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(value.shape)}"
            for name, value in expected.items()
            if name in tensors and tensors[name].shape != value.shape
        ],
    }
    found = [f"{len(names)} {kind} ({_first(names)})" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(
            f"checkpoint {path} does not fit the model: {', '.join(found)}; use the settings it was made with"
        )
    module.load_state_dict(dict(tensors))


def _first(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join([*names[:limit], "..."] if len(names) > limit else names)
