"""Optional packages, imported where they are needed."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from iasvit.errors import IasvitError, reason


def imported(package: str, extra: str) -> ModuleType:
    """A package of an extra.

    Raises:
        IasvitError: it is not installed; the message says how to install it.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise IasvitError(
            f"{package} is needed and cannot be imported ({reason(error)}); install it by pip install 'iasvit[{extra}]'"
        ) from error
