"""Files that are whole or not there, and errors in one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from iasvit.errors import IasvitError, StorageError, reason
from iasvit.files import atomic_write, replacing


def test_a_file_is_replaced_and_nothing_stays_beside(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "früher")
    assert path.read_bytes() == "früher".encode()
    atomic_write(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "old")
    with pytest.raises(FileNotFoundError), replacing(path) as temporary:
        (temporary.write_text("new"), temporary.rename(tmp_path / "none" / "x"))
    assert list(tmp_path.iterdir()) == [path]

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError) as error:
        atomic_write(path, "new")
    assert str(error.value) == f"{path} cannot be written: No space left on device"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none/a\.txt cannot be written: No such file or directory"):
        atomic_write(tmp_path / "none" / "a.txt", "x")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EACCES, "Permission denied", "a.txt"), "Permission denied"),
        (OSError("odd"), "odd"),
        (IasvitError("two\n  lines"), "two lines"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_reason_is_one_line(error: Exception, expected: str) -> None:
    assert reason(error) == expected
