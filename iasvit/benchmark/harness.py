"""The harness: it takes the cells (model × method × bits × seed) of a task and stores one row per cell."""

from __future__ import annotations

import errno
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iasvit import distributed
from iasvit.admission import admission
from iasvit.api import quantize
from iasvit.artifact import packed_bytes
from iasvit.artifact import save as save_model
from iasvit.benchmark import provenance
from iasvit.benchmark.locks import locked
from iasvit.benchmark.results import COST, RULES, SCHEMA, Key, ResultStore, Row, check_writable, format_options
from iasvit.benchmark.task import Outputs, Task
from iasvit.benchmark.versions import method_version, other_version
from iasvit.errors import IasvitError, StorageError, reason
from iasvit.export.runtime import check_backend, exported_twin
from iasvit.launch import fail_together
from iasvit.methods import Method, get_method, images_used, load_method_class, method_options, split_variant
from iasvit.nn import quantizers_of
from iasvit.options import without_bounds
from iasvit.progress import Progress, fingerprint
from iasvit.spec import QuantSpec
from iasvit.transforms import transforms_of

BACKEND = "backend"  # how a row names it among its options
FULL_PRECISION = "fp32"  # the method's name in the row of a model that is not quantized
CHECKPOINT_ROOT = Path(".iasvit/checkpoints")

Reference = tuple[Outputs, Row]  # of a model in full precision

_LONGEST_NAME = 150  # characters of a saved model's file name, fingerprint and suffix apart
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


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
        backend: what evaluates the quantized model: "" for PyTorch, or one of `iasvit.export.BACKENDS`, through the
            graph that it exports to. The row says so among its options, which tell it from PyTorch's.
    """

    model: str
    method: str
    spec: str
    seed: int
    calib_size: int
    options: tuple[tuple[str, Any], ...] = ()
    backend: str = ""


def run_cells(
    task: Task,
    cells: Sequence[Cell],
    store: ResultStore,
    *,
    checkpoint_root: Path = CHECKPOINT_ROOT,
    force: bool = False,
    stale: bool = False,
    save: Path | None = None,
    quiet: bool = False,
    references: dict[str, Reference] | None = None,
) -> list[Row]:
    """Measure each cell that the store does not hold yet, and store a row for each as soon as it is done.

    Each full-precision model is evaluated once, and its row is stored if it is missing. A killed run continues at the
    cell, and inside the cell at the block, where it stopped. An error inside a method, or in the evaluation of its
    model, becomes a row with status "failed" and the reason; the other cells go on. If another process is measuring a
    cell with the same folder of checkpoints, the cell is postponed until that one is done.

    All processes of a torch.distributed group run the same cells. The first one reads and writes all files.

    Args:
        task: where models and data come from.
        cells: what to measure.
        store: where rows go.
        checkpoint_root: folder for what an interrupted cell resumes from.
        force: measure also cells that are stored.
        stale: measure also cells that are stored by another version of the method or the task.
        save: folder that keeps the quantized model of each cell measured, a file each; None for none.
        quiet: print nothing on standard error.
        references: model → what `reference` returned of it; what is missing is measured and added.

    Returns:
        The row of each cell, in order: just measured, or the stored one.

    Raises:
        IasvitError: bad bits, method or option, or folders that cannot be written (before anything runs); a model or
            data that cannot be used.
    """
    jobs = make_jobs(task, cells)
    distributed.check_equal("the cells, their data or their models", *(job.key for job in jobs))
    quiet = quiet or distributed.rank() > 0
    run = _Run(task, store, Path(checkpoint_root), force, stale, save, quiet, {} if references is None else references)
    distributed.first(lambda: run.check_folders(jobs))
    numbers = [f"[{number}/{len(jobs)}]" for number in range(1, len(jobs) + 1)]
    rows = [run.measure(job, number, wait=False) for job, number in zip(jobs, numbers, strict=True)]
    return [row or run.wait(job, number) for row, job, number in zip(rows, jobs, numbers, strict=True)]


def reference(
    task: Task, cell: Cell, store: ResultStore, *, checkpoint_root: Path = CHECKPOINT_ROOT, force: bool = False
) -> Reference:
    """Outputs and row of a cell's model in full precision, evaluated where the row does not hold all that is needed."""
    (job,) = make_jobs(task, [cell])
    return _Run(task, store, Path(checkpoint_root), force, False, None, True, {}).reference(job)


def title_of(task: Task, job: Job) -> str:
    """A cell in one line, for messages."""
    return f"{task.name} {task.data.name}: {job.cell.model} {job.cell.method} {job.key.spec} seed {job.key.seed}"


def result_of(task: Task, row: Row) -> str:
    """What came of a cell in one line, for messages."""
    if row["status"] != "ok":
        return f"failed: {row['reason']}"
    return ", ".join(
        f"{m.name} {row[m.name]:.{m.digits}f} (fp32 {row[f'fp_{m.name}']:.{m.digits}f})" for m in task.primary
    )


def exit_status(rows: Sequence[Row]) -> int:
    """1 if any cell failed, else 0."""
    return int(any(row["status"] != "ok" for row in rows))


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as they are in memory."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


@dataclass(frozen=True)
class Job:
    """A cell, its key, and its bits; None for full precision."""

    cell: Cell
    key: Key
    spec: QuantSpec | None


def make_method(cell: Cell) -> Method:
    """The method of a cell with its options; IasvitError for one that does not exist."""
    options = {name: value for name, value in cell.options if value is not None}
    if "seed" in method_options(cell.method):
        options["seed"] = cell.seed
    return get_method(cell.method, **options)


def make_jobs(task: Task, cells: Sequence[Cell]) -> list[Job]:
    """The jobs of cells, in order.

    Raises:
        IasvitError: bad bits, method, option or calibration size; data or a model whose files cannot be read.
    """
    specs = [_check(cell) for cell in cells]
    data = (task.name, task.data.name, task.split_size, task.data_fingerprint())
    models = {name: (task.config_fingerprint(name), name, task.weights(name)) for name in {c.model for c in cells}}
    jobs = []
    for cell, spec in zip(cells, specs, strict=True):
        identity = (*data, *models[cell.model], cell.method)
        if spec is None:
            jobs.append(Job(cell, Key(*identity, "W32A32", 0, 0, "").stored(), None))
            continue
        cls = load_method_class(split_variant(cell.method)[0])
        given = without_bounds(cls, {name: value for name, value in cell.options if value is not None})
        options = format_options([*given.items(), *([(BACKEND, cell.backend)] if cell.backend else [])])
        key = Key(*identity, str(spec), cell.seed, cell.calib_size, options)
        jobs.append(Job(cell, key.stored(), spec))
    return jobs


def _check(cell: Cell) -> QuantSpec | None:
    """The bits of a cell, None for full precision; IasvitError if it cannot be measured."""
    if cell.method == FULL_PRECISION:
        return None
    make_method(cell)
    if cell.backend:
        check_backend(cell.backend)
    if cell.calib_size < 1:
        raise IasvitError(f"calibration size is {cell.calib_size}, but at least one image is needed")
    return QuantSpec.parse(cell.spec)


def reference_job(job: Job) -> Job:
    """That of the same model in full precision."""
    key = job.key._replace(method=FULL_PRECISION, spec="W32A32", seed=0, calib_size=0, options="")
    return Job(Cell(job.cell.model, FULL_PRECISION, "W32A32", 0, 0), key, None)


def stored_row(store: ResultStore, key: Key, *, force: bool = False, stale: bool = False) -> Row | None:
    """The stored row that makes measuring a cell unnecessary, or None; see `run_cells` for `force` and `stale`."""
    row = None if force else store.find(key)
    if row is None or row["status"] != "ok" or (stale and other_version(row)):
        return None
    return row


@dataclass
class _Run:
    """What the cells of one run share."""

    task: Task
    store: ResultStore
    checkpoint_root: Path
    force: bool
    stale: bool
    save: Path | None
    quiet: bool
    references: dict[str, Reference]

    def __post_init__(self) -> None:
        self.primary = [metric.name for metric in self.task.primary]
        self.metrics = [metric.name for metric in self.task.scored]

    def check_folders(self, jobs: Sequence[Job]) -> None:
        """Raise IasvitError where a file that the jobs need cannot be written."""
        if self.save is not None:
            check_writable(self.save / f"{'x' * _LONGEST_NAME}-12345678.safetensors", self.save)
        if any(self._known(job) is None for job in jobs):
            self.store.check(self.task.name, self.task.data.name)

    def _known(self, job: Job) -> Row | None:
        """The stored row that makes measuring a cell unnecessary, if any."""
        return stored_row(self.store, job.key, force=self.force, stale=self.stale)

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def wait(self, job: Job, number: str) -> Row:
        """The row of a cell that another process was measuring, when that one is done."""
        row = self.measure(job, number, wait=True)
        assert row is not None  # what waits gets the lock
        return row

    def measure(self, job: Job, number: str, wait: bool) -> Row | None:
        """The row of a cell, from the store or measured now; None, unless it is to wait, where another process does."""
        title = f"{number} {title_of(self.task, job)}"
        if (stored := self._stored(job, title)) is not None:
            return stored
        if job.spec is None:
            self.say(title)
            return self.reference(job)[1]
        with self._held(job, wait) as free:
            if free:  # the process that had it may have stored the row
                return self._stored(job, title) or self._measure(job, number, title)
        self.say(f"{title}: another process measures it; postponed")
        return None

    def _lock(self, job: Job) -> Path:
        return self.checkpoint_root / f"{fingerprint(*job.key)}.lock"

    @contextmanager
    def _held(self, job: Job, wait: bool) -> Iterator[bool]:
        """The cell's lock, held by the first process for all; see `locked`."""
        with ExitStack() as held:
            yield distributed.first(lambda: held.enter_context(locked(self._lock(job), wait)))

    def _stored(self, job: Job, title: str) -> Row | None:
        """The same, and the cell's checkpoints are removed."""
        return distributed.first(lambda: self._settled(job, title))

    def _settled(self, job: Job, title: str) -> Row | None:
        stored = self._known(job)
        if stored is not None:
            self.say(f"{title}: stored already{self._remark(job, stored)}")
            if self._left(job):
                with locked(self._lock(job), wait=False) as free:
                    for folder in self._left(job) if free else []:
                        Progress(checkpoint=folder).discard()
        return stored

    def _measure(self, job: Job, number: str, title: str) -> Row:
        """The row of a cell, measured now."""
        cell = job.cell
        self.say(title)
        start = time.perf_counter()
        reference, fp_row = self.reference(job)
        network = self.task.load_model(cell.model)
        calibration = self.task.calibration(cell.model, cell.calib_size, cell.seed)
        checkpoint = distributed.first(lambda: self._checkpoint(job, device_of(network)))
        progress = Progress(f"{cell.model} {cell.method}", checkpoint, self.quiet)
        row = self._row(job, network)
        row.update({f"fp_{name}": fp_row[name] for name in self.primary})
        try:
            self._quantize_and_score(job, network, calibration, reference, progress, row)
        except Exception as error:
            if isinstance(error, StorageError) or getattr(error, "errno", None) in _STORAGE_ERRORS:
                raise
            fail_together(error)
            self._failed(row, error)
        row["time"] = _now()
        row = self._appended(row)
        if row["status"] == "ok":
            progress.discard()
        self.say(f"{number} {result_of(self.task, row)}, {time.perf_counter() - start:.0f} s")
        return row

    def _remark(self, job: Job, stored: Row) -> str:
        """What the log says about a stored row that is not measured again."""
        remarks = ""
        if other := other_version(stored):
            remarks += f", {other}; --stale measures it again"
        if self.save is not None and job.spec is not None and not stored["model_file"]:
            remarks += ", without a model file; --force measures it again and keeps one"
        return remarks

    def reference(self, job: Job) -> Reference:
        """The full-precision model's outputs and row; evaluated, and the row stored, once a run.

        A row of another version of the task is no reference for what is measured now.
        """
        job = reference_job(job)
        model = job.cell.model
        if model not in self.references:
            # Where a stored row is all that is needed, the second of two processes waits for the first one's.
            wait = type(self.task).recall is not Task.recall
            with self._held(job, wait):
                self.references[model] = self._find_reference(job)
        return self.references[model]

    def _find_reference(self, job: Job) -> Reference:
        """The same, from the store or evaluated now."""
        model = job.cell.model
        stored = distributed.first(lambda: stored_row(self.store, job.key, force=self.force, stale=True))
        outputs = None if stored is None else self.task.recall(stored)
        if stored is not None and outputs is not None:
            return outputs, stored
        network = self.task.load_model(model)
        row = self._row(job, network)
        progress = Progress(f"{model} full precision", quiet=self.quiet)
        memory = provenance.PeakMemory(device_of(network))
        outputs = self._predict(model, network, progress, row)
        row["peak_memory_mib"] = _peak(memory)
        self._score(outputs, outputs, row)
        row.update({f"fp_{name}": row[name] for name in self.primary}, time=_now())
        if stored is None:
            row = self._appended(row, unless=lambda: stored_row(self.store, job.key, force=self.force, stale=True))
        return outputs, row

    def _appended(self, row: Row, unless: Callable[[], object] = lambda: None) -> Row:
        """Store a row, the first process's, unless something is not None; the row."""

        def append() -> Row:
            if unless() is None:
                self.store.append(row)
            return row

        return distributed.first(append)

    def _quantize_and_score(
        self,
        job: Job,
        network: nn.Module,
        calibration: Tensor | Sequence[Tensor],
        reference: Outputs,
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
            quantized = quantize(network, calibration, job.spec, method, progress=progress)
        used = [quantizer.enabled for _, quantizer in quantizers_of(quantized, weights=False)]
        if used and not any(used):
            row["a_bits"] = 32  # weights only, whatever the spec says of activations
        seconds = progress.seconds
        row["calibration_seconds"] = round(seconds.get("calibration", 0.0), 3)
        parts = [value for name, value in seconds.items() if name.startswith("reconstruction")]
        row["reconstruction_seconds"] = round(sum(parts), 3)
        row["quantization_seconds"] = round(sum(seconds.values()), 3)
        runs = exported_twin(quantized, job.cell.backend) if job.cell.backend else quantized
        outputs = self._predict(job.cell.model, runs, progress, row)
        row["peak_memory_mib"] = _peak(memory)
        row["packed_bytes"] = packed_bytes(quantized)
        row["admission"] = str(admission(quantized))
        self._score(outputs, reference, row)
        row["transformed"] = self._transformed(job, quantized, reference)
        if self.save is not None:
            row["model_file"] = distributed.first(lambda: self._save(self.save, job.key, quantized))

    def _save(self, folder: Path, key: Key, quantized: nn.Module) -> str:
        """Keep a model; its file as rows name it, "" for a model that cannot be saved."""
        parts = (key.task, key.dataset, key.model, key.method, key.spec, f"seed{key.seed}")
        name = re.sub(r"[^a-z0-9._]+", "-", "-".join(parts).lower())[:_LONGEST_NAME].strip("-.")
        path = folder / f"{name}-{fingerprint(*key)[:8]}.safetensors"
        try:
            save_model(quantized, path)
        except (StorageError, OSError):
            raise
        except Exception as error:  # a model that no file can hold has a number all the same
            self.say(f"no model file of {key.model} {key.method} {key.spec}: {reason(error)}")
            return ""
        results = self.store.folder.resolve()
        inside = path.resolve().is_relative_to(results)
        return path.resolve().relative_to(results).as_posix() if inside else str(path)

    def _predict(self, model: str, network: nn.Module, progress: Progress, row: Row) -> Outputs:
        start = time.perf_counter()
        with torch.no_grad():
            outputs = self.task.predict(model, network, progress)
        seconds = time.perf_counter() - start
        row["evaluation_seconds"] = round(seconds, 3)
        row["images_per_second"] = round(self.task.split_size / seconds, 2)
        return outputs

    def _transformed(self, job: Job, quantized: nn.Module, reference: Outputs) -> str:
        """The full-precision scores of a network that a transform changed into another function; "" if none did."""
        made = transforms_of(quantized)
        if made is None or made.network is None:
            return ""
        progress = Progress(f"{job.cell.model} {job.cell.method} in full precision", quiet=self.quiet)
        with torch.no_grad():
            outputs = self.task.predict(job.cell.model, made.network, progress)
        scores = self.task.score(outputs, reference)
        return format_options((name, round(float(scores[name]), 4)) for name in self.primary)

    def _score(self, outputs: Outputs, reference: Outputs, row: Row) -> None:
        scores = {name: float(value) for name, value in self.task.score(outputs, reference).items()}
        if set(scores) != set(self.metrics):
            raise IasvitError(f"task {self.task.name!r} scores {sorted(scores)}, but names {sorted(self.metrics)}")
        for name in self.primary:
            if not isfinite(scores[name]):
                raise IasvitError(f"{name} of the model is {scores[name]}; its outputs are not finite")
        row.update(scores)

    def _checkpoint(self, job: Job, device: torch.device) -> Path:
        """The cell's checkpoint folder, named after all that decides what a run would go on with.

        What is left of the same cell by other versions, libraries or thread counts, or on another device, goes.
        """
        versions = {**provenance.versions(), "torch": torch.__version__, "task": self.task.version}
        machine = provenance.describe_device(device), torch.get_num_threads() if device.type == "cpu" else ""
        begun_by = fingerprint(method_version(job.cell.method), *versions.values(), *machine)
        folder = self.checkpoint_root / f"{fingerprint(*job.key)}-{begun_by}-{self._last(job)}"
        left = self._left(job)
        for old in self.checkpoint_root.glob(f"{fingerprint(*job.key)}-*"):
            if old != folder:
                Progress(checkpoint=old).discard()
                if old not in left:
                    self.say(
                        "this cell starts again and its checkpoint is removed: it was begun by another version, "
                        "library, device or number of threads"
                    )
        return folder

    def _last(self, job: Job) -> str:
        """Which row of the cell is the last; a checkpoint's name says which it was when the checkpoint began."""
        row = self.store.find(job.key)
        return "new" if row is None or row["status"] != "ok" else fingerprint(row["time"], row["evaluation_seconds"])

    def _left(self, job: Job) -> list[Path]:
        """Checkpoints that were begun before the cell's last row: it came of them, and a kill kept them from going."""
        last = self._last(job)
        found = self.checkpoint_root.glob(f"{fingerprint(*job.key)}-*")
        return [folder for folder in found if last != "new" and not folder.name.endswith(f"-{last}")]

    def _failed(self, row: Row, error: Exception) -> None:
        text = " ".join(str(error).split())
        if isinstance(error, IasvitError):
            row["reason"] = text
        else:  # a defect: whoever writes the method needs to see where
            row["reason"] = f"{type(error).__name__}: {text}"[:500]
            if not self.quiet:
                traceback.print_exception(error)
        row["status"] = "failed"
        row.update(dict.fromkeys(self.metrics))

    def _row(self, job: Job, network: nn.Module) -> Row:
        """A row with everything that is known before measuring; the rest is None."""
        return {
            "schema_version": SCHEMA,
            **job.key._asdict(),
            "calib_used": images_used(make_method(job.cell), job.cell.calib_size) if job.spec else 0,
            "method_version": method_version(job.cell.method),
            "task_version": self.task.version,
            "data_kind": self.task.data.kind,
            "data_description": self.task.data.description,
            "w_bits": job.spec.w_bits if job.spec else 32,
            "a_bits": job.spec.a_bits if job.spec else 32,
            **dict.fromkeys(self.metrics),
            **dict.fromkeys(f"fp_{name}" for name in self.primary),
            **dict.fromkeys(COST),
            **dict.fromkeys(RULES, ""),
            "model_bytes": model_bytes(network),
            "model_file": "",
            "device": provenance.describe_device(device_of(network)),
            "threads": torch.get_num_threads(),
            **provenance.versions(),
            "git_commit": provenance.git_commit(),
            "spec_hash": job.spec.hash if job.spec else "",
            "command": provenance.command(),
            "status": "ok",
            "reason": "",
            "time": _now(),
        }


def device_of(network: nn.Module) -> torch.device:
    """Where a network's parameters are; the CPU for one that has none."""
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def _peak(memory: provenance.PeakMemory) -> float:
    """MiB, of the process that took most."""
    return round(max(distributed.gathered(memory.mib)), 1)


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
