"""Figures as SVG text, of one style, for the leaderboard and for whoever draws more: the same bytes each time."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS = 4  # axes in a row
_STYLE = {
    "svg.hashsalt": "iasvit",  # ids inside the file; drawn at random otherwise
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_MARKERS = "osD^vPX*<>"
_NOT_OF_XML = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@contextmanager
def axes_in_rows(count: int, title: str, sharey: bool = True) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """A figure and its axes in rows of ACROSS; no window and no global state.

    Args:
        count: of axes.
        title: above all.
        sharey: whether all axes have one y axis.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        rows, columns = -(-count // ACROSS), min(count, ACROSS)
        figure = Figure(figsize=(1.2 + 2.5 * columns, 0.8 + 2.6 * rows), layout="constrained")
        FigureCanvasSVG(figure)
        figure.suptitle(plain(title), fontsize=10)
        axes = list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flat)
        for ax in axes[count:]:
            ax.remove()
        yield figure, axes[:count]


def svg(figure: Figure, axes: Sequence[Axes]) -> str:
    """The figure with one legend for all its axes, below them."""
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 7), fontsize=8
        )
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def plain(text: str) -> str:
    """The text as a label that is drawn as it stands: "$" begins no formula, what XML cannot hold is a space."""
    return _NOT_OF_XML.sub(" ", text).replace("$", r"\$")


def looks(labels: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each label, the same in all plots of these labels."""
    return {label: {"color": f"C{i % 10}", "marker": _MARKERS[i % len(_MARKERS)]} for i, label in enumerate(labels)}
