"""`iasvit inspect CHECKPOINT|BACKBONE`: what each layer's quantizers are given, and what they make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from torch import Tensor, nn

import iasvit
from iasvit.benchmark.results import check_writable
from iasvit.cli import main, make_app
from iasvit.errors import IasvitError
from iasvit.inspection import layer_errors, quantizer_table, with_same_names
from iasvit.leaderboard.plots import inspection
from iasvit.methods import method_options
from iasvit.spec import QuantSpec
from tasks.classification.setup import find_source, make_setup
from tasks.command import at_least, make_cells, make_device, parse_options, print_logs
from tasks.imagenet import ImageNetTask

app = make_app()


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(help="A saved model, or a backbone to quantize first.")],
    data: Annotated[str, typer.Option(help="Data set whose images are looked at.")] = "mini",
    data_root: Annotated[Path | None, typer.Option(help="Folder with the data.")] = None,
    pretrained: Annotated[
        bool, typer.Option(help="If TARGET is a backbone: use trained weights, or random ones.")
    ] = True,
    bits: Annotated[str, typer.Option(help="If TARGET is a backbone: its bits.")] = "W4A4",
    method: Annotated[str, typer.Option(help="If TARGET is a backbone: the method.")] = "minmax",
    iterations: Annotated[int | None, typer.Option(help="Learning steps of a method that learns.")] = None,
    images: Annotated[int, typer.Option(help="Number of images to look at; a backbone is calibrated on as many.")] = 32,
    seed: int = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the table (CSV) and the plot (SVG).")] = None,
) -> None:
    """Print ranges, channel spread, attention tail, quantizer, bits and error of every layer."""
    print_logs()
    at_least("--images", images, 1)
    path = Path(target)
    stem = f"inspect-{path.stem}"
    if out is not None:
        check_writable(out / f"{stem}.csv", out)
    spec = QuantSpec.parse(bits)
    given = parse_options([], {"iterations": iterations})
    options = make_cells([target], [spec], [method], [seed], images, find_source(data).profile, given)[0].options
    task = ImageNetTask(
        make_setup(
            data, data_root, pretrained=pretrained, device=make_device(device), labels=not find_source(data).own_name
        )
    )
    if path.suffix == ".safetensors" or path.is_file():
        quantized = iasvit.load(path).to(task.device)
        x = _images_for(task, quantized, images, seed).to(task.device)
        table = quantizer_table(quantized, x)
        made = quantized.quantization
        title = f"{path.name}: {made.method} at {made.spec}"
    else:
        model = task.load_model(target)
        x = task.calibration(target, images, seed).to(task.device)
        seeded = {"seed": seed} if "seed" in method_options(method) else {}
        quantized = iasvit.quantize(model, x, spec, method, **dict(options), **seeded)
        errors = pd.DataFrame(layer_errors(with_same_names(model), quantized, x))
        errors = errors[errors["kind"] != "block"].rename(columns={"own": "output_error", "streamed": "error_streamed"})
        table = quantizer_table(quantized, x).merge(errors.drop(columns="kind"), how="left", on="layer")
        title = f"{target}: {method} at {bits}"
    print(f"{title}, {images} images of {data}\n")
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep=""))
    if out is not None:
        table.to_csv(out / f"{stem}.csv", index=False, float_format="%.6g")
        (out / f"{stem}.svg").write_text(inspection(table, title), encoding="utf-8")
        print(f"\n{out / f'{stem}.csv'}\n{out / f'{stem}.svg'}")


def _images_for(task: ImageNetTask, quantized: nn.Module, count: int, seed: int) -> Tensor:
    """Calibration images as the quantized model takes them.

    Raises:
        IasvitError: they are of another size than the model's.
    """
    config = quantized.quantization.data
    x = task.images.calibration(config, count, seed)
    expected = torch.Size(config["input_size"])
    if x.shape[1:] != expected:
        raise IasvitError(
            f"the checkpoint's model takes images {'×'.join(map(str, expected))}, but those of --data {task.data.name} "
            f"are {'×'.join(map(str, x.shape[1:]))}; choose the data set that it was made for"
        )
    return x


if __name__ == "__main__":
    main(app)
