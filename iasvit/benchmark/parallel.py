"""Cells measured side by side on the cores of one machine: each in a process of its own, with one thread."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from tqdm import tqdm

from iasvit.benchmark.estimate import estimate
from iasvit.benchmark.harness import (
    CHECKPOINT_ROOT,
    Cell,
    Reference,
    make_jobs,
    reference,
    result_of,
    run_cells,
    stored_row,
    title_of,
)
from iasvit.benchmark.results import ResultStore, Row
from iasvit.benchmark.task import Task
from iasvit.errors import IasvitError
from iasvit.progress import Progress

T = TypeVar("T")
GRACE = 10.0  # seconds that processes have to clean up before they are killed
LOOK_EVERY = 1.0  # seconds


def run_side_by_side(
    task: Task,
    cells: Sequence[Cell],
    store: ResultStore,
    count: int,
    *,
    checkpoint_root: Path = CHECKPOINT_ROOT,
    force: bool = False,
    stale: bool = False,
    save: Path | None = None,
    quiet: bool = False,
) -> list[Row]:
    """Do what `run_cells` does, with `count` cells at once. The task's models must be on the CPU.

    If the process of a cell is killed, for example because memory ran out, it is reported at the end; the others go on.

    Raises:
        IasvitError: as `run_cells`, or a process was killed.
    """
    torch.set_num_threads(1)  # also here: processes are forked, and threads of OpenMP do not outlive that
    jobs = make_jobs(task, cells)
    run = partial(run_cells, task, store=store, checkpoint_root=checkpoint_root, stale=stale, save=save, quiet=True)
    todo = [job for job in jobs if stored_row(store, job.key, force=force, stale=stale) is None]
    if len(todo) < 2:
        return run_cells(
            task, cells, store, checkpoint_root=checkpoint_root, force=force, stale=stale, save=save, quiet=quiet
        )
    store.check(task.name, task.data.name)

    def say(text: str) -> None:
        if not quiet:
            (tqdm.write if sys.stderr.isatty() else print)(text, file=sys.stderr)
            sys.stderr.flush()

    stored = len(jobs) - len(todo)
    say(f"{len(jobs)} cells, {stored} stored already; {min(count, len(todo))} at once, a thread each")
    expected = [each.seconds for each in estimate(task, [job.cell for job in todo], store, force=True)]
    models = {job.cell.model: job.cell for job in todo}
    references: dict[str, Reference] = {}
    measure = partial(reference, task, store=store, checkpoint_root=checkpoint_root, force=force)
    for number, found in side_by_side([partial(measure, cell) for cell in models.values()], count):
        if isinstance(found, CrashError):
            raise found
        if found is not None:
            references[list(models)[number]] = found
    rows: dict[int, Row] = {}
    crashes: list[str] = []
    order = in_good_order(expected)
    works = [partial(run, [todo[each].cell], force=force, references=references) for each in order]
    kinds = [todo[each].cell.model for each in order]
    with TimeLeft([expected[each] for each in order], kinds, "percent of all cells", quiet) as left:
        for number, outcome in side_by_side(works, count):
            left.see(number, ended=outcome is not None)
            if outcome is None:
                continue
            title = title_of(task, todo[order[number]])
            ended = f"[{stored + len(left.done)}/{len(jobs)}]"
            if isinstance(outcome, CrashError):
                crashes.append(f"{title}: {outcome}")
                say(f"{ended} {crashes[-1]}")
            else:
                (rows[order[number]],) = outcome
                say(f"{ended} {title}: {result_of(task, outcome[0])}, {left.done[number]:.0f} s")
    if crashes:
        raise IasvitError(f"{len(crashes)} of {len(todo)} cells were not measured; the first is {crashes[0]}")
    measured = {todo[each]: row for each, row in rows.items()}
    return [measured.get(job) or run([job.cell])[0] for job in jobs]


class CrashError(IasvitError):
    """A process ended without a result."""


def side_by_side(works: Sequence[Callable[[], T]], count: int) -> Iterator[tuple[int, T | CrashError | None]]:
    """Run functions in processes forked from this one, `count` at once, in order.

    Each has one torch thread. Processes that share a core take turns, whereas threads would wait for each other.

    Args:
        works: functions; what they return, or raise, must be possible to pickle.
        count: processes.

    Yields:
        (number, result) when a work begins, result None, and when it has ended; a CrashError if it was killed. And
        (-1, None) every LOOK_EVERY seconds in which nothing happens.

    Raises:
        Whatever a work raises; the others are ended then.
    """
    context = multiprocessing.get_context("fork")
    waiting = deque(enumerate(works))
    running: dict[Connection, tuple[int, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < count:
                number, work = waiting.popleft()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(work, sender, os.getpid()))
                process.start()
                sender.close()
                running[receiver] = (number, process)
                yield number, None
            ready = wait(list(running), LOOK_EVERY)
            if not ready:
                yield -1, None
            for source in ready:
                receiver = cast(Connection, source)
                number, process = running[receiver]
                try:
                    raised, result = pickle.loads(receiver.recv_bytes())
                except EOFError:
                    raised, result = False, None
                process.join()
                del running[receiver]
                receiver.close()
                if raised:
                    raise result
                yield number, _crash(process.exitcode) if result is None else result
    finally:
        for _, process in running.values():
            process.terminate()
        end = time.monotonic() + GRACE
        for _, process in running.values():
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()


def _crash(status: int) -> CrashError:
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    return CrashError(f"its process ended {how}; if memory ran out, use fewer --jobs")


def _work(work: Callable[[], Any], sender: Connection, parent: int) -> None:
    """What a process does: run the work, and send what came of it."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    try:
        outcome = False, work()
    except Exception as error:
        outcome = True, error
    except BaseException:  # Ctrl-C and SIGTERM; the parent says what there is to say
        os._exit(1)
    sender.send_bytes(pickle.dumps(outcome))


def _end_with(parent: int) -> None:
    """End this process when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


class TimeLeft:
    """Moves a bar by what works take, so that the time left that it shows is that of all.

    The expected time of a work is corrected by the works of its kind that have ended, or by all if there are none.

    Args:
        seconds: expected of each work; None where nothing is known.
        kinds: of each work: those of a kind are expected to be wrong by the same factor, as cells of one model are.
        label: of the bar.
        quiet: show none.
    """

    def __init__(self, seconds: Sequence[float | None], kinds: Sequence[str], label: str, quiet: bool) -> None:
        known = [each for each in seconds if each is not None]
        usual = max(sum(known) / len(known), 1e-3) if known else 1.0
        self.seconds = [usual if each is None else max(each, 1e-3) for each in seconds]
        self.kinds = list(kinds)
        self.started: dict[int, float] = {}
        self.done: dict[int, float] = {}
        self._phase = Progress(label, quiet=quiet).phase("", 100)
        self._shown = 0

    def __enter__(self) -> TimeLeft:
        self._bar = self._phase.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._phase.__exit__(*error)

    def see(self, number: int, ended: bool) -> None:
        """A work began or has ended; or with number -1, time went by."""
        now = time.monotonic()
        if ended:
            self.done[number] = now - self.started.pop(number)
        elif number >= 0:
            self.started[number] = now
        slower = {kind: self._slower(kind) for kind in set(self.kinds)}
        every = [seconds * slower[kind] for seconds, kind in zip(self.seconds, self.kinds, strict=True)]
        spent = sum(self.done.values())
        left = sum(each for number, each in enumerate(every) if number not in self.done)
        under_way = sum(min(now - start, 0.95 * every[each]) for each, start in self.started.items())
        percent = int(100 * (spent + under_way) / (spent + left))
        self._bar.update(max(0, percent - self._shown))
        self._shown = max(percent, self._shown)

    def _slower(self, kind: str) -> float:
        """The ratio of measured to expected time for works of a kind; for all works if none of the kind has ended."""
        done = [number for number in self.done if self.kinds[number] == kind] or list(self.done)
        expected = sum(self.seconds[number] for number in done)
        return max(sum(self.done[number] for number in done) / expected, 1e-3) if expected else 1.0


def in_good_order(seconds: Sequence[float | None]) -> list[int]:
    """Numbers of works in the order to begin them: the shortest, for a first result, then from the longest down."""
    order = sorted(range(len(seconds)), key=lambda number: -(seconds[number] or 0.0))
    return order[-1:] + order[:-1]
