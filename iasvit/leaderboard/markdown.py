"""What a table is: methods × backbones in Markdown, the best marked, with the same values as data."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pandas as pd

from iasvit.benchmark.staleness import STALE_MARKS

MADE = "<!-- made by `iasvit leaderboard` from the stored rows; do not edit -->"
MISSING = "–"
MARKS = "a column's best is bold, its second underlined"
# The papers' order of columns; other models follow by name.
_BACKBONES = ("vit_s", "vit_b", "deit_t", "deit_s", "deit_b", "swin_t", "swin_s", "swin_b")
_MODELS = _BACKBONES + tuple(f"{head}_{b}" for head in ("mask_rcnn", "cascade_mask_rcnn") for b in _BACKBONES)


@dataclass(frozen=True)
class Document:
    """The tables of one task, data set and bit-width.

    Attributes:
        name: of its files and of its place in README.
        title: says which of the three kinds the numbers are.
        sections: Markdown that README takes too.
        details: further Markdown.
        frame: the same as data.
        identity: task, dataset and spec where the numbers are measured.
        cells: those of the largest split, for plots.
    """

    name: str
    title: str
    sections: str
    details: str
    frame: pd.DataFrame
    identity: tuple[str, str, str] | None = None
    cells: pd.DataFrame | None = None

    def markdown(self) -> str:
        """The file's text."""
        return "\n\n".join(part for part in (MADE, f"# {self.title}", self.sections, self.details) if part) + "\n"


def slug(text: str) -> str:
    """The text as part of a file name: lower case, "-" for all but letters, digits and "_"."""
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")


def _digits(metric: str) -> int:
    return 4 if metric == "cosine" else 2


def grid(cells: pd.DataFrame, metric: str, marked: int = 2) -> str:
    """Methods × backbones: **mean ± standard deviation** (gap to full precision), the best `marked` of a column so."""
    digits = _digits(metric)
    columns = sorted(cells["column"].unique(), key=lambda name: (model_rank(name), name))
    lines = sorted(cells["line"].unique())
    by_place = {(cell["line"], cell["column"]): cell for cell in cells.to_dict("records")}
    top = {column: _top(cells[cells["column"] == column], metric, digits)[:marked] for column in columns}
    same_n = cells.loc[cells["n"] > 0, "n"].nunique() <= 1
    grid = [["method", *columns]]
    if f"fp_{metric}" in cells:
        grid.append(["fp32", *(_full_precision(cells[cells["column"] == c], metric, digits) for c in columns)])
    for line in lines:
        row = [line]
        for column in columns:
            cell = by_place.get((line, column))
            row.append(MISSING if cell is None else _cell(cell, metric, digits, top[column], same_n))
        grid.append(row)
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    text = [
        "| " + " | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) + " |" for row in grid
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def model_rank(name: str) -> int:
    """A model's place in the papers' order of columns; those that the papers have not are last."""
    base = name.split(" [")[0]
    return _MODELS.index(base) if base in _MODELS else len(_MODELS)


def _top(cells: pd.DataFrame, metric: str, digits: int) -> list[float]:
    """The values of the cells that compete, as they are printed, the best first."""
    competing = cells[(cells["n"] > 0) & ~cells["weights_only"].astype(bool)]
    return sorted({round(value, digits) for value in competing[metric]}, reverse=True)


def _full_precision(cells: pd.DataFrame, metric: str, digits: int) -> str:
    """Of one column's cells: value (published value and difference to it)."""
    value = cells[f"fp_{metric}"].mean()
    if pd.isna(value):
        return MISSING
    if f"published_fp_{metric}" not in cells or pd.isna(published := cells[f"published_fp_{metric}"].iloc[0]):
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({beside_published(value, published, digits)})"


def beside_published(value: float, published: float, digits: int = 2) -> str:
    """ "published 71.00, -1.00": the published value, and ours less it."""
    return f"published {published:.{digits}f}, {value - published:+.{digits}f}"


def _cell(cell: dict, metric: str, digits: int, top: list[float], same_n: bool) -> str:
    stale = STALE_MARKS[cell["stale"]]
    if not cell["n"]:
        return f"failed{stale}"
    text = f"{cell[metric]:.{digits}f}"
    if cell["n"] > 1:
        text += f" ± {cell[f'{metric}_std']:.{digits}f}"
    if not cell["weights_only"] and (value := round(cell[metric], digits)) in top:
        text = f"**{text}**" if value == top[0] else f"<u>{text}</u>"
    notes = []
    if f"fp_{metric}" in cell and not pd.isna(cell[f"fp_{metric}"]):
        notes.append(f"{cell[metric] - cell[f'fp_{metric}']:+.{digits}f}")
    if f"published_{metric}" in cell and not pd.isna(cell[f"published_{metric}"]):
        notes.append(beside_published(cell[metric], cell[f"published_{metric}"], digits))
    if not same_n:
        notes.append(f"n={cell['n']}")
    if cell["failed"]:
        notes.append(f"{cell['failed']} failed")
    return text + stale + (f" ({', '.join(notes)})" if notes else "")
