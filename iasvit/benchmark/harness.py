"""The harness: cells (model × method × bits × seed) of a task in, one stored row a cell out."""

from __future__ import annotations

import errno
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from iasvit.artifact import packed_bytes
from iasvit.benchmark import provenance
from iasvit.benchmark.results import COST, Key, ResultStore, Row, format_options
from iasvit.errors import IasvitError
from iasvit.methods import Method, get_method, load_method_class, method_options, split_variant
from iasvit.nn import quantizers_of
from iasvit.progress import JournalError, Progress, fingerprint
from iasvit.spec import QuantSpec

FULL_PRECISION = "fp32"  # the method's name in the row of a model that is not quantized
JOURNAL_ROOT = Path(".iasvit/journal")
Predictions = Any  # whatever a task's predict returns and its score takes

_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


class Task(Protocol):
    """A benchmark: models, calibration images, and an evaluation.

    Attributes:
        name: for example "imagenet".
        dataset: what it runs on, for example "mini".
        split_size: images evaluated.
        metrics: names of the values that `score` returns, the primary one first.
        primary: optional; the primary metrics where there are several, as box and mask AP.
    """

    name: str
    dataset: str
    split_size: int
    metrics: tuple[str, ...]

    def load_model(self, model: str) -> nn.Module:
        """The full-precision model of this name in eval mode, on the task's device."""
        ...

    def calibration(self, model: str, n: int, seed: int) -> Tensor | Sequence[Tensor]:
        """n calibration images, normalised as the model wants; the seed chooses them.

        A tensor n×3×H×W, or where they differ in size, a sequence of n tensors 1×3×H×W.
        """
        ...

    def predict(self, model: str, network: nn.Module, progress: Progress) -> Predictions:
        """The network's answers on the whole split; `model` names the full-precision model that it comes from."""
        ...

    def score(self, predictions: Predictions, reference: Predictions) -> dict[str, float]:
        """Every metric; `reference` are the full-precision model's predictions."""
        ...

    # Optional: def weights(self, model: str) -> str, which weights the model has where its name does not tell (a file
    # and its hash); it is part of a cell's key. Without it, the empty string.
    # Optional: def forward(self, network: nn.Module, images: Tensor), the network's answer to images where it is not
    # network(images).
    # Optional: def recall(self, row: Row) -> Predictions, the predictions in full precision as far as `score` reads
    # them, from the stored row of the full-precision model; which then is not evaluated again.


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        model: name that the task knows.
        method: name of the registry, also a variant, or "fp32" for the model as it is.
        spec: bits, "W3A3".
        seed: of calibration images and method.
        calib_size: calibration images.
        options: (name, value) pairs for the method besides `seed`, sorted by name; None is the method's own default.
    """

    model: str
    method: str
    spec: str
    seed: int
    calib_size: int
    options: tuple[tuple[str, Any], ...] = ()


def run_cells(
    task: Task,
    cells: Sequence[Cell],
    store: ResultStore,
    *,
    journal_root: Path = JOURNAL_ROOT,
    force: bool = False,
    quiet: bool = False,
) -> list[Row]:
    """Measure each cell that the store does not hold yet, and store a row for each as soon as it is done.

    The full-precision model is evaluated once a model, and its row stored where it is missing. A run that was killed
    goes on at the cell, and inside the cell at the block, where it stopped. What goes wrong inside a method, or in the
    evaluation of the model that it gave, becomes a row with status "failed" and the reason; the other cells go on.

    Args:
        task: where models and data come from.
        cells: what to measure.
        store: where rows go.
        journal_root: folder for what an interrupted cell resumes from.
        force: measure also cells that are stored.
        quiet: print nothing on standard error.

    Returns:
        The row of each cell, in order: just measured, or the stored one.

    Raises:
        IasvitError: bad bits, method or option (before anything runs); a model, data or a folder that cannot be used.
    """
    run = _Run(task, store, journal_root, force, quiet)
    jobs = [run.job(cell) for cell in cells]
    return [run.measure(job, f"[{number}/{len(jobs)}]") for number, job in enumerate(jobs, start=1)]


def exit_status(rows: Sequence[Row]) -> int:
    """1 if any cell failed, else 0."""
    return int(any(row["status"] != "ok" for row in rows))


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as they are in memory."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


@dataclass(frozen=True)
class Job:
    """A cell, and what it takes to know whether it is stored: its key, bits and code."""

    cell: Cell
    key: Key
    spec: QuantSpec | None  # None: full precision
    code: str


def _weights(task: Task, model: str) -> str:
    return task.weights(model) if hasattr(task, "weights") else ""


def make_method(cell: Cell) -> Method:
    """The method of a cell with its options; IasvitError for one that does not exist."""
    options = {name: value for name, value in cell.options if value is not None}
    if "seed" in method_options(cell.method):
        options["seed"] = cell.seed
    return get_method(cell.method, **options)


def make_job(task: Task, cell: Cell) -> Job:
    """The job of a cell; IasvitError for bad bits, method, option or calibration size."""
    identity = (task.name, task.dataset, task.split_size, cell.model, _weights(task, cell.model), cell.method)
    if cell.method == FULL_PRECISION:
        return Job(cell, Key(*identity, "W32A32", 0, 0, ""), None, "")
    make_method(cell)
    if cell.calib_size < 1:
        raise IasvitError(f"calibration size is {cell.calib_size}, but at least one image is needed")
    spec = QuantSpec.parse(cell.spec)
    options = format_options((name, value) for name, value in cell.options if value is not None)
    base, *_ = split_variant(cell.method)
    code = provenance.code_hash(load_method_class(base).__module__)
    return Job(cell, Key(*identity, str(spec), cell.seed, cell.calib_size, options), spec, code)


class _Run:
    """What the cells of one run share."""

    def __init__(self, task: Task, store: ResultStore, journal_root: Path, force: bool, quiet: bool) -> None:
        self.task = task
        self.store = store
        self.journal_root = Path(journal_root)
        self.force = force
        self.quiet = quiet
        self.primary: tuple[str, ...] = tuple(getattr(task, "primary", task.metrics[:1]))
        self._reference: dict[str, tuple[Predictions, Row]] = {}

    def job(self, cell: Cell) -> Job:
        return make_job(self.task, cell)

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def measure(self, job: Job, number: str) -> Row:
        """The row of a cell, from the store or measured now."""
        cell = job.cell
        where = f"{self.task.name} {self.task.dataset}"
        title = f"{number} {where}: {cell.model} {cell.method} {job.key.spec} seed {job.key.seed}"
        stored = self.store.find(job.key)
        if stored is not None and stored["status"] == "ok" and not self.force:
            note = "" if stored["code_hash"] == job.code else ", by other code than the present; --force measures again"
            self.say(f"{title}: stored already{note}")
            return stored
        self.say(title)
        start = time.perf_counter()
        reference, fp_row = self.reference(cell.model)
        if job.spec is None:
            return fp_row
        network = self.task.load_model(cell.model)
        calibration = self.task.calibration(cell.model, cell.calib_size, cell.seed)
        journal = self._journal(job)
        progress = Progress(f"{cell.model} {cell.method}", journal, self.quiet)
        row = self._row(job, network)
        row.update({f"fp_{name}": fp_row[name] for name in self.primary})
        try:
            self._quantize_and_score(job, network, calibration, reference, progress, row)
        except Exception as error:
            if isinstance(error, JournalError) or getattr(error, "errno", None) in _STORAGE_ERRORS:
                raise
            self._failed(row, error)
        row["time"] = _now()
        self.store.append(row)
        if row["status"] == "ok":
            progress.discard()
            values = ", ".join(f"{name} {row[name]:.2f} (fp32 {row[f'fp_{name}']:.2f})" for name in self.primary)
            self.say(f"{number} {values}, {time.perf_counter() - start:.0f} s")
        else:
            self.say(f"{number} failed: {row['reason']}")
        return row

    def reference(self, model: str) -> tuple[Predictions, Row]:
        """The full-precision model's predictions and row; evaluated, and the row stored, once a run."""
        if model not in self._reference:
            job = self.job(Cell(model, FULL_PRECISION, "W32A32", 0, 0))
            stored = None if self.force else self.store.find(job.key)
            recall = getattr(self.task, "recall", None)
            if recall is not None and stored is not None and stored["status"] == "ok":
                self._reference[model] = recall(stored), stored
                return self._reference[model]
            network = self.task.load_model(model)
            row = self._row(job, network)
            progress = Progress(f"{model} full precision", quiet=self.quiet)
            memory = provenance.PeakMemory(device_of(network))
            predictions = self._predict(model, network, progress, row)
            row["peak_memory_mib"] = round(memory.mib(), 1)
            self._score(predictions, predictions, row)
            row.update({f"fp_{name}": row[name] for name in self.primary}, time=_now())
            if self.force or not self.store.has(job.key):
                self.store.append(row)
            self._reference[model] = predictions, row
        return self._reference[model]

    def _quantize_and_score(
        self,
        job: Job,
        network: nn.Module,
        calibration: Tensor | Sequence[Tensor],
        reference: Predictions,
        progress: Progress,
        row: Row,
    ) -> None:
        """Fill in the row's metrics and cost."""
        method = make_method(job.cell)
        row["iterations"] = getattr(method, "iterations", None)
        device = device_of(network)
        memory = provenance.PeakMemory(device)
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with forked, progress.phase("quantization"):
            torch.manual_seed(job.cell.seed)  # for methods that draw from the global generator
            quantized = method.quantize(network, calibration, job.spec, progress).eval()
        used = [quantizer.enabled for _, quantizer in quantizers_of(quantized, weights=False)]
        if used and not any(used):
            row["a_bits"] = 32  # weights only, whatever the spec says of activations
        seconds = progress.seconds
        row["calibration_seconds"] = round(seconds.get("calibration", 0.0), 3)
        parts = [value for name, value in seconds.items() if name.startswith("reconstruction")]
        row["reconstruction_seconds"] = round(sum(parts), 3)
        row["quantization_seconds"] = round(sum(seconds.values()), 3)
        predictions = self._predict(job.cell.model, quantized, progress, row)
        row["peak_memory_mib"] = round(memory.mib(), 1)
        row["packed_bytes"] = packed_bytes(quantized)
        self._score(predictions, reference, row)

    def _predict(self, model: str, network: nn.Module, progress: Progress, row: Row) -> Predictions:
        start = time.perf_counter()
        with torch.no_grad():
            predictions = self.task.predict(model, network, progress)
        seconds = time.perf_counter() - start
        row["evaluation_seconds"] = round(seconds, 3)
        row["images_per_second"] = round(self.task.split_size / seconds, 2)
        return predictions

    def _score(self, predictions: Predictions, reference: Predictions, row: Row) -> None:
        scores = {name: float(value) for name, value in self.task.score(predictions, reference).items()}
        if set(scores) != set(self.task.metrics):
            raise IasvitError(f"task {self.task.name!r} scores {sorted(scores)}, but names {sorted(self.task.metrics)}")
        for name in self.primary:
            if not isfinite(scores[name]):
                raise IasvitError(f"{name} of the model is {scores[name]}; its outputs are not finite")
        row.update(scores)

    def _journal(self, job: Job) -> Path:
        """The cell's journal folder; what other code left of the same cell goes."""
        name = fingerprint(*job.key)
        for old in self.journal_root.glob(f"{name}-*"):
            if old.name != f"{name}-{job.code}":
                Progress(journal=old).discard()
        return self.journal_root / f"{name}-{job.code}"

    def _failed(self, row: Row, error: Exception) -> None:
        text = " ".join(str(error).split())
        if isinstance(error, IasvitError):
            row["reason"] = text
        else:  # a defect: whoever writes the method needs to see where
            row["reason"] = f"{type(error).__name__}: {text}"[:500]
            if not self.quiet:
                traceback.print_exception(error)
        row["status"] = "failed"
        row.update(dict.fromkeys(self.task.metrics))

    def _row(self, job: Job, network: nn.Module) -> Row:
        """A row with everything that is known before measuring; the rest is None."""
        return {
            **job.key._asdict(),
            "w_bits": job.spec.w_bits if job.spec else 32,
            "a_bits": job.spec.a_bits if job.spec else 32,
            **dict.fromkeys(self.task.metrics),
            **dict.fromkeys(f"fp_{name}" for name in self.primary),
            **dict.fromkeys(COST),
            "model_bytes": model_bytes(network),
            "device": provenance.describe_device(device_of(network)),
            "threads": torch.get_num_threads(),
            **provenance.versions(),
            "git_commit": provenance.git_commit(),
            "spec_hash": job.spec.hash if job.spec else "",
            "code_hash": job.code,
            "command": provenance.command(),
            "status": "ok",
            "reason": "",
            "time": _now(),
        }


def device_of(network: nn.Module) -> torch.device:
    """Where a network's parameters are; the CPU for one that has none."""
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
