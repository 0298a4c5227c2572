"""Error of every layer, method beside method: `python -m tasks.studies.errors --backbone deit_t --bits W3A3`.

For each layer of a quantized backbone the relative squared error of its output, ‖y_q - y‖² / ‖y‖² over 32 validation
scenes, y from the full-precision model: "own" with the inputs of its block (patch embedding, block, patch merging or
head) from the full-precision model, so that errors begin anew at each block; "streamed" in the quantized model as it
runs. A table of means by kind of layer is printed, and every layer goes to a CSV file, which is drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

import iasvit
from iasvit.cli import main
from iasvit.inspection import layer_errors, with_same_names
from iasvit.methods import method_options
from tasks.classification.data import MiniImages
from tasks.mini import zoo
from tasks.mini.observation import scene_images
from tasks.studies import plots

app = typer.Typer(add_completion=False)
METHODS = ["base_ptq", "minmax", "ptq4vit", "repq_vit", "ias_vit"]
SETTINGS = {"iterations": 200, "batch_size": 16, "lr": 1e-3}  # the mini profile's


@app.command()
def errors(
    backbone: Annotated[list[str], typer.Option(help="Repeatable. A mini backbone.")] = ["deit_t", "swin_t"],  # noqa: B006
    method: Annotated[list[str], typer.Option(help="Repeatable.")] = METHODS,
    bits: str = "W3A3",
    images: Annotated[int, typer.Option(help="Number of validation images.")] = 32,
    calib_size: int = 256,
    device: str = "cpu",
    out: Annotated[Path, typer.Option(help="CSV file. Plots go to the folder plots beside it.")] = Path(
        "results/mini_errors.csv"
    ),
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
    plots.draw(out, "layer-errors", plots.layer_errors, "error by layer")
    for name in backbone:
        for which in ("own", "streamed"):
            means = table[table.model == name].pivot_table(index="kind", columns="method", values=which, sort=False)
            print(f"\n{name}, {bits}, mean relative squared error, {which}\n{means[method].round(3).to_string()}")


if __name__ == "__main__":
    main(app)
