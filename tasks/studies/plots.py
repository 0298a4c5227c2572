"""Plots of what the studies measured, drawn from their CSV files; `iasvit leaderboard` shows them with its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from iasvit.leaderboard.figures import axes_in_rows, looks, plain, svg
from iasvit.leaderboard.markdown import slug


def draw(path: Path, name: str, plot: Callable[[pd.DataFrame, str], str], text: str) -> list[Path]:
    """Draw a study's file: an SVG for each model and bits, in the folder plots next to it.

    Args:
        path: CSV file with columns model and bits, and those that `plot` takes.
        name: first part of the plots' file names.
        plot: takes the part of the table and a title, and returns the SVG.
        text: what the title says behind model and bits.

    Returns:
        The files written.
    """
    folder = path.parent / "plots"
    folder.mkdir(exist_ok=True)
    written = []
    for (model, bits), part in pd.read_csv(path).groupby(["model", "bits"], sort=True):
        written.append(folder / f"{slug(f'{name}-{model}-{bits}')}.svg")
        written[-1].write_text(plot(part, f"mini {model}, {bits}: {text}"), encoding="utf-8")
    return written


def layer_errors(errors: pd.DataFrame, title: str) -> str:
    """Relative squared error of each layer, in the order in which they run, a line for each method.

    Args:
        errors: columns layer, method, own and streamed, of one model (`python -m tasks.studies.errors`).
        title: above all.
    """
    errors = errors[errors["streamed"] > 0]
    layers = errors["layer"].drop_duplicates().tolist()
    styles = looks(sorted(errors["method"].unique()))
    with axes_in_rows(2, title) as (figure, axes):
        figure.set_size_inches(12, 3.8)
        names = {"own": "inputs of its block in full precision", "streamed": "errors accumulated"}
        for ax, (column, text) in zip(axes, names.items(), strict=True):
            for method, part in errors.groupby("method", sort=True):
                part = part[part[column] > 0]  # a link with nothing to quantize has no error of its own
                places = [layers.index(layer) for layer in part["layer"]]
                ax.plot(places, part[column], label=plain(method), linewidth=0.8, markersize=2.5, **styles[method])
            ax.set_yscale("log")
            ax.set_title(text, fontsize=9)
            ax.set_xlabel("quantized layer or product, and block, from input to output")
        axes[0].set_ylabel("relative squared error")
        return svg(figure, axes)


def loss_surface(losses: pd.DataFrame, title: str) -> str:
    """Loss over the plane of two directions, an axis for each variant, all of one colour scale.

    Args:
        losses: columns variant, alpha, beta, loss (`python -m tasks.studies.surface`).
        title: above all.
    """
    variants = losses["variant"].drop_duplicates().tolist()
    levels = sorted({float(losses["loss"].quantile(q / 16)) for q in range(17)})
    with axes_in_rows(len(variants), title) as (figure, axes):
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
        return svg(figure, axes)


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
    with axes_in_rows(len(names), title) as (figure, axes):
        figure.set_size_inches(1.2 + 2.9 * len(names), 3.6)
        for i, (ax, name) in enumerate(zip(axes, names, strict=True)):
            grid = grids[grids["series"] == name]
            places = grid["value"].clip(lower=edges[0])
            ax.stairs(bins["share"], edges, fill=True, color="0.8", label="values, by half octave")
            ax.vlines(places, 0, grid["share"], color=f"C{i}", linewidth=1)
            ax.plot(places, grid["share"], linestyle="", markersize=5, label=f"{name}: codes", **looks(names)[name])
            ax.set_xscale("log", base=2)
            ax.set_title(name, fontsize=9)
            ax.set_xlabel("value (0 and below: left edge)")
        axes[0].set_ylabel("share of values")
        return svg(figure, axes)
