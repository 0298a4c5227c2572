"""The exceptions that a user may see: a clear sentence, exit status 2, no traceback."""

from __future__ import annotations

from reprlib import Repr

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class IasvitError(ValueError):
    """Bad input. The message is one sentence that names the file, option or module at fault and what would be right.

    The command line prints it on standard error and exits with status 2; library callers catch it as a ValueError.
    """


class StorageError(IasvitError):
    """A file cannot be written: the disk or folder is at fault and not what is measured, so a run stops."""


def reason(error: BaseException) -> str:
    """Why an error happened, in one line: the system's text of an OSError, else its message, else its type."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())


def shown(value: object) -> str:
    """A value as messages show it: its repr, in the middle of which a long one is cut."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "an integer of thousands of digits"
