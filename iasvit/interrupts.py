"""Ctrl-C and SIGTERM while modules are imported: the process ends with one line, since nothing has begun.

Imported before anything that takes long, so that it imports next to nothing itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Ended(SystemExit):
    """This process ends because another one of its group has failed, and has said why."""


def _end(number: int, frame: Any) -> None:
    what = "interrupted" if number == signal.SIGINT else "terminated"
    sys.stderr.write(f"{what} before anything ran\n")
    sys.stderr.flush()
    os._exit(128 + number)  # an exception would become that of the module whose import it breaks off


def end_on_signals() -> dict[int, Any]:
    """End the process at once, with one line and status 130 or 143, where a signal comes from now on.

    For a script, before its imports; `iasvit.cli.main` puts its own handlers in place of these.

    Returns:
        Signal → the handler that it had.
    """
    ours = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    try:
        return {number: signal.signal(number, _end) for number in ours}
    except ValueError:  # not in the main thread, which alone gets signals
        return {}


def is_default(number: int) -> bool:
    """Whether a signal has the handler that a process begins with, or that of `end_on_signals`."""
    return signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, _end)


@contextmanager
def interruptible() -> Iterator[None]:
    """The same during a block."""
    before = end_on_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
