"""Locks that keep two processes from the same work; the death of their owner frees them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock at `path` while the block runs; the file is made, and removed in the end.

    Args:
        path: of the lock's file; its folder is made.
        wait: until another process that holds it lets it go; else the block runs at once, whoever holds it.

    Yields:
        Whether no other process holds the lock; True also where files cannot be locked or written at all.
    """
    file, free = None, True
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file, free = _open(path, wait)
    try:
        yield free
    finally:
        if file is not None:
            if free:
                path.unlink(missing_ok=True)
            os.close(file)


def _open(path: Path, wait: bool) -> tuple[int, bool]:
    """A descriptor of the file at `path`, and whether it is locked by it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(file, path):  # and not a file that its owner removed while this process waited
                return file, True
        except BlockingIOError:
            return file, False
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.fstat(file).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
