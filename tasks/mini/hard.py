"""mini-hard: a mini backbone with a real ViT's channel spread transplanted, and the same full-precision output.

A LayerNorm's channel j is multiplied by f_j (weight and bias) and column j of the Linear that alone reads it divided by
f_j. In floating point the pair computes what it did; a per-tensor quantizer between them now meets channels whose
ranges differ as a pretrained ViT-S's do (real_vit_channel_spread.csv).

The f_j follow from the ranges that the model has on calibration scenes and from the ranges it should have: of C
channels, the k-th smallest gets a ratio to the median that is drawn from the k-th of C equal slices of the measured
distribution, the smallest and the largest channel the measured minimum and maximum. So channels keep their order:
what was trained to be large becomes the outlier, as in a real network, and no channel is stretched further than the
distribution asks.
"""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor, nn

from tasks.mini.observation import SCENES, blocks_of, norm_linear_sites, observe, scene_images

SPREAD = Path(__file__).parent / "real_vit_channel_spread.csv"
REAL_CHANNELS = 384
KNOTS = {"minimum": 0.0, "q01": 0.01, "q50": 0.5, "q99": 0.99, "q999": 0.999, "maximum": 1.0}


def read_spread() -> dict[str, list[list[float]]]:
    """Site → block of the real ViT → ratios of channel range to median at each of KNOTS, ascending."""
    with SPREAD.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    spread: dict[str, list[list[float]]] = {}
    for row in sorted(rows, key=lambda row: int(row["block"])):
        spread.setdefault(row["site"], []).append([float(row[knot]) for knot in KNOTS])
    return spread


def draw_ratios(ratios: list[float], channels: int, generator: np.random.Generator) -> Tensor:
    """Ratios of channel range to median for so many channels, ascending; float64.

    Between the measured quantiles the logarithm of the ratio is interpolated over normal scores: the bulk is then
    bell-shaped, as the measured one is, where a straight line would put too many channels near the outliers.

    Args:
        ratios: the measured ratios at each of KNOTS.
        channels: how many to draw, one from each of as many equal slices of the distribution.
        generator: draws the place inside each slice.
    """
    normal = NormalDist()
    knots = [normal.inv_cdf((p * (REAL_CHANNELS - 1) + 0.5) / REAL_CHANNELS) for p in KNOTS.values()]
    places = (np.arange(channels) + generator.random(channels)) / channels
    scores = [normal.inv_cdf(min(max(place, 1e-9), 1 - 1e-9)) for place in places]
    drawn = np.exp(np.interp(scores, knots, np.log(ratios)))
    drawn = (drawn / drawn[(channels - 1) // 2]).clip(ratios[0], ratios[-1])  # the median channel is the unit …
    drawn[0], drawn[-1] = ratios[0], ratios[-1]  # … and the ends are the measured ones
    return torch.from_numpy(drawn)


@torch.no_grad()
def harden(model: nn.Module, seed: int, images: Tensor | None = None) -> nn.Module:
    """A copy of the model whose post-LayerNorm channel ranges spread as a real ViT's; the output is unchanged.

    Block i of the model takes the spread of the real ViT's block at the same relative depth; Swin's patch-merging norm,
    which a ViT lacks, takes norm2's of the block that follows.

    Args:
        model: a timm ViT or Swin in eval(), fp32.
        seed: of the draws.
        images: float32 n×3×H×W, normalised, on which channel ranges are measured; 60 calibration scenes unless given.

    Returns:
        A copy; its output differs from the model's by rounding alone (under 1e-5).
    """
    images = scene_images(model, "calibration", SCENES) if images is None else images
    hard = copy.deepcopy(model)
    generator = np.random.Generator(np.random.PCG64(seed))
    spread, depth = read_spread(), len(blocks_of(model))
    _, ranges = observe(model, images)
    for (block, site, norm, linear), current in zip(norm_linear_sites(hard), ranges, strict=True):
        real = spread[site if site in spread else "norm2->fc1"]
        wanted = draw_ratios(real[round(block * (len(real) - 1) / max(depth - 1, 1))], len(current), generator)
        order = current.double().cpu().argsort(stable=True)
        target = torch.empty_like(wanted)
        target[order] = wanted * current.median().double().cpu()
        # A channel that hardly moves on these scenes would get a factor without bound.
        factors = (target / current.double().cpu().clamp_min(1e-12)).clamp(1 / 64, 64).to(norm.weight)
        norm.weight.mul_(factors)
        norm.bias.mul_(factors)
        linear.weight.div_(factors)
    return hard
