"""A sweep: cells go to an engine, rows come back into the store, and failed cells are tried again."""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from iasvit.benchmark.provenance import command
from iasvit.benchmark.results import Key, ResultStore, Row
from iasvit.sweep.engine import Engine, Event
from iasvit.sweep.suite import Needs
from iasvit.sweep.worker import Outcome, Work

RETRIES = 2
LINE_EVERY = 30.0  # seconds between lines of progress while nothing happens


@dataclass(frozen=True)
class Failure:
    """A cell without a result at the end of a sweep.

    Attributes:
        title: of the cell.
        reason: of its last attempt.
        attempts: how many there were.
    """

    title: str
    reason: str
    attempts: int


def say(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr, flush=True)


def sweep(
    todo: Sequence[Work],
    engine: Engine,
    store: ResultStore,
    *,
    retries: int = RETRIES,
    tell: Callable[[str], None] = say,
) -> list[Failure]:
    """Measure cells on an engine; a row is stored, by this process alone, as soon as its cell is done.

    A cell that fails, or is lost with its process or machine, is tried again `retries` times; one that shared a GPU and
    ran out of its memory, once more with a GPU to itself before that counts. Where a full-precision row is all that a
    task needs of that model, the model's first cell brings it, and the others wait for it. Whatever ends the sweep, the
    engine is closed.

    Args:
        todo: what to measure.
        engine: where.
        store: of rows.
        retries: further attempts.
        tell: called with each line of progress.

    Returns:
        The cells that failed for good; each that a method failed on has a row with status "failed" too.

    Raises:
        IasvitError: a row cannot be stored.
    """
    try:
        return _Sweep(todo, engine, store, retries, tell).run()
    finally:
        engine.close()


class _Sweep:
    """The state of a sweep; a cell's ticket is its place in `todo`."""

    def __init__(
        self, todo: Sequence[Work], engine: Engine, store: ResultStore, retries: int, tell: Callable[[str], None]
    ) -> None:
        self.todo, self.engine, self.store, self.retries, self.tell = list(todo), engine, store, retries, tell
        self.command = command()
        self.needs: list[Needs] = [work.grid.needs for work in todo]
        self.attempts = Counter[int]()
        self.started: dict[int, float] = {}  # running cells
        self.pending = set(range(len(todo)))  # not done and not failed, running ones included
        self.failures: list[Failure] = []
        self.stored: set[Key] = set()
        self.seconds: dict[tuple[str, ...], list[float]] = defaultdict(list)
        self.most = 1  # cells that ran at once
        self.held: dict[Key, list[int]] = {}  # key of a full-precision row → cells that wait for it

    def run(self) -> list[Failure]:
        """See `sweep`."""
        for ticket, work in enumerate(self.todo):
            if work.lacks in self.held:
                self.held[work.lacks].append(ticket)
                continue
            if work.lacks is not None:
                self.held[work.lacks] = []
            self.engine.submit(ticket, work, self.needs[ticket])
        while self.pending:
            events = self.engine.events(LINE_EVERY)
            for event in events:
                if event.outcome is None:
                    self.started[event.ticket] = time.monotonic()
                    self.most = max(self.most, len(self.started))
                else:
                    self.end(event, event.outcome)
            if not events:
                self.tell(self.state())
        return self.failures

    def end(self, event: Event, outcome: Outcome) -> None:
        """Store a cell's row, or try the cell again."""
        ticket, work = event.ticket, self.todo[event.ticket]
        seconds = time.monotonic() - self.started.pop(ticket, time.monotonic())
        self.attempts[ticket] += 1
        if not outcome.error:
            self.over(ticket, outcome)
            for kind in _kinds(work.key):
                self.seconds[kind].append(seconds)
            self.tell(f"{self.number()} {work.title}: {seconds:.0f} s on {event.where}; {self.state()}")
            return
        needs = self.needs[ticket]
        if outcome.out_of_memory and 0 < needs.gpu < 1:
            self.needs[ticket] = replace(needs, gpu=1)
            self.attempts[ticket] -= 1
            what = "again with a GPU to itself"
        elif self.attempts[ticket] <= self.retries and not outcome.out_of_memory:
            what = f"again, attempt {self.attempts[ticket] + 1} of {self.retries + 1}"
        else:
            self.over(ticket, outcome)
            self.failures.append(Failure(work.title, outcome.error, self.attempts[ticket]))
            self.tell(f"{self.number()} {work.title} failed on {event.where}: {outcome.error}; {self.state()}")
            return
        self.tell(f"{work.title} failed on {event.where}: {outcome.error}; {what}")
        self.engine.submit(ticket, work, self.needs[ticket])

    def over(self, ticket: int, outcome: Outcome) -> None:
        """Store the rows of a cell that is not tried again, and submit those that waited for one of them."""
        self.keep(outcome.rows)
        self.pending.discard(ticket)
        lacks = self.todo[ticket].lacks
        for waiting in self.held.pop(lacks, []) if lacks is not None else []:
            self.todo[waiting] = replace(self.todo[waiting], reference=self.store.find(lacks))
            self.engine.submit(waiting, self.todo[waiting], self.needs[waiting])

    def keep(self, rows: Sequence[Row]) -> None:
        """Store rows; of the full-precision rows that several cells bring, one."""
        for row in rows:
            if Key.of(row) not in self.stored:
                self.store.append({**row, "command": self.command})
                self.stored.add(Key.of(row))

    def number(self) -> str:
        """How many of the cells are over, "[3/10]"."""
        return f"[{len(self.todo) - len(self.pending)}/{len(self.todo)}]"

    def state(self) -> str:
        """Counts, and the time left."""
        failed = len(self.failures)
        done = len(self.todo) - len(self.pending) - failed
        waiting = len(self.pending) - len(self.started)
        counts = f"{done} done, {len(self.started)} running, {waiting} waiting, {failed} failed"
        return f"{counts}, {self.left()}"

    def left(self) -> str:
        """From how long like cells took, as many at once as there were at most."""
        if not self.seconds:
            return "time left not known yet"
        now, left = time.monotonic(), 0.0
        for ticket in self.pending:
            kinds = (self.seconds[kind] for kind in _kinds(self.todo[ticket].key) if kind in self.seconds)
            seconds = next(kinds, [0.0])
            spent = now - self.started.get(ticket, now)
            left += max(sum(seconds) / len(seconds) - spent, 0.0)
        return f"about {_duration(left / min(self.most, max(len(self.pending), 1)))} left"


def _kinds(key: Key) -> tuple[tuple[str, ...], ...]:
    """What cells that take alike long have in common, the closest first."""
    closest = (key.task, key.dataset, key.model, key.method, key.spec)
    return closest, closest[:4], ("", "", "", key.method), ()


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
