"""The engine of this machine: room, crashes, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sweep_fakes
from sweep_fakes import write_suite

from iasvit.benchmark.harness import Cell
from iasvit.benchmark.results import Key, ResultStore, Row
from iasvit.sweep import command
from iasvit.sweep.engine import Event, Node
from iasvit.sweep.local import LocalEngine
from iasvit.sweep.suite import Grid, Needs
from iasvit.sweep.worker import Outcome, Work

HERE = Path(__file__).parent
WORKER = (sys.executable, "-S", str(HERE / "local_worker.py"))
KEY = Key("swept", "mini", 20, "d1", "", "vit_s", "", "noise", "W3A3", 0, 8, "")


def work(title: str, needs: Needs | None = None) -> Work:
    return Work(Grid("here", "swept", {}, needs or Needs()), Cell("vit_s", "noise", "W3A3", 0, 8), KEY, title)


@pytest.fixture
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalEngine]:
    """2 cores and 2 GPUs that are numbers 4 and 7 of the machine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    made = LocalEngine(cpu=2, gpu=2, worker=WORKER)
    yield made
    made.close()


def run(engine: LocalEngine, *works: Work) -> dict[int, Outcome]:
    """Submit these, and wait for what becomes of them."""
    for ticket, each in enumerate(works):
        engine.submit(ticket, each, each.grid.needs)
    outcomes: dict[int, Outcome] = {}
    deadline = time.monotonic() + 60
    while len(outcomes) < len(works):
        assert time.monotonic() < deadline
        outcomes |= {event.ticket: event.outcome for event in engine.events(1) if event.outcome is not None}
    return outcomes


def together(rows: list[Row]) -> int:
    """How many of these ran at once, at most."""
    return max(sum(other["start"] <= row["start"] < other["end"] for other in rows) for row in rows)


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int], seconds: float) -> bool:
    """Whether these processes end within so many seconds."""
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def test_as_many_at_once_as_there_is_room_for(engine: LocalEngine) -> None:
    rows = [outcome.rows[0] for outcome in run(engine, *[work("sleep 0.3")] * 4).values()]
    assert together(rows) == 2
    assert {row["gpus"] for row in rows} == {""}
    wide = [outcome.rows[0] for outcome in run(engine, *[work("sleep 0.3", Needs(cpu=2))] * 2).values()]
    assert together(wide) == 1
    assert {row["threads"] for row in wide} == {"2"}


def test_gpus_are_shared_by_fractions(engine: LocalEngine) -> None:
    half = Needs(gpu=0.5)
    assert engine._room(half) == {0: 0.5}
    outcomes = run(engine, work("sleep 0.3", half), work("sleep 0.3", half), work("sleep 0.3", Needs(gpu=2)))
    rows = [outcomes[ticket].rows[0] for ticket in range(3)]
    assert [row["gpus"] for row in rows] == ["4", "4", "4,7"]  # one GPU is filled before the next is begun
    assert rows[2]["start"] >= max(row["end"] for row in rows[:2])


@pytest.mark.parametrize(
    ("title", "error"),
    [
        ("crash", "the process ended with status 3: Segfault in kernel"),
        ("killed", "the process ended by signal SIGKILL"),
    ],
)
def test_a_process_that_dies_is_a_failure(engine: LocalEngine, title: str, error: str) -> None:
    assert run(engine, work(title), work("sleep"))[0] == Outcome(error=error)


def test_nodes_and_room(engine: LocalEngine) -> None:
    (node,) = engine.nodes()
    assert (node.cpu, node.gpu) == (2, 2)
    assert node.memory_gib > 1
    assert node.fits(Needs(2, 2, 1))
    assert not Node("x", 2, 1, 4).fits(Needs(2, 1, 5))


def test_closing_ends_what_runs_with_its_children(engine: LocalEngine, tmp_path: Path) -> None:
    for ticket in range(3):
        engine.submit(ticket, work(f"family {tmp_path / 'pids'}"), Needs())
    pids = _pids(tmp_path / "pids", 2, engine)
    assert all(alive(pid) for pid in pids)
    engine.close()
    assert gone(pids, 2)
    assert all(event.outcome is not None for event in engine.events(0.1))  # the third is not started any more


def test_workers_end_when_the_sweep_is_killed(tmp_path: Path) -> None:
    """Even by SIGKILL, after which nothing can be cleaned up."""
    worker = "import os, subprocess; from iasvit.sweep import worker\ndef measure(work):\n"
    worker += "    child = subprocess.Popen(['sleep', '600'])\n"
    worker += (
        f"    print(os.getpid(), child.pid, file=open({str(tmp_path / 'pids')!r}, 'w'), flush=True)\n    child.wait()\n"
    )
    worker += "worker.Work.from_json = lambda text: text\nworker.measure = measure\nworker.main()"
    driver = "import sys; sys.path.insert(0, sys.argv[1]); import test_local as t; "
    driver += "e = t.LocalEngine(1, 0, [sys.executable, '-c', sys.argv[2]]); e.submit(0, t.work(''), t.Needs())\n"
    driver += "while True: e.events(1)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])}
    process = subprocess.Popen([sys.executable, "-c", driver, str(HERE), worker], env=env)
    pids = _pids(tmp_path / "pids", 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone(pids, 10)


def _pids(path: Path, lines: int, engine: LocalEngine | None = None) -> list[int]:
    """The process ids in a file, once it has so many lines."""
    deadline = time.monotonic() + 60
    while not path.exists() or len(path.read_text().splitlines()) < lines or not path.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        found: list[Event] = engine.events(0.05) if engine else []
        assert all(event.outcome is None for event in found)
        time.sleep(0.05)
    return [int(pid) for pid in path.read_text().split()]


@pytest.mark.slow
def test_a_suite_in_real_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep_fakes.install(monkeypatch, tmp_path)
    monkeypatch.setenv("IASVIT_TEST_LOG", str(tmp_path / "log"))
    mini = 'task = "imagenet"\ndata = "mini"\nlimit = 8\ncalib_size = 2\nbackbone = ["deit_t"]'
    mini += '\nmethod = ["minmax"]\nbits = ["W8A8"]\nseed = [0]'
    path = write_suite(Path("s.toml"), 'bits = ["W3A3"]\nseed = [0]\nmethod = ["frail"]\nresources = {cpu = 2}', mini)
    assert command.run(str(path), "local", None, Path("runs")) is False
    shown = capsys.readouterr()
    assert shown.err.splitlines()[0] == "s: 2 cells, 0 stored already, 2 to measure"
    assert "imagenet on mini, W8A8: top1, 8 images" in shown.out
    assert "rows: runs/imagenet-mini.csv, runs/swept-mini.csv" in shown.out
    rows = ResultStore("runs").rows()
    assert sorted(rows["method"]) == ["fp32", "fp32", "frail", "minmax"]
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.split()[3] == "2"  # threads
    assert int(line.split()[2]) != os.getpid()
    assert command.run(str(path), "local", None, Path("runs")) is False
    assert "2 stored already, 0 to measure" in capsys.readouterr().err
