"""Metrics of a run: one JSON line per record in ``metrics.jsonl``, and the same scalars for TensorBoard."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from glow_kernels.errors import CheckpointError, MissingDependencyError
from glow_kernels.training.checkpoint import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE_NAME = "metrics.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    """All records of a run, oldest first; none if nothing has been written yet.

    A record has ``step``, ``time`` (seconds since the run began) and the values written; a value that was not finite
    is null in the file and None here. A last line cut short by a crash is left out.

    Raises:
        CheckpointError: the file cannot be read, or a line other than a last one cut short is damaged.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}; check its permissions") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            record = None
        if not _is_record(record):
            raise CheckpointError(f"{path}, line {number}, is damaged; delete that line")
        records.append(record)
    return records


def _is_record(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("step"), int)
        and isinstance(record.get("time"), (int, float))
        and all(value is None or isinstance(value, (int, float)) for value in record.values())
    )


class MetricsWriter:
    """Appends records to ``metrics.jsonl`` in a folder and to TensorBoard files under ``tensorboard`` in it.

    A writer for a folder that already has records appends to them; its clock continues from the last record.

    Args:
        folder: The folder of the run; made if it does not exist.
        tensorboard: Whether to write TensorBoard files too.

    Raises:
        CheckpointError: existing records cannot be read or the folder cannot be written.
        MissingDependencyError: TensorBoard files are wanted and tensorboard is not installed.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = True) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make {folder}: {error.strerror or error}; use another folder") from error
        self._rewrite(read(folder))
        self._tensorboard = _summary_writer(folder) if tensorboard else None

    def write(self, step: int, **values: float) -> None:
        """Append one record; the operating system has it before this returns.

        Raises:
            CheckpointError: the line cannot be written.
        """
        numbers = {name: float(value) for name, value in values.items()}
        # JSON has no NaN and no infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        record = {"step": step, "time": round(time.monotonic() - self._start, 3), **finite}
        path = self._folder / FILE_NAME
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"cannot write {path}: {error.strerror or error}; free some space and resume the run"
            ) from error
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)

    def truncate(self, after_step: int) -> None:
        """Remove the records with a step greater than ``after_step``: a resumed run writes them again.

        Raises:
            CheckpointError: the file cannot be read or written; it is unchanged.
        """
        self._rewrite([record for record in read(self._folder) if record["step"] <= after_step])
        if self._tensorboard is not None:
            self._tensorboard.close()
            # TensorBoard files cannot be shortened; a purge step makes TensorBoard ignore their later records.
            self._tensorboard = _summary_writer(self._folder, purge_step=after_step + 1)

    def close(self) -> None:
        """Write what is still buffered for TensorBoard. May be called twice."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rewrite(self, records: Sequence[dict[str, Any]]) -> None:
        """Replace the contents of the file with ``records``, which also drops a last line that was cut short."""
        lines = [json.dumps(record) + "\n" for record in records]
        write_atomically(self._folder / FILE_NAME, "".join(lines).encode())
        self._start = time.monotonic() - (records[-1]["time"] if records else 0.0)


def _summary_writer(folder: Path, purge_step: int | None = None) -> "SummaryWriter":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError("TensorBoard files need tensorboard: pip install 'glow_kernels[train]'") from error
    return SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=purge_step)
