"""Temporary folders: they go with their owner, and those of killed processes with the next one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from iasvit.scratch import Scratch, scratch

_KILLED = """
import os, signal, sys
from pathlib import Path
from iasvit.scratch import Scratch
folder = Scratch("killed-", Path(sys.argv[1]))
(folder.path / "big.bin").write_bytes(b"x" * 1000)
if not os.fork():  # a worker ends without taking the folder with it
    sys.exit()
os.wait()
assert folder.path.is_dir()
os.kill(os.getpid(), int(sys.argv[2]))
"""


def kill(folder: Path, number: int) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    run = subprocess.run([sys.executable, "-c", _KILLED, folder, str(number)], env=env, capture_output=True, text=True)
    assert run.returncode == -number, run.stderr


def test_what_a_killed_process_left_goes_with_the_next_folder(tmp_path: Path) -> None:
    living = Scratch("living-", tmp_path)
    (tmp_path / "iasvit-not-ours").mkdir()
    (tmp_path / "iasvit-link").symlink_to(tmp_path / "iasvit-not-ours")
    kill(tmp_path, 9)
    (left,) = tmp_path.glob("iasvit-killed-*")
    with scratch("next-", tmp_path) as folder:
        assert folder.is_dir()
        assert not left.exists()
        assert living.path.is_dir()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(["iasvit-not-ours", "iasvit-link", living.path.name])


def test_a_folder_goes_with_its_object(tmp_path: Path) -> None:
    folder = Scratch(parent=tmp_path)
    (folder.path / "x").touch()
    del folder
    assert list(tmp_path.iterdir()) == []
