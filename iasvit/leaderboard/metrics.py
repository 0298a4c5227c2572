"""What a task's class says of its numbers: the metrics of rows, and the order of models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from iasvit.benchmark.results import metric_columns
from iasvit.benchmark.task import Metric, Task, load_task_class
from iasvit.errors import IasvitError


def task_metrics(task: str, columns: Iterable[str]) -> tuple[Metric, ...]:
    """The metrics that rows with these columns have, as the task's class declares them.

    A metric that no class declares has the defaults of `Metric`. A metric with a column fp_<name> is primary, and where
    no metric is, the first one that does not count what was left out.

    Args:
        task: name, registered or not.
        columns: of the rows; those that are empty in all rows left out.

    Returns:
        The declared ones first, in the order of the declaration; then the others, in the order of the columns.
    """
    columns = list(columns)
    full_precision = [name.removeprefix("fp_") for name in columns if name.startswith("fp_")]
    names = list(dict.fromkeys([*metric_columns(columns), *full_precision]))
    cls = _task_class(task)
    declared = {metric.name: metric for metric in cls.metrics} if cls else {}
    ordered = [name for name in declared if name in names] + [name for name in names if name not in declared]
    metrics = [declared.get(name, Metric(name)) for name in ordered]
    metrics = [replace(metric, primary=metric.primary or metric.name in full_precision) for metric in metrics]
    if not any(metric.primary for metric in metrics):
        first = next((metric for metric in metrics if not metric.counts), None)
        metrics = [replace(metric, primary=metric is first) for metric in metrics]
    return tuple(metrics)


def further(metrics: Iterable[Metric]) -> list[Metric]:
    """Those that are neither primary nor a standard error nor a count."""
    metrics = list(metrics)
    errors = {metric.standard_error for metric in metrics}
    return [metric for metric in metrics if not (metric.primary or metric.counts or metric.name in errors)]


def model_order(task: str) -> tuple[str, ...]:
    """The task's models in the order in which tables have them; other models follow by name."""
    cls = _task_class(task)
    return cls.model_order if cls else ()


def _task_class(name: str) -> type[Task] | None:
    """None where the task is not registered here, or cannot be loaded: its rows are shown all the same."""
    try:
        loaded: object = load_task_class(name)
    except IasvitError:
        return None
    return loaded if isinstance(loaded, type) and issubclass(loaded, Task) else None
