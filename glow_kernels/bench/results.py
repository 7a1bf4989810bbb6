"""Files of results: JSON lines, each with the format's version, the run it belongs to, and its kind."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glow_kernels.bench import environment
from glow_kernels.errors import DataError, UsageError

VERSION = 2
# Significant digits of a number; further ones are noise that only makes the committed files larger.
_DIGITS = 4
FOLDER = Path("benchmarks/results")
_WITHOUT_CASE = ("environment", "warning")
# The beginning of every file of results.
_START = f'{{"version":{VERSION},'

Row = dict[str, Any]


class Writer:
    """Appends rows of one run to ``path`` immediately, so an interruption loses none.

    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, path: Path, run: Row) -> None:
        self.path = path
        self._run = run["run"]
        self.rows: list[Row] = []
        prepare(path)
        self.write(run)

    def write(self, row: Row) -> None:
        """Append one row."""
        row = _rounded({**row, "run": self._run})
        append(self.path, row)
        self.rows.append(row)

    def finish(self) -> None:
        """Drop rows of this run that a later row of the same case replaces, since it includes the earlier visits.

        Raises:
            DataError: the file cannot be read or written.
        """
        rows = read(self.path)
        latest = {_name(row): index for index, row in enumerate(rows)}
        kept = [row for index, row in enumerate(rows) if row["run"] != self._run or latest[_name(row)] == index]
        _rewrite(self.path, "".join(_line(row) for row in kept))


def prepare(path: Path) -> None:
    """Make the folder and the file if needed, and drop a last line that an interrupted run cut short.

    Raises:
        DataError: the file cannot be written, or rows of this version cannot be appended to it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise DataError(f"results cannot be written to {path}: {error.strerror}") from error
    # The file is read back, which might never end on a device or a pipe.
    if not path.is_file():
        raise DataError(f"results cannot be written to {path}: it is not a regular file")
    text = _read_text(path)
    whole = _without_cut_line(text)
    if not whole and not (text.startswith(_START) or _START.startswith(text)):
        raise DataError(f"{path} is not a file of results: name another with --output")
    _parse(whole, str(path))
    if whole != text:
        _rewrite(path, whole)


def append(path: Path, row: Row) -> None:
    """Append a row, with the format's version.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        with path.open("a") as file:
            file.write(_line({"version": VERSION, **row}))
    except OSError as error:
        raise DataError(f"results cannot be written to {path}: {error.strerror}") from error


def read(path: Path) -> list[Row]:
    """All rows of a file. A last line cut short by an interruption is left out with a warning.

    Raises:
        DataError: the file cannot be read, is damaged, or was written by another version.
    """
    return _rows(_read_text(path), str(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise DataError(f"results {path} cannot be read: {reason}") from error


def _rows(text: str, name: str) -> list[Row]:
    whole = _without_cut_line(text)
    rows = _parse(whole, name)
    if len(whole) < len(text):
        warnings.warn(f"results {name}: the last line is cut short and left out", stacklevel=3)
    if not rows:
        raise DataError(f"results {name} has no rows")
    return rows


def _parse(text: str, name: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"results {name}, line {number}: not JSON ({error})") from error
        # Not isinstance: in Python True is also an int.
        if not isinstance(row, dict) or type(row.get("version")) is not int:
            raise DataError(f"results {name}, line {number}: not a row of benchmark results")
        if row["version"] > VERSION:
            raise DataError(
                f"results {name}, line {number}: format {row['version']} is newer than {VERSION}, which this version "
                "of glow_kernels reads; install a newer one"
            )
        if row["version"] < VERSION:
            raise DataError(
                f"results {name}, line {number}: format {row['version']} is older than {VERSION}; move the file away "
                "and measure again"
            )
        named = isinstance(row.get("run"), str) and isinstance(row.get("kind"), str)
        if not named or not (row["kind"] in _WITHOUT_CASE or isinstance(row.get("case"), dict)):
            raise DataError(f"results {name}, line {number}: a row without its run, kind or case; delete that line")
        rows.append(row)
    return rows


def select(name: str, folder: Path = FOLDER) -> list[Row]:
    """Rows of a file, or, if ``name`` is a git revision, of all files in ``folder`` as committed at that revision.

    Raises:
        UsageError: ``name`` is neither.
        DataError: as for :func:`read`, or ``folder`` had no results at that revision.
    """
    if Path(name).is_file():
        return read(Path(name))
    commit = environment.git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if not commit:
        raise UsageError(f"{name!r} is neither a file of results nor a git revision")
    listed = environment.git("ls-tree", "-r", "--name-only", commit, "--", str(folder)) or ""
    files = [file for file in listed.splitlines() if file.endswith(".jsonl")]
    if not files:
        raise DataError(f"there are no results in {folder} at {name} ({commit[:12]})")
    return [row for file in files for row in _rows(environment.git("show", f"{commit}:{file}") or "", f"{name}:{file}")]


def of_kind(rows: Sequence[Row], kind: str) -> Iterator[Row]:
    """Rows of one kind, the last measurement of every case, in order of first appearance."""
    latest: dict[str, Row] = {}
    for row in rows:
        if row["kind"] == kind:
            latest[key(row)] = row
    yield from latest.values()


def by_device(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows grouped by the name of their run's device, since cases only distinguish CPU and GPU.

    Runs without an environment row, such as the stages of ``make gpu``, are left out unless no run has one.
    """
    devices = {row["run"]: str(row.get("device")) for row in rows if row["kind"] == "environment"}
    groups = {
        device: [row for row in rows if devices.get(row["run"]) == device] for device in dict.fromkeys(devices.values())
    }
    return groups or {"an unknown device": list(rows)}


def key(row: Row) -> str:
    """A string that identifies a case across runs."""
    return json.dumps(row["case"], sort_keys=True)


def _name(row: Row) -> tuple[Any, ...]:
    """The key that a row shares with those it replaces."""
    return row["run"], row["kind"], key(row) if "case" in row else json.dumps(row, sort_keys=True)


def _line(row: Row) -> str:
    return json.dumps(row, separators=(",", ":")) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _without_cut_line(text: str) -> str:
    """The text without a last line that an interrupted run cut short; every line ends with a newline."""
    end = text.rfind("\n") + 1
    try:
        json.loads(text[end:])
    except ValueError:
        return text[:end]
    return text + "\n"


def _rewrite(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text)
        part.replace(path)
    except OSError as error:
        raise DataError(f"results cannot be written to {path}: {error.strerror}") from error
