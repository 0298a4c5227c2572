"""A tiny task that suites can name, and engines that run cells in the process of the test."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from harness_fakes import FakeTask, Noise
from torch import Tensor, nn

from iasvit.benchmark import versions
from iasvit.benchmark.harness import Cell
from iasvit.methods import get_method
from iasvit.progress import Progress
from iasvit.spec import QuantSpec
from iasvit.sweep.engine import Engine, Event, Node
from iasvit.sweep.suite import Needs
from iasvit.sweep.worker import Outcome, Work, measure

ENTRY_POINTS = """[iasvit.tasks]
swept = sweep_fakes:Swept
mute = harness_fakes:FakeTask
gone = nowhere:Gone
[iasvit.methods]
noise = harness_fakes:Noise
frail = sweep_fakes:Frail
"""


class Mode(str, Enum):
    """An option with choices."""

    plain = "plain"
    striped = "striped"


class Swept(FakeTask):
    """The harness tests' task, for suites."""

    name = "swept"

    @classmethod
    def grid(
        cls,
        *,
        bits: list[str],
        seed: list[int],
        backbone: list[str] | None = None,
        method: list[str] | None = None,
        mode: Mode = Mode.plain,
        data_root: Path | None = None,
        lr: float = 0.1,
        labels: bool = True,
        limit: int | None = None,
        device: str | None = None,
    ) -> tuple[Swept, list[Cell]]:
        for name in method or []:
            get_method(name)
        # Data that is not the same in every process, where the test says so.
        task = cls(data=os.environ.get("IASVIT_TEST_DATA", "d1"))
        specs = [str(QuantSpec.parse(text)) for text in bits]
        combinations = ((b, m, s, n) for b in backbone or ["vit_s"] for m in method or [] for s in specs for n in seed)
        return task, [Cell(b, m, s, n, 8) for b, m, s, n in combinations]


@dataclass
class Frail(Noise):
    """Notes in the file of IASVIT_TEST_LOG each time that it runs; waits IASVIT_TEST_SLEEP seconds."""

    name: ClassVar[str] = "frail"

    def quantize(self, model: nn.Module, calibration: Tensor, spec: QuantSpec, progress: Progress) -> nn.Module:
        import time

        with open(os.environ["IASVIT_TEST_LOG"], "a") as file:
            file.write(f"{spec} {self.seed} {os.getpid()} {torch.get_num_threads()}\n")
        time.sleep(float(os.environ.get("IASVIT_TEST_SLEEP", "0")))
        return super().quantize(model, calibration, spec, progress)


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Register the fakes as an installed package does, in this process and in those that it starts."""
    metadata = folder / "site" / "sweep_fakes-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sweep-fakes\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(folder / "site"))
    paths = [str(folder / "site"), str(Path(__file__).parent), str(Path(__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep))
    versions.forget()


def write_suite(path: Path, *grids: str, top: str = "") -> Path:
    """A suite of these grids' lines, of the fake task unless they name one."""
    task = 'task = "swept"\n'
    path.write_text("\n".join([top, *(f"[[grid]]\n{'' if 'task' in grid else task}{grid}\n" for grid in grids)]))
    return path


class Inline(Engine):
    """Runs one cell after another, by `act`: `measure`, unless a test has something happen to a cell."""

    name = "inline"

    def __init__(self, act: Callable[[Work, Needs], Outcome] = lambda work, needs: measure(work)) -> None:
        self.act = act
        self.queue: list[tuple[int, Work, Needs]] = []
        self.submitted: list[tuple[int, Needs]] = []
        self.current: tuple[int, Work, Needs] | None = None
        self.closed = False

    def nodes(self) -> list[Node]:
        return [Node("here", 4, 2, 8)]

    def submit(self, ticket: int, work: Work, needs: Needs) -> None:
        self.queue.append((ticket, work, needs))
        self.submitted.append((ticket, needs))

    def events(self, seconds: float) -> list[Event]:
        if self.current is None:
            self.current = self.queue.pop(0)
            return [Event(self.current[0], "here")]
        (ticket, work, needs), self.current = self.current, None
        return [Event(ticket, "here", self.act(work, needs))]

    def close(self) -> None:
        self.closed = True
