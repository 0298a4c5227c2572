"""How hard a backbone's activations are to quantize: `python -m tasks.studies.activations --backbone deit_t`.

The statistics are those measured on a real pretrained ViT-S, with the same columns, on 60 validation scenes in batches
of 20, and of attention every 17th value of a batch:

- site "attention", statistic "share_below_2^-7": the post-softmax values; headline is the share below 2^-7 (all of
  which 3-bit log2 sends to one code), extreme the largest value.
- sites "norm1->qkv", "norm2->fc1" and, in Swin, "downsample.norm->reduction" (at the block that follows it), statistic
  "channel_range_over_median": max - min of each channel of the LayerNorm's output over all tokens and images, divided
  by the median channel's; headline is the largest ratio, extreme the smallest, n the number of channels.

q01 … q999 are quantiles of the values or ratios. In Swin's shifted windows, masked pairs count as the zeros they are.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from iasvit.errors import IasvitError
from iasvit.files import replacing
from tasks.command import print_logs
from tasks.mini import zoo
from tasks.mini.hard import harden
from tasks.mini.observation import SCENES, norm_linear_sites, observe, scene_images

logger = logging.getLogger(__name__)
COLUMNS = ("model", "block", "site", "n", "statistic", "headline", "q01", "q50", "q99", "q999", "extreme")
QUANTILES = (0.01, 0.5, 0.99, 0.999)
SMALL = 2.0**-7
VARIANTS = ("untrained", "trained", "hard")


def attention_row(values: Tensor) -> dict[str, object]:
    """The statistics of post-softmax values: n, statistic, headline, quantiles, extreme (see the module)."""
    array = values.double().cpu().numpy()
    quantiles = np.quantile(array, QUANTILES)
    return {
        "n": array.size,
        "statistic": "share_below_2^-7",
        "headline": f"{np.mean(array < SMALL):.4f}",
        **{name: f"{q:.3g}" for name, q in zip(COLUMNS[6:10], quantiles, strict=True)},
        "extreme": f"{array.max():.3g}",
    }


def channel_row(ranges: Tensor) -> dict[str, object]:
    """The statistics of channel ranges: n, statistic, headline, quantiles, extreme (see the module)."""
    ratios = (ranges / ranges.median()).double().cpu().numpy()
    quantiles = np.quantile(ratios, QUANTILES)
    return {
        "n": ratios.size,
        "statistic": "channel_range_over_median",
        "headline": f"{ratios.max():.2f}",
        **{name: f"{q:.3f}" for name, q in zip(COLUMNS[6:10], quantiles, strict=True)},
        "extreme": f"{ratios.min():.3f}",
    }


def measure(model: nn.Module, images: Tensor, label: str) -> list[dict[str, object]]:
    """The rows of one model, in the order of the reference: block by block, attention first.

    Args:
        model: a timm ViT or Swin in eval().
        images: float32 n×3×H×W, normalised.
        label: for the column "model".
    """
    attention, ranges = observe(model, images)
    rows = [{"model": label, "block": i, "site": "attention", **attention_row(a)} for i, a in enumerate(attention)]
    for (block, site, _, _), values in zip(norm_linear_sites(model), ranges, strict=True):
        rows.append({"model": label, "block": block, "site": site, **channel_row(values)})
    return sorted(rows, key=lambda row: row["block"])


def summary(rows: list[dict[str, object]]) -> str:
    """One line for the rows of one model, against the targets: 75% of attention, 2.5 times the median."""
    shares = [float(row["headline"]) for row in rows if row["site"] == "attention"]
    spreads = [float(row["headline"]) for row in rows if row["site"] != "attention"]
    return (
        f"{rows[0]['model']:40s} attention below 2^-7: {min(shares):.0%} to {max(shares):.0%}, "
        f"{sum(share >= 0.75 for share in shares)} of {len(shares)} blocks from 75%; "
        f"channel range: {min(spreads):.1f} to {max(spreads):.1f}, "
        f"{sum(spread >= 2.5 for spread in spreads)} of {len(spreads)} sites from 2.5"
    )


def write(rows: list[dict[str, object]], path: Path) -> None:
    """Put the rows into the CSV at `path`, in place of older rows of the same models; others stay."""
    labels = {row["model"] for row in rows}
    older = []
    if path.is_file():
        with path.open(newline="") as file:
            older = [row for row in csv.DictReader(file) if row["model"] not in labels]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*older, *rows])


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m tasks.studies.activations", description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", action="append", choices=list(zoo.MINI_BACKBONES), metavar="NAME",
                        help="repeatable; by default all that have a checkpoint")  # fmt: skip
    for variant in VARIANTS:
        parser.add_argument(f"--{variant}", action="store_true", help="this variant only; by default all")
    parser.add_argument("--checkpoints", type=Path, help="folder with checkpoints; by default the repository's own")
    parser.add_argument("--out", type=Path, default=Path("results/mini_activations.csv"))
    options = parser.parse_args(arguments)
    print_logs()
    variants = [variant for variant in VARIANTS if getattr(options, variant)] or list(VARIANTS)
    names = options.backbone or [n for n in zoo.MINI_BACKBONES if zoo.checkpoint_path(n, options.checkpoints).is_file()]
    try:
        if not names:
            raise IasvitError(
                f"no checkpoint in {options.checkpoints or zoo.CHECKPOINTS}; train one, or name --backbone"
            )
        for name in names:
            for variant in variants:
                model = zoo.build(name) if variant == "untrained" else zoo.load(name, options.checkpoints)
                if variant == "hard":
                    model = harden(model, seed=0)
                rows = measure(model, scene_images(model, "val", SCENES), f"mini {name}, {variant}, {SCENES} scenes")
                write(rows, options.out)
                print(summary(rows), flush=True)
    except IasvitError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
