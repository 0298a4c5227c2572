"""What is shown of the tables: plots, and the values of the page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from iasvit.benchmark.results import primary_metrics
from iasvit.benchmark.staleness import STALE_MARKS, stale_notes
from iasvit.errors import IasvitError
from iasvit.leaderboard.aggregate import kind_of
from iasvit.leaderboard.markdown import Document, beside_published, model_rank, slug
from iasvit.leaderboard.page import Value
from iasvit.leaderboard.plots import accuracy_by_bits, accuracy_by_seconds, code_grids, layer_errors, loss_surface


def plots(documents: Iterable[Document]) -> dict[str, str]:
    """File name → SVG: accuracy against bits and against seconds, for each task, data set and primary metric.

    Cells whose bits differ from layer to layer are left out, and models that not every bit-width has a cell of stay.
    Against seconds, cells are drawn that the device measured which measured most of them.
    """
    drawn: dict[str, str] = {}
    groups: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for document in documents:
        match = re.fullmatch(r"W(\d+)A(\d+)", document.identity[2]) if document.identity else None
        if match and document.cells is not None:
            task, dataset, spec = document.identity
            cells = document.cells[document.cells["n"] > 0]
            groups.setdefault((task, dataset), []).append(
                cells.assign(spec=spec, w_bits=int(match[1]), a_bits=int(match[2]), model=cells["column"])
            )
    for (task, dataset), parts in groups.items():
        cells = pd.concat(parts, ignore_index=True)
        models = sorted(cells["model"].unique(), key=lambda name: (model_rank(name), name))
        for metric in primary_metrics(cells.columns):
            name = slug(f"{task}-{dataset}") + ("" if metric == "top1" else f"-{metric.lower()}")
            title = f"{task} on {dataset}: {metric} against bits, {kind_of(dataset)}"
            if len(parts) > 1:
                drawn[f"{name}-bits.svg"] = accuracy_by_bits(cells, metric, models, title)
            for spec, part in cells[cells["quantization_seconds"].notna()].groupby("spec", sort=True):
                device = part["device"].mode().iloc[0]  # seconds compare on one device only
                part = part[part["device"] == device]
                here = [model for model in models if model in set(part["model"])]
                title = f"{task} on {dataset}, {spec}: {metric} against seconds on {device}, {kind_of(dataset)}"
                drawn[f"{name}-{spec.lower()}-seconds.svg"] = accuracy_by_seconds(part, metric, here, title)
    return drawn


def drawn_files(folder: Path) -> dict[str, str]:
    """File name → SVG: errors by layer, loss surfaces, code grids, from what `tasks.studies` measured into the folder.

    Raises:
        IasvitError: a file is there, but not as its script writes it.
    """
    return {
        **_drawn(folder / "mini_errors.csv", "errors", "layer-errors", layer_errors, "error by layer"),
        **_drawn(folder / "mini_surface.csv", "surface", "loss-surface", loss_surface, "loss around a block's weights"),
        **_drawn(folder / "mini_attention.csv", "attention", "code-grids", code_grids, "post-softmax values and codes"),
    }


def _drawn(path: Path, script: str, name: str, draw: Callable[[pd.DataFrame, str], str], text: str) -> dict[str, str]:
    """A plot for each model and spec of the file; nothing where there is no file."""
    if not path.is_file():
        return {}
    try:
        return {
            slug(f"{name}-{model}-{bits}") + ".svg": draw(part, f"mini {model}, {bits}: {text}")
            for (model, bits), part in pd.read_csv(path).groupby(["model", "bits"], sort=True)
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IasvitError(f"{path} is not of `python -m tasks.mini.{script}`: {error}; make it again") from error


def page_values(documents: Iterable[Document]) -> list[Value]:
    """Every primary value of the documents: with settings and commands, or with its source."""
    values: list[Value] = []
    for document in documents:
        values += _published(document) if document.identity is None else _measured(document)
    return values


def _measured(document: Document) -> list[Value]:
    task, dataset, bits = document.identity
    cells = document.cells
    values = []
    for metric in primary_metrics(cells.columns):
        competing = cells[(cells["n"] > 0) & ~cells["weights_only"].astype(bool)]
        best = competing.groupby("column")[metric].max()
        for cell in cells.to_dict("records"):
            failed = not cell["n"]
            gap = cell[metric] - cell.get(f"fp_{metric}", float("nan"))
            notes = ["failed"] * failed + [STALE_MARKS[cell["stale"]]] * bool(cell["stale"])
            if not failed and pd.notna(published := cell.get(f"published_{metric}")):
                notes.append(f"({beside_published(cell[metric], published)})")
            settings = cell["settings"].replace(";", ", ")
            device = [] if failed else [f"on {cell['device']}"]
            values.append(
                Value(
                    kind=kind_of(dataset)[0].upper() + kind_of(dataset)[1:],
                    task=task,
                    dataset=dataset,
                    bits=bits,
                    method=cell["line"],
                    model=cell["column"],
                    metric=metric,
                    value=_number(cell[metric]),
                    std=_number(cell[f"{metric}_std"]),
                    gap=_number(gap),
                    seeds=int(cell["n"]),
                    seconds=_number(cell["quantization_seconds"]),
                    how="\n".join([settings, *device, cell["command"], *stale_notes(pd.DataFrame([cell]))]),
                    note=" ".join(notes),
                    best=not failed and not cell["weights_only"] and cell[metric] == best[cell["column"]],
                )
            )
    return values


def _published(document: Document) -> list[Value]:
    best = document.frame.groupby(["metric", "model"])["value"].transform("max")
    return [
        Value(
            kind="Published: values from papers, not measured here",
            task=row["task"],
            dataset="",
            bits=f"W{row['w_bits']}A{row['a_bits']}",
            method=row["method"],
            model=row["model"],
            metric=row["metric"],
            value=_number(row["value"]),
            gap=_number(row["gap"]),
            how=row["source"],
            best=row["value"] == top,
        )
        for row, top in zip(document.frame.to_dict("records"), best, strict=True)
    ]


def _number(value: float) -> float | None:
    return None if pd.isna(value) else float(value)
