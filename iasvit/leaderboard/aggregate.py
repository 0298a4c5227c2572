"""Tables from the stored rows: aggregated over seeds, data sets and bit-widths apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from iasvit.benchmark.results import COST, Key, Row, latest, metric_columns, primary_metrics
from iasvit.benchmark.staleness import STALE_WORDS, equal_code, stale_notes, staleness
from iasvit.leaderboard.markdown import MARKS, MISSING, Document, grid, slug

# Columns that `_frame` adds to those of the rows.
_LABELS = ("settings", "line", "column", "stale", "compared", "weights_only")
_WEIGHTS_ONLY = ", weights only"  # activations in full precision: shown, but out of the competition


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
            parts += [heading, grid(cells, metric, marked=1)]  # a terminal shows no underlining
        parts += [_notes(group, cells, legend=False)]
    return "\n\n".join(part for part in parts if part)


def measured_documents(rows: Iterable[Row], published: pd.DataFrame | None = None) -> list[Document]:
    """A document for each task, data set and spec that has rows.

    Args:
        rows: all of the store, those that a later row replaces too: see `iasvit.benchmark.staleness`.
        published: of `read_published`; shown beside what is measured on the papers' data set. None for none.
    """
    frame = _frame(rows)
    frame = frame[frame["method"] != "fp32"]
    documents = []
    for (task, dataset, spec), group in frame.groupby(["task", "dataset", "spec"], sort=True):
        title = f"{task} on {dataset}, {spec}: {kind_of(dataset)}"
        sections, details, frames, all_cells = [], [], [], []
        for split_size, part in sorted(group.groupby("split_size"), key=lambda item: -item[0]):
            part = part.dropna(axis=1, how="all")
            cells = _aggregate(part)
            if published is not None and dataset == task:
                cells = _beside_published(cells, published[published["task"] == task], spec)
            all_cells.append(cells)
            primary = primary_metrics(part.columns)
            for metric in primary:
                sections += [f"**{title}.** {metric}, {split_size} images", grid(cells, metric)]
            sections += [_notes(part, cells), _commands(part)]
            details += [_details(cells, split_size, [m for m in _metrics(part) if m not in primary])]
            frames.append(_data(cells, {"task": task, "dataset": dataset, "spec": spec, "split_size": split_size}))
        data = pd.concat(frames, ignore_index=True)
        name = slug(f"{task}-{dataset}-{spec}")
        text = ("\n\n".join(sections), "\n\n".join(details))
        documents.append(Document(name, title, *text, data, (task, dataset, spec), all_cells[0]))
    return documents


def kind_of(dataset: str) -> str:
    """What headings say of numbers measured on this data set."""
    if dataset == "mini-hard":
        return (
            "measured on mini-hard, the embedded benchmark's stress variant (a real ViT's channel spread transplanted)"
        )
    if dataset == "mini":
        return "measured on the embedded mini benchmark (drawn scenes, small models), not on real data"
    return "measured on real data"


def _frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows as a table: the latest of equal keys, in a fixed order, with `line` and `column`, their place in a grid."""
    rows = list(rows)
    kept = sorted(latest(rows), key=Key.of)
    frame = pd.DataFrame(kept) if kept else pd.DataFrame(columns=["task", "dataset", "spec", "split_size", "method"])
    if kept:
        where = ["task", "dataset", "spec", "split_size"]
        frame["settings"] = [_settings(row) for row in kept]
        frame["line"] = frame.groupby([*where, "method"])["settings"].transform(_distinguish)
        frame["weights_only"] = (frame["method"] != "fp32") & (frame["a_bits"] == 32)
        frame["line"] = frame["method"] + frame["line"] + frame["weights_only"].map({True: _WEIGHTS_ONLY, False: ""})
        several = frame.groupby([*where, "model"])["weights"].transform("nunique") > 1
        frame["column"] = frame["model"].where(~several, frame["model"] + " [" + frame["weights"] + "]")
        equal = equal_code(rows)
        frame[["stale", "compared"]] = [staleness(row, equal) for row in kept]
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
    """One row a grid cell: n, failed, stale and compared, mean, std and fp of each metric, and mean cost.

    A cell is as stale as the stalest of its rows. The standard deviation is the sample's (n - 1), and NaN for one seed.
    Where seeds were measured on several devices, cost is that of the rows on the one with most of them, `device`.
    """
    rows = rows.reindex(columns=list(dict.fromkeys([*rows.columns, *primary_metrics(rows.columns), *COST])))
    groups = rows.groupby(["line", "column"], sort=True)
    done = rows[rows["status"] == "ok"].groupby(["line", "column"], sort=True)
    cells = groups[["method", "model", "weights", "settings", "weights_only"]].first()
    cells["n"] = done.size().reindex(cells.index, fill_value=0)
    cells["failed"] = groups["status"].agg(lambda status: int((status == "failed").sum()))
    cells["stale"] = groups["stale"].max()
    cells["compared"] = groups["compared"].agg(lambda compared: compared[compared > 0].min()).fillna(0).astype(int)
    cells["command"] = groups["command"].agg(lambda commands: "\n".join(dict.fromkeys(commands)))
    for metric in _metrics(rows):
        values = done[metric]
        cells[metric] = values.mean().reindex(cells.index).astype(float)
        cells[f"{metric}_std"] = values.std().reindex(cells.index).astype(float)
        if f"fp_{metric}" in rows:
            cells[f"fp_{metric}"] = groups[f"fp_{metric}"].mean()
    cells["device"] = done["device"].agg(lambda devices: devices.mode().iloc[0]).reindex(cells.index)
    place = pd.MultiIndex.from_frame(rows[["line", "column"]])
    same = rows[(rows["status"] == "ok") & (rows["device"] == cells["device"].reindex(place).to_numpy())]
    for name in COST:
        cells[name] = same.groupby(["line", "column"])[name].mean().reindex(cells.index).astype(float)
    return cells.reset_index()


def _beside_published(cells: pd.DataFrame, published: pd.DataFrame, spec: str) -> pd.DataFrame:
    """The cells, with published_<metric> of the same model, method and bits, and published_fp_<metric> of the model."""
    bits = "W" + published["w_bits"].astype(str) + "A" + published["a_bits"].astype(str)
    same, full = published[bits == spec], published[published["method"] == "fp32"]
    for metric in primary_metrics(cells.columns):
        for name, part, on in ((metric, same, ["model", "method"]), (f"fp_{metric}", full, ["model"])):
            values = part.loc[part["metric"] == metric, [*on, "value"]].rename(columns={"value": f"published_{name}"})
            cells = cells.merge(values, how="left", on=on, validate="m:1")
    return cells


def _data(cells: pd.DataFrame, identity: dict[str, object]) -> pd.DataFrame:
    """The aggregated cells as they go to CSV."""
    data = cells.drop(columns=["line", "column", "command"])
    data["stale"] = [STALE_WORDS[stale] for stale in cells["stale"]]
    for metric in primary_metrics(cells.columns):
        beside = {f"gap_{metric}": data[metric] - data[f"fp_{metric}"]}
        if (name := f"published_{metric}") in data:
            beside |= {name: data.pop(name), f"gap_published_{metric}": cells[metric] - cells[name]}
        for place, (name, values) in enumerate(beside.items(), start=data.columns.get_loc(f"fp_{metric}") + 1):
            data.insert(place, name, values)
    for position, (name, value) in enumerate(identity.items()):
        data.insert(position, name, value)
    return data.round(4)


def _notes(rows: pd.DataFrame, cells: pd.DataFrame, legend: bool = True) -> str:
    """What the numbers are, the methods' settings, what failed and what is stale, as a list."""
    notes = []
    if legend:
        counts = sorted(set(cells["n"]) - {0})
        seeds = f"{counts[0]} seed{'s' * (counts[0] > 1)} a cell" if len(counts) == 1 else "n seeds a cell"
        notes.append(f"Mean ± standard deviation over seeds (difference to fp32); {seeds}; {MARKS}.")
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
    if cells.filter(regex="^published_").notna().any(axis=None):
        notes.append("Published: the papers' value on the whole validation split, and ours less it.")
    notes += stale_notes(cells)
    return "\n".join(f"- {note}" for note in notes)


def _commands(rows: pd.DataFrame) -> str:
    first = rows.sort_values("time", kind="stable")["command"].drop_duplicates()
    return "\n".join(["Measured by", "", "```sh", *first, "```"])


def _details(cells: pd.DataFrame, split_size: int, metrics: Sequence[str]) -> str:
    """Grids of the further metrics, and what the cells cost."""
    parts = [f"## Further metrics and cost, {split_size} images"]
    for metric in metrics:
        if not metric.endswith("_se") and metric != "unreadable":
            parts += [f"{metric}:", grid(cells, metric)]
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
    lines = [f"| method | model | device | {' | '.join(names.values())} |", "|---|---|---|" + "--:|" * len(names)]
    for cell in cells[cells["n"] > 0].to_dict("records"):
        values = [MISSING if pd.isna(cell[n]) else f"{cell[n]:.{0 if 'bytes' in n else 1}f}" for n in names]
        lines.append(f"| {cell['line']} | {cell['column']} | {cell['device']} | {' | '.join(values)} |")
    return "\n\n".join([*parts, "Cost, mean over seeds; it compares on one device only:", "\n".join(lines)])
