"""Tables from published values: numbers from papers, each with its source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from iasvit.errors import IasvitError
from iasvit.leaderboard.markdown import MARKS, PUBLISHED, Document, brief_grid, escape, grid, slug
from iasvit.leaderboard.metrics import model_order, task_metrics
from iasvit.spec import FULL_PRECISION

PUBLISHED_COLUMNS = ("task", "model", "method", "w_bits", "a_bits", "metric", "value", "source")


def read_published(path: Path) -> pd.DataFrame:
    """Published values, columns PUBLISHED_COLUMNS; an empty table where there is no file.

    Raises:
        IasvitError: a column is missing, bits are no whole number from 1 to 32, a value is not finite or not what its
            metric's declaration allows, a line names no source, or two lines give the same number.
    """
    if not path.is_file():
        return pd.DataFrame(columns=list(PUBLISHED_COLUMNS))
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise IasvitError(f"{path} cannot be read as CSV: {error}") from error
    if missing := [name for name in PUBLISHED_COLUMNS if name not in frame]:
        raise IasvitError(f"{path} has no column {missing[0]!r}; columns are {', '.join(PUBLISHED_COLUMNS)}")
    for name in ("w_bits", "a_bits"):
        numbers = pd.to_numeric(frame[name], errors="coerce")
        for line in frame.index[~(numbers.between(1, FULL_PRECISION) & (numbers % 1 == 0))]:
            raise IasvitError(
                f"{path} line {line + 2}: {name} is {frame[name][line]!r}, but 1 to {FULL_PRECISION} is expected"
            )
        frame[name] = numbers.astype(int)
    values = pd.to_numeric(frame["value"], errors="coerce")
    for (task, name), group in frame.groupby(["task", "metric"]):
        (metric,) = task_metrics(task, [f"fp_{name}"])
        allowed = values[group.index].between(metric.minimum, metric.maximum) & np.isfinite(values[group.index])
        for line in group.index[~allowed]:
            raise IasvitError(
                f"{path} line {line + 2}: value is {frame['value'][line]!r}, but {metric.range} is expected of {name}"
            )
    frame["value"] = values
    for line in frame.index[frame["source"].str.strip() == ""]:
        raise IasvitError(f"{path} line {line + 2} names no source")
    for line in frame.index[frame.duplicated(["task", "model", "method", "w_bits", "a_bits", "metric"])]:
        raise IasvitError(f"{path} line {line + 2} repeats the cell of an earlier line; keep one")
    return frame


def published_documents(published: pd.DataFrame) -> list[Document]:
    """A document for each task and bit-width that has published values."""
    documents = []
    full = published[published["method"] == "fp32"]
    quantized = published[published["method"] != "fp32"]
    for (task, w_bits, a_bits), group in quantized.groupby(["task", "w_bits", "a_bits"], sort=True):
        heading = "published values, from papers and not measured here"
        title = f"{task}, W{w_bits}A{a_bits}: {heading}"
        group = group.merge(
            full[["task", "model", "metric", "value"]].rename(columns={"value": "fp"}), how="left", validate="m:1"
        )
        order = model_order(task)
        metrics = task_metrics(task, [f"fp_{name}" for name in sorted(set(group["metric"]))])
        sections, brief = [], []
        for metric in metrics:
            part = group[group["metric"] == metric.name]
            cells = part.rename(columns={"value": metric.name, "fp": f"fp_{metric.name}"})
            cells = cells.assign(
                n=1, failed=0, weights_only=False, method_label=part["method"], model_label=part["model"]
            )
            head = f"**{escape(title)}.** {metric.name}"
            sections += [head, grid(cells, metric, order)]
            brief += [head, brief_grid(cells, metric, order)]
        sources = [
            f"- {escape(source)}: {escape(', '.join(sorted(set(part['method']))))}."
            for source, part in group.groupby("source", sort=True)
        ]
        sections.append("\n".join([f"Value (difference from fp32); {MARKS}. Sources:", "", *sources]))
        data = group.assign(gap=(group["value"] - group["fp"]).round(4))
        data = data.sort_values(["metric", "method", "model"], kind="stable")
        name = slug(f"{task}-published-w{w_bits}a{a_bits}")
        text, short = "\n\n".join(sections), "\n\n".join(brief)
        documents.append(Document(name, title, text, "", short, data, PUBLISHED, heading, metrics, order))
    return documents
