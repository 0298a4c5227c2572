"""One cell of a suite, measured in a process of its own: what both engines run."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from iasvit.benchmark.results import Key, ResultStore, Row
from iasvit.errors import IasvitError, reason
from iasvit.sweep.suite import Grid, Needs, arguments

if TYPE_CHECKING:  # an engine needs no torch
    from iasvit.benchmark.harness import Cell

GRACE = 5.0  # seconds that a worker has to clean up after an interrupt before it is killed
_OUT_OF_MEMORY = "OutOfMemoryError"  # torch's, of a GPU


@dataclass(frozen=True)
class Work:
    """A cell as it is sent to a worker; all of it can be written as JSON.

    Attributes:
        grid: that it is of.
        cell: of the grid.
        key: that the cell must have with the worker too, or else the worker sees other data or weights.
        title: for messages.
        reference: the stored row of the full-precision model, if there is one.
        lacks: that row's key, where the task needs no more than the row and there is none; else None.
        checkpoints: folder for what an interrupted cell resumes from; "" keeps nothing.
        environment: variables to set.
    """

    grid: Grid
    cell: Cell
    key: Key
    title: str
    reference: Row | None = None
    lacks: Key | None = None
    checkpoints: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Work:
        """The work that `to_json` wrote."""
        values = json.loads(text)
        from iasvit.benchmark.harness import Cell

        grid, cell, lacks = (values.pop(name) for name in ("grid", "cell", "lacks"))
        options = tuple((name, value) for name, value in cell.pop("options"))
        return cls(
            Grid(**{**grid, "needs": Needs(**grid["needs"])}),
            Cell(**cell, options=options),
            Key(*values.pop("key")),
            lacks=None if lacks is None else Key(*lacks),
            **values,
        )


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        rows: to store, the cell's own the last; none where nothing was measured.
        error: why it failed; "" where it did not.
        out_of_memory: whether a GPU's memory was too small.
    """

    rows: list[Row] = field(default_factory=list)
    error: str = ""
    out_of_memory: bool = False


class _Rows(ResultStore):
    """A store in memory: nothing is left behind by a worker that is killed."""

    def __init__(self, known: Row | None) -> None:
        super().__init__(Path())
        self._known = [] if known is None else [known]
        self.new: list[Row] = []

    def find(self, key: Key) -> Row | None:
        """See `ResultStore`."""
        return next((row for row in (*self.new, *self._known) if Key.of(row) == key), None)

    def append(self, row: Row) -> None:
        """See `ResultStore`."""
        self.new.append(row)

    def check(self, task: str, dataset: str) -> None:
        """There is no folder that could be at fault."""


def measure(work: Work) -> Outcome:
    """Measure a cell in this process; whatever goes wrong is in the outcome."""
    os.environ.update(work.environment)
    try:
        rows = _measure(work)
    except Exception as error:
        name = "" if isinstance(error, IasvitError) else f"{type(error).__name__}: "
        return Outcome([], f"{name}{reason(error)}"[:500], type(error).__name__ == _OUT_OF_MEMORY)
    last = rows[-1]
    why = "" if last["status"] == "ok" else last["reason"] or "no reason is given"
    return Outcome(rows, why, why.startswith(_OUT_OF_MEMORY))


def _measure(work: Work) -> list[Row]:
    import torch

    from iasvit.benchmark.harness import make_jobs, run_cells
    from iasvit.benchmark.task import load_task_class

    grid = work.grid
    torch.set_num_threads(max(1, int(grid.needs.cpu)))
    cls = load_task_class(grid.task)
    # The sweep has checked every backbone at all bits; the task is the same with one of each.
    whole = ("method", "option")
    options = {
        key: value[:1] if isinstance(value, list) and key not in whole else value
        for key, value in arguments(cls, grid.options, grid.where).items()
    }
    task, _ = cls.grid(**options, device="cuda" if grid.needs.gpu else "cpu")
    (job,) = make_jobs(task, [work.cell])
    for name, here, there in zip(Key._fields, job.key, work.key, strict=True):
        if here != there:
            raise IasvitError(f"the worker has {name} {here!r}, but the sweep has {there!r}; give both the same files")
    store = _Rows(work.reference)
    if work.checkpoints:
        run_cells(task, [work.cell], store, checkpoint_root=Path(work.checkpoints), quiet=True)
    else:
        from tempfile import TemporaryDirectory

        with TemporaryDirectory(prefix="iasvit-") as folder:
            run_cells(task, [work.cell], store, checkpoint_root=Path(folder), quiet=True)
    return store.new


def main() -> None:
    """Read a work from standard input, and print its outcome; end when standard input does, for then nobody waits."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what tasks and libraries print is no outcome
    try:
        work = Work.from_json(sys.stdin.readline())
        threading.Thread(target=_end_with_parent, daemon=True).start()
        outcome = measure(work)
    except KeyboardInterrupt:  # files and the like are cleaned up by now; helpers may be left
        os.killpg(0, signal.SIGKILL)
    out.write(json.dumps(asdict(outcome)))
    out.close()


def _end_with_parent() -> None:
    """Interrupt this process when its parent is gone, and soon after kill it with all that it started."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
