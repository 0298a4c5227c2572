"""How many cores are there and free, and that threads wait without spinning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from iasvit import threads


@pytest.mark.parametrize(("text", "cores"), [("max 100000", 8), ("250000 100000", 3), ("10000 100000", 1), ("?", 8)])
def test_a_quota_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cpu.max").write_text(text)
    assert threads.usable_cores(tmp_path / "cpu.max") == cores
    assert threads.usable_cores(tmp_path / "none") == 8


def test_cores_that_others_use_are_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four cores, one is not in the affinity, one is busy, one half, one idle."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 3})
    path = tmp_path / "stat"

    def write(*ticks: tuple[int, int]) -> None:
        lines = [f"cpu{core} 0 0 {busy} {idle} 0 0 0 0 0 0" for core, (busy, idle) in enumerate(ticks)]
        path.write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *lines, "intr 5"]))

    write(*[(100, 100)] * 4)
    monkeypatch.setattr(threads.time, "sleep", lambda _: write((200, 100), (100, 200), (100, 200), (160, 140)))
    assert threads.free_cores(path) == 1  # 0 + 1 + 0.4
    assert threads.free_cores(tmp_path / "none") == threads.usable_cores()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads.free_cores(path) == 5


def test_a_command_waits_passively_unless_told_otherwise() -> None:
    code = "import os, sys; sys.argv = ['iasvit', '--help']\nfrom iasvit.__main__ import main\n"
    code += "try: main()\nexcept SystemExit: print(os.environ['OMP_WAIT_POLICY'])"
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == expected
