"""README's picture: `python -m tasks.studies.picture`. Mini scenes, and what 3-bit codes make of a post-softmax map."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import torch
import typer
from matplotlib import pyplot as plt
from torch import Tensor, nn

from iasvit.cli import main
from iasvit.quantizers import Log2Quantizer, Quantizer, SULQuantizer, UniformQuantizer
from tasks.mini import scenes, zoo

app = typer.Typer(add_completion=False)


def quantizers(n_bits: int) -> dict[str, Quantizer]:
    """The quantizers that the picture compares."""
    return {
        "uniform": UniformQuantizer(n_bits),
        "log2": Log2Quantizer(n_bits),
        "log-sqrt2": Log2Quantizer(n_bits, steps_per_octave=2),
        "SULQ": SULQuantizer(n_bits),
    }


@torch.inference_mode()
def attention_map(model: nn.Module, block: int, images: Tensor) -> Tensor:
    """Post-softmax attention (B, heads, N, N) of one block of a ViT for normalised images (B, 3, H, W)."""
    seen: list[Tensor] = []
    attention = model.blocks[block].attn
    attention.fused_attn = False
    hook = attention.attn_drop.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model(images)
    hook.remove()
    return seen[0]


@app.command()
def draw(
    backbone: Annotated[str, typer.Option(help="A mini ViT.")] = "deit_t",
    block: Annotated[int, typer.Option(help="Block whose attention map is shown.")] = 5,
    n_bits: Annotated[int, typer.Option(help="Bits of a code.")] = 3,
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("results/picture.png"),
) -> None:
    """Draw mini scenes beside the code grids of the post-softmax quantizers."""
    rendered, labels = scenes.render_images("val", 0, 32)
    model = zoo.load(backbone)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    images = (torch.from_numpy(rendered[:16]).permute(0, 3, 1, 2) / 255 - mean) / std
    values = attention_map(model, block, images)

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), width_ratios=(1.15, 1), layout="constrained")
    rows = [np.concatenate(list(rendered[start : start + 8]), axis=1) for start in range(0, 32, 8)]
    left.imshow(np.concatenate(rows, axis=0), interpolation="nearest")
    left.set_title("Mini benchmark: 16 classes, drawn from a seed", fontsize=10)
    left.set_axis_off()

    low, high = 2.0**-13, 1.0
    bins = np.geomspace(low, high, 90)
    counts, _ = np.histogram(values.flatten().numpy(), bins=bins)
    right.stairs(counts / counts.max(), bins, fill=True, color="0.8", label="attention values")
    for row, (name, quantizer) in enumerate(quantizers(n_bits).items()):
        quantizer.calibrate(values)
        levels = quantizer.decode(torch.arange(quantizer.n_levels)).clamp_min(low)
        error = (quantizer(values) - values).square().mean().sqrt()
        line = -0.12 * (row + 1)
        right.plot(levels, np.full(len(levels), line), "|", color=f"C{row}", markersize=13, markeredgewidth=2)
        right.text(high * 1.25, line, f"{name}, RMSE {error:.4f}", color=f"C{row}", va="center", fontsize=9)
    right.set_xscale("log", base=2)
    right.set_xlim(low, high)
    right.set_ylim(-0.6, 1.05)
    right.set_yticks([])
    right.set_xlabel("post-softmax value (levels at or below the left edge are drawn on it)", fontsize=9)
    right.set_title(f"{n_bits}-bit levels over the attention of {backbone}, block {block}", fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})
    print(f"{out}: {len(labels)} scenes, {values.numel()} attention values")


if __name__ == "__main__":
    main(app)
