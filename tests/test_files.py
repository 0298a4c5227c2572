"""Files that are whole or not there, and errors in one line."""

from __future__ import annotations

import errno
import os
import random
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from iasvit.errors import IasvitError, StorageError, reason
from iasvit.files import atomic_write, replacing
from iasvit.progress import Progress


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


def test_file_then_name_then_folder_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash at any moment leaves the old file or the new one, never an empty one."""
    calls: list[str] = []
    sync, rename = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def replace(*paths: Path) -> None:
        calls.append("name")
        rename(*paths)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    atomic_write(tmp_path / "a.txt", "new")
    assert calls == ["file", "name", "folder"]


def test_threads_write_beside_under_names_of_their_own(tmp_path: Path) -> None:
    """And under names of at most 255 bytes, for a file's own name may have as many."""
    path, both = tmp_path / ("é" * 120), Barrier(2)

    def write(text: str) -> None:
        with replacing(path) as temporary:
            both.wait(10)
            temporary.write_text(text)
            both.wait(10)
            assert temporary.read_text() == text

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ["one", "two"]))
    assert path.read_text() in ("one", "two")
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


def test_a_changed_checkpoint_is_never_restored_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {"weight": torch.randn(40, 5, generator=generator), "codes": torch.arange(9, dtype=torch.uint8)}
    Progress(checkpoint=tmp_path).save(3, state)
    path = tmp_path / "checkpoint.safetensors"
    data, numbers = path.read_bytes(), random.Random(0)
    refused = 0
    for number in range(400):
        changed, start = bytearray(data), numbers.randrange(len(data))
        if number % 4 == 0:
            changed[start] ^= 1 << numbers.randrange(8)
        elif number % 4 == 1:
            changed[start : start + 16] = bytes(len(changed[start : start + 16]))
        elif number % 4 == 2:
            del changed[start:]
        else:
            changed[start : start + 4], changed[:4] = changed[:4], changed[start : start + 4]
        path.write_bytes(changed)
        caplog.clear()
        restored = Progress(checkpoint=tmp_path).restore()
        if restored is None:
            refused += 1
            assert f"the checkpoint {path} is damaged (" in caplog.text
        else:
            assert restored[0] == 3
            assert all(torch.equal(restored[1][name], value) for name, value in state.items())
    assert refused > 380
