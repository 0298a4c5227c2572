"""How many threads, and how they wait: what keeps a run fast on cores that others use too.

Threads of OpenMP wait for each other many thousand times a second. By default they spin meanwhile, so that on a core
that has something else to do a thread that waits takes the time of the one that is waited for.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

SAMPLE = 0.1  # seconds


def wait_passively() -> None:
    """Let threads of OpenMP sleep while they wait, unless the environment says otherwise; before torch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # Intel's OpenMP has its own name for it


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: of its affinity, and no more than a container's quota has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        most, period = quota.read_text().split()
        cores = min(cores, math.ceil(int(most) / int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return max(1, cores)


def free_cores(stat: Path = Path("/proc/stat")) -> int:
    """Cores of those that are idle now, at least 1, measured over SAMPLE seconds; or what OMP_NUM_THREADS says."""
    if (given := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():
        return max(1, int(given))
    before = _idle(stat)
    time.sleep(SAMPLE)
    after = _idle(stat)
    shares = [(after[core][0] - before[core][0]) / max(1, after[core][1] - before[core][1]) for core in before]
    return max(1, min(usable_cores(), round(sum(shares)))) if shares else usable_cores()


def _idle(stat: Path) -> dict[int, tuple[int, int]]:
    """Core → (ticks idle, ticks in all), of the cores of this process's affinity; empty where nothing says."""
    found = {}
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return {}
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    for line in lines:
        name, *ticks = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in mine:
            values = [int(each) for each in ticks[:8]]
            found[int(name[3:])] = values[3] + values[4], sum(values)
    return found
