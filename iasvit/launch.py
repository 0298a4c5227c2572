"""The processes that torchrun starts: they join a group, only the first prints, and all end if one fails."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from iasvit import distributed
from iasvit.errors import IasvitError, reason
from iasvit.interrupts import Ended

TIMEOUT = timedelta(hours=2)  # that a process waits for the others at most: one may have much more to read
JOIN_TIMEOUT = timedelta(minutes=2)
TOGETHER = 5.0  # seconds that processes may fail one after the other and still have failed together
POLL, GRACE = 0.3, 3.0  # seconds between looks at the others, and for a process to end by itself where one has failed
_ENDED = f"iasvit/ended/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that torchrun has started, by its environment.

    Attributes:
        rank: from 0 to world_size - 1, over all machines.
        world_size: how many processes there are.
        local_rank: from 0, on this machine.
        address, port: of the store where they meet.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int

    @classmethod
    def find(cls) -> Place | None:
        """The place, or None for the only process.

        Raises:
            IasvitError: the environment says that there are several processes, and not all that torchrun says.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        rank, world_size, local_rank, address, port = (os.environ.get(name, "") for name in names)
        if not (rank or world_size) or world_size == "1":
            return None
        for name in names:
            value = os.environ.get(name, "")
            if not value or (name != "MASTER_ADDR" and not value.isdecimal()):
                given = f"is {value!r}" if value else "is not set"
                raise IasvitError(
                    f"the environment says that this is one of several processes, but {name} {given}; start them by "
                    "torchrun --standalone --nproc-per-node N, or clear RANK and WORLD_SIZE"
                )
        return cls(int(rank), int(world_size), int(local_rank), address, int(port))


@contextmanager
def launched() -> Iterator[None]:
    """Join the processes that torchrun has started for a block; nothing where there is one, or they are joined already.

    Meanwhile only the first process prints. Where a block raises, the other processes end within seconds, with the same
    status, and say nothing: `Ended` takes the place of what they raise then.

    Raises:
        IasvitError: the environment is incomplete, or the processes do not find each other.
    """
    place = Place.find()
    if place is None or dist.is_initialized():
        yield
        return
    others = _join(place)
    try:
        with _first_alone_prints(place):
            yield
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0, 1):  # a command's own end
            others.leave()
        else:
            others.end(_status(error))
        raise
    others.leave()


def _status(error: BaseException) -> int:
    """The status with which a process ends where it raises this."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, IasvitError | OSError) else 1


def _join(place: Place) -> _Others:
    if torch.cuda.is_available() and place.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(place.local_rank)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
        return _Others(place)
    except (RuntimeError, ValueError) as error:
        raise IasvitError(
            f"the {place.world_size} processes do not find each other at {place.address}:{place.port} "
            f"({reason(error)[:200]}); start them by torchrun --standalone --nproc-per-node {place.world_size}"
        ) from None


@contextmanager
def _first_alone_prints(place: Place) -> Iterator[None]:
    with ExitStack() as stack:
        if place.rank > 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def fail_together(error: Exception) -> None:
    """Return where all processes report a failure within TOGETHER seconds of each other: what is next, all can do.

    Where one of them has failed alone, the others wait for it in the middle of their work, and nothing can go on.

    Raises:
        IasvitError: this process, or another one, has failed alone.
    """
    if distributed.world_size() == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    count, stop = store.add(f"iasvit/failures/{distributed.rank()}", 1), time.monotonic() + TOGETHER
    while time.monotonic() < stop and not store.check(["iasvit/alone"]):
        if all(store.add(f"iasvit/failures/{other}", 0) >= count for other in range(distributed.world_size())):
            return
        time.sleep(0.05)
    store.set("iasvit/alone", "")  # a process that now loses its connection to this one has not failed with it
    if isinstance(error, IasvitError):
        raise error
    raise IasvitError(
        f"{type(error).__name__} in process {distributed.rank()} of {distributed.world_size()}: {reason(error)}"
    ) from error


class _Others:
    """The other processes, as far as they say in the store that they end, and a thread that looks there.

    The main thread may wait for a process that will never answer, in code of torch that no signal breaks off.
    """

    def __init__(self, place: Place) -> None:
        self._rank = place.rank
        client = {"timeout": JOIN_TIMEOUT, "wait_for_workers": False}
        self._store = dist.TCPStore(place.address, place.port, **client)
        self._ended = ""  # what the thread has seen there
        self._status: int | None = None  # with which this process ends where one has failed
        atexit.register(self._end_at_once)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="iasvit-others", daemon=True)
        self._thread.start()

    def end(self, status: int) -> None:
        """Tell the others to end with this status; raises Ended where another process was before."""
        self._left.set()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would change the status
        mine = f"{status} {self._rank}"
        ended = self._ended
        if not ended:
            with suppress(RuntimeError):  # the store went with the process that had it
                ended = self._store.compare_set(_ENDED, "", mine).decode()
        self._status = int((ended or mine).split()[0])
        if ended not in ("", mine):
            raise Ended(self._status) from None
        time.sleep(2 * POLL)  # for the others to see it: what they wait for, and the store, may go with this process

    def _end_at_once(self) -> None:
        """End without what libraries do last: threads of torch that still wait for a process make that an abort."""
        if self._status is not None:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(self._status)

    def leave(self) -> None:
        """Leave the group, when all are done."""
        with suppress(RuntimeError):  # of a process that was lost, which torchrun tells
            distributed.gathered(lambda: None)
        self._left.set()
        self._thread.join(GRACE)
        with suppress(RuntimeError):
            dist.destroy_process_group()

    def _watch(self) -> None:
        while not self._left.wait(POLL):
            try:
                if not self._store.check([_ENDED]):
                    continue
                self._ended = self._store.get(_ENDED).decode()
            except RuntimeError:  # the store went with the process that had it, which could say nothing
                if self._left.wait(POLL):
                    return
                self._ended = "1"
            # SIGTERM unwinds the main thread, unless it waits.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            if not self._left.wait(GRACE):
                sys.stdout.flush()
                os._exit(int(self._ended.split()[0]))
            return
