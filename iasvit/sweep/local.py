"""The engine of this machine: a process a cell."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from iasvit.sweep.engine import Engine, Event, Node
from iasvit.sweep.suite import Needs
from iasvit.sweep.worker import GRACE, Outcome, Work

WORKER = (sys.executable, "-m", "iasvit.sweep.worker")


@dataclass
class _Running:
    """A process, and what it holds: GPU number → share."""

    process: subprocess.Popen[str]
    needs: Needs
    gpus: dict[int, float]


class LocalEngine(Engine):
    """Starts cells in order as long as cores, GPUs and memory last; each sees its own GPU alone.

    Args:
        cpu: cores; None for those that this process may use.
        gpu: GPUs; None for those that torch sees.
        worker: command line of the process that reads a work and prints its outcome.
    """

    name = "local"

    def __init__(self, cpu: int | None = None, gpu: int | None = None, worker: Sequence[str] = WORKER) -> None:
        if gpu is None:
            import torch

            gpu = torch.cuda.device_count()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        self._node = Node("this machine", cpu or len(os.sched_getaffinity(0)), gpu, memory)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        self._devices = visible.split(",") if visible else [str(number) for number in range(gpu)]
        self._worker = list(worker)
        self._waiting: deque[tuple[int, Work, Needs]] = deque()
        self._running: dict[int, _Running] = {}
        self._events: queue.Queue[Event] = queue.Queue()

    def nodes(self) -> list[Node]:
        """See `Engine`."""
        return [self._node]

    def submit(self, ticket: int, work: Work, needs: Needs) -> None:
        """See `Engine`."""
        self._waiting.append((ticket, work, needs))

    def events(self, seconds: float) -> list[Event]:
        """See `Engine`."""
        found = self._start()
        with suppress(queue.Empty):
            if not found:
                found.append(self._events.get(timeout=seconds))
            while True:
                found.append(self._events.get_nowait())
        for event in found:
            if event.outcome is not None:
                self._running.pop(event.ticket, None)
        return found

    def close(self) -> None:
        """See `Engine`."""
        self._waiting.clear()
        for running in self._running.values():
            _signal(running.process, signal.SIGINT)
        for running in self._running.values():
            with suppress(subprocess.TimeoutExpired):
                running.process.wait(GRACE)
        for running in self._running.values():
            _signal(running.process, signal.SIGKILL)  # also what a worker that has ended left of its group
            running.process.wait()
        self._running.clear()

    def _start(self) -> list[Event]:
        """Start what there is room for, in order: a cell that needs a whole GPU is not overtaken for ever."""
        started = []
        while self._waiting:
            ticket, work, needs = self._waiting[0]
            gpus = self._room(needs)
            if gpus is None:
                break
            self._waiting.popleft()
            threads = str(max(1, int(needs.cpu)))
            devices = ",".join(self._devices[number] for number in gpus)
            environment = {**os.environ, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": devices}
            errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 closed by the thread
            process = subprocess.Popen(
                self._worker,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process alone, which then ends the group
            )
            self._running[ticket] = _Running(process, needs, gpus)
            threading.Thread(target=self._follow, args=(ticket, process, work, errors), daemon=True).start()
            started.append(Event(ticket, self._node.name))
        return started

    def _room(self, needs: Needs) -> dict[int, float] | None:
        """The GPUs for a cell, number → share, or None where something does not last."""
        held = [running.needs for running in self._running.values()]
        cpu = self._node.cpu - sum(each.cpu for each in held)
        memory = self._node.memory_gib - sum(each.memory_gib for each in held)
        if needs.cpu > cpu + 1e-6 or needs.memory_gib > memory:
            return None
        free = dict.fromkeys(range(int(self._node.gpu)), 1.0)
        for running in self._running.values():
            for number, share in running.gpus.items():
                free[number] -= share
        share = min(needs.gpu, 1.0)
        count = 0 if not needs.gpu else max(1, int(needs.gpu))
        fitting = sorted((n for n, left in free.items() if left >= share - 1e-6), key=lambda n: (free[n], n))
        return dict.fromkeys(fitting[:count], share) if len(fitting) >= count else None

    def _follow(self, ticket: int, process: subprocess.Popen[str], work: Work, errors: IO[str]) -> None:
        """Hand a process its work, wait, and report its outcome."""
        assert process.stdin is not None
        assert process.stdout is not None
        with errors:
            with suppress(OSError):  # it ended before it read
                process.stdin.write(work.to_json() + "\n")
                process.stdin.flush()
            text = process.stdout.read()
            status = process.wait()
            with suppress(OSError):
                process.stdin.close()  # open until now: a worker whose standard input ends has lost its parent
            process.stdout.close()
            errors.seek(0)
            said = errors.read().strip().splitlines()
        _signal(process, signal.SIGKILL)  # helpers of a worker that crashed
        try:
            outcome = Outcome(**json.loads(text))
        except ValueError:
            how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            outcome = Outcome(error=f"the process ended {how}{f': {said[-1]}' if said else ''}"[:500])
        self._events.put(Event(ticket, self._node.name, outcome))


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal to a process and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
