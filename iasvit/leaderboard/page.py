"""The leaderboard as one HTML file: matrices and scatter plots, without a server and without anything from elsewhere.

`page.html`, `page.css` and `page.js` beside this module are the template; the values are JSON in it, and the script
draws them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from iasvit.benchmark.task import EMBEDDED, REAL
from iasvit.leaderboard.markdown import PUBLISHED
from iasvit.rules import violations

_HERE = Path(__file__).parent
_ORDER = (REAL, EMBEDDED, PUBLISHED)  # of the tables' tabs
_TEXTS = ("settings", "device", "source", "note", "transformed")  # repeated from cell to cell, and stored once
_SPEC = re.compile(r"W(\d+)A(\d+)")


@dataclass(frozen=True)
class Value:
    """One value of the leaderboard: a cell of one matrix.

    Attributes:
        kind: PUBLISHED, REAL or EMBEDDED; with task and dataset it names the table.
        heading: says in words what kind of number it is.
        task, dataset, bits, method, model, metric: what was measured; dataset is "" for published values.
        value: mean over seeds; None where the cell failed.
        digits: decimal places of the metric.
        higher_is_better: whether a larger value is better.
        std: standard deviation over seeds; None for one seed.
        error: standard error from the size of the split; None where unknown.
        gap: value - the full-precision model's; None where that is unknown.
        seeds: how many; None for published values.
        images: size of the split; None for published values.
        seconds: of quantization, mean over seeds; None where unknown.
        device: that measured the seconds.
        settings: calibration size and options.
        source: the commands, one a line, or the paper.
        rules: the admission rules as computed from the quantized models, `str(Admission)`, each different one once.
        transformed: full-precision metrics of the network after the transforms that changed it.
        note: further words, such as "failed".
        competes: False for a method that quantizes weights only, which cannot be the best.
        best: whether it is the best of the values that compete in its column.
    """

    kind: str
    heading: str
    task: str
    dataset: str
    bits: str
    method: str
    model: str
    metric: str
    value: float | None
    digits: int = 2
    higher_is_better: bool = True
    std: float | None = None
    error: float | None = None
    gap: float | None = None
    seeds: int | None = None
    images: int | None = None
    seconds: float | None = None
    device: str = ""
    settings: str = ""
    source: str = ""
    rules: tuple[str, ...] = ()
    transformed: str = ""
    note: str = ""
    competes: bool = True
    best: bool = False


def page(values: Sequence[Value]) -> str:
    """The page's HTML.

    Args:
        values: in any order; models keep the order in which they come first.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "sort_keys": False}
    style, script = (Markup((_HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(data=_data(values), style=style, script=script)


def _data(values: Iterable[Value]) -> dict[str, Any]:
    """What the script draws: tables with their cells, and the texts and rules that cells refer to by place."""
    tables: dict[tuple[str, str, str], list[Value]] = {}
    for value in values:
        tables.setdefault((value.kind, value.task, value.dataset), []).append(value)
    texts: dict[str, int] = {"": 0}
    rules: dict[tuple[str, ...], int] = {}
    shown = []
    for (kind, task, dataset), part in sorted(tables.items(), key=lambda item: (_ORDER.index(item[0][0]), *item[0])):
        shown.append(
            {
                "kind": kind,
                "task": task,
                "dataset": dataset,
                "metrics": {v.metric: {"digits": v.digits, "higher": v.higher_is_better} for v in part},
                "bits": sorted({v.bits for v in part}, key=_bits_order),
                "headings": {v.bits: v.heading for v in part},
                "cells": [_cell(value, texts, rules) for value in part],
            }
        )
    verdicts = [
        {
            "text": list(several),
            "broken": list(dict.fromkeys(what for text in several for what in violations(text))),
            "changed": any("network changed" in text for text in several),
        }
        for several in rules
    ]
    return {"tables": shown, "texts": list(texts), "rules": verdicts}


def _cell(value: Value, texts: dict[str, int], rules: dict[tuple[str, ...], int]) -> dict[str, Any]:
    """The cell without what is empty; numbers have the digits that are shown, and one more where they are compared."""
    digits = value.digits + 1
    cell: dict[str, Any] = {name: getattr(value, name) for name in ("bits", "metric", "method", "model")}
    cell |= {
        name: round(number, digits)
        for name in ("value", "std", "error", "gap")
        if (number := getattr(value, name)) is not None
    }
    cell |= {name: number for name in ("seeds", "images") if (number := getattr(value, name)) is not None}
    if value.seconds is not None:
        cell["seconds"] = round(value.seconds, 2)
    cell |= {name: texts.setdefault(text, len(texts)) for name in _TEXTS if (text := getattr(value, name))}
    if value.rules:
        cell["rules"] = rules.setdefault(value.rules, len(rules))
    if value.best:
        cell["best"] = True
    if not value.competes:
        cell["apart"] = True
    return cell


def _bits_order(spec: str) -> tuple[int, int, str]:
    """By bits of weights, then of activations; a mixed specification comes last."""
    match = _SPEC.fullmatch(spec)
    return (int(match[1]), int(match[2]), spec) if match else (99, 99, spec)
