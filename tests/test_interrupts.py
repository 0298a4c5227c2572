"""Signals: one line, the status of the signal, and nothing left, during imports and later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIGNALS = [signal.SIGINT, signal.SIGTERM]
_APP = """
import os, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from iasvit.cli import main, make_app
from iasvit.scratch import scratch
app = make_app()
@app.command()
def go():
    with scratch("x-", Path()):
        try:
            os.kill(os.getpid(), NUMBER)
        except Exception:
            print("swallowed")
main(app)
"""


def run(folder: Path, *args: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), *sys.path])}
    command = [sys.executable, *map(str, args)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("slow", "args"), [("torch", [ROOT / "tasks" / "imagenet.py"]), ("typer", ["-m", "iasvit", "list"])]
)
def test_a_signal_during_imports_ends_with_a_line(
    tmp_path: Path, slow: str, args: list[object], number: signal.Signals
) -> None:
    """The module that takes long is one that sends the signal, and would swallow an exception."""
    text = f"import os\ntry:\n    os.kill(os.getpid(), {int(number)})\nexcept BaseException:\n    pass\n"
    (tmp_path / f"{slow}.py").write_text(text)
    ended = run(tmp_path, *args)
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert (ended.returncode, ended.stderr) == (128 + number, f"{word} before anything ran\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_work_cleans_up(tmp_path: Path, number: signal.Signals) -> None:
    ended = run(tmp_path, "-c", _APP.replace("NUMBER", str(int(number))))
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert ended.stderr == f"{word}; run the same command again to continue where it stopped\n"
    assert (ended.returncode, ended.stdout) == (128 + number, "")
    assert list(tmp_path.iterdir()) == []
