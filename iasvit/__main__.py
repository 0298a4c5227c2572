"""The `iasvit` command: `python -m iasvit`."""

from __future__ import annotations

from typing import NoReturn

from iasvit.interrupts import interruptible
from iasvit.threads import wait_passively


def main() -> NoReturn:
    """Import the command line and run it."""
    wait_passively()
    with interruptible():
        from iasvit.cli import main as run
    run()


if __name__ == "__main__":
    main()
