"""Tables: methods × models in Markdown, with the best marked, and the same values as data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from iasvit.benchmark.task import Metric

MADE = "<!-- made by `iasvit leaderboard` from the stored rows; do not edit -->"
MISSING = "–"
MARKS = "the best of a column is bold, the second is underlined"
PUBLISHED = "published"  # the third kind of number, with REAL and EMBEDDED of `iasvit.benchmark.task`


@dataclass(frozen=True)
class Document:
    """The tables of one task, data set and bit-width, all of one kind.

    Attributes:
        name: of its files and of its marker in README.
        title: says which of the three kinds the numbers are.
        sections: the tables of the primary metrics, with notes and commands; Markdown.
        details: further Markdown.
        brief: what README gets: means alone, without marks or notes; Markdown.
        frame: the same as data.
        kind: PUBLISHED, REAL or EMBEDDED.
        heading: what the numbers are, "measured on real data".
        metrics: those of the tables.
        model_order: models in the order in which tables have them.
        identity: task, dataset and spec where the numbers are measured.
        cells: those of the largest and latest data, for plots and page.
        data: which that is: split size, time of the latest row, fingerprint.
    """

    name: str
    title: str
    sections: str
    details: str
    brief: str
    frame: pd.DataFrame
    kind: str
    heading: str
    metrics: tuple[Metric, ...]
    model_order: tuple[str, ...] = ()
    identity: tuple[str, str, str] | None = None
    cells: pd.DataFrame | None = None
    data: tuple[int, str, str] | None = None

    def markdown(self) -> str:
        """The file's text."""
        title = f"# {escape(self.title)}"
        return "\n\n".join(part for part in (MADE, title, self.sections, self.details) if part) + "\n"


def slug(text: str) -> str:
    """The text as part of a file name: lower case, "-" for all but letters, digits and "_"."""
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")


def escape(text: str) -> str:
    """The text for a line or a table of Markdown: no line breaks, and neither "|" nor a tag is read as such."""
    text = re.sub(r"\s*[\r\n]\s*", " ", text).replace("<", "&lt;")
    return re.sub(r"(\\*)\|", r"\1\1\|", text)  # backslashes before a "|" would take away its own


def ordered_models(cells: pd.DataFrame, model_order: Sequence[str]) -> list[str]:
    """The cells' model labels: in this order of their models, then by name."""
    rank = {model: place for place, model in enumerate(model_order)}
    models = dict(zip(cells["model_label"], cells["model"], strict=True))
    return sorted(models, key=lambda label: (rank.get(models[label], len(rank)), label))


def grid(cells: pd.DataFrame, metric: Metric, model_order: Sequence[str], marked: int = 2) -> str:
    """Methods × models: **mean ± standard deviation** (gap to full precision), the best `marked` of a model so.

    Args:
        cells: one row a cell; columns method_label, model_label, model, n, failed, weights_only, the metric's and,
            where they are known, "<metric>_std", "fp_<metric>", "published_<metric>" and "published_fp_<metric>".
        metric: to show.
        model_order: models in the order of the columns; others follow by name.
        marked: 1 for the best alone, 2 for the second as well.
    """
    models = ordered_models(cells, model_order)
    by_labels = {(cell["method_label"], cell["model_label"]): cell for cell in cells.to_dict("records")}
    of_model = {model: cells[cells["model_label"] == model] for model in models}
    top = {model: _top(part, metric)[:marked] for model, part in of_model.items()}
    same_n = cells.loc[cells["n"] > 0, "n"].nunique() <= 1
    rows = [["method", *map(escape, models)]]
    if f"fp_{metric.name}" in cells:
        rows.append(["fp32", *(_full_precision(part, metric) for part in of_model.values())])
    for method in sorted(cells["method_label"].unique()):
        row = [escape(method)]
        for model in models:
            cell = by_labels.get((method, model))
            row.append(MISSING if cell is None else _cell(cell, metric, top[model], same_n))
        rows.append(row)
    return _lines(rows)


def brief_grid(cells: pd.DataFrame, metric: Metric, model_order: Sequence[str]) -> str:
    """Methods × models: the mean alone, "failed" where every seed failed.

    The least mean loss against full precision comes first, as on the page. Methods that have at most half of the models
    follow, then those that quantize weights alone.

    Args:
        cells: see `grid`.
        metric: to show.
        model_order: see `grid`.
    """
    models = ordered_models(cells, model_order)
    values = cells.pivot(index="method_label", columns="model_label", values=metric.name)[models]
    measured = cells.pivot(index="method_label", columns="model_label", values="n")[models]
    weights_only = cells.groupby("method_label")["weights_only"].any()
    loss, few = values.copy(), values.notna().sum(axis=1) * 2 <= len(models)
    rows = [["method", *map(escape, models)]]
    if f"fp_{metric.name}" in cells:
        full = cells.groupby("model_label")[f"fp_{metric.name}"].mean()
        rows.append(
            ["fp32", *(MISSING if pd.isna(full[model]) else f"{full[model]:.{metric.digits}f}" for model in models)]
        )
        loss -= full[models].fillna(0)
    mean = loss.mean(axis=1) * (-1 if metric.higher_is_better else 1)
    for method in sorted(
        values.index, key=lambda label: (weights_only[label], few[label], pd.isna(mean[label]), mean[label], label)
    ):
        row = [escape(method)]
        for model in models:
            value = values.at[method, model]
            text = "failed" if measured.at[method, model] == 0 else MISSING
            row.append(text if pd.isna(value) else f"{value:.{metric.digits}f}")
        rows.append(row)
    return _lines(rows)


def _lines(rows: Sequence[Sequence[str]]) -> str:
    """The table's lines, the first row being its head, in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [
        "| " + " | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def competing(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells that can be the best: measured, and not of weights alone."""
    return cells[(cells["n"] > 0) & ~cells["weights_only"].astype(bool)]


def _top(cells: pd.DataFrame, metric: Metric) -> list[float]:
    """The values of the cells that compete, as they are printed, the best first."""
    values = competing(cells)[metric.name].dropna()
    return sorted({round(value, metric.digits) for value in values}, reverse=metric.higher_is_better)


def _full_precision(cells: pd.DataFrame, metric: Metric) -> str:
    """One model's value in full precision (published value, and the difference from it)."""
    value = cells[f"fp_{metric.name}"].mean()
    if pd.isna(value):
        return MISSING
    text = f"{value:.{metric.digits}f}"
    name = f"published_fp_{metric.name}"
    if name not in cells or pd.isna(published := cells[name].iloc[0]):
        return text
    return f"{text} ({with_published(value, published, metric.digits)})"


def with_published(value: float, published: float, digits: int) -> str:
    """ "published 71.00, -1.00": the published value, and the difference of ours from it."""
    return f"published {published:.{digits}f}, {value - published:+.{digits}f}"


def _cell(cell: dict, metric: Metric, top: list[float], same_n: bool) -> str:
    name, digits = metric.name, metric.digits
    if not cell["n"]:
        return "failed"
    if pd.isna(cell[name]):
        return MISSING
    text = f"{cell[name]:.{digits}f}"
    if cell["n"] > 1:
        text += f" ± {cell[f'{name}_std']:.{digits}f}"
    if not cell["weights_only"] and (value := round(cell[name], digits)) in top:
        text = f"**{text}**" if value == top[0] else f"<u>{text}</u>"
    notes = []
    if not pd.isna(full := cell.get(f"fp_{name}")):
        notes.append(f"{cell[name] - full:+.{digits}f}")
    if not pd.isna(published := cell.get(f"published_{name}")):
        notes.append(with_published(cell[name], published, digits))
    if not same_n:
        notes.append(f"n={cell['n']}")
    if cell["failed"]:
        notes.append(f"{cell['failed']} failed")
    return text + (f" ({', '.join(notes)})" if notes else "")
