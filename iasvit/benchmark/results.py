"""The result store: one CSV file for each task and data set, one row a measured cell, appended atomically."""

from __future__ import annotations

import csv
import fcntl
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from iasvit.benchmark.task import Row, data_set
from iasvit.errors import IasvitError, StorageError, reason, shown
from iasvit.files import atomic_write, replacing

SCHEMA = 3

# A row's columns are IDENTITY, the task's metrics, fp_<metric> of its primary metrics, COST, RULES, PROVENANCE.
IDENTITY = (
    *("schema_version", "task", "dataset", "split_size", "data_fingerprint", "config_fingerprint", "model", "weights"),
    *("method", "w_bits", "a_bits", "spec", "seed", "calib_size", "calib_used", "options"),
    *("method_version", "task_version", "data_kind", "data_description"),
)
COST = (
    *("iterations", "calibration_seconds", "reconstruction_seconds", "quantization_seconds", "evaluation_seconds"),
    *("images_per_second", "peak_memory_mib", "model_bytes", "packed_bytes"),
)
PROVENANCE = (
    *("model_file", "device", "threads", "python", "torch", "timm", "iasvit", "git_commit", "spec_hash", "command"),
    *("status", "reason", "time"),
)
# `iasvit.admission` in a line; and the metrics of the network in full precision where a transform has changed it, as
# `format_options` writes them. Rows of before have neither.
RULES = ("admission", "transformed")
_NEEDED_OF_ROWS = (*IDENTITY, *COST, *PROVENANCE)
_FIXED = (*_NEEDED_OF_ROWS, *RULES)
# Without these a row says nothing; a file may lack any other column.
_NEEDED_INTEGERS = ("split_size", "w_bits", "a_bits", "seed", "calib_size")
_NEEDED = ("task", "dataset", "model", "method", "spec", *_NEEDED_INTEGERS, "status", "time")
_VERSIONS = ("schema_version", "method_version", "task_version")  # 1 where they are missing
_INTEGERS = frozenset(
    {*_NEEDED_INTEGERS, *_VERSIONS, "iterations", "calib_used", "model_bytes", "packed_bytes", "threads"}
)
_TEXTS = frozenset({*IDENTITY, *RULES, *PROVENANCE}) - _INTEGERS
_LONGEST = 100_000  # characters of a value
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


class Key(NamedTuple):
    """Everything that decides a cell's number. Of rows with equal keys the latest counts.

    A row of schema 1 has an empty `data_fingerprint`. Its data and configuration are unknown, and equal nothing that is
    known.
    """

    task: str
    dataset: str
    split_size: int
    data_fingerprint: str
    config_fingerprint: str
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

    def stored(self) -> Key:
        """The key as a row holds it, the same text after writing and reading."""
        return Key(*(_plain(value) if isinstance(value, str) else value for value in self))

    def unknown(self) -> Key:
        """The key of the same cell on unknown data."""
        return self._replace(data_fingerprint="", config_fingerprint="")


Fields = dict[str, str]  # a row as its file has it


def _from_1(fields: Fields) -> Fields:
    """Schema 2 has fingerprints, unknown here, versions in place of the code's hash, and the kind of data."""
    data = data_set(fields["task"], fields["dataset"])
    fields.pop("code_hash", "")
    new = {"method_version": "1", "data_kind": data.kind, "data_description": data.description}
    return {**fields, **new, "schema_version": "2"}


def _from_2(fields: Fields) -> Fields:
    """Schema 3 has the number of calibration images that the method read: what the method says, if it is installed."""
    used = _images_used(fields["method"], fields.get("options", ""), int(fields["calib_size"]))
    return {**fields, "calib_used": "" if used is None else str(used), "schema_version": "3"}


@cache
def _images_used(name: str, options: str, calib_size: int) -> int | None:
    """None where it is not known: no such method here, or none that takes these options."""
    if calib_size == 0:  # full precision
        return 0
    from iasvit.methods import get_method, images_used, parse_value  # torch, which rows of today do without

    words = {"True": True, "False": False, "None": None}  # as `format_options` writes them
    pairs = (option.partition("=")[::2] for option in options.split(";") if option)
    try:
        return images_used(
            get_method(name, **{key: words.get(value, parse_value(value)) for key, value in pairs}), calib_size
        )
    except IasvitError:
        return None


UPGRADES: dict[int, Callable[[Fields], Fields]] = {1: _from_1, 2: _from_2}  # from this schema to the next


def format_options(options: Iterable[tuple[str, Any]]) -> str:
    """Options as a row holds them: "batch_size=64;iterations=100", sorted by name."""
    return ";".join(f"{name}={value}" for name, value in sorted(options))


def metric_columns(columns: Iterable[str]) -> list[str]:
    """The columns of a row that are the task's metrics, in order."""
    return [name for name in columns if name not in _FIXED and not name.startswith("fp_")]


def primary_metrics(columns: Iterable[str]) -> list[str]:
    """The primary metrics among a row's columns, in order: those that also have a full-precision value."""
    return [name.removeprefix("fp_") for name in columns if name.startswith("fp_")]


def _columns(*names: Iterable[str]) -> list[str]:
    """All these columns in a row's order."""
    union = list(dict.fromkeys(name for part in names for name in part))
    return [*IDENTITY, *metric_columns(union), *(n for n in union if n.startswith("fp_")), *COST, *RULES, *PROVENANCE]


def _plain(text: str) -> str:
    """The text as a file can hold it: line breaks become spaces, so that a row is a line and a missing newline shows.

    What is not UTF-8, in a path say, becomes escapes; what is longer than a CSV reader's field is cut.
    """
    text = re.sub(r"[\r\n\0]+", " ", text).encode(errors="backslashreplace").decode()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({len(text)} characters)"


def _line(values: Iterable[Any]) -> str:
    """One CSV line."""
    buffer = io.StringIO()
    texts = ("" if value is None else _plain(str(value)) for value in values)
    csv.writer(buffer, lineterminator="\n").writerow(texts)
    return buffer.getvalue()


def _split(line: str) -> list[str]:
    return next(csv.reader([line], strict=True), [])


def _value(name: str, text: str, header: Iterable[str]) -> Any:
    if name in _TEXTS:
        return text
    if not text and name not in _NEEDED_INTEGERS:
        return 1 if name in _VERSIONS else None
    if name in _INTEGERS:
        return int(text)
    if name not in COST and not name.startswith("fp_") and f"fp_{name}" not in header:
        with suppress(ValueError):
            return float(text)
        return text  # a column of a later version of this program
    return float(text)


def _fields(header: list[str], line: str) -> Fields:
    """A line's fields in the present schema; raises ValueError (or csv.Error) saying what is wrong with the line."""
    texts = _split(line)
    if len(texts) != len(header):
        raise ValueError(f"it has {len(texts)} fields, but the header has {len(header)}")
    fields = dict(zip(header, texts, strict=True))
    if fields["status"] not in ("ok", "failed"):
        raise ValueError(f"its status is {fields['status']!r}, but ok or failed is expected")
    if not _TIME.fullmatch(fields["time"]):
        raise ValueError(f"its time is {fields['time']!r}, but one such as 2026-01-31T12:00:00Z is expected")
    while (schema := int(fields.get("schema_version") or 1)) in UPGRADES:
        fields = UPGRADES[schema](fields)
    return fields


def _parse(header: list[str], line: str) -> Row:
    """A line's row, with a default for each column that its file lacks; raises as `_fields` does."""
    fields = _fields(header, line)
    return {name: _value(name, fields.get(name, ""), header) for name in _columns(fields)}


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """Return all sound rows of a result file in order, and one sentence for each line that is left out.

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
        raise IasvitError(f"{path} cannot be read: {reason(error)}") from error
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
            if missing := [name for name in _NEEDED if name not in header]:
                return [], [
                    f"{path} line 1 is not the header of a result file (no column {missing[0]!r}); file left out"
                ]
        except (ValueError, csv.Error) as error:
            if header is None:
                return [], [f"{path} line 1 is not the header of a result file ({error}); file left out"]
            what = "was cut off while it was written" if number == cut_off else f"is malformed ({error})"
            problems.append(f"{path} line {number} {what}; row left out")
    return rows, problems


def latest(rows: Iterable[Row]) -> list[Row]:
    """Keep the latest of rows with equal keys, by time and then by order; in order of first appearance.

    A row on unknown data is left out if the same cell has a row on known data.
    """
    kept: dict[Key, Row] = {}
    for row in rows:
        key = Key.of(row)
        if key not in kept or row["time"] >= kept[key]["time"]:
            kept[key] = row
    known = {key.unknown() for key in kept if key.data_fingerprint}
    return [row for key, row in kept.items() if key.data_fingerprint or key.unknown() not in known]


def check_writable(path: Path, folder: Path) -> None:
    """Check before the long work that a file can be written at `path`, in `folder`, which is made.

    Raises:
        IasvitError: it cannot be written, or its name is not UTF-8 or too long.
    """
    trial = path.with_name(f"{path.name}.try")
    try:
        str(path.absolute()).encode()
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(trial) as beside:  # whose name is the longest that will be written
            beside.touch()
        trial.unlink(missing_ok=True)  # another process may try the same
    except UnicodeEncodeError:
        raise IasvitError(f"folder {shown(str(folder))} is not UTF-8; choose another one") from None
    except OSError as error:
        raise StorageError(
            f"folder {shown(str(folder))} cannot be written: {reason(error)}; choose another one"
        ) from error


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
        try:
            paths = sorted(self.folder.glob("*.csv"))
        except OSError as error:
            raise IasvitError(f"{shown(str(self.folder))} cannot be read: {reason(error)}") from error
        found = [row for path in paths for row in self._rows(path)]
        return pd.DataFrame(latest(found), columns=_columns(*found))

    def find(self, key: Key) -> Row | None:
        """The latest row with this key, or None."""
        for row in latest(self._rows(self.path(key.task, key.dataset))):
            if Key.of(row) == key:
                return row
        return None

    def has(self, key: Key) -> bool:
        """Whether the cell was measured. A failed cell was not, and a rerun tries it again."""
        row = self.find(key)
        return row is not None and row["status"] == "ok"

    def check(self, task: str, dataset: str) -> None:
        """Check before the long work that rows of a task on a data set can be stored. No file is left behind.

        Raises:
            IasvitError: the folder or the file cannot be written, its name is not UTF-8 or too long, or it holds
                something else.
        """
        path = self.path(task, dataset)
        check_writable(path, self.folder)
        try:
            if path.exists():
                with _locked(path) as file:
                    _header(file, path)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {reason(error)}; choose another folder") from error

    def append(self, row: Row) -> None:
        """Add a row: the whole row or, if that fails, nothing.

        Args:
            row: a value or None for each column of IDENTITY, COST and PROVENANCE; every other name is a metric, or
                fp_<metric> of a primary one.

        Raises:
            IasvitError: a column is missing, or the file cannot be written, or holds something else.
        """
        if missing := [name for name in _NEEDED_OF_ROWS if name not in row]:
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
                    _rewrite(path, row)
                else:
                    whole = os.pread(file, 1, size - 1) == b"\n"
                    _write(file, size, ("" if whole else "\n") + _line(row.get(name) for name in header))
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written: {reason(error)}; free space or choose another folder"
            ) from error

    def _rows(self, path: Path) -> list[Row]:
        try:
            stat = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise IasvitError(f"{shown(str(path))} cannot be read: {reason(error)}") from error
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
    if any(name not in header for name in _NEEDED):
        raise IasvitError(
            f"{path} line 1 is not the header of a result file; move the file away or choose another folder"
        )
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


def _rewrite(path: Path, row: Row) -> None:
    """Replace a result file by one in the present schema with one more row, and with all columns of both.

    Lines that cannot be read stay as they are.
    """
    lines = path.read_bytes().decode(errors="surrogateescape").split("\n")
    if not lines[-1]:
        lines.pop()
    old = _split(lines[0].rstrip("\r"))
    read: list[Fields | str] = []
    for line in lines[1:]:
        try:
            _parse(old, line.rstrip("\r"))
            read.append(_fields(old, line.rstrip("\r")))
        except (ValueError, csv.Error):
            read.append(line + "\n")
    header = _columns(*(fields for fields in read if isinstance(fields, dict)), row)
    written = [_line(header)]
    for kept in read:
        written.append(kept if isinstance(kept, str) else _line(kept.get(name) for name in header))
    written.append(_line(row.get(name) for name in header))
    atomic_write(path, "".join(written).encode(errors="surrogateescape"))
