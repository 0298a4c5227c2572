"""Plots of the aggregated rows, as SVG text: the same bytes from the same cells."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from iasvit.benchmark.task import Metric
from iasvit.leaderboard.figures import ACROSS, axes_in_rows, looks, plain, svg


def metric_by_bits(cells: pd.DataFrame, metric: Metric, models: Sequence[str], title: str) -> str:
    """A metric against bits, an axis for each model, a line for each method, full precision dashed.

    Args:
        cells: one row a cell; columns method_label, model_label, spec, w_bits, a_bits, the metric's, its "_std" and,
            where it is known, its "fp_" value.
        metric: for the y axis.
        models: labels in the order of the axes.
        title: above all.
    """
    specs = cells.sort_values(["w_bits", "a_bits"])["spec"].drop_duplicates().tolist()
    styles = looks(sorted(cells["method_label"].unique()))
    name = metric.name
    with axes_in_rows(len(models), title) as (figure, axes):
        for ax, model in zip(axes, models, strict=True):
            of_model = cells[cells["model_label"] == model]
            if f"fp_{name}" in cells:
                ax.axhline(of_model[f"fp_{name}"].mean(), color="0.4", linestyle="--", linewidth=1, label="fp32")
            for method, part in of_model.groupby("method_label", sort=True):
                part = part.set_index("spec").reindex([spec for spec in specs if spec in set(part["spec"])])
                places = [specs.index(spec) for spec in part.index]
                error = part[f"{name}_std"].fillna(0.0)
                ax.errorbar(places, part[name], error, label=plain(method), linewidth=1, markersize=4, **styles[method])
            ax.set_xticks(range(len(specs)), specs)
            ax.set_xlim(-0.3, len(specs) - 0.7)
            ax.set_title(plain(model), fontsize=9)
        for ax in axes[::ACROSS]:
            ax.set_ylabel(_axis(metric))
        return svg(figure, axes)


def metric_by_seconds(cells: pd.DataFrame, metric: Metric, models: Sequence[str], title: str) -> str:
    """A metric against the seconds of quantization, an axis for each model; the Pareto front is a line.

    Args:
        cells: one row a cell, of one spec; columns method_label, model_label, weights_only, quantization_seconds and
            the metric's. Cells of weights alone are drawn, but are not of the front.
        metric: for the y axis.
        models: labels in the order of the axes.
        title: above all.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    styles = looks(sorted(cells["method_label"].unique()))
    with axes_in_rows(len(models), title) as (figure, axes):
        for ax, model in zip(axes, models, strict=True):
            of_model = cells[cells["model_label"] == model]
            front = pareto_front(of_model, metric)
            ax.plot(
                front["quantization_seconds"],
                front[metric.name],
                color="0.6",
                linewidth=1,
                drawstyle="steps-post",
                label="Pareto front",
            )
            for cell in of_model.sort_values("method_label").to_dict("records"):
                method = cell["method_label"]
                point = (cell["quantization_seconds"], cell[metric.name])
                ax.plot(*point, linestyle="", markersize=6, label=plain(method), **styles[method])
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_title(plain(model), fontsize=9)
            ax.set_xlabel("seconds of quantization")
        for ax in axes[::ACROSS]:
            ax.set_ylabel(_axis(metric))
        return svg(figure, axes)


def pareto_front(cells: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Of one model's cells those that no cell is both as fast as and better than, the fastest first.

    Args:
        cells: as of `metric_by_seconds`.
        metric: says which of two values is the better.
    """
    cells = cells[~cells["weights_only"].astype(bool)].sort_values(["quantization_seconds", "method_label"])
    gain = cells[metric.name] if metric.higher_is_better else -cells[metric.name]
    return cells[gain > gain.cummax().shift(fill_value=float("-inf"))]


def inspection(table: pd.DataFrame, title: str) -> str:
    """Channel spread, attention's tail and error of each layer's operands, from input to output.

    Args:
        table: of `iasvit.inspection.quantizer_table`.
        title: above all.
    """
    layers = table["layer"].drop_duplicates().tolist()
    styles = looks(sorted(table["operand"].unique()))
    shown = {"spread": "channel range / median", "tail": "share below 2^-7", "error": "relative squared error of input"}
    with axes_in_rows(len(shown), title, sharey=False) as (figure, axes):
        figure.set_size_inches(13, 3.8)
        for ax, (column, text) in zip(axes, shown.items(), strict=True):
            for operand, part in table[table[column].notna()].groupby("operand", sort=True):
                places = [layers.index(layer) for layer in part["layer"]]
                ax.plot(places, part[column], linestyle="", markersize=4, label=plain(operand), **styles[operand])
            if column != "tail":
                ax.set_yscale("log")
            ax.set_title(text, fontsize=9)
            ax.set_xlabel("layer, from input to output")
        return svg(figure, axes)


def _axis(metric: Metric) -> str:
    return plain(metric.name) + ("" if metric.higher_is_better else " (lower is better)")
