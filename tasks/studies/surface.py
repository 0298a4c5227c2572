"""Loss surface around a block's weights, as in the paper (arXiv:2311.10126): `python -m tasks.studies.surface`.

The loss is the mean squared error between the block's output and that of the full-precision block, both with
full-precision inputs, for weights W + α·D1 + β·D2: D1 and D2 are random directions, each row scaled to the norm of its
row of W. "direct" has everything quantized at once, activations per tensor; "stage 1" of SOS has weights in full
precision and post-LayerNorm activations per channel; "stage 3" is what stage 2 leaves: weights quantized, and one scale
a tensor, reparameterized from stage 1's. Where a surface is rough, small steps of the weights say little of the next.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor, nn

from iasvit.calibration import calibrate_inputs
from iasvit.cli import main
from iasvit.errors import IasvitError
from iasvit.models import Segment, find_pairs, insert_quantizers, segments
from iasvit.reparam import reparameterize
from iasvit.sos import IASViT
from iasvit.spec import QuantSpec
from tasks.mini import zoo
from tasks.mini.observation import scene_images
from tasks.studies import plots

app = typer.Typer(add_completion=False)
VARIANTS = ("direct", "stage 1", "stage 3")


@torch.no_grad()
def prepare(model: nn.Module, bits: str, block: int, images: Tensor, variant: str) -> tuple[Segment, Tensor, Tensor]:
    """A block with calibrated quantizers as the variant has them, its inputs, and its full-precision outputs.

    Raises:
        IasvitError: the model has no block of that number.
    """
    method = IASViT(sos=variant != "direct")
    quantized = insert_quantizers(
        copy.deepcopy(model), QuantSpec.parse(bits), method.weight_quantizer, method.activation_quantizer
    )
    chain = segments(model)
    blocks = [i for i, segment in enumerate(chain) if ".blocks." in f".{segment.name}"]
    if not 0 <= block < len(blocks):
        raise IasvitError(f"--block is {block}, but the backbone has blocks 0 to {len(blocks) - 1}")
    inputs = images
    for segment in chain[: blocks[block]]:
        inputs = segment.run(inputs)
    target = chain[blocks[block]].run(inputs)
    quantized_block = segments(quantized)[blocks[block]]
    for layer in quantized_block.layers():
        layer.weight_quantizer.enabled = False
    calibrate_inputs(quantized_block.quantizers(weights=False), lambda: quantized_block.run(inputs))
    if variant == "stage 3":
        for pair in find_pairs(quantized):
            if pair.linears[0] in quantized_block.layers():
                reparameterize(pair)
    if variant != "stage 1":
        for layer in quantized_block.layers():
            layer.calibrate_weight()
            layer.weight_quantizer.enabled = True
    return quantized_block, inputs, target


@torch.no_grad()
def surface(block: Segment, inputs: Tensor, target: Tensor, places: np.ndarray, seed: int) -> list[dict[str, float]]:
    """The loss at each (α, β) of places × places; the weights are as before afterwards."""
    generator = torch.Generator().manual_seed(seed)
    weights = [layer.weight for layer in block.layers()]
    before = [weight.clone() for weight in weights]

    def direction(weight: Tensor) -> Tensor:
        rows = torch.randn(weight.shape, generator=generator).to(weight.device).flatten(1)
        norms = weight.flatten(1).norm(dim=1, keepdim=True)
        return (rows * norms / rows.norm(dim=1, keepdim=True)).view_as(weight)

    first, second = ([direction(weight) for weight in before] for _ in range(2))
    rows = []
    for alpha in places:
        for beta in places:
            for weight, base, d1, d2 in zip(weights, before, first, second, strict=True):
                weight.copy_(base + alpha * d1 + beta * d2)
            loss = (block.run(inputs) - target).square().mean().item()
            rows.append({"alpha": float(alpha), "beta": float(beta), "loss": loss})
    for weight, base in zip(weights, before, strict=True):
        weight.copy_(base)
    return rows


@app.command()
def draw(
    backbone: Annotated[str, typer.Option(help="A mini backbone.")] = "deit_t",
    block: int = 5,
    bits: str = "W3A3",
    images: int = 8,
    points: Annotated[int, typer.Option(help="Grid points per side.")] = 25,
    radius: Annotated[float, typer.Option(help="Largest α and β.")] = 0.25,
    seed: int = 0,
    device: str = "cpu",
    out: Annotated[Path, typer.Option(help="CSV file. Plots go to the folder plots beside it.")] = Path(
        "results/mini_surface.csv"
    ),
) -> None:
    """Measure the loss surfaces, and draw them."""
    model = zoo.load(backbone).to(device)
    x = scene_images(model, "calibration", images).to(device)
    places = np.linspace(-radius, radius, points)
    tables = []
    for variant in VARIANTS:
        rows = surface(*prepare(model, bits, block, x, variant), places, seed)
        tables.append(pd.DataFrame(rows).assign(model=backbone, bits=bits, block=block, variant=variant))
        losses = tables[-1]["loss"].to_numpy().reshape(points, points)
        # Second differences relative to the surface's height: 0 for a plane, larger the rougher.
        rough = np.abs(np.diff(losses, 2, axis=0)).mean() / np.ptp(losses)
        print(f"{variant}: loss {losses.min():.4g} to {losses.max():.4g}, roughness {rough:.4f}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    pd.concat(tables).to_csv(out, index=False, float_format="%.6g")
    plots.draw(out, "loss-surface", plots.loss_surface, "loss around a block's weights")


if __name__ == "__main__":
    main(app)
