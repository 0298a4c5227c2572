"""The leaderboard as one page: sortable tables, filters and plots, without a server or a script from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_TEMPLATE = Path(__file__).with_name("page.html")
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
        kind: the heading that it stands under: published, measured on real data, measured on mini ….
        task, dataset, bits, method, model, metric: what it is of; dataset is "" for published values.
        value: mean over seeds; None where the cell failed.
        std: standard deviation over seeds; None for one.
        gap: value - full precision's; None where that is not known.
        seeds: how many; None for published values.
        seconds: of quantization, mean over seeds; None where not known.
        how: settings, source or commands, one a line.
        note: a mark behind the value, such as "failed".
        best: whether it is the best of its method's rivals.
    """

    kind: str
    task: str
    dataset: str
    bits: str
    method: str
    model: str
    metric: str
    value: float | None
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
        plots: addresses of images, relative to the page.
    """
    kinds = dict.fromkeys(value.kind for value in values)
    parts = {
        "filters": "\n".join(_filter(name, label, values) for name, label in _FILTERS.items()),
        "sections": "\n".join(_section(kind, [v for v in values if v.kind == kind]) for kind in kinds),
        "plots": "\n".join(
            f'<figure><img loading="lazy" src="{escape(path)}" alt="{escape(Path(path).stem)}"></figure>'
            for path in plots
        ),
    }
    text = _TEMPLATE.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"@{name}@", part)
    return text


def _filter(name: str, label: str, values: Sequence[Value]) -> str:
    options = sorted({getattr(value, name) for value in values} - {""})
    texts = "".join(f"<option>{escape(option)}</option>" for option in options)
    return f'<label>{label}<select name="{name}"><option value="">all</option>{texts}</select></label>'


def _section(kind: str, values: Sequence[Value]) -> str:
    heads = "".join(
        f'<th scope="col" data-key="{key}"{_class(number)}><button type="button">{label}</button></th>'
        for key, (label, number) in _COLUMNS.items()
    )
    rows = "\n".join(_row(place, value) for place, value in enumerate(values))
    return (
        f'<section><h2>{escape(kind)}</h2><p class="count"></p><div class="scroll"><table>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div></section>"
    )


def _class(number: bool) -> str:
    return ' class="number"' if number else ""


def _row(place: int, value: Value) -> str:
    digits = 4 if value.metric == "cosine" else 2
    shown = "" if value.value is None else f"{value.value:.{digits}f}"
    spread = "" if value.std is None else f" ± {value.std:.{digits}f}"
    texts = {
        "value": f"{shown}{spread} {value.note}".strip(),
        "gap": "" if value.gap is None else f"{value.gap:+.{digits}f}",
        "seeds": "" if value.seeds is None else str(value.seeds),
        "seconds": "" if value.seconds is None else f"{value.seconds:.1f}",
    }
    cells = []
    for key, (_, number) in _COLUMNS.items():
        if key == "how":
            cells.append(f"<td><details><summary>how</summary><pre>{escape(value.how)}</pre></details></td>")
        elif number:
            exact = {"value": shown}.get(key, texts[key])
            cells.append(f'<td class="number {key}" data-value="{exact}">{escape(texts[key])}</td>')
        else:
            cells.append(f"<td>{escape(getattr(value, key)).replace('_', '_<wbr>')}</td>")
    data = "".join(f' data-{name}="{escape(getattr(value, name))}"' for name in _FILTERS)
    best = ' class="best"' if value.best else ""
    return f'<tr data-place="{place}"{best}{data}>{"".join(cells)}</tr>'
