"""How a benchmark describes itself: its metrics, data and version, and how it loads, runs and scores a model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from iasvit.errors import IasvitError
from iasvit.plugins import load

if TYPE_CHECKING:  # to list tasks must not import torch
    import torch
    from torch import Tensor, nn
    from typer import Typer

    from iasvit.benchmark.harness import Cell
    from iasvit.progress import Progress

GROUP = "iasvit.tasks"
Row = dict[str, Any]
Outputs = Any  # whatever a task's predict returns and its score takes
REAL, EMBEDDED = "real", "embedded"  # kinds of data that are measured on; the third kind of number is published


@dataclass(frozen=True)
class Metric:
    """A number that a task's `score` returns.

    Attributes:
        name: its column, "top1".
        digits: after the point, in tables.
        higher_is_better: if False, the lowest value is the best.
        primary: whether it has tables and plots of its own, with the full-precision model's value beside it in the
            column fp_<name>.
        standard_error: name of the metric that is its standard error from the size of the split; "" for none.
        counts: whether it counts what was left out (unreadable images), and is said in words where it is not 0.
        minimum, maximum: what a value lies between, both included; a published value that does not is refused.
    """

    name: str
    digits: int = 2
    higher_is_better: bool = True
    primary: bool = False
    standard_error: str = ""
    counts: bool = False
    minimum: float = -math.inf
    maximum: float = math.inf

    @property
    def range(self) -> str:
        """What a value is, in words."""
        if math.isfinite(self.minimum) and math.isfinite(self.maximum):
            return f"a number from {self.minimum:g} to {self.maximum:g}"
        if math.isfinite(self.minimum):
            return f"a finite number of at least {self.minimum:g}"
        return f"a finite number of at most {self.maximum:g}" if math.isfinite(self.maximum) else "a finite number"


@dataclass(frozen=True)
class DataSet:
    """What a task runs on.

    Attributes:
        name: "mini"; part of the result file's name.
        kind: REAL or EMBEDDED. Tables never mix the two.
        description: what headings say of numbers measured on it, behind "measured on": "real data".
    """

    name: str
    kind: str = REAL
    description: str = "real data"

    def __post_init__(self) -> None:
        if self.kind not in (REAL, EMBEDDED):
            raise IasvitError(f"the kind of data set {self.name!r} is {self.kind!r}, but {REAL} or {EMBEDDED} is meant")


class Task(ABC):
    """A benchmark: models, calibration images, and an evaluation. Registered in a package's metadata:

        [project.entry-points."iasvit.tasks"]
        my_task = "my_package.my_module:MyTask"

    Attributes:
        name: of the entry point, "imagenet".
        metrics: what `score` returns, the primary ones first. Of the class, so that tables know them without data.
        version: raised, with a line in `changelog`, whenever the task's numbers change.
        changelog: version → what changed the numbers; version 1 need not be in it.
        model_order: models in the order in which tables have them; others follow by name.
        data_sets: data sets by name, as far as they are known beforehand; any other is real data.
        data: what this instance runs on.
        split_size: images evaluated.
        device: where models run.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    version: ClassVar[int] = 1
    changelog: ClassVar[dict[int, str]] = {}
    model_order: ClassVar[tuple[str, ...]] = ()
    data_sets: ClassVar[dict[str, DataSet]] = {}
    data: DataSet
    split_size: int
    device: torch.device | str = "cpu"

    @property
    def scored(self) -> tuple[Metric, ...]:
        """Those of `metrics` that this instance scores: all, unless the data has no labels, say."""
        return self.metrics

    @property
    def primary(self) -> tuple[Metric, ...]:
        """The primary ones of `scored`, or else its first."""
        return tuple(metric for metric in self.scored if metric.primary) or self.scored[:1]

    @classmethod
    def command(cls) -> Typer:
        """The app behind `iasvit run <name>`.

        Raises:
            IasvitError: the task has none.
        """
        raise IasvitError(f"task {cls.name!r} has no command")

    @classmethod
    def grid(cls, **options: Any) -> tuple[Task, list[Cell]]:
        """The task and the cells that these options of its command name. All are checked, and nothing is measured.

        A suite of `iasvit sweep` may give each keyword parameter that the task's own `grid` has, by its type hint: a
        list, text, number, Path or Enum. One of them is `device`, which the sweep gives. The task must be the same
        whichever of the values of a list (backbones, bits, seeds) are given.

        Raises:
            IasvitError: the task has none, or an option is wrong.
        """
        raise IasvitError(f"task {cls.name!r} has no grid, so no suite can name it")

    @abstractmethod
    def load_model(self, model: str) -> nn.Module:
        """The full-precision model of this name in eval mode, on the task's device."""

    @abstractmethod
    def calibration(self, model: str, n: int, seed: int) -> Tensor | Sequence[Tensor]:
        """n calibration images, normalised for the model. The seed chooses them.

        A tensor n×3×H×W, or where they differ in size, a sequence of n tensors 1×3×H×W.
        """

    @abstractmethod
    def predict(self, model: str, network: nn.Module, progress: Progress) -> Outputs:
        """The network's outputs on the whole split; `model` names the full-precision model that it comes from."""

    @abstractmethod
    def score(self, outputs: Outputs, reference: Outputs) -> dict[str, float]:
        """Every metric of `scored`; `reference` are the full-precision model's outputs."""

    @abstractmethod
    def data_fingerprint(self) -> str:
        """Hex digits that change when the evaluated split or the calibration images to draw from do."""

    def config_fingerprint(self, model: str) -> str:
        """Hex digits that change when the model's resolved configuration does; "" where its name says it all."""
        return ""

    def weights(self, model: str) -> str:
        """Which weights the model has, if its name does not tell (a file and its hash); "" if it does."""
        return ""

    def forward(self, network: nn.Module, images: Tensor) -> Any:
        """The network's output for a batch of images, for timing."""
        return network(images)

    def recall(self, row: Row) -> Outputs | None:
        """The full-precision outputs as far as `score` reads them, from its stored row; None to evaluate it again."""
        return None


def list_tasks() -> dict[str, EntryPoint]:
    """Registered tasks by name, sorted."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def load_task_class(name: str) -> type[Task]:
    """The class that a task's entry point names.

    Raises:
        IasvitError: no such task (the message lists what exists), or its module cannot be imported.
    """
    entries = list_tasks()
    if name not in entries:
        raise IasvitError(f"task {name!r} is not registered; the registered ones are {', '.join(entries) or 'none'}")
    return load(entries[name], f"task {name!r}")


@cache
def find_task_class(name: str) -> type[Task] | None:
    """The class of a task, or None if it is not installed or cannot be loaded."""
    try:
        return load_task_class(name)
    except IasvitError:
        return None


def data_set(task: str, name: str) -> DataSet:
    """The data set of this name; real data unless the task is installed and says otherwise."""
    cls = find_task_class(task)
    return (cls.data_sets if cls else {}).get(name, DataSet(name))
