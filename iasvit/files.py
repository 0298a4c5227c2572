"""Files that are complete or absent: they are written beside their place and renamed."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from iasvit.errors import StorageError, reason


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path beside `path` to write to. When the block ends, the file is on the disk and renamed to `path`.

    If the block raises, what it wrote is removed, and the file at `path`, if any, stays as it was. The new file has the
    mode that the umask gives. A link is never replaced: the file that it points to is. The rename is on the disk too,
    so that a crash afterwards does not bring the old file back.

    Raises:
        OSError: the file cannot be written, or `path` is a folder, a device, a pipe or a socket.
    """
    try:
        str(path).encode()
        path = Path(os.path.realpath(path))
    except ValueError as error:
        raise OSError(f"its name is not text in UTF-8 ({reason(error)})") from error
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is a folder, a device or a pipe, but a file is expected")
    name = path.name.encode()[:100].decode(errors="ignore")
    temporary = path.with_name(f".{name}.{os.getpid()}-{threading.get_native_id()}.tmp")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = os.fstat(handle).st_mode  # what umask or the folder's access list leave of it
    os.close(handle)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fchmod(file.fileno(), stat.S_IMODE(mode))  # safetensors makes files that the owner alone reads
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems have no fsync of folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


SEAL = "iasvit"  # the metadata entry that holds the checksums


class DamagedError(ValueError):
    """A file's content is not what was written: the message says what differs."""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file with a checksum of every tensor and of the metadata, on the CPU, contiguous.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    sums = {name: _checksum(str(t.dtype), str(list(t.shape)), _bytes(t)) for name, t in tensors.items()}
    text = json.dumps({"metadata": metadata, "checksums": sums}, sort_keys=True)
    save_file(tensors, path, {SEAL: f"{_checksum(text)} {text}"})  # one entry: safetensors shuffles several


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of `write_tensors`.

    Raises:
        OSError, SafetensorError: the file cannot be read, or is no safetensors file.
        DamagedError: it has no checksums, or its content differs from them.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is a folder, a device or a pipe")  # which safetensors would wait for
    with safe_open(path, framework="pt") as file:
        seal = (file.metadata() or {}).get(SEAL, "")
        checksum, _, text = seal.partition(" ")
        names = set(file.keys())
        if seal.startswith("{"):
            raise DamagedError("it is of an earlier version of iasvit, which wrote no checksums")
        if checksum != _checksum(text):
            raise DamagedError("its header differs from its checksum" if checksum else "it has no checksums")
        content = json.loads(text)
        metadata, sums = content["metadata"], content["checksums"]
        for name in sorted(names ^ set(sums)):
            raise DamagedError(f"the tensor {name!r} is {'unexpected' if name in names else 'missing'}")
        tensors = {name: file.get_tensor(name) for name in sorted(names)}
    for name, tensor in tensors.items():
        if sums[name] != _checksum(str(tensor.dtype), str(list(tensor.shape)), _bytes(tensor)):
            raise DamagedError(f"the tensor {name!r} differs from its checksum")
    return tensors, metadata


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _checksum(*parts: str | memoryview) -> str:
    """32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode() + b"\x1f" if isinstance(part, str) else part)
    return digest.hexdigest()


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
