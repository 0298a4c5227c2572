"""Plots of the aggregated rows, as SVG text: the same bytes from the same cells."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
_ACROSS = 4  # axes in a row


@contextmanager
def _figure(count: int, title: str, sharey: bool = True) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """Axes in rows of _ACROSS; no window and no global state."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        rows, columns = -(-count // _ACROSS), min(count, _ACROSS)
        figure = Figure(figsize=(1.2 + 2.5 * columns, 0.8 + 2.6 * rows), layout="constrained")
        FigureCanvasSVG(figure)
        figure.suptitle(title, fontsize=10)
        axes = list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flat)
        for ax in axes[count:]:
            ax.remove()
        yield figure, axes[:count]


def _svg(figure: Figure, axes: Sequence[Axes]) -> str:
    """The figure with one legend for all its axes, below them."""
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 7), fontsize=8
        )
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _looks(lines: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each method, the same in all plots of these lines."""
    return {line: {"color": f"C{i % 10}", "marker": _MARKERS[i % len(_MARKERS)]} for i, line in enumerate(lines)}


def accuracy_by_bits(cells: pd.DataFrame, metric: str, models: Sequence[str], title: str) -> str:
    """Accuracy against bits, an axis for each model, a line for each method, full precision dashed.

    Args:
        cells: one row a cell; columns line, model, spec, w_bits, a_bits, the metric, its "_std" and its "fp_" value.
        metric: for the y axis, in percent.
        models: in the order of the axes.
        title: above all.
    """
    specs = cells.sort_values(["w_bits", "a_bits"])["spec"].drop_duplicates().tolist()
    looks = _looks(sorted(cells["line"].unique()))
    with _figure(len(models), title) as (figure, axes):
        for ax, model in zip(axes, models, strict=True):
            here = cells[cells["model"] == model]
            ax.axhline(here[f"fp_{metric}"].mean(), color="0.4", linestyle="--", linewidth=1, label="fp32")
            for line, part in here.groupby("line", sort=True):
                part = part.set_index("spec").reindex([spec for spec in specs if spec in set(part["spec"])])
                places = [specs.index(spec) for spec in part.index]
                error = part[f"{metric}_std"].fillna(0.0)
                ax.errorbar(places, part[metric], error, label=line, linewidth=1, markersize=4, **looks[line])
            ax.set_xticks(range(len(specs)), specs)
            ax.set_xlim(-0.3, len(specs) - 0.7)
            ax.set_title(model, fontsize=9)
        for ax in axes[::_ACROSS]:
            ax.set_ylabel(metric)
        return _svg(figure, axes)


def accuracy_by_seconds(cells: pd.DataFrame, metric: str, models: Sequence[str], title: str) -> str:
    """Accuracy against the seconds of quantization, an axis for each model; the Pareto front is a line.

    Args:
        cells: one row a cell, of one spec; columns line, model, weights_only, quantization_seconds and the
            metric. Cells of weights alone are drawn, but are not of the front.
        metric: for the y axis, in percent.
        models: in the order of the axes.
        title: above all.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    looks = _looks(sorted(cells["line"].unique()))
    with _figure(len(models), title) as (figure, axes):
        for ax, model in zip(axes, models, strict=True):
            here = cells[cells["model"] == model].sort_values(["quantization_seconds", "line"])
            competing = here[~here["weights_only"].astype(bool)]
            front = competing[competing[metric] > competing[metric].cummax().shift(fill_value=float("-inf"))]
            where = (front["quantization_seconds"], front[metric])
            ax.plot(*where, color="0.6", linewidth=1, drawstyle="steps-post", label="Pareto front")
            for cell in here.sort_values("line").to_dict("records"):
                ax.plot(
                    cell["quantization_seconds"],
                    cell[metric],
                    linestyle="",
                    markersize=6,
                    label=cell["line"],
                    **looks[cell["line"]],
                )
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_title(model, fontsize=9)
            ax.set_xlabel("seconds of quantization")
        for ax in axes[::_ACROSS]:
            ax.set_ylabel(metric)
        return _svg(figure, axes)


def layer_errors(errors: pd.DataFrame, title: str) -> str:
    """Relative squared error of each layer, in the order in which they run, a line for each method.

    Args:
        errors: columns layer, method, own and streamed, of one model (`python -m tasks.studies.errors`).
        title: above all.
    """
    errors = errors[errors["streamed"] > 0]
    layers = errors["layer"].drop_duplicates().tolist()
    looks = _looks(sorted(errors["method"].unique()))
    with _figure(2, title) as (figure, axes):
        figure.set_size_inches(12, 3.8)
        names = {"own": "inputs of its block in full precision", "streamed": "errors accumulated"}
        for ax, (column, text) in zip(axes, names.items(), strict=True):
            for method, part in errors.groupby("method", sort=True):
                part = part[part[column] > 0]  # a link with nothing to quantize has no error of its own
                places = [layers.index(layer) for layer in part["layer"]]
                ax.plot(places, part[column], label=method, linewidth=0.8, markersize=2.5, **looks[method])
            ax.set_yscale("log")
            ax.set_title(text, fontsize=9)
            ax.set_xlabel("quantized layer or product, and block, from input to output")
        axes[0].set_ylabel("relative squared error")
        return _svg(figure, axes)


def inspection(table: pd.DataFrame, title: str) -> str:
    """Channel spread, attention's tail and error of each layer's operands, from input to output.

    Args:
        table: of `iasvit.inspection.quantizer_table`.
        title: above all.
    """
    layers = table["layer"].drop_duplicates().tolist()
    looks = _looks(sorted(table["operand"].unique()))
    shown = {"spread": "channel range / median", "tail": "share below 2^-7", "error": "relative squared error of input"}
    with _figure(len(shown), title, sharey=False) as (figure, axes):
        figure.set_size_inches(13, 3.8)
        for ax, (column, text) in zip(axes, shown.items(), strict=True):
            for operand, part in table[table[column].notna()].groupby("operand", sort=True):
                places = [layers.index(layer) for layer in part["layer"]]
                ax.plot(places, part[column], linestyle="", markersize=4, label=operand, **looks[operand])
            if column != "tail":
                ax.set_yscale("log")
            ax.set_title(text, fontsize=9)
            ax.set_xlabel("layer, from input to output")
        return _svg(figure, axes)


def loss_surface(losses: pd.DataFrame, title: str) -> str:
    """Loss over the plane of two directions, an axis for each variant, all of one colour scale.

    Args:
        losses: columns variant, alpha, beta, loss (`python -m tasks.studies.surface`).
        title: above all.
    """
    variants = losses["variant"].drop_duplicates().tolist()
    levels = sorted({float(losses["loss"].quantile(q / 16)) for q in range(17)})
    with _figure(len(variants), title) as (figure, axes):
        figure.set_size_inches(1.2 + 3.2 * len(variants), 3.6)
        for ax, variant in zip(axes, variants, strict=True):
            grid = losses[losses["variant"] == variant].pivot(index="beta", columns="alpha", values="loss")
            drawn = ax.contourf(
                grid.columns, grid.index, grid, levels=sorted(set(levels)), cmap="viridis", extend="both"
            )
            ax.set_title(variant, fontsize=9)
            ax.set_xlabel("α")
        axes[0].set_ylabel("β")
        figure.colorbar(drawn, ax=list(axes), label="mean squared error of the block's output")
        return _svg(figure, axes)


def code_grids(shares: pd.DataFrame, title: str) -> str:
    """The distribution of post-softmax values, and over it the code grid of each quantizer, an axis for each.

    Args:
        shares: columns series ("values" for the distribution, else the quantizer), value and share of one model
            (`python -m tasks.studies.attention`); bins are half an octave wide.
        title: above all.
    """
    bins = shares[shares["series"] == "values"].sort_values("value")
    edges = [*bins["value"], bins["value"].max() * 2**0.5]
    grids = shares[shares["series"] != "values"]
    names = grids["series"].drop_duplicates().tolist()
    with _figure(len(names), title) as (figure, axes):
        figure.set_size_inches(1.2 + 2.9 * len(names), 3.6)
        for i, (ax, name) in enumerate(zip(axes, names, strict=True)):
            grid = grids[grids["series"] == name]
            places = grid["value"].clip(lower=edges[0])
            ax.stairs(bins["share"], edges, fill=True, color="0.8", label="values, by half octave")
            ax.vlines(places, 0, grid["share"], color=f"C{i}", linewidth=1)
            ax.plot(places, grid["share"], linestyle="", markersize=5, label=f"{name}: codes", **_looks(names)[name])
            ax.set_xscale("log", base=2)
            ax.set_title(name, fontsize=9)
            ax.set_xlabel("value (0 and below: left edge)")
        axes[0].set_ylabel("share of values")
        return _svg(figure, axes)
