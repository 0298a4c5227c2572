"""What is shown of the tables: plots, and the values of the page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from iasvit.benchmark.task import Metric
from iasvit.leaderboard.markdown import Document, competing, ordered_models, slug, with_published
from iasvit.leaderboard.page import Value
from iasvit.leaderboard.plots import metric_by_bits, metric_by_seconds

_ONE_SPEC = r"W(\d+)A(\d+)"  # the same bits in all layers


def plots(documents: Iterable[Document]) -> dict[str, str]:
    """File name → SVG: each primary metric against bits and against seconds, for each task and data set.

    Cells whose bits differ from layer to layer are left out, as are those of other data (a part of the split, say) than
    the largest and latest that were measured. Models that not every bit-width has a cell of stay. Against seconds,
    cells are drawn that the device measured which measured most of them.
    """
    drawn: dict[str, str] = {}
    groups: dict[tuple[str, str, str], list[Document]] = {}
    for document in documents:
        if document.identity and re.fullmatch(_ONE_SPEC, document.identity[2]):
            task, dataset, _ = document.identity
            groups.setdefault((task, dataset, document.kind), []).append(document)
    for group in groups.values():
        split_size, _, fingerprint = max(document.data for document in group)
        same = [document for document in group if document.data[::2] == (split_size, fingerprint)]
        primary = [metric for metric in same[0].metrics if metric.primary]
        for metric in primary:
            drawn |= _drawn(same, metric, f"-{slug(metric.name)}" if len(primary) > 1 else "")
    return drawn


def _drawn(documents: list[Document], metric: Metric, suffix: str) -> dict[str, str]:
    """The plots of one metric, from the documents of one task and the same data."""
    first = documents[0]
    task, dataset, spec = first.identity
    name = first.name.removesuffix(f"-{slug(spec)}") + suffix
    cells = pd.concat([_with_bits(document) for document in documents], ignore_index=True)
    if metric.name not in cells:
        return {}
    cells = cells[(cells["n"] > 0) & cells[metric.name].notna()]
    models = ordered_models(cells, first.model_order)
    drawn = {}
    if cells["spec"].nunique() > 1:
        title = f"{task} on {dataset}: {metric.name} against bits, {first.heading}"
        drawn[f"{name}-bits.svg"] = metric_by_bits(cells, metric, models, title)
    for spec, part in cells[cells["quantization_seconds"].notna()].groupby("spec", sort=True):
        device = part["device"].mode().iloc[0]  # seconds compare on one device only
        part = part[part["device"] == device]
        shown = [model for model in models if model in set(part["model_label"])]
        title = f"{task} on {dataset}, {spec}: {metric.name} against seconds on {device}, {first.heading}"
        drawn[f"{name}-{slug(spec)}-seconds.svg"] = metric_by_seconds(part, metric, shown, title)
    return drawn


def _with_bits(document: Document) -> pd.DataFrame:
    spec = document.identity[2]
    w_bits, a_bits = map(int, re.fullmatch(_ONE_SPEC, spec).groups())
    return document.cells.assign(spec=spec, w_bits=w_bits, a_bits=a_bits)


def page_values(documents: Iterable[Document]) -> list[Value]:
    """Every primary value of the documents, for the page."""
    values: list[Value] = []
    for document in documents:
        values += _published(document) if document.identity is None else _measured(document)
    return values


def _measured(document: Document) -> list[Value]:
    task, dataset, bits = document.identity
    cells = document.cells
    values = []
    for metric in document.metrics:
        if not metric.primary:
            continue
        best = competing(cells).groupby("model_label")[metric.name].agg("max" if metric.higher_is_better else "min")
        for cell in _in_order(cells, ordered_models(cells, document.model_order)):
            failed = not cell["n"]
            value = cell[metric.name]
            notes = ["failed"] * failed + [cell["other_version"]] * bool(cell["other_version"])
            if not failed and pd.notna(published := cell.get(f"published_{metric.name}")):
                notes.append(with_published(value, published, metric.digits))
            values.append(
                Value(
                    kind=document.kind,
                    heading=document.heading[0].upper() + document.heading[1:],
                    task=task,
                    dataset=dataset,
                    bits=bits,
                    method=cell["method_label"],
                    model=cell["model_label"],
                    metric=metric.name,
                    digits=metric.digits,
                    higher_is_better=metric.higher_is_better,
                    value=_number(value),
                    std=_number(cell[f"{metric.name}_std"]),
                    error=_number(cell.get(metric.standard_error, float("nan"))),
                    gap=_number(value - cell.get(f"fp_{metric.name}", float("nan"))),
                    seeds=int(cell["n"]),
                    images=int(document.data[0]),
                    seconds=_number(cell["quantization_seconds"]),
                    device="" if failed else cell["device"],
                    settings=cell["settings"].replace(";", ", "),
                    source=cell["command"],
                    rules=cell["rules"],
                    transformed=cell["transformed"],
                    note="; ".join(notes),
                    competes=not cell["weights_only"],
                    best=not failed and not cell["weights_only"] and value == best[cell["model_label"]],
                )
            )
    return values


def _published(document: Document) -> list[Value]:
    values = []
    for metric in document.metrics:
        part = document.frame[document.frame["metric"] == metric.name]
        part = part.assign(model_label=part["model"])
        best = part.groupby("model")["value"].agg("max" if metric.higher_is_better else "min")
        values += [
            Value(
                kind=document.kind,
                heading="Published: values from papers, not measured here",
                task=row["task"],
                dataset="",
                bits=f"W{row['w_bits']}A{row['a_bits']}",
                method=row["method"],
                model=row["model"],
                metric=metric.name,
                digits=metric.digits,
                higher_is_better=metric.higher_is_better,
                value=_number(row["value"]),
                gap=_number(row["gap"]),
                source=row["source"],
                best=row["value"] == best[row["model"]],
            )
            for row in _in_order(part, ordered_models(part, document.model_order))
        ]
    return values


def _in_order(cells: pd.DataFrame, models: Sequence[str]) -> list[dict[str, Any]]:
    """The cells in the order of their models."""
    return sorted(cells.to_dict("records"), key=lambda cell: models.index(cell["model_label"]))


def _number(value: float) -> float | None:
    return None if pd.isna(value) else float(value)
