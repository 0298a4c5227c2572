"""What packages register under an entry point: methods, tasks, model families."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

from iasvit.errors import IasvitError


def load(entry: EntryPoint, what: str) -> Any:
    """What an entry point names.

    Args:
        entry: of a group of iasvit's.
        what: it is, for the message: "method 'minmax'".

    Raises:
        IasvitError: its module cannot be imported, or has no such name.
    """
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise IasvitError(
            f"{what} is registered as {entry.value}, but loading that failed: {error}; "
            "mend or uninstall the package that registers it"
        ) from error
