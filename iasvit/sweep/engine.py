"""What an engine is: where cells run, and what they report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from iasvit.errors import IasvitError
from iasvit.sweep.suite import Grid, Needs
from iasvit.sweep.worker import Outcome, Work


@dataclass(frozen=True)
class Node:
    """A machine.

    Attributes:
        name: for messages.
        cpu: cores for cells.
        gpu: GPUs.
        memory_gib: main memory in GiB.
    """

    name: str
    cpu: float
    gpu: float
    memory_gib: float

    def fits(self, needs: Needs) -> bool:
        """Whether a cell with these needs can ever run here."""
        return needs.cpu <= self.cpu and needs.gpu <= self.gpu and needs.memory_gib <= self.memory_gib


@dataclass(frozen=True)
class Event:
    """A cell was started, or has ended.

    Attributes:
        ticket: number that it was submitted with.
        where: machine that it runs or ran on.
        outcome: None when it was started.
    """

    ticket: int
    where: str
    outcome: Outcome | None = None


class Engine(ABC):
    """Runs cells, each in a process of its own, as many at once as their needs let it."""

    name: str

    @abstractmethod
    def nodes(self) -> list[Node]:
        """The machines that there are now."""

    @abstractmethod
    def submit(self, ticket: int, work: Work, needs: Needs) -> None:
        """Run this when there is room."""

    @abstractmethod
    def events(self, seconds: float) -> list[Event]:
        """What happened; waits so long at most for something to."""

    @abstractmethod
    def close(self) -> None:
        """End what still runs or waits, and leave no process behind."""


def check_room(engine: Engine, grids: Sequence[Grid]) -> None:
    """Raise IasvitError where a grid's cells need more than any machine of the engine has."""
    nodes = engine.nodes()
    for grid in grids:
        needs = grid.needs
        if any(node.fits(needs) for node in nodes):
            continue
        for name, what in (("gpu", "GPUs"), ("cpu", "CPUs"), ("memory_gib", "GiB of memory")):
            most = max((getattr(node, name) for node in nodes), default=0)
            if getattr(needs, name) > most:
                option = name.replace("_gib", "")
                raise IasvitError(
                    f"{grid.where}: a cell needs {getattr(needs, name):g} {what}, but no machine of engine "
                    f"{engine.name} has more than {most:.4g}; change {name} under resources, or give --{option}"
                )
        raise IasvitError(f"{grid.where}: a cell needs {needs}, but no machine of engine {engine.name} has all of it")
