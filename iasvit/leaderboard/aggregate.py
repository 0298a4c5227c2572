"""Tables from the stored rows. Kinds of data, data sets and bit-widths have tables of their own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from iasvit.benchmark.results import Row
from iasvit.benchmark.task import REAL, Metric
from iasvit.leaderboard.cells import TABLE, add_published, aggregate, cells_as_data, labelled, row_columns
from iasvit.leaderboard.markdown import MARKS, MISSING, Document, brief_grid, escape, grid, slug
from iasvit.leaderboard.metrics import further, model_order, task_metrics
from iasvit.progress import fingerprint as digest

_COST = {  # column → heading
    "calibration_seconds": "calibration s",
    "reconstruction_seconds": "reconstruction s",
    "quantization_seconds": "all of quantization s",
    "evaluation_seconds": "evaluation s",
    "images_per_second": "images/s",
    "peak_memory_mib": "peak memory MiB",
    "model_bytes": "model bytes",
    "packed_bytes": "packed bytes",
}


def table(rows: Sequence[Row], metrics: Sequence[str] | None = None) -> str:
    """Markdown tables, methods × models, of these rows: what a task prints at the end of a run.

    Args:
        rows: as `run_cells` returns them.
        metrics: names of those to show; None for the primary ones.
    """
    parts = []
    frame = labelled(rows)
    for (task, dataset, _, spec, split_size, fingerprint), group in frame.groupby(list(TABLE), sort=True):
        found = task_metrics(task, row_columns(group))
        cells = aggregate(group, found)
        by_name = {metric.name: metric for metric in found}
        names = [metric.name for metric in found if metric.primary] if metrics is None else metrics
        size = _size(frame[(frame["dataset"] == dataset) & (frame["spec"] == spec)], split_size, fingerprint)
        for name in names:
            if name in by_name:
                parts.append(f"{escape(f'{task} on {dataset}, {spec}')}: {name}, {size}")
                parts.append(grid(cells, by_name[name], model_order(task), marked=1))  # a terminal has no underlining
        parts.append(_bullets([*_failures(group), *_left_out(group, found), *_other_versions(cells)]))
    return "\n\n".join(part for part in parts if part)


def measured_documents(rows: Iterable[Row], published: pd.DataFrame | None = None) -> list[Document]:
    """A document for each task, data set, kind of data and spec that has rows.

    Args:
        rows: all of the store; of rows with equal keys the latest counts.
        published: of `read_published`; shown with what is measured on the papers' data set, the real one that has the
            task's name. None for none.
    """
    frame = labelled(rows)
    kinds = frame.groupby(["task", "dataset"])["data_kind"].nunique()
    documents = []
    for (task, dataset, kind, spec), group in frame.groupby(["task", "dataset", "data_kind", "spec"], sort=True):
        name = slug(f"{task}-{dataset}{f'-{kind}' if kinds[task, dataset] > 1 else ''}-{spec}")
        papers = published is not None and kind == REAL and dataset == task
        values = published[published["task"] == task] if papers else None
        documents.append(_document(name, (task, dataset, spec), kind, group, values))
    return _with_own_names(documents)


def _with_own_names(documents: list[Document]) -> list[Document]:
    """The documents; those whose names would be the same for all that a file name leaves out get a digest each."""
    counts = Counter(document.name for document in documents)
    return [
        replace(document, name=f"{document.name}-{digest(document.kind, *(document.identity or ()))[:8]}")
        if counts[document.name] > 1
        else document
        for document in documents
    ]


def _document(
    name: str, identity: tuple[str, str, str], kind: str, rows: pd.DataFrame, published: pd.DataFrame | None
) -> Document:
    """The tables of rows that have their task, data set, kind and spec in common: the largest and latest data first."""
    assert set(rows["data_kind"]) == {kind}
    task, dataset, spec = identity
    order = model_order(task)
    heading = f"measured on {_description(rows)}"
    title = f"{task} on {dataset}, {spec}: {heading}"
    parts = {
        (split_size, part["data_time"].iloc[0], fingerprint): part
        for (split_size, fingerprint), part in rows.groupby(["split_size", "data_fingerprint"])
    }
    sections, details, frames, brief = [], [], [], []
    first: dict[str, Any] = {}
    for data, part in sorted(parts.items(), reverse=True):
        split_size, _, fingerprint = data
        size = _size(rows, split_size, fingerprint)
        part = part.dropna(axis=1, how="all")
        metrics = task_metrics(task, row_columns(part))
        primary = [metric for metric in metrics if metric.primary]
        cells = aggregate(part, metrics)
        if published is not None:
            cells = add_published(cells, published, spec, primary)
        for metric in primary:
            head = f"**{escape(title)}.** {metric.name}, {size}"
            sections += [head, grid(cells, metric, order)]
            if not first:  # the largest and latest data alone
                brief += [head, brief_grid(cells, metric, order)]
        if not first:
            brief.append(_brief_note(part, cells, primary))
        sections += [_bullets(_notes(part, cells, metrics)), _commands(part)]
        details += [_details(cells, size, further(metrics), order)]
        columns = {"task": task, "dataset": dataset, "spec": spec, "data_kind": kind}
        columns |= {"split_size": split_size, "data_fingerprint": fingerprint}
        frames.append(cells_as_data(cells, metrics, columns))
        first = first or {"metrics": metrics, "cells": cells, "data": data}
    return Document(
        name=name,
        title=title,
        sections="\n\n".join(sections),
        details="\n\n".join(details),
        brief="\n\n".join(brief),
        frame=pd.concat(frames, ignore_index=True),
        kind=kind,
        heading=heading,
        model_order=order,
        identity=identity,
        **first,
    )


def _description(rows: pd.DataFrame) -> str:
    """What the latest of the rows says of its data."""
    return rows.sort_values(["time", "data_description"])["data_description"].iloc[-1]


def _size(rows: pd.DataFrame, split_size: int, fingerprint: str) -> str:
    """The split's size and, where these rows have several data of that size, which of them."""
    several = rows.loc[rows["split_size"] == split_size, "data_fingerprint"].nunique() > 1
    return f"{split_size} images" + (f", data {fingerprint or 'not recorded'}" if several else "")


def _notes(rows: pd.DataFrame, cells: pd.DataFrame, metrics: Sequence[Metric]) -> list[str]:
    """What the numbers are, the methods' settings, what failed, and what another version measured."""
    counts = sorted(set(cells["n"]) - {0})
    seeds = f"{counts[0]} seed{'s' * (counts[0] > 1)} per cell" if len(counts) == 1 else "n seeds per cell"
    notes = [f"Mean ± standard deviation over seeds (difference from fp32); {seeds}; {MARKS}."]
    for metric in metrics:
        if metric.primary and not metric.higher_is_better:
            notes.append(f"The lower {metric.name}, the better.")
        if metric.primary and metric.standard_error in rows:
            error = f"{rows[metric.standard_error].max():.{metric.digits}f}"
            notes.append(f"Standard error of {metric.name} from the size of the split: at most {error}.")
    for label, settings in sorted(set(zip(cells["method_label"], cells["settings"], strict=True))):
        notes.append(escape(f"{label}: {settings.replace(';', ', ')}."))
    notes += [*_rules(rows), *_failures(rows), *_left_out(rows, metrics)]
    if cells.filter(regex="^published_").notna().any(axis=None):
        notes.append("Published: the paper's value on the whole validation split, and the difference of ours from it.")
    return notes + _other_versions(cells)


def _brief_note(rows: pd.DataFrame, cells: pd.DataFrame, primary: Sequence[Metric]) -> str:
    """A line below README's tables: what a value is, its standard error, and whether another version measured some."""
    parts = ["Means over seeds, best first"]
    for metric in primary:
        if metric.standard_error in rows:
            parts.append(f"standard error of {metric.name} at most {rows[metric.standard_error].max():.1f}")
    if (cells["other_version"] != "").any():
        parts.append("some values are of earlier versions of a method")
    return "; ".join(parts) + "."


def _rules(rows: pd.DataFrame) -> list[str]:
    """The admission rules as computed, and what a network that a transform changed scores in full precision."""
    if "admission" not in rows:
        return []
    known = rows[rows["admission"].fillna("") != ""]
    notes = []
    for rules, part in known.groupby("admission", sort=True):
        notes.append(escape(f"Computed rules of {', '.join(sorted(set(part['method_label'])))}: {rules}."))
    changed = known[known["transformed"].fillna("") != ""] if "transformed" in known else known[:0]
    for (method, model), part in changed.groupby(["method_label", "model_label"], sort=True):
        values = ", ".join(sorted(set(part["transformed"])))
        notes.append(escape(f"{method} on {model}: in full precision the changed network has {values}."))
    return notes


def _failures(rows: pd.DataFrame) -> list[str]:
    return [
        escape(f"{row['method_label']} on {row['model_label']}, seed {row['seed']}, failed: {row['reason']}")
        for row in rows[rows["status"] == "failed"].to_dict("records")
    ]


def _left_out(rows: pd.DataFrame, metrics: Iterable[Metric]) -> list[str]:
    counts = {metric.name: rows[metric.name].max() for metric in metrics if metric.counts and metric.name in rows}
    return [f"{name}: {count:.0f} images of the split were left out." for name, count in counts.items() if count > 0]


def _other_versions(cells: pd.DataFrame) -> list[str]:
    """For each sentence about another version, the cells that it is of; models where it is not of all of a method's."""
    notes = []
    for sentence, part in cells[cells["other_version"] != ""].groupby("other_version", sort=True):
        names = []
        for method, of_method in part.groupby("method_label", sort=True):
            every = len(of_method) == (cells["method_label"] == method).sum()
            names.append(method if every else f"{method} on {', '.join(of_method['model_label'])}")
        notes.append(escape(f"{'; '.join(names)}: {sentence}; `--stale` measures it again."))
    return notes


def _bullets(notes: Iterable[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)


def _commands(rows: pd.DataFrame) -> str:
    first = rows.sort_values("time", kind="stable")["command"].drop_duplicates()
    longest = max((len(ticks) for command in first for ticks in re.findall("`+", command)), default=0)
    fence = "`" * max(3, longest + 1)  # a command that holds a fence does not end this one
    return "\n".join(["Measured by", "", f"{fence}sh", *first, fence])


def _details(cells: pd.DataFrame, size: str, metrics: Iterable[Metric], order: Sequence[str]) -> str:
    """Grids of the further metrics, and what the cells cost."""
    parts = [f"## Further metrics and cost, {size}"]
    for metric in metrics:
        parts += [f"{metric.name}:", grid(cells, metric, order)]
    lines = [f"| method | model | device | {' | '.join(_COST.values())} |", "|---|---|---|" + "--:|" * len(_COST)]
    for cell in cells[cells["n"] > 0].to_dict("records"):
        labels = [escape(cell[name]) for name in ("method_label", "model_label", "device")]
        values = [MISSING if pd.isna(cell[n]) else f"{cell[n]:.{0 if 'bytes' in n else 1}f}" for n in _COST]
        lines.append(f"| {' | '.join([*labels, *values])} |")
    return "\n\n".join([*parts, "Cost, mean over seeds. Compare it on one device only:", "\n".join(lines)])
