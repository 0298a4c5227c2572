"""Fingerprints: hex digits that tell data sets and configurations apart. No image file is read for them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def fingerprint(content: Any) -> str:
    """Sixteen hex digits of the SHA-256 of dictionaries, sequences, texts and numbers; the order of keys is ignored.

    A class or a function in it counts by its qualified name. What stands for nothing else, a set say, raises TypeError.
    """
    text = json.dumps(content, sort_keys=True, default=_qualified_name)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _qualified_name(value: Any) -> str:
    if not callable(value) or not hasattr(value, "__qualname__"):
        raise TypeError(f"a {type(value).__name__} has no fingerprint")
    return f"{value.__module__}.{value.__qualname__}"


def file_sizes(paths: Iterable[str | Path], root: Path) -> list[tuple[str, int]]:
    """(path relative to `root`, bytes) of each file, in order; -1 bytes for one that cannot be found."""
    return [(Path(os.path.relpath(path, root)).as_posix(), _size(path)) for path in paths]


def _size(path: str | Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
