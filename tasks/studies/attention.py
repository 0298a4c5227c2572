"""Post-softmax values and quantizers' code grids over them: `python -m tasks.studies.attention --backbone deit_t`.

One block's attention maps, every 17th value of 60 validation scenes (see `tasks.studies.activations`). Of the values
themselves the CSV has the share in each bin, half an octave wide; of each quantizer, calibrated on them, the value that
each code stands for and the share of values that get it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from torch import Tensor

from iasvit.cli import main
from iasvit.errors import IasvitError
from iasvit.quantizers import SOFTMAX_QUANTIZERS
from tasks.mini import zoo
from tasks.mini.observation import SCENES, observe, scene_images
from tasks.studies import plots

app = typer.Typer(add_completion=False)
# name in the CSV file → name in SOFTMAX_QUANTIZERS
GRIDS = {"uniform": "uniform", "log2": "log2_searched", "log-sqrt2": "log_sqrt2", "SULQ": "sulq"}
LOWEST_OCTAVE = -16  # smaller values are of the first bin


def histogram(values: Tensor) -> list[dict[str, object]]:
    """The share of values in each bin of half an octave: series "values", value the bin's lower edge.

    Args:
        values: post-softmax, in [0, 1], any shape.
    """
    edges = 2.0 ** torch.arange(LOWEST_OCTAVE, 0.5, 0.5, dtype=torch.float64)
    bins = torch.bucketize(values.flatten().double(), edges, right=True).sub_(1).clamp_(0, len(edges) - 2)
    shares = bins.bincount(minlength=len(edges) - 1) / bins.numel()
    return [
        {"series": "values", "code": i, "value": edges[i].item(), "share": share}
        for i, share in enumerate(shares.tolist())
    ]


def code_grid(values: Tensor, kind: str, n_bits: int) -> list[dict[str, object]]:
    """For each code of a quantizer calibrated on the values: what it stands for, and the share of values that get it.

    Args:
        values: post-softmax, in [0, 1], any shape.
        kind: one of GRIDS.
        n_bits: of a code.
    """
    quantizer = SOFTMAX_QUANTIZERS[GRIDS[kind]](n_bits)
    quantizer.calibrate(values)
    levels = quantizer.decode(torch.arange(quantizer.n_levels, device=values.device)).tolist()
    counts = quantizer.encode(values).flatten().int().bincount(minlength=quantizer.n_levels)
    shares = (counts / values.numel()).tolist()
    return [
        {"series": kind, "code": code, "value": level, "share": share}
        for code, (level, share) in enumerate(zip(levels, shares, strict=True))
    ]


@app.command()
def attention(
    backbone: Annotated[list[str], typer.Option(help="Repeatable. A mini backbone.")] = ["deit_t", "swin_t"],  # noqa: B006
    block: Annotated[
        int, typer.Option(help="Block whose attention maps are shown; Swin shifts windows in odd blocks.")
    ] = 4,
    n_bits: Annotated[int, typer.Option(help="Bits of a code.")] = 3,
    device: str = "cpu",
    out: Annotated[Path, typer.Option(help="CSV file. Plots go to the folder plots beside it.")] = Path(
        "results/mini_attention.csv"
    ),
) -> None:
    """Measure post-softmax values and code grids, and draw them."""
    rows = []
    for name in backbone:
        model = zoo.load(name).to(device)
        maps, _ = observe(model, scene_images(model, "val", SCENES).to(device))
        if not 0 <= block < len(maps):
            raise IasvitError(f"--block is {block}, but {name} has blocks 0 to {len(maps) - 1}")
        values = maps[block]
        found = histogram(values)
        for kind in GRIDS:
            found += code_grid(values, kind, n_bits)
        rows += [{"model": name, "bits": f"{n_bits} bits", "block": block, **row} for row in found]
        print(f"{name}: {values.numel()} values, {(values < 2.0**-7).float().mean():.0%} below 2^-7", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(out, index=False, float_format="%.6g")
    plots.draw(out, "code-grids", plots.code_grids, "post-softmax values and codes")


if __name__ == "__main__":
    main(app)
