"""Error of every layer, method beside method: `python -m tasks.mini.errors --backbone deit_t --bits W3A3`.

For each layer of a quantized backbone the relative squared error of its output, ‖y_q - y‖² / ‖y‖² over 32 validation
scenes, y from the full-precision model: "own" with the inputs of its block (patch embedding, block, patch merging or
head) from the full-precision model, so that errors begin anew at each block; "streamed" in the quantized model as it
runs. A table of means by kind of layer is printed, and every layer goes to a CSV file.
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

import iasvit
from iasvit.cli import main
from iasvit.methods import method_options
from iasvit.models import Segment, insert_quantizers, segments
from iasvit.nn import QuantConv2d, QuantLinear, QuantMatMul, quantizers_of
from iasvit.quantizers import UniformQuantizer
from iasvit.spec import QuantSpec
from tasks.imagenet_data import MiniImages
from tasks.mini import zoo
from tasks.mini.activations import scene_images

app = typer.Typer(add_completion=False)
METHODS = ["base_ptq", "minmax", "ptq4vit", "repq_vit", "ias_vit"]
SETTINGS = {"iterations": 200, "batch_size": 16, "lr": 1e-3}  # the mini profile's


def with_same_names(model: nn.Module) -> nn.Module:
    """The full-precision model with its layers where a quantized one has them, all quantizers off."""
    plain = insert_quantizers(
        copy.deepcopy(model),
        QuantSpec(8, 8),
        lambda site: UniformQuantizer(site.n_bits),
        lambda site: UniformQuantizer(site.n_bits),
    )
    for weights in (True, False):
        for _, quantizer in quantizers_of(plain, weights=weights):
            quantizer.enabled = False
    return plain.eval()


def observe(model: nn.Module, run: Callable[[], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The output of every quantized layer while `run` runs, by name, and what `run` returned."""
    outputs: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: outputs.update({name: output})

    handles = [
        layer.register_forward_hook(watch(name))
        for name, layer in model.named_modules()
        if isinstance(layer, (QuantLinear, QuantConv2d, QuantMatMul))
    ]
    try:
        return outputs, run()
    finally:
        for handle in handles:
            handle.remove()


def relative_error(output: Tensor, target: Tensor) -> float:
    """‖output - target‖² / ‖target‖²."""
    return ((output - target).square().sum() / target.square().sum()).item()


@torch.inference_mode()
def layer_errors(model: nn.Module, quantized: nn.Module, images: Tensor) -> list[dict[str, object]]:
    """A row (layer, kind, own, streamed) for each quantized layer, and one of kind "block" for each segment.

    Args:
        model: full precision, of `with_same_names`.
        quantized: made from it.
        images: float32 (B, 3, H, W), normalised.
    """
    x = x_q = images
    rows = []

    def outputs(network: nn.Module, segment: Segment, inputs: Tensor) -> dict[str, Tensor]:
        seen, output = observe(network, lambda: segment.run(inputs))
        return {**seen, segment.name: output}

    for plain, mine in zip(segments(model), segments(quantized), strict=True):
        target = outputs(model, plain, x)
        own, streamed = outputs(quantized, mine, x), outputs(quantized, mine, x_q)
        for name, y in target.items():
            kind = "block" if name == plain.name else ".".join(name.split(".")[-2:])
            rows.append(
                {
                    "layer": name,
                    "kind": kind,
                    "own": relative_error(own[name], y),
                    "streamed": relative_error(streamed[name], y),
                }
            )
        x, x_q = target[plain.name], streamed[mine.name]
    return rows


@app.command()
def errors(
    backbone: Annotated[list[str], typer.Option(help="mini backbone, repeatable")] = ["deit_t", "swin_t"],  # noqa: B006
    method: Annotated[list[str], typer.Option(help="repeatable")] = METHODS,
    bits: str = "W3A3",
    images: Annotated[int, typer.Option(help="validation images")] = 32,
    calib_size: int = 256,
    device: str = "cpu",
    out: Annotated[Path, typer.Option(help="CSV file")] = Path("results/mini_errors.csv"),
) -> None:
    """The error of every layer, method beside method."""
    rows = []
    for name in backbone:
        model = zoo.load(name).to(device)
        x = scene_images(model, "val", images).to(device)
        calibration = MiniImages().calibration(model.pretrained_cfg, calib_size, 0).to(device)
        for each in method:
            options = {key: value for key, value in SETTINGS.items() if key in method_options(each)}
            quantized = iasvit.quantize(model, calibration, bits, each, **options)
            for row in layer_errors(with_same_names(model), quantized, x):
                rows.append({"model": name, "bits": bits, "method": each, "images": images, **row})
            print(f"{name} {each}: done", flush=True)
    table = pd.DataFrame(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, index=False, float_format="%.4g")
    for name in backbone:
        for which in ("own", "streamed"):
            means = table[table.model == name].pivot_table(index="kind", columns="method", values=which, sort=False)
            print(f"\n{name}, {bits}, mean relative squared error, {which}\n{means[method].round(3).to_string()}")


if __name__ == "__main__":
    main(app)
