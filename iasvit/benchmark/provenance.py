"""Where a number comes from: commit, versions, command, device, and the memory it took."""

from __future__ import annotations

import gc
import os
import platform
import resource
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from iasvit import distributed

PACKAGE = Path(__file__).parents[1]  # iasvit


@cache
def git_commit() -> str:
    """The commit of the checkout that this package runs from, "-dirty" added where files differ.

    IASVIT_COMMIT says it instead where the code was copied without its history; else it is "unknown" there.
    """
    if given := os.environ.get("IASVIT_COMMIT"):
        return given

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(PACKAGE), *args], capture_output=True, text=True, check=True, timeout=20
        ).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not some other repository that we are installed inside
        commit = git("rev-parse", "--short=12", "HEAD").strip()
        return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of python, torch, timm and iasvit."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "timm", "iasvit")}}


def command() -> str:
    """The command line of this process, paths relative to the current folder, so that it reads the same elsewhere."""
    script, *args = sys.argv
    is_file = script.endswith(".py")
    words = ["python"] if is_file else []
    if distributed.world_size() > 1:
        words = ["torchrun", "--nproc-per-node", str(distributed.processes_here())]
        words += [] if is_file else ["--no-python"]
    words.append(os.path.relpath(script) if is_file else os.path.basename(script))
    return shlex.join(words + [_relative(arg) for arg in args])


def _relative(arg: str) -> str:
    option, equals, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
    return option + equals + (os.path.relpath(value) if os.path.isabs(value) else value)


def describe_device(device: torch.device) -> str:
    """ "cpu: <model of the processor>" or "cuda: <name of the GPU>"; "cuda: 2 × <name>" of two processes."""
    if (count := distributed.world_size()) > 1:
        return _described(device).replace(": ", f": {count} × ", 1)
    return _described(device)


def _described(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return device.type
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"cpu: {line.partition(':')[2].strip()}"
    except OSError:
        pass
    return f"cpu: {platform.processor() or platform.machine()}"


class PeakMemory:
    """The most memory used since it was made: on a GPU what torch allocated there, else the process's resident set.

    The resident set's high-water mark is reset through Linux's /proc; where that cannot be done, the process's peak
    since its start is all there is. What nothing refers to any more is freed first, so that it does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()  # quantized models and their graphs refer to themselves, and would wait for Python's collector
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._can_reset = True
        except OSError:
            self._can_reset = False

    def mib(self) -> float:
        """The peak so far in MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if self._can_reset:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)
