"""Runs functions of test modules in several processes, as torchrun starts them, from one that has imported torch."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECONDS = 60.0  # that a group may take


@dataclass(frozen=True)
class Ended:
    """How one process ended.

    Attributes:
        status: of its exit; negative for a signal.
        out, err: what it wrote.
        seconds: from the start of its group to its end.
    """

    status: int
    out: str
    err: str
    seconds: float


def run(module: str, calls: dict[str, tuple[str, int]], folder: Path, device: str = "cpu") -> dict[str, list[Ended]]:
    """Call functions of a test module in processes, one group after the other; each may import what it takes once.

    Args:
        module: "several_processes".
        calls: name → (function, number of processes). It is called with a folder of that name, in each process.
        folder: for these folders.
        device: in IASVIT_TEST_DEVICE of their environment.
    """
    path = os.pathsep.join(filter(None, [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # To look for GPUs must not touch the driver: it does not outlive a fork.
    env |= {"IASVIT_TEST_DEVICE": device, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    command = [sys.executable, str(Path(__file__)), module, json.dumps(calls), str(folder)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=len(calls) * SECONDS)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return {name: [Ended(**each) for each in ended] for name, ended in found.items()}


def _group(function: Any, folder: Path, count: int) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    folder.mkdir(exist_ok=True)
    start, children = time.monotonic(), {}
    for rank in range(count):
        child = os.fork()
        if child == 0:
            _be(function, folder, rank, count, port)
        children[child] = rank
    ended: list[dict[str, Any]] = [{}] * count
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if not child:
            if time.monotonic() - start > SECONDS:
                for left in children:
                    os.kill(left, signal.SIGKILL)
            time.sleep(0.02)
            continue
        rank = children.pop(child)
        texts = [(folder / f"{name}-{rank}").read_text() for name in ("out", "err")]
        status = os.waitstatus_to_exitcode(status)
        ended[rank] = {"status": status, "out": texts[0], "err": texts[1], "seconds": time.monotonic() - start}
    return ended


def _be(function: Any, folder: Path, rank: int, count: int, port: int) -> None:
    """Be one of the processes; never returns."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="localhost")
    os.environ["MASTER_PORT"] = str(port)
    os.chdir(folder)
    status: object = 1
    try:
        function(folder)
        status = 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


def main() -> None:
    """Import a module, and run the groups that standard input's caller asks for."""
    module, calls, folder = importlib.import_module(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    ended = {name: _group(getattr(module, call), folder / name, count) for name, (call, count) in calls.items()}
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
