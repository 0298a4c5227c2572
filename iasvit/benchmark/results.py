"""The result store: one CSV file for each task and data set, one row a measured cell, appended atomically."""

from __future__ import annotations

import csv
import fcntl
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from iasvit.errors import IasvitError

Row = dict[str, Any]

# A row's columns are IDENTITY, the task's metrics, fp_<metric> of its primary metrics, COST, PROVENANCE.
IDENTITY = (
    *("task", "dataset", "split_size", "model", "weights", "method", "w_bits", "a_bits", "spec", "seed"),
    *("calib_size", "options"),
)
COST = (
    *("iterations", "calibration_seconds", "reconstruction_seconds", "quantization_seconds", "evaluation_seconds"),
    *("images_per_second", "peak_memory_mib", "model_bytes", "packed_bytes"),
)
PROVENANCE = (
    *("device", "threads", "python", "torch", "timm", "iasvit", "git_commit", "spec_hash", "code_hash", "command"),
    *("status", "reason", "time"),
)
_FIXED = (*IDENTITY, *COST, *PROVENANCE)
_REQUIRED_INTEGERS = frozenset({"split_size", "w_bits", "a_bits", "seed", "calib_size"})
_INTEGERS = _REQUIRED_INTEGERS | {"iterations", "model_bytes", "packed_bytes", "threads"}
_TEXTS = frozenset(_FIXED) - _INTEGERS - {name for name in COST if name.endswith(("_seconds", "_second", "_mib"))}
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


class Key(NamedTuple):
    """Everything that decides a cell's number; of rows with equal keys the latest counts."""

    task: str
    dataset: str
    split_size: int
    model: str
    weights: str
    method: str
    spec: str
    seed: int
    calib_size: int
    options: str

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Key:
        """The key of a stored row."""
        return cls(*(row[name] for name in cls._fields))


def format_options(options: Iterable[tuple[str, Any]]) -> str:
    """Options as a row holds them: "batch_size=64;iterations=100", sorted by name."""
    return ";".join(f"{name}={value}" for name, value in sorted(options))


def metric_columns(columns: Iterable[str]) -> list[str]:
    """Of a row's columns those that are the task's metrics, in order."""
    return [name for name in columns if name not in _FIXED and not name.startswith("fp_")]


def primary_metrics(columns: Iterable[str]) -> list[str]:
    """Of a row's columns the primary metrics, which are those with a full-precision value beside them, in order."""
    return [name.removeprefix("fp_") for name in columns if name.startswith("fp_")]


def _columns(*names: Iterable[str]) -> list[str]:
    """All these columns in a row's order."""
    union = list(dict.fromkeys(name for part in names for name in part))
    return [*IDENTITY, *metric_columns(union), *(n for n in union if n.startswith("fp_")), *COST, *PROVENANCE]


def _line(values: Iterable[Any]) -> str:
    """One CSV line; a value's line breaks become spaces, so that a row is a line and a missing newline shows."""
    buffer = io.StringIO()
    texts = ("" if value is None else re.sub(r"[\r\n\0]+", " ", str(value)) for value in values)
    csv.writer(buffer, lineterminator="\n").writerow(texts)
    return buffer.getvalue()


def _split(line: str) -> list[str]:
    return next(csv.reader([line], strict=True), [])


def _value(name: str, text: str) -> Any:
    if name in _TEXTS:
        return text
    if not text and name not in _REQUIRED_INTEGERS:
        return None
    return int(text) if name in _INTEGERS else float(text)


def _parse(header: list[str], line: str) -> Row:
    """Raises ValueError (or csv.Error) saying what is wrong with the line."""
    fields = _split(line)
    if len(fields) != len(header):
        raise ValueError(f"it has {len(fields)} fields, but the header has {len(header)}")
    row = {name: _value(name, text) for name, text in zip(header, fields, strict=True)}
    if row["status"] not in ("ok", "failed"):
        raise ValueError(f"its status is {row['status']!r}, but ok or failed is expected")
    if not _TIME.fullmatch(row["time"]):
        raise ValueError(f"its time is {row['time']!r}, but one such as 2026-01-31T12:00:00Z is expected")
    return row


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """All sound rows of a result file in order, and one sentence for each line that is left out.

    A line that a killed writer cut off has no newline at its end, or one that the next writer gave it; because `time`
    is the last column, such a line never passes for a whole one.

    Raises:
        IasvitError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # not between the halves of a row that another process appends
            data = file.read()
    except OSError as error:
        raise IasvitError(f"{path} cannot be read: {error.strerror or error}") from error
    rows: list[Row] = []
    problems: list[str] = []
    lines = data.split(b"\n")
    cut_off = len(lines) if lines[-1] else None  # number of a line without newline
    if cut_off is None:
        lines.pop()
    header: list[str] | None = None
    for number, raw in enumerate(lines, start=1):
        try:
            line = raw.decode().rstrip("\r")
            if header is not None:
                rows.append(_parse(header, line))
                continue
            header = _split(line)
            if missing := [name for name in _FIXED if name not in header]:
                return [], [f"{path} line 1 is no header of a result file (no column {missing[0]!r}); file left out"]
        except (ValueError, csv.Error) as error:
            if header is None:
                return [], [f"{path} line 1 is no header of a result file ({error}); file left out"]
            what = "was cut off while it was written" if number == cut_off else f"is malformed ({error})"
            problems.append(f"{path} line {number} {what}; row left out")
    return rows, problems


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows with equal keys the latest, by time and then by order; in order of first appearance."""
    kept: dict[Key, Row] = {}
    for row in rows:
        key = Key.of(row)
        if key not in kept or row["time"] >= kept[key]["time"]:
            kept[key] = row
    return list(kept.values())


def warn(message: str) -> None:
    """Print a warning on standard error."""
    print(f"warning: {message}", file=sys.stderr)


class ResultStore:
    """Measured rows in a folder, one file <task>-<dataset>.csv for each task and data set.

    Any number of processes may append at once and lose nothing. Nothing is ever deleted from a file: a forced
    measurement appends a row with the same key, and the latest counts.

    Args:
        folder: where the files lie; made when the first row comes. Folders inside it are not read.
        report: called once with a sentence about each line that cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str], report: Callable[[str], None] = warn) -> None:
        self.folder = Path(folder)
        self._report = report
        self._reported: set[str] = set()
        self._read: dict[Path, tuple[tuple[int, int, int], list[Row]]] = {}

    def path(self, task: str, dataset: str) -> Path:
        """The file that holds the rows of a task on a data set."""
        return self.folder / f"{task}-{dataset}.csv"

    def rows(self) -> pd.DataFrame:
        """The rows of all files as a table, the latest of those with equal keys; a value that is missing is NaN."""
        found = [row for path in sorted(self.folder.glob("*.csv")) for row in self._rows(path)]
        return pd.DataFrame(latest(found), columns=_columns(*found))

    def find(self, key: Key) -> Row | None:
        """The latest row with this key, or None."""
        for row in latest(self._rows(self.path(key.task, key.dataset))):
            if Key.of(row) == key:
                return row
        return None

    def has(self, key: Key) -> bool:
        """Whether the cell was measured; one that failed was not, and a rerun tries it again."""
        row = self.find(key)
        return row is not None and row["status"] == "ok"

    def append(self, row: Row) -> None:
        """Add a row: all of it or, where that fails, nothing.

        Args:
            row: a value or None for each column of IDENTITY, COST and PROVENANCE; every other name is a metric, or
                fp_<metric> of a primary one.

        Raises:
            IasvitError: a column is missing, or the file cannot be written, or holds something else.
        """
        if missing := [name for name in _FIXED if name not in row]:
            raise IasvitError(f"the result row lacks {', '.join(missing)}")
        path = self.path(row["task"], row["dataset"])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path) as file:
                header = _header(file, path)
                size = os.fstat(file).st_size
                if not header:
                    header = _columns(row)
                    _write(file, size, _line(header) + _line(row.get(name) for name in header))
                elif any(name not in header for name in row):
                    _widen(path, _columns(header, row), row)
                else:
                    whole = os.pread(file, 1, size - 1) == b"\n"
                    _write(file, size, ("" if whole else "\n") + _line(row.get(name) for name in header))
        except OSError as error:
            reason = error.strerror or error
            raise IasvitError(f"{path} cannot be written: {reason}; free space or choose another folder") from error

    def _rows(self, path: Path) -> list[Row]:
        try:
            stat = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return []
        state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if path not in self._read or self._read[path][0] != state:
            rows, problems = read_rows(path)
            self._read[path] = (state, rows)
            for problem in problems:
                if problem not in self._reported:
                    self._reported.add(problem)
                    self._report(problem)
        return self._read[path][1]


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A file descriptor of the file at `path`, locked; the file is made if there is none."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                current = os.fstat(file).st_ino == path.stat().st_ino
            except FileNotFoundError:
                current = False
            if current:  # and not a file that another process replaced while this one waited
                yield file
                return
        finally:
            os.close(file)


def _header(file: int, path: Path) -> list[str]:
    """The columns of a result file; none if it is empty or was cut off within its header, and then it is emptied."""
    with open(path, "rb") as stream:
        raw = stream.readline()
    if not raw.endswith(b"\n") and _line(_FIXED).encode().startswith(raw[:40]):
        os.ftruncate(file, 0)
        return []
    try:
        header = _split(raw.decode().rstrip("\r\n"))
    except (ValueError, csv.Error):
        header = []
    if any(name not in header for name in _FIXED):
        raise IasvitError(f"{path} line 1 is no header of a result file; move the file away or choose another folder")
    return header


def _write(file: int, size: int, text: str) -> None:
    """Put text at the end of a file of this size, or leave the file as it was."""
    data = memoryview(text.encode())
    os.lseek(file, size, os.SEEK_SET)
    try:
        while data:
            data = data[os.write(file, data) :]
        os.fsync(file)
    except BaseException:
        os.ftruncate(file, size)
        raise


def _widen(path: Path, header: list[str], row: Row) -> None:
    """Replace a result file by one with more columns, empty in the rows it has, and with one more row.

    Lines that cannot be read stay as they are.
    """
    lines = path.read_bytes().decode(errors="surrogateescape").split("\n")
    if not lines[-1]:
        lines.pop()
    old = _split(lines[0].rstrip("\r"))
    written = [_line(header)]
    for line in lines[1:]:
        try:
            _parse(old, line.rstrip("\r"))
        except (ValueError, csv.Error):
            written.append(line + "\n")
            continue
        fields = dict(zip(old, _split(line.rstrip("\r")), strict=True))
        written.append(_line(fields.get(name) for name in header))
    written.append(_line(row.get(name) for name in header))
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes("".join(written).encode(errors="surrogateescape"))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
