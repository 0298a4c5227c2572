"""What post-softmax quantizers alone cost, on any model of the ImageNet task: `python -m tasks.studies.softmax`.

Everything stays in full precision but the attention maps, which pass through one kind of quantizer, calibrated on the
first images. Beside the quantizers stands a row "noise" that no quantizer takes part in: every value times 2^u, u
uniform in [-1/2, 1/2], which is the rounding that grids of one level an octave (log2, SULQ) do to any value at any
bit-width. What it costs is the model's doing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from torch import Tensor, nn

from iasvit.blockwise.output_search import search_bases
from iasvit.calibration import calibrate_inputs, calibration_store, enabled
from iasvit.cli import main, make_app
from iasvit.errors import IasvitError, reason
from iasvit.files import replacing
from iasvit.models import Site, insert_quantizers
from iasvit.nn import quantizers_of
from iasvit.progress import Progress
from iasvit.quantizers import SOFTMAX_QUANTIZERS, AdaLogQuantizer, Quantizer, UniformQuantizer
from iasvit.spec import QuantSpec
from tasks.classification.setup import find_source, make_setup
from tasks.command import at_least, check_models, make_device, print_logs, unique
from tasks.imagenet import ImageNetTask

METRICS = ("top1", "agreement", "cosine")
NOISE = "noise"
BY_OUTPUT = "adalog_by_output"  # AdaLog whose scale and base are chosen by the error of A·V, as in `unison`

app = make_app()


class OctaveNoise(nn.Module):
    """x·2^u with u uniform in [-1/2, 1/2]."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        """x disturbed, of x's shape."""
        return x * torch.rand(x.shape, generator=self.generator).to(x.device).sub_(0.5).exp2_()


@torch.no_grad()
def with_softmax_quantizer(model: nn.Module, images: Tensor, kind: str, n_bits: int) -> nn.Module:
    """A copy of the model whose attention maps alone are quantized.

    Args:
        model: full precision.
        images: float32 n×3×H×W, to calibrate on.
        kind: a name in `SOFTMAX_QUANTIZERS`, BY_OUTPUT, or NOISE.
        n_bits: of a code; NOISE has none.
    """
    makers: dict[str, Callable[[int], Quantizer]] = {
        **SOFTMAX_QUANTIZERS,
        BY_OUTPUT: AdaLogQuantizer,
        NOISE: UniformQuantizer,
    }

    def activation(site: Site) -> Quantizer:
        return (makers[kind] if site.role == "softmax" else UniformQuantizer)(site.n_bits)

    quantized = insert_quantizers(
        copy.deepcopy(model), QuantSpec(n_bits, n_bits), lambda site: UniformQuantizer(site.n_bits), activation
    )
    for weights in (True, False):
        for _, quantizer in quantizers_of(quantized, weights=weights):
            quantizer.enabled = False
    products = [(n, m.matmul_av) for n, m in quantized.named_modules() if hasattr(m, "matmul_av")]
    if kind == NOISE:
        for _, product in products:
            product.left_quantizer = OctaveNoise()
    else:
        maps = [(f"{name}.matmul_av.left_quantizer", product.left_quantizer) for name, product in products]
        with enabled(maps, False):
            calibrate_inputs(maps, lambda: quantized(images))
        if kind == BY_OUTPUT:
            search_bases(quantized, calibration_store(images, images.device), len(images), None)
        for _, quantizer in maps:
            quantizer.enabled = True
    return quantized.eval()


def variants(n_bits: list[int]) -> Iterator[tuple[str, int]]:
    """(kind, bits) of all rows but that of full precision."""
    yield NOISE, 8
    for bits in n_bits:
        for kind in (*SOFTMAX_QUANTIZERS, BY_OUTPUT):
            yield kind, bits


@app.command(help=__doc__.partition("\n")[0])
def softmax(
    backbone: Annotated[
        list[str] | None, typer.Option(help="Repeatable. [default: as tasks/imagenet.py]", show_default=False)
    ] = None,
    n_bits: Annotated[list[int], typer.Option(help="Repeatable. Bits of a code.")] = [3, 4, 6],  # noqa: B006
    data: Annotated[str, typer.Option(help="As tasks/imagenet.py.")] = "mini",
    data_root: Annotated[Path | None, typer.Option(help="As tasks/imagenet.py.", show_default=False)] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="As tasks/imagenet.py.", show_default=False)] = None,
    calib_size: Annotated[int, typer.Option(help="Number of calibration images.")] = 32,
    limit: Annotated[int | None, typer.Option(help="Evaluate this many images only.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: cuda if there is one, else cpu]")] = None,
    out: Annotated[Path, typer.Option(help="CSV file to write.")] = Path("results/softmax.csv"),
) -> None:
    """A row (model, quantizer, n_bits, images, top1, agreement, cosine) for each quantizer."""
    print_logs()
    at_least("--calib-size", calib_size, 1)
    names = unique(backbone or find_source(data).profile.models)
    task = ImageNetTask(make_setup(data, data_root, checkpoint=checkpoint, device=make_device(device), limit=limit))
    check_models(task.models, names, [QuantSpec(bits, bits) for bits in n_bits])
    task.images.check_calibration(calib_size)
    rows = []
    for name in names:
        model = task.load_model(name)
        images = task.calibration(name, calib_size, seed=0).to(task.device)
        reference = task.predict(name, model, Progress())

        def add(kind: str, bits: int | None, network: nn.Module, name: str = name, full=reference) -> None:
            scores = task.score(task.predict(name, network, Progress()), full)
            kept = {metric: round(scores[metric], 4) for metric in METRICS}
            rows.append({"model": name, "quantizer": kind, "n_bits": bits, "images": len(task.images), **kept})
            print(f"{name} {kind:14s} {bits or '':2} " + " ".join(f"{k} {v:.2f}" for k, v in kept.items()), flush=True)

        add("full precision", None, model)
        for kind, bits in variants(unique(n_bits)):
            add(kind, None if kind == NOISE else bits, with_softmax_quantizer(model, images, kind, bits))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            pd.DataFrame(rows).astype({"n_bits": "Int64"}).to_csv(temporary, index=False)
    except OSError as error:
        raise IasvitError(f"--out {out} cannot be written: {reason(error)}") from None


if __name__ == "__main__":
    main(app)
