"""Temporary folders that go with their owner, and those that a killed process left behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "iasvit-"
_LOCK = ".lock"


class Scratch:
    """A temporary folder. It goes with `remove`, with this object, or with the process.

    One that a killed process left in the same place goes when the next one is made there: a process holds a lock on a
    file in its folder as long as it lives.

    Args:
        name: part of the folder's name, which says what it is for.
        parent: folder to make it in; None for the system's temporary one.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, name: str = "", parent: Path | None = None) -> None:
        where = Path(tempfile.gettempdir() if parent is None else parent)
        _remove_left(where)
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{name}", dir=where))
        # Locked before it has the name by which others look for it.
        unnamed = self.path / f"{_LOCK}.new"
        lock = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o600)
        with suppress(OSError):  # where files cannot be locked, nobody takes the folder for left behind either
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(unnamed, self.path / _LOCK)
        self.remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())


@contextmanager
def scratch(name: str = "", parent: Path | None = None) -> Iterator[Path]:
    """A temporary folder for a block; see `Scratch`."""
    folder = Scratch(name, parent)
    try:
        yield folder.path
    finally:
        folder.remove()


def _remove(path: Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # and not a process that it forked
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _remove_left(where: Path) -> None:
    """Remove this user's folders of which nobody holds the lock any more."""
    with suppress(OSError):
        for entry in os.scandir(where):
            if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    _remove_if_left(entry)


def _remove_if_left(entry: os.DirEntry[str]) -> None:
    if entry.stat(follow_symlinks=False).st_uid != os.getuid():
        return
    lock = os.open(Path(entry.path) / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(entry.path, ignore_errors=True)
    finally:
        os.close(lock)
