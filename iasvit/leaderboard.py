"""Tables from the stored rows and the published values: Markdown and CSV, the same bytes from the same input."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from iasvit.errors import IasvitError
from iasvit.methods import load_method_class, split_variant
from iasvit.provenance import code_hash
from iasvit.results import COST, Row, latest, metric_columns, primary_metrics, read_rows, warn

MADE = "<!-- made by `iasvit leaderboard` from the stored rows; do not edit -->"
PUBLISHED_COLUMNS = ("task", "model", "method", "w_bits", "a_bits", "metric", "value", "source")
# The papers' order of columns; other models follow by name.
_BACKBONES = ("vit_s", "vit_b", "deit_t", "deit_s", "deit_b", "swin_t", "swin_s", "swin_b")
_MODELS = _BACKBONES + tuple(f"{head}_{b}" for head in ("mask_rcnn", "cascade_mask_rcnn") for b in _BACKBONES)
_LABELS = ("settings", "line", "column", "stale", "weights_only")  # columns that `_frame` adds to those of the rows
_MISSING = "–"
_MARKS = "a column's best is bold, its second underlined"
_STALE = "†"
_WEIGHTS_ONLY = ", weights only"  # activations in full precision: shown, but out of the competition


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


def write_leaderboard(
    runs: Path, published: Path, out: Path, readme: Path | None = None, report: Callable[[str], None] = warn
) -> list[Path]:
    """Write <task>-<dataset>-<bits>.md and .csv for all that is measured or published, plots, and index.html.

    Args:
        runs: folder of result files, read with all folders in it; of rows with equal keys the latest counts.
        published: CSV file of published values, columns PUBLISHED_COLUMNS.
        out: folder for tables and plots; what tasks.mini measured into it is drawn too. Tables and plots of
            earlier calls that have no rows any more are removed.
        readme: file whose text between `<!-- table:NAME -->` and `<!-- /table -->` is replaced by that table; None for
            no such file.
        report: called with a sentence about each line or marker that cannot be used.

    Returns:
        The files written.

    Raises:
        IasvitError: a file cannot be read or written, or the published values have a wrong or repeated line.
    """
    from iasvit.page import page
    from iasvit.views import drawn_files, page_values, plots

    rows: list[Row] = []
    for path in sorted(runs.rglob("*.csv")):
        found, problems = read_rows(path)
        rows += found
        for problem in problems:
            report(problem)
    documents = [*measured_documents(rows), *published_documents(read_published(published))]
    drawn = {f"plots/{name}": svg for name, svg in {**plots(documents), **drawn_files(out)}.items()}
    texts = {"leaderboard.md": _index(documents, drawn), "index.html": page(page_values(documents), drawn), **drawn}
    for document in documents:
        texts[f"{document.name}.md"] = document.markdown()
        texts[f"{document.name}.csv"] = document.frame.to_csv(index=False, lineterminator="\n")
    replaced = None if readme is None else _fill(readme, documents, report)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in out.glob("*.md"):
            if path.name not in texts and path.read_text(encoding="utf-8").startswith(MADE):
                path.unlink()
                path.with_suffix(".csv").unlink(missing_ok=True)
        for path in (out / "plots").glob("*.svg"):
            if f"plots/{path.name}" not in texts:
                path.unlink()
        for name, text in texts.items():
            (out / name).parent.mkdir(exist_ok=True)
            _replace(out / name, text)
        if readme is not None and replaced is not None:
            _replace(readme, replaced)
    except OSError as error:
        raise IasvitError(f"{error.filename or out} cannot be written: {error.strerror or error}") from error
    return [out / name for name in texts] + ([readme] if readme is not None and replaced is not None else [])


def table(rows: Sequence[Row], metrics: Sequence[str] | None = None) -> str:
    """Markdown tables, methods × backbones, of these rows: what a task prints at the end of a run.

    Args:
        rows: as `run_cells` returns them.
        metrics: which to show; None for the primary ones.
    """
    parts = []
    frame = _frame(rows)
    frame = frame[frame["method"] != "fp32"]
    for (spec, split_size), group in frame.groupby(["spec", "split_size"], sort=True):
        cells = _aggregate(group)
        for metric in metrics or primary_metrics(group.columns):
            heading = f"{group['task'].iloc[0]} on {group['dataset'].iloc[0]}, {spec}: {metric}, {split_size} images"
            parts += [heading, _grid(cells, metric, marked=1)]  # a terminal shows no underlining
        parts += [_notes(group, cells, legend=False)]
    return "\n\n".join(part for part in parts if part)


# Measured values


def measured_documents(rows: Iterable[Row]) -> list[Document]:
    """A document for each task, data set and spec that has rows."""
    frame = _frame(rows)
    frame = frame[frame["method"] != "fp32"]
    documents = []
    for (task, dataset, spec), group in frame.groupby(["task", "dataset", "spec"], sort=True):
        title = f"{task} on {dataset}, {spec}: {kind_of(dataset)}"
        sections, details, frames, all_cells = [], [], [], []
        for split_size, part in sorted(group.groupby("split_size"), key=lambda item: -item[0]):
            part = part.dropna(axis=1, how="all")
            cells = _aggregate(part)
            all_cells.append(cells)
            primary = primary_metrics(part.columns)
            for metric in primary:
                sections += [f"**{title}.** {metric}, {split_size} images", _grid(cells, metric)]
            sections += [_notes(part, cells), _commands(part)]
            details += [_details(cells, split_size, [m for m in _metrics(part) if m not in primary])]
            frames.append(_data(cells, {"task": task, "dataset": dataset, "spec": spec, "split_size": split_size}))
        data = pd.concat(frames, ignore_index=True)
        name = slug(f"{task}-{dataset}-{spec}")
        text = ("\n\n".join(sections), "\n\n".join(details))
        documents.append(Document(name, title, *text, data, (task, dataset, spec), all_cells[0]))
    return documents


def kind_of(dataset: str) -> str:
    if dataset == "mini-hard":
        return (
            "measured on mini-hard, the embedded benchmark's stress variant (a real ViT's channel spread transplanted)"
        )
    if dataset == "mini":
        return "measured on the embedded mini benchmark (drawn scenes, small models), not on real data"
    return "measured on real data"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")


@cache
def _current_code(method: str) -> str | None:
    """The code hash that a method's rows would get now; None where the method cannot be loaded."""
    try:
        return code_hash(load_method_class(split_variant(method)[0]).__module__)
    except (IasvitError, ImportError):
        return None


def _frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows as a table: the latest of equal keys, in a fixed order, with `line` and `column`, their place in a grid."""
    kept = sorted(latest(rows), key=lambda row: (row["task"], row["dataset"], row["spec"], row["method"], row["seed"]))
    frame = pd.DataFrame(kept) if kept else pd.DataFrame(columns=["task", "dataset", "spec", "split_size", "method"])
    if kept:
        where = ["task", "dataset", "spec", "split_size"]
        frame["settings"] = [_settings(row) for row in kept]
        frame["line"] = frame.groupby([*where, "method"])["settings"].transform(_distinguish)
        frame["weights_only"] = (frame["method"] != "fp32") & (frame["a_bits"] == 32)
        frame["line"] = frame["method"] + frame["line"] + frame["weights_only"].map({True: _WEIGHTS_ONLY, False: ""})
        several = frame.groupby([*where, "model"])["weights"].transform("nunique") > 1
        frame["column"] = frame["model"].where(~several, frame["model"] + " [" + frame["weights"] + "]")
        frame["stale"] = [row["method"] != "fp32" and row["code_hash"] != _current_code(row["method"]) for row in kept]
    return frame


def _metrics(rows: pd.DataFrame) -> list[str]:
    return [name for name in metric_columns(rows.columns) if name not in _LABELS]


def _settings(row: Row) -> str:
    options = f";{row['options']}" if row["options"] else ""
    return f"calib_size={row['calib_size']}{options}"


def _distinguish(settings: pd.Series) -> pd.Series:
    """For each row " (name=value, ...)" of the settings that are not the same in all rows of its method."""
    parsed = [text.split(";") for text in settings]
    shared = set(parsed[0]).intersection(*parsed)
    labels = [", ".join(part for part in parts if part not in shared) for parts in parsed]
    several = len(set(settings)) > 1
    return pd.Series([f" ({label or 'defaults'})" if several else "" for label in labels], settings.index)


def _aggregate(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a grid cell: n, failed, stale, mean, std and fp of each metric, and mean cost.

    The standard deviation is the sample's (n - 1), and NaN for one seed.
    """
    rows = rows.reindex(columns=list(dict.fromkeys([*rows.columns, *primary_metrics(rows.columns), *COST])))
    groups = rows.groupby(["line", "column"], sort=True)
    done = rows[rows["status"] == "ok"].groupby(["line", "column"], sort=True)
    cells = groups[["method", "model", "weights", "settings", "weights_only"]].first()
    cells["n"] = done.size().reindex(cells.index, fill_value=0)
    cells["failed"] = groups["status"].agg(lambda status: int((status == "failed").sum()))
    cells["stale"] = groups["stale"].any()
    cells["command"] = groups["command"].agg(lambda commands: "\n".join(dict.fromkeys(commands)))
    for metric in _metrics(rows):
        values = done[metric]
        cells[metric] = values.mean().reindex(cells.index).astype(float)
        cells[f"{metric}_std"] = values.std().reindex(cells.index).astype(float)
        if f"fp_{metric}" in rows:
            cells[f"fp_{metric}"] = groups[f"fp_{metric}"].mean()
    for name in COST:
        cells[name] = done[name].mean().reindex(cells.index).astype(float)
    return cells.reset_index()


def _data(cells: pd.DataFrame, identity: dict[str, object]) -> pd.DataFrame:
    """The aggregated cells as they go to CSV."""
    data = cells.drop(columns=["line", "column", "command"])
    for metric in primary_metrics(cells.columns):
        data.insert(data.columns.get_loc(f"fp_{metric}") + 1, f"gap_{metric}", data[metric] - data[f"fp_{metric}"])
    for position, (name, value) in enumerate(identity.items()):
        data.insert(position, name, value)
    return data.round(4)


def _digits(metric: str) -> int:
    return 4 if metric == "cosine" else 2


def _grid(cells: pd.DataFrame, metric: str, marked: int = 2) -> str:
    """Methods × backbones: **mean ± standard deviation** (gap to full precision), the best `marked` of a column so."""
    digits = _digits(metric)
    columns = sorted(cells["column"].unique(), key=lambda name: (model_rank(name), name))
    lines = sorted(cells["line"].unique())
    by_place = {(cell["line"], cell["column"]): cell for cell in cells.to_dict("records")}
    top = {column: _top(cells[cells["column"] == column], metric, digits)[:marked] for column in columns}
    same_n = cells["n"].nunique() == 1
    grid = [["method", *columns]]
    if f"fp_{metric}" in cells:
        full = cells.groupby("column")[f"fp_{metric}"].mean()
        grid.append(["fp32", *(_MISSING if pd.isna(full[c]) else f"{full[c]:.{digits}f}" for c in columns)])
    for line in lines:
        row = [line]
        for column in columns:
            cell = by_place.get((line, column))
            row.append(_MISSING if cell is None else _cell(cell, metric, digits, top[column], same_n))
        grid.append(row)
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    text = [
        "| " + " | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) + " |" for row in grid
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def model_rank(name: str) -> int:
    base = name.split(" [")[0]
    return _MODELS.index(base) if base in _MODELS else len(_MODELS)


def _top(cells: pd.DataFrame, metric: str, digits: int) -> list[float]:
    """The values of the cells that compete, as they are printed, the best first."""
    competing = cells[(cells["n"] > 0) & ~cells["weights_only"].astype(bool)]
    return sorted({round(value, digits) for value in competing[metric]}, reverse=True)


def _cell(cell: dict, metric: str, digits: int, top: list[float], same_n: bool) -> str:
    stale = _STALE if cell["stale"] else ""
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
    if not same_n:
        notes.append(f"n={cell['n']}")
    if cell["failed"]:
        notes.append(f"{cell['failed']} failed")
    return text + stale + (f" ({', '.join(notes)})" if notes else "")


def _notes(rows: pd.DataFrame, cells: pd.DataFrame, legend: bool = True) -> str:
    """What the numbers are, the methods' settings, what failed and what is stale, as a list."""
    notes = []
    if legend:
        counts = sorted(set(cells["n"]) - {0})
        seeds = f"{counts[0]} seed{'s' * (counts[0] > 1)} a cell" if len(counts) == 1 else "n seeds a cell"
        notes.append(f"Mean ± standard deviation over seeds (difference to fp32); {seeds}; {_MARKS}.")
        for metric in primary_metrics(rows.columns):
            if f"{metric}_se" in rows and rows[f"{metric}_se"].notna().any():
                error = rows[f"{metric}_se"].max()
                notes.append(f"Standard error of {metric} from the size of the split: at most {error:.2f}.")
        for line, settings in sorted(set(zip(cells["line"], cells["settings"], strict=True))):
            notes.append(f"{line}: {settings.replace(';', ', ')}.")
    for row in rows[rows["status"] == "failed"].to_dict("records"):
        notes.append(f"{row['line']} on {row['column']}, seed {row['seed']}, failed: {row['reason']}")
    if "unreadable" in rows and (count := rows["unreadable"].max()) > 0:
        notes.append(f"{count:.0f} images of the split could not be read and were left out.")
    if cells["stale"].any():
        notes.append(f"{_STALE} measured by other code than the present; measure it again with --force.")
    return "\n".join(f"- {note}" for note in notes)


def _commands(rows: pd.DataFrame) -> str:
    first = rows.sort_values("time", kind="stable")["command"].drop_duplicates()
    return "\n".join(["Measured by", "", "```sh", *first, "```"])


def _details(cells: pd.DataFrame, split_size: int, metrics: Sequence[str]) -> str:
    """Grids of the further metrics, and what the cells cost."""
    parts = [f"## Further metrics and cost, {split_size} images"]
    for metric in metrics:
        if not metric.endswith("_se") and metric != "unreadable":
            parts += [f"{metric}:", _grid(cells, metric)]
    names = {
        "calibration_seconds": "calibration s",
        "reconstruction_seconds": "reconstruction s",
        "quantization_seconds": "all of quantization s",
        "evaluation_seconds": "evaluation s",
        "images_per_second": "images/s",
        "peak_memory_mib": "peak memory MiB",
        "model_bytes": "model bytes",
        "packed_bytes": "packed bytes",
    }
    lines = [f"| method | model | {' | '.join(names.values())} |", "|---|---|" + "--:|" * len(names)]
    for cell in cells[cells["n"] > 0].to_dict("records"):
        values = [_MISSING if pd.isna(cell[n]) else f"{cell[n]:.{0 if 'bytes' in n else 1}f}" for n in names]
        lines.append(f"| {cell['line']} | {cell['column']} | {' | '.join(values)} |")
    return "\n\n".join([*parts, "Cost, mean over seeds:", "\n".join(lines)])


# Published values


def read_published(path: Path) -> pd.DataFrame:
    """Published values, columns PUBLISHED_COLUMNS; an empty table where there is no file.

    Raises:
        IasvitError: a column is missing, a value is no number from 0 to 100, a line names no source, or two lines give
            the same number.
    """
    if not path.is_file():
        return pd.DataFrame(columns=list(PUBLISHED_COLUMNS))
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise IasvitError(f"{path} cannot be read as CSV: {error}") from error
    if missing := [name for name in PUBLISHED_COLUMNS if name not in frame]:
        raise IasvitError(f"{path} has no column {missing[0]!r}; columns are {', '.join(PUBLISHED_COLUMNS)}")
    for name in ("w_bits", "a_bits", "value"):
        numbers = pd.to_numeric(frame[name], errors="coerce")
        for line in frame.index[~numbers.between(0, 100)]:
            raise IasvitError(f"{path} line {line + 2}: {name} is {frame[name][line]!r}, but 0 to 100 is expected")
        frame[name] = numbers if name == "value" else numbers.astype(int)
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
        title = f"{task}, W{w_bits}A{a_bits}: published values, from papers and not measured here"
        group = group.merge(
            full[["task", "model", "metric", "value"]].rename(columns={"value": "fp"}), how="left", validate="m:1"
        )
        sections = []
        for metric, part in group.groupby("metric", sort=True):
            cells = part.rename(columns={"value": metric, "fp": f"fp_{metric}"}).assign(
                n=1, failed=0, stale=False, weights_only=False
            )
            cells = cells.assign(line=cells["method"], column=cells["model"])
            sections += [f"**{title}.** {metric}", _grid(cells, metric)]
        sources = [
            f"- {source}: {', '.join(sorted(set(part['method'])))}."
            for source, part in group.groupby("source", sort=True)
        ]
        sections.append("\n".join([f"Value (difference to fp32); {_MARKS}. Sources:", "", *sources]))
        data = group.assign(gap=(group["value"] - group["fp"]).round(4))
        data = data.sort_values(["metric", "method", "model"], kind="stable")
        name = slug(f"{task}-published-w{w_bits}a{a_bits}")
        documents.append(Document(name, title, "\n\n".join(sections), "", data))
    return documents


# Files


def _index(documents: Sequence[Document], drawn: Iterable[str]) -> str:
    lines = [f"- [{document.title}]({document.name}.md) ([CSV]({document.name}.csv))" for document in documents]
    images = [f"![{Path(name).stem}]({name})" for name in drawn]
    return (
        "\n".join(
            [
                MADE,
                "",
                "# Leaderboard",
                "",
                "[Sortable, on one page](index.html)",
                "",
                *lines,
                *(f"\n{image}" for image in images),
            ]
        )
        + "\n"
    )


def _fill(readme: Path, documents: Sequence[Document], report: Callable[[str], None]) -> str | None:
    """README's text with its tables replaced; None if it has no marker or cannot change."""
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise IasvitError(f"{readme} cannot be read: {error.strerror or error}") from error
    by_name = {document.name: document for document in documents}

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in by_name:
            report(f"{readme} has a marker for table {name!r}, of which there are no rows; left as it is")
            return match[0]
        return f"<!-- table:{name} -->\n{by_name[name].sections}\n<!-- /table -->"

    starts, ends = text.count("<!-- table:"), text.count("<!-- /table -->")
    if starts != ends:
        raise IasvitError(f"{readme} has {starts} table markers, but {ends} <!-- /table --> markers; give each its end")
    pattern = r"<!-- table:(?P<name>[\w-]+) -->(?:(?!<!-- table:).)*?<!-- /table -->"
    new = re.sub(pattern, replace, text, flags=re.DOTALL)
    return new if new != text else None


def _replace(path: Path, text: str) -> None:
    """Write a file beside and rename it; one that holds this text already stays untouched."""
    data = text.encode()
    if path.is_file() and path.read_bytes() == data:
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
