"""From stored rows to the cells of tables: the latest rows, labelled, and aggregated over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
from pandas.api.types import is_numeric_dtype

from iasvit.benchmark.results import COST, Key, Row, latest, metric_columns
from iasvit.benchmark.task import REAL, Metric
from iasvit.benchmark.versions import other_version

# What rows must have in common to share a table; the models and methods of a table are its columns and lines.
TABLE = ("task", "dataset", "data_kind", "spec", "split_size", "data_fingerprint")
# Columns that rows of earlier schemas lack, and what they count as.
_MISSING = {"data_kind": REAL, "data_description": "real data", "data_fingerprint": "", "config_fingerprint": ""}
_WEIGHTS_ONLY = ", weights only"  # activations in full precision: shown, but out of the competition
_CELL = ["method_label", "model_label"]


def labelled(rows: Iterable[Row]) -> pd.DataFrame:
    """The latest of rows with equal keys, without full-precision ones, as a table in a fixed order.

    Args:
        rows: as stored.

    Returns:
        The rows' columns, and settings, method_label, model_label, weights_only, other_version and data_time, when the
        latest row on the same data was measured, of any spec.
    """
    kept = sorted((row for row in latest(rows) if row["method"] != "fp32"), key=Key.of)
    if not kept:
        return pd.DataFrame(columns=list(TABLE))
    frame = pd.DataFrame([{name: row.get(name) or value for name, value in _MISSING.items()} for row in kept])
    frame = pd.concat([pd.DataFrame(kept).drop(columns=list(_MISSING), errors="ignore"), frame], axis=1)
    frame["settings"] = [_settings(row) for row in kept]
    settings = frame.groupby([*TABLE, "method"])["settings"].transform(_distinguish)
    frame["weights_only"] = frame["a_bits"] == 32
    frame["method_label"] = frame["method"] + settings + frame["weights_only"].map({True: _WEIGHTS_ONLY, False: ""})
    frame["model_label"] = frame["model"]
    for name, prefix in (("weights", ""), ("config_fingerprint", "configuration ")):
        several = frame.groupby([*TABLE, "model"])[name].transform("nunique") > 1
        frame.loc[several, "model_label"] += " [" + prefix + frame.loc[several, name] + "]"
    frame["data_time"] = frame.groupby([name for name in TABLE if name != "spec"])["time"].transform("max")
    frame["other_version"] = [other_version(row) for row in kept]
    return frame


def row_columns(rows: pd.DataFrame) -> list[str]:
    """Of a table of labelled rows the columns that hold something, less those that `labelled` added.

    A column of text that the store does not know is left out: it is no metric.
    """
    added = {*_MISSING, *_CELL, "settings", "weights_only", "other_version", "data_time"}
    held = rows.dropna(axis=1, how="all")
    texts = {name for name in metric_columns(held.columns) if not is_numeric_dtype(held[name])}
    return [name for name in held.columns if name not in added | texts]


def _settings(row: Row) -> str:
    options = f";{row['options']}" if row["options"] else ""
    used = row.get("calib_used")
    size = row["calib_size"] if used is None or used == row["calib_size"] else f"{used} of {row['calib_size']}"
    return f"calib_size={size}{options}"


def _distinguish(settings: pd.Series) -> pd.Series:
    """For each row " (name=value, ...)" of the settings that are not the same in all rows of its method."""
    parsed = [text.split(";") for text in settings]
    shared = set(parsed[0]).intersection(*parsed)
    labels = [", ".join(part for part in parts if part not in shared) for parts in parsed]
    several = len(set(settings)) > 1
    return pd.Series([f" ({label or 'defaults'})" if several else "" for label in labels], settings.index)


def aggregate(rows: pd.DataFrame, metrics: Sequence[Metric]) -> pd.DataFrame:
    """One row a cell: labels, n, failed, other_version, rules; mean, std and fp of each metric; and mean cost.

    The standard deviation is the sample's (n - 1), and NaN for one seed. Where seeds were measured on several devices,
    cost is that of the rows on the one with most of them, `device`.

    Args:
        rows: of `labelled`, of one table.
        metrics: those to aggregate.
    """
    needed = [*(metric.name for metric in metrics), *COST, "admission", "transformed"]
    rows = rows.reindex(columns=list(dict.fromkeys([*rows.columns, *needed])))
    groups = rows.groupby(_CELL, sort=True)
    done = rows[rows["status"] == "ok"].groupby(_CELL, sort=True)
    cells = groups[["method", "model", "weights", "settings", "weights_only"]].first()
    cells["n"] = done.size().reindex(cells.index, fill_value=0)
    cells["failed"] = groups["status"].agg(lambda status: int((status == "failed").sum()))
    cells["other_version"] = groups["other_version"].agg(lambda texts: "; ".join(sorted(set(texts) - {""})))
    cells["command"] = groups["command"].agg(lambda commands: "\n".join(dict.fromkeys(commands)))
    for name, column in (("rules", "admission"), ("transformed", "transformed")):
        texts = groups[column].agg(lambda texts: tuple(sorted({text for text in texts if text and pd.notna(text)})))
        cells[name] = texts if name == "rules" else texts.map("\n".join)
    for metric in metrics:
        values = done[metric.name]
        cells[metric.name] = values.mean().reindex(cells.index).astype(float)
        cells[f"{metric.name}_std"] = values.std().reindex(cells.index).astype(float)
        if f"fp_{metric.name}" in rows:
            cells[f"fp_{metric.name}"] = groups[f"fp_{metric.name}"].mean()
    cells["device"] = done["device"].agg(lambda devices: devices.mode().iloc[0]).reindex(cells.index)
    of_row = pd.MultiIndex.from_frame(rows[_CELL])
    same = rows[(rows["status"] == "ok") & (rows["device"] == cells["device"].reindex(of_row).to_numpy())]
    for name in COST:
        cells[name] = same.groupby(_CELL)[name].mean().reindex(cells.index).astype(float)
    return cells.reset_index()


def add_published(cells: pd.DataFrame, published: pd.DataFrame, spec: str, metrics: Sequence[Metric]) -> pd.DataFrame:
    """The cells, with published_<metric> of the same model, method and bits, and published_fp_<metric> of the model.

    Args:
        cells: of `aggregate`.
        published: published values of the cells' task.
        spec: of the cells, "W3A3".
        metrics: those to look up.
    """
    bits = "W" + published["w_bits"].astype(str) + "A" + published["a_bits"].astype(str)
    same, full = published[bits == spec], published[published["method"] == "fp32"]
    for metric in metrics:
        for name, part, on in ((metric.name, same, ["model", "method"]), (f"fp_{metric.name}", full, ["model"])):
            values = part.loc[part["metric"] == metric.name, [*on, "value"]]
            cells = cells.merge(values.rename(columns={"value": f"published_{name}"}), "left", on=on, validate="m:1")
    return cells


def cells_as_data(cells: pd.DataFrame, metrics: Sequence[Metric], identity: dict[str, object]) -> pd.DataFrame:
    """The cells as they go to CSV.

    Args:
        cells: of `aggregate`, with or without published values.
        metrics: those of the cells; gaps are of the primary ones.
        identity: names and values of the first columns.
    """
    data = cells.drop(columns=[*_CELL, "command", "rules", "transformed"])
    for metric in (metric.name for metric in metrics if metric.primary and f"fp_{metric.name}" in cells):
        gaps = {f"gap_{metric}": data[metric] - data[f"fp_{metric}"]}
        if (name := f"published_{metric}") in data:
            gaps |= {name: data.pop(name), f"gap_published_{metric}": cells[metric] - cells[name]}
        for position, (name, values) in enumerate(gaps.items(), start=data.columns.get_loc(f"fp_{metric}") + 1):
            data.insert(position, name, values)
    for position, (name, value) in enumerate(identity.items()):
        data.insert(position, name, value)
    return data.round(4)
