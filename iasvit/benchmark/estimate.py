"""What cells would cost, without measuring any: from stored rows, or from one timed forward."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iasvit.benchmark.harness import FULL_PRECISION, Cell, device_of, make_jobs, make_method, stored_row
from iasvit.benchmark.results import Key, ResultStore, Row
from iasvit.benchmark.task import Task
from iasvit.models import is_detector


@dataclass(frozen=True)
class Estimate:
    """What a cell is expected to cost.

    Attributes:
        cell: the cell.
        seconds: 0 for a stored cell, None where nothing is known.
        basis: what the number rests on.
    """

    cell: Cell
    seconds: float | None
    basis: str


def estimate(
    task: Task, cells: Sequence[Cell], store: ResultStore, *, force: bool = False, stale: bool = False
) -> list[Estimate]:
    """What each cell would cost, without measuring any (`--dry-run`).

    From the stored row of the same model and method that is nearest in iterations, scaled; else, for methods that
    reconstruct, from one measured forward of 8 calibration images.

    Raises:
        IasvitError: as `run_cells` does before anything runs.
    """
    jobs = make_jobs(task, cells)
    rows = store.rows()
    rows = rows[(rows["task"] == task.name) & (rows["dataset"] == task.data.name) & (rows["status"] == "ok")]
    known: list[Row] = rows.astype(object).where(rows.notna(), None).to_dict("records")
    timed: dict[str, tuple[float, bool]] = {}
    estimates = []
    for job in jobs:
        cell = job.cell
        if stored_row(store, job.key, force=force, stale=stale) is not None:
            estimates.append(Estimate(cell, 0.0, "stored already"))
            continue
        iterations, batch_size = _steps(cell)
        same = [row for row in known if (row["model"], row["method"]) == (cell.model, cell.method)]
        if same:
            # The same bits first, then the nearest number of iterations.
            nearest = min(
                same, key=lambda r: (r["spec"] != job.key.spec, abs((r["iterations"] or 0) - (iterations or 0)))
            )
            seconds = _scaled(nearest, job.key, iterations, batch_size)
            estimates.append(Estimate(cell, seconds, f"stored row of {nearest['time'][:10]}"))
            continue
        if cell.model not in timed:
            timed[cell.model] = _time_forward(task, cell.model)
        image_seconds, detector = timed[cell.model]
        if (forwards := _forwards(cell, iterations, batch_size, detector)) is not None:
            forwards += 2 * task.split_size  # quantizers double a forward
            estimates.append(Estimate(cell, image_seconds * forwards, "rough, from one timed forward"))
        else:
            estimates.append(Estimate(cell, None, "no measurement yet"))
    return estimates


def _steps(cell: Cell) -> tuple[int | None, int]:
    """Iterations and batch size of a cell; (None, 1) if the method's options say nothing of them."""
    if cell.method == FULL_PRECISION:
        return None, 1
    method = make_method(cell)
    return getattr(method, "iterations", None), getattr(method, "batch_size", 1)


def _forwards(cell: Cell, iterations: int | None, batch_size: int, detector: bool) -> float | None:
    """Forward passes of one image that a cell's method takes, roughly; None where nothing says."""
    if cell.method == FULL_PRECISION:
        return 0.0
    forwards = getattr(make_method(cell), "forwards", None)
    if forwards is not None:
        return forwards(cell.calib_size, detector)
    # A step is a forward and a backward with quantizers, in each of two stages; then the initialisation; measured.
    return None if iterations is None else 7.0 * iterations * batch_size + 36 * cell.calib_size


def _scaled(row: Row, key: Key, iterations: int | None, batch_size: int) -> float:
    """Seconds of a cell from the row of another, each part by what it grows with."""
    evaluation = row["evaluation_seconds"] * key.split_size / row["split_size"]
    if key.method == FULL_PRECISION:
        return evaluation
    reconstruction = row["reconstruction_seconds"]
    rest = (row["quantization_seconds"] - reconstruction) * key.calib_size / row["calib_size"]
    if iterations is not None and row["iterations"]:
        options = dict(option.partition("=")[::2] for option in row["options"].split(";"))
        reconstruction *= iterations / row["iterations"] * batch_size / int(options.get("batch_size", batch_size))
    return evaluation + rest + reconstruction


@torch.no_grad()
def _time_forward(task: Task, model: str) -> tuple[float, bool]:
    """Seconds that one image takes in full precision, and whether the model is a detector."""
    network = task.load_model(model)
    images = task.calibration(model, 8, 0)
    batches = [images] if isinstance(images, Tensor) else list(images)  # images of different sizes come one by one
    batches = [batch.to(device_of(network)) for batch in batches]
    task.forward(network, batches[0][:1])
    seconds = []
    for _ in range(3):  # the machine may have other things to do
        start = time.perf_counter()
        for batch in batches:
            task.forward(network, batch)
        seconds.append(time.perf_counter() - start)
    return min(seconds) / len(images), is_detector(network)


def format_estimates(estimates: Sequence[Estimate]) -> str:
    """The estimates as a Markdown table with a line of their sum."""
    lines = ["| model | method | bits | seed | seconds | basis |", "|---|---|---|--:|--:|---|"]
    for item in estimates:
        cell, seconds = item.cell, "?" if item.seconds is None else f"{item.seconds:.0f}"
        lines.append(f"| {cell.model} | {cell.method} | {cell.spec} | {cell.seed} | {seconds} | {item.basis} |")
    unknown = sum(item.seconds is None for item in estimates)
    total = sum(item.seconds or 0.0 for item in estimates)
    tail = f", and {unknown} of unknown cost" if unknown else ""
    return "\n".join([*lines, "", f"{len(estimates)} cells, about {total:.0f} s{tail}"])
