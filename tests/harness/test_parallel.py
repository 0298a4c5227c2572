"""Cells side by side: the rows of a run in one process, whatever ends a process, and the time left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import harness_fakes
import pytest
from harness_fakes import FakeTask

from iasvit import methods
from iasvit.benchmark import parallel
from iasvit.benchmark.harness import Cell, run_cells
from iasvit.benchmark.parallel import CrashError, TimeLeft, in_good_order, run_side_by_side, side_by_side
from iasvit.benchmark.results import COST, ResultStore, Row
from iasvit.errors import IasvitError

CELLS = [
    Cell(model, "noise", spec, seed, 8) for model in ("vit_s", "vit_b") for spec in ("W3A3", "W4A4") for seed in (0, 1)
]


@pytest.fixture(autouse=True)
def _methods(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(methods, "_entries", lambda: harness_fakes.ENTRIES)
    monkeypatch.chdir(tmp_path)


def numbers(row: Row) -> Row:
    """What does not depend on when it was measured."""
    return {name: value for name, value in row.items() if name not in (*COST, "time")}


def test_rows_are_those_of_one_process_and_each_is_stored_once(capsys: pytest.CaptureFixture[str]) -> None:
    store = ResultStore("side")
    side = run_side_by_side(FakeTask(), CELLS, store, 3)
    one = run_cells(FakeTask(), CELLS, ResultStore("one"), quiet=True)
    assert [numbers(row) for row in side] == [numbers(row) for row in one]
    rows = store.rows()
    assert sorted(rows["method"]) == ["fp32"] * 2 + ["noise"] * 8
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "8 cells, 0 stored already; 3 at once, a thread each"
    assert sorted(line.split("]")[0] for line in said[1:]) == [f"[{number}/8" for number in range(1, 9)]

    task = FakeTask()
    assert [row["time"] for row in run_side_by_side(task, CELLS, store, 3, quiet=True)] == [row["time"] for row in side]
    assert task.loaded == []  # all are stored
    assert len(store.rows()) == 10


def test_a_failed_cell_is_a_row_and_a_killed_process_is_said_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run_side_by_side(FakeTask(), [*CELLS[:2], Cell("vit_s", "broken", "W3A3", 0, 8)], ResultStore("a"), 2)
    assert [row["status"] for row in rows] == ["ok", "ok", "failed"]
    assert "vit_s broken W3A3 seed 0: failed: " in capsys.readouterr().err
    monkeypatch.setenv("IASVIT_TEST_SIGNAL", str(int(signal.SIGKILL)))
    store = ResultStore("b")
    with pytest.raises(IasvitError, match=r"1 of 3 cells were not measured; the first is .* killed .* by SIGKILL"):
        run_side_by_side(FakeTask(), [Cell("vit_s", "killed", "W3A3", 0, 8), *CELLS[:2]], store, 2)
    assert sorted(store.rows()["method"]) == ["fp32", "noise", "noise"]


def test_what_a_work_raises_ends_the_others_and_comes_here() -> None:
    def fail() -> int:
        raise IasvitError("the disk is full")

    started = time.monotonic()
    with pytest.raises(IasvitError, match="the disk is full"):
        list(side_by_side([lambda: time.sleep(60), fail], 2))
    assert time.monotonic() - started < 30
    ended = [outcome for _, outcome in side_by_side([lambda: os._exit(3)], 1) if outcome]
    assert [str(each) for each in ended] == ["its process ended with status 3; if memory ran out, use fewer --jobs"]
    assert isinstance(ended[0], CrashError)


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    code = "import os, time\nfrom iasvit.benchmark.parallel import side_by_side\n"
    code += "def work():\n    open(f'{os.getpid()}.pid', 'w').close()\n    time.sleep(600)\n"
    code += "list(side_by_side([work, work], 2))"
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 60
    while len(found := list(tmp_path.glob("*.pid"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while any(Path(f"/proc/{each.stem}/stat").exists() for each in found):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_shortest_comes_first_then_the_longest() -> None:
    assert in_good_order([5.0, 1.0, 9.0, 3.0]) == [1, 2, 0, 3]
    assert in_good_order([None, 2.0]) == [0, 1]


def test_time_left_follows_the_works_that_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the work done in 40 s for the 20 s expected: the bar stands at a half, and in between below the end."""
    now = [0.0]
    monkeypatch.setattr(parallel.time, "monotonic", lambda: now[0])
    # A work of unknown cost takes what the others take.
    with TimeLeft(
        [20.0, None, 20.0], "aaa", "", quiet=True
    ) as left:  # a work of unknown cost takes what the others take
        moved: list[int] = []
        monkeypatch.setattr(left._bar, "update", moved.append)
        left.see(0, ended=False)
        now[0] = 10.0
        left.see(-1, ended=False)
        assert sum(moved) == 16  # half of a third
        now[0] = 100.0
        left.see(-1, ended=False)
        assert sum(moved) == 31  # a work that takes longer than expected is not done
        left.see(0, ended=True)
        left.see(1, ended=False)
        assert sum(moved) == 33
        now[0] = 150.0  # half of what the first took, five times what was expected
        left.see(-1, ended=False)
        assert sum(moved) == 50


def test_what_is_left_is_corrected_by_works_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Works of kind b take a quarter of what is expected of them, those of kind a what is."""
    now = [0.0]
    monkeypatch.setattr(parallel.time, "monotonic", lambda: now[0])
    with TimeLeft([10.0, 40.0, 30.0, 80.0], "abab", "", quiet=True) as left:
        moved: list[int] = []
        monkeypatch.setattr(left._bar, "update", moved.append)
        for number, seconds in enumerate((10.0, 10.0)):
            left.see(number, ended=False)
            now[0] += seconds
            left.see(number, ended=True)
        assert sum(moved) == 28  # 20 s of 20 + 30 + 80 / 4
