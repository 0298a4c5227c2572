"""The engine of a Ray cluster (extra `cluster`): a task a cell."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from iasvit.errors import IasvitError, reason
from iasvit.sweep.engine import Engine, Event, Node
from iasvit.sweep.suite import Needs
from iasvit.sweep.worker import GRACE, Outcome, Work, measure

REACH_SECONDS = 5.0  # for a connection to the address
JOIN_SECONDS = 60.0  # for the cluster there to answer
_JOIN = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='CRITICAL')"


def work_on(text: str) -> Iterator[Any]:
    """The task: yields the name of its machine when it starts, and then the cell's outcome."""
    yield socket.gethostname()
    yield measure(Work.from_json(text))


class RayEngine(Engine):
    """Submits all cells at once; the cluster runs those that it has room for.

    Ray retries nothing by itself: what is lost with a machine is reported like any other failure.

    Args:
        address: HOST:PORT of a cluster, or "auto" for the one that runs on this machine; None for the one that
            RAY_ADDRESS names, else for one that is started here and ends with the sweep.

    Raises:
        IasvitError: Ray is not installed, or the address cannot be reached.
    """

    name = "ray"

    def __init__(self, address: str | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise IasvitError("--engine ray needs the package ray; install iasvit with the extra cluster") from None
        self._ray = ray
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        if address != "local":
            check_address(address)
        own = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        except (Exception, SystemExit) as error:  # Ray exits where a cluster stops to answer
            raise IasvitError(f"the Ray cluster at {address} cannot be joined: {_sentence(error)}") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, own)  # Ray has put its own there
        # A process of its own for each cell: its threads, memory and GPU are free when it ends.
        self._task = ray.remote(max_retries=0, max_calls=1)(work_on)
        self._running: dict[Any, tuple[int, str]] = {}  # Ray's generator → ticket, machine; "" before it starts

    def nodes(self) -> list[Node]:
        """See `Engine`."""
        found = []
        for node in self._ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                memory = has.get("memory", 0) / 2**30
                found.append(Node(node["NodeManagerHostname"], has.get("CPU", 0), has.get("GPU", 0), memory))
        return found

    def submit(self, ticket: int, work: Work, needs: Needs) -> None:
        """See `Engine`."""
        task = self._task.options(
            name=work.title, num_cpus=needs.cpu, num_gpus=needs.gpu, memory=int(needs.memory_gib * 2**30) or None
        )
        self._running[task.remote(work.to_json())] = ticket, ""

    def events(self, seconds: float) -> list[Event]:
        """See `Engine`."""
        if not self._running:
            return []
        waiting = list(self._running)
        ready, _ = self._ray.wait(waiting, num_returns=1, timeout=seconds)
        if ready:
            ready, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0)
        return [self._event(each) for each in ready]

    def close(self) -> None:
        """See `Engine`."""
        try:
            for each in self._running:
                self._ray.cancel(each)
            if ends := [each.completed() for each in self._running]:
                self._ray.wait(ends, num_returns=len(ends), timeout=GRACE)
            for each in self._running:
                self._ray.cancel(each, force=True)
        finally:
            self._running.clear()
            self._ray.shutdown()

    def _event(self, generator: Any) -> Event:
        ticket, where = self._running[generator]
        try:
            value = self._ray.get(next(generator))
        except StopIteration:
            value = Outcome(error="the task ended without an outcome")
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error  # of what the task itself raised
            value = Outcome(error=f"{type(cause).__name__}: {_sentence(cause)}"[:500])
        if isinstance(value, str):
            self._running[generator] = ticket, value
            return Event(ticket, value)
        del self._running[generator]
        return Event(ticket, where or "the cluster", value)


def check_address(address: str) -> None:
    """Find out in bounded time whether a cluster answers at an address; Ray's own attempt takes two minutes.

    Raises:
        IasvitError: it does not, or the address is of another kind.
    """
    if address.startswith("ray://"):
        raise IasvitError(
            f"--address {address} belongs to the Ray client, which is not supported; "
            "give HOST:PORT of the cluster's head on one of its machines, or submit the command with ray job submit"
        )
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise IasvitError(f"--address {address} is not of the form HOST:PORT, such as head:6379")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise IasvitError(f"--address {address} cannot be reached: {reason(error)}") from error
    command = [sys.executable, "-c", _JOIN, address]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=JOIN_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise IasvitError(f"--address {address}: no Ray cluster has answered within {JOIN_SECONDS:.0f} s") from None
    if tried.returncode:
        said = [line for line in tried.stderr.strip().splitlines() if line] or ["no reason is given"]
        raise IasvitError(f"--address {address}: the Ray cluster cannot be joined: {said[-1]}")


def _sentence(error: BaseException) -> str:
    """Ray's reasons are paragraphs; the first sentence says what happened."""
    return reason(error).partition(". ")[0].strip(" .")
