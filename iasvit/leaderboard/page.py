"""The leaderboard as one page: sortable tables, filters and plots, without a server or a script from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_COLUMNS = {  # key → (heading, is a number)
    "method": ("method", False),
    "model": ("model", False),
    "bits": ("bits", False),
    "value": ("value", True),
    "gap": ("to fp32", True),
    "metric": ("metric", False),
    "task": ("task", False),
    "dataset": ("data set", False),
    "seeds": ("seeds", True),
    "seconds": ("seconds", True),
    "how": ("how", False),
}
_FILTERS = {"task": "task", "dataset": "data set", "bits": "bits", "method": "method", "model": "model"}


@dataclass(frozen=True)
class Value:
    """One value of the leaderboard.

    Attributes:
        kind: published, real or embedded; each has tables of its own.
        heading: of the table that it stands in.
        task, dataset, bits, method, model, metric: what it is of; dataset is "" for published values.
        value: mean over seeds; None where the cell failed.
        digits: behind the point.
        std: standard deviation over seeds; None for one.
        gap: value - full precision's; None where that is not known.
        seeds: how many; None for published values.
        seconds: of quantization, mean over seeds; None where not known.
        how: settings, source or commands, one a line.
        note: words behind the value, such as "failed".
        best: whether it is the best of its method's rivals.
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
    std: float | None = None
    gap: float | None = None
    seeds: int | None = None
    seconds: float | None = None
    how: str = ""
    note: str = ""
    best: bool = False


def page(values: Sequence[Value], plots: Iterable[str]) -> str:
    """The page's HTML.

    Args:
        values: in the order in which they are shown at first.
        plots: paths of images, relative to the page.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = _breakable
    tables: dict[tuple[str, str], list[Value]] = {}
    for value in values:
        tables.setdefault((value.kind, value.heading), []).append(value)
    return environment.get_template("page.html").render(
        columns=_COLUMNS,
        filters={
            name: (label, sorted({getattr(value, name) for value in values} - {""})) for name, label in _FILTERS.items()
        },
        sections=[(heading, [(value, _numbers(value)) for value in part]) for (_, heading), part in tables.items()],
        plots=[(quote(path), Path(path).stem) for path in plots],
    )


def _numbers(value: Value) -> dict[str, tuple[str, str]]:
    """Of each column of numbers what a row is sorted by, and what is shown."""
    shown = "" if value.value is None else f"{value.value:.{value.digits}f}"
    spread = "" if value.std is None else f" ± {value.std:.{value.digits}f}"
    gap = "" if value.gap is None else f"{value.gap:+.{value.digits}f}"
    seeds = "" if value.seeds is None else str(value.seeds)
    seconds = "" if value.seconds is None else f"{value.seconds:.1f}"
    return {
        "value": (shown, f"{shown}{spread} {value.note}".strip()),
        **{key: (text, text) for key, text in (("gap", gap), ("seeds", seeds), ("seconds", seconds))},
    }


def _breakable(text: str) -> Markup:
    """The text, escaped, with a place to break the line behind each "_"."""
    return Markup("_<wbr>").join(text.split("_"))
