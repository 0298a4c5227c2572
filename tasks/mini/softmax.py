"""What post-softmax quantizers alone cost: `python -m tasks.mini.softmax --backbone deit_t`.

Everything stays in full precision but the attention maps, which pass through one kind of quantizer, calibrated on 32
images. Beside the quantizers stands a row "noise" that no quantizer takes part in: every value times 2^u, u uniform in
[-1/2, 1/2], which is the rounding that grids of one level an octave (log2, SULQ) do to any value at any bit-width. What
it costs is the model's doing. "log2, scale = max" is log2 without a search of its scale, as the papers compare with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from torch import Tensor, nn

from iasvit.calibration import calibrate_inputs
from iasvit.cli import main
from iasvit.models import Site, insert_quantizers
from iasvit.nn import quantizers_of
from iasvit.quantizers import Log2Quantizer, Quantizer, SULQuantizer, TwinSoftmaxQuantizer, UniformQuantizer
from iasvit.spec import QuantSpec
from tasks.mini import zoo
from tasks.mini.activations import scene_images

app = typer.Typer(add_completion=False)
CALIBRATION_IMAGES = 32
BATCH = 20


class OctaveNoise(nn.Module):
    """x·2^u with u uniform in [-1/2, 1/2]."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape, generator=self.generator).to(x.device).sub_(0.5).exp2_()


KINDS: dict[str, Callable[[int], Quantizer]] = {
    "uniform": UniformQuantizer,
    "twin uniform": TwinSoftmaxQuantizer,
    "log2, scale = max": lambda n_bits: Log2Quantizer(n_bits, percentiles=(1.0,)),
    "log2": Log2Quantizer,
    "log-sqrt2": lambda n_bits: Log2Quantizer(n_bits, steps_per_octave=2),
    "SULQ": SULQuantizer,
}


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, classes) of images (B, 3, H, W), in batches."""
    return torch.cat([model(batch) for batch in images.split(BATCH)])


def with_softmax_quantizer(model: nn.Module, images: Tensor, n_bits: int, kind: str) -> nn.Module:
    """A copy of the model whose attention maps alone are quantized, calibrated on the images."""

    def activation(site: Site) -> Quantizer:
        return KINDS[kind](site.n_bits) if site.role == "softmax" else UniformQuantizer(site.n_bits)

    quantized = insert_quantizers(
        copy.deepcopy(model), QuantSpec(n_bits, n_bits), lambda site: UniformQuantizer(site.n_bits), activation
    )
    for weights in (True, False):
        for _, quantizer in quantizers_of(quantized, weights=weights):
            quantizer.enabled = False
    softmax = [(n, q) for n, q in quantizers_of(quantized, weights=False) if n.endswith("matmul_av.left_quantizer")]
    with torch.inference_mode():
        calibrate_inputs(softmax, lambda: quantized(images))
    return quantized


def with_noise(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy of the model whose attention maps are disturbed by half an octave either way."""
    disturbed = with_softmax_quantizer(model, images[:1], 8, "uniform")
    for module in disturbed.modules():
        if hasattr(module, "matmul_av"):
            module.matmul_av.left_quantizer = OctaveNoise()
    return disturbed


@app.command()
def softmax(
    backbone: Annotated[list[str], typer.Option(help="mini backbone, repeatable")] = ["deit_t", "deit_s", "swin_t"],  # noqa: B006
    n_bits: Annotated[list[int], typer.Option(help="repeatable")] = [3, 4, 6],  # noqa: B006
    images: Annotated[int, typer.Option(help="validation images")] = 1000,
    device: str = "cpu",
    out: Annotated[Path, typer.Option(help="CSV file")] = Path("results/mini_softmax.csv"),
) -> None:
    """Top-1 of mini backbones with nothing but the attention maps quantized."""
    from tasks.mini import scenes

    _, labels = scenes.render_images("val", 0, images, zoo.IMAGE_SIZE)
    target = torch.from_numpy(labels)
    rows = []
    for name in backbone:
        model = zoo.load(name).to(device)
        x = scene_images(model, "val", images).to(device)
        calibration = scene_images(model, "calibration", CALIBRATION_IMAGES).to(device)
        variants: dict[tuple[str, int | str], Callable[[], nn.Module]] = {
            ("full precision", ""): lambda model=model: model,
            ("noise", ""): lambda model=model, images=calibration: with_noise(model, images),
        }
        for bits in n_bits:
            for kind in KINDS:
                variants[kind, bits] = lambda a=model, b=calibration, c=bits, d=kind: with_softmax_quantizer(a, b, c, d)
        for (kind, bits), make in variants.items():
            top1 = 100 * (logits(make(), x).argmax(dim=1).cpu() == target).float().mean().item()
            rows.append({"model": name, "quantizer": kind, "n_bits": bits, "images": images, "top1": round(top1, 2)})
            print(f"{name:8s} {kind:18s} {bits!s:2s} {top1:6.2f}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(out, index=False)


if __name__ == "__main__":
    main(app)
