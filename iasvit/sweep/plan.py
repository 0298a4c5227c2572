"""From a suite to the cells that are still to be measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from iasvit.benchmark.estimate import estimate, format_estimates
from iasvit.benchmark.harness import Cell, Job, make_jobs, reference_job, stored_row
from iasvit.benchmark.results import Key, ResultStore, Row
from iasvit.benchmark.task import Task, load_task_class
from iasvit.errors import IasvitError
from iasvit.sweep.suite import Grid, Suite, arguments
from iasvit.sweep.worker import Work


@dataclass(frozen=True)
class PlannedGrid:
    """A grid with its task, on the CPU, and its cells as jobs."""

    grid: Grid
    task: Task
    jobs: list[Job]

    @property
    def cells(self) -> list[Cell]:
        """The cells alone."""
        return [job.cell for job in self.jobs]


def plan_grids(suite: Suite) -> list[PlannedGrid]:
    """The tasks and cells of a suite, all checked; no cell is there twice.

    Raises:
        IasvitError: a backbone, method, bits or option that does not exist, or data that is not there.
    """
    planned: list[PlannedGrid] = []
    seen: dict[Key, str] = {}  # key → the grid that has it
    for grid in suite.grids:
        cls = load_task_class(grid.task)
        try:
            task, cells = cls.grid(**arguments(cls, grid.options, grid.where), device="cpu")
            jobs = make_jobs(task, cells)
        except IasvitError as error:
            raise IasvitError(f"{grid.where}: {error}") from error
        for job in jobs:
            if job.key in seen:
                raise IasvitError(f"{grid.where} has the cell {title(job)}, which {seen[job.key]} has; name it once")
            seen[job.key] = grid.where
        planned.append(PlannedGrid(grid, task, jobs))
    return planned


def title(job: Job) -> str:
    """What lines of progress call a cell."""
    key = job.key
    return f"{key.task} {key.dataset}: {key.model} {key.method} {key.spec} seed {key.seed}"


@dataclass(frozen=True)
class Plan:
    """The cells of a suite.

    Attributes:
        keys: of all cells, in order.
        todo: those to measure.
    """

    keys: list[Key]
    todo: list[Work]

    def rows(self, store: ResultStore) -> list[Row]:
        """The stored rows of the cells, in order."""
        return [row for key in self.keys if (row := store.find(key)) is not None]


def make_plan(
    planned: Sequence[PlannedGrid],
    store: ResultStore,
    *,
    force: bool = False,
    stale: bool = False,
    checkpoints: Path | None = None,
) -> Plan:
    """Which cells the store does not hold yet; `force` and `stale` are those of `run_cells`.

    Args:
        planned: of `plan_grids`.
        store: of rows.
        force: measure also cells that are stored.
        stale: measure also cells that are stored by another version.
        checkpoints: folder for what interrupted cells resume from; None keeps nothing.
    """
    environment = {name: value for name, value in os.environ.items() if name.startswith("IASVIT_")}
    folder = "" if checkpoints is None else str(checkpoints.absolute())
    keys, todo = [], []
    for part in planned:
        for job in part.jobs:
            keys.append(job.key)
            if stored_row(store, job.key, force=force, stale=stale) is None:
                full = reference_job(job).key
                reference = stored_row(store, full, force=force, stale=True)
                row_is_enough = type(part.task).recall is not Task.recall
                lacks = full if reference is None and row_is_enough else None
                todo.append(Work(part.grid, job.cell, job.key, title(job), reference, lacks, folder, environment))
    return Plan(keys, todo)


def format_plan(planned: Sequence[PlannedGrid], store: ResultStore, *, force: bool = False, stale: bool = False) -> str:
    """The cells of each grid and their estimated cost, in Markdown."""
    parts = []
    for part in planned:
        estimates = estimate(part.task, part.cells, store, force=force, stale=stale)
        parts += [f"{part.task.name} on {part.task.data.name}, each cell with {part.grid.needs}:"]
        parts += [format_estimates(estimates)]
    return "\n\n".join(parts)
