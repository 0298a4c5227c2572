"""Files that are whole or not there: written beside, and renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from iasvit.errors import StorageError, reason


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to; the file is on the disk and renamed to `path` when the block ends.

    Where the block raises, what it wrote is removed and the file at `path`, if any, stays as it was.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file at once; text in UTF-8. Its folder must be there.

    Raises:
        StorageError: the file cannot be written; the message names it.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {reason(error)}") from error
