"""Tasks' commands as a user runs them, in this process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import typer

from iasvit.cli import main


def run(app: typer.Typer | None, monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """Run a command, `iasvit` itself where no other is given; its exit status."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
    with pytest.raises(SystemExit) as status:
        main(app)
    return int(status.value.code or 0)


def run_script(path: Path, monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """Run a file as `python FILE` does; its exit status."""
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, args)])
    with pytest.raises(SystemExit) as status:
        runpy.run_path(str(path), run_name="__main__")
    return int(status.value.code or 0)


def complaint(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object
) -> str:
    """The one sentence that a command prints to bad input."""
    assert run(app, monkeypatch, *args) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]
