"""The `iasvit` command: `python -m iasvit`."""

from __future__ import annotations

from typing import NoReturn

from iasvit.interrupts import interruptible


def main() -> NoReturn:
    """Import the command line and run it."""
    with interruptible():
        from iasvit.cli import main as run
    run()


if __name__ == "__main__":
    main()
