"""Whether an exported file gives the model's number: `python -m tasks.studies.exported --backbone deit_t --bits W4A4`.

Each cell is quantized as `iasvit run imagenet` does it, exported, and run beside the model on the whole split. A row
has the agreement of their answers, and beside it `agreement_moved`: the model's with itself where each pixel is moved
to the next float. Of the first `code_images` it counts the codes of all quantizers in both, and those that differ, at a
tie of rounding or not; where one differs the model goes on with the file's, and `agreement_same_codes` is how often the
two then answer alike. With `--precision float64` both compute in double precision instead, each goes on with its own
codes, and all codes of all images are compared. Rows go to a CSV file as they come, and what is there is skipped;
several processes may write to one. docs/deploy.md says how to read them.
"""

from __future__ import annotations

import csv
import fcntl
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import iasvit
import iasvit.methods
from iasvit.benchmark.harness import Cell, make_method
from iasvit.benchmark.provenance import describe_device
from iasvit.cli import main, make_app
from iasvit.errors import IasvitError, shown
from iasvit.export import ExportedModel
from iasvit.export.compare import Comparison
from iasvit.progress import Progress
from iasvit.spec import QuantSpec
from tasks.imagenet import ImageNetTask

app = make_app()
CODES_AT_ONCE = 25  # images; codes and values of all quantizers are held
KEY = ("data", "images", "model", "method", "spec", "target", "calib_size", "options")


def quantized(task: ImageNetTask, cell: Cell) -> nn.Module:
    """The cell's model, as `iasvit run imagenet` quantizes it."""
    network = task.load_model(cell.model)
    images = task.calibration(cell.model, cell.calib_size, cell.seed)
    torch.manual_seed(cell.seed)
    return iasvit.quantize(network, images, QuantSpec.parse(cell.spec), make_method(cell), progress=Progress())


def compared(task: ImageNetTask, cell: Cell, model: nn.Module, target: str, codes: int) -> dict[str, Any]:
    """The row of a cell; codes are compared in the first `codes` images, answers in all."""
    comparison = Comparison(model, target)
    backend = "openvino" if target == "openvino" else "onnxruntime"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        iasvit.export_onnx(model, path, target=target)
        exported = ExportedModel(path, backend)
    right, agree, agree_moved, largest, count = [0, 0], 0, 0, 0.0, 0
    same, largest_same, coded = 0, 0.0, 0
    for batch, labels, _ in task.images.batches(task.models.config(cell.model)):
        for part in batch[: codes - coded].split(CODES_AT_ONCE) if coded < codes else ():
            (a,), (b,) = comparison.run(part)
            same += int((a.argmax(dim=1) == b.argmax(dim=1)).sum())
            largest_same = max(largest_same, (a - b).abs().max().item())
            coded += len(part)
        with torch.inference_mode():
            mine, theirs = model(batch), exported(batch)
            moved = model(torch.nextafter(batch, torch.full_like(batch, torch.inf)))
        right, agree = _counted(task, mine, theirs, labels, right, agree)
        agree_moved += int((mine.argmax(dim=1) == moved.argmax(dim=1)).sum())
        largest = max(largest, (mine - theirs).abs().max().item())
        count += len(batch)
    found = comparison.differences.values()
    return {
        **key(task, cell, target),
        "top1": round(100 * right[0] / count, 2),
        "top1_exported": round(100 * right[1] / count, 2),
        "agreement": round(100 * agree / count, 3),
        "agreement_moved": round(100 * agree_moved / count, 3),
        "largest_difference": f"{largest:.3g}",
        "code_images": coded,
        "codes": sum(each.codes for each in found),
        "ties": sum(each.ties for each in found),
        "no_ties": sum(each.others for each in found),
        "agreement_same_codes": round(100 * same / max(1, coded), 3),
        "largest_difference_same_codes": f"{largest_same:.3g}",
        "layers_with_ties": " ".join(f"{each.path}:{each.ties}" for each in found if each.ties),
        "on_integers": f"{sum(form == 'int8' for form in comparison.forms.values())}/{len(comparison.forms)}",
        "device": describe_device(torch.device("cpu")),
    }


def compared_in_double(task: ImageNetTask, cell: Cell, model: nn.Module) -> dict[str, Any]:
    """The row of a cell in float64: answers and codes of all images, where each side goes on with its own."""
    comparison = Comparison(model, double=True)
    right, agree, largest, count = [0, 0], 0, 0.0, 0
    start = time.perf_counter()
    for batch, labels, _ in task.images.batches(task.models.config(cell.model)):
        parts = [comparison.run(part) for part in batch.split(CODES_AT_ONCE)]
        mine, theirs = (torch.cat([outputs[0] for outputs in side]) for side in zip(*parts, strict=True))
        right, agree = _counted(task, mine, theirs, labels, right, agree)
        largest = max(largest, (mine - theirs).abs().max().item())
        count += len(batch)
    seconds = time.perf_counter() - start
    found = comparison.differences.values()
    return {
        **key(task, cell, "onnx"),
        "top1": round(100 * right[0] / count, 2),
        "top1_exported": round(100 * right[1] / count, 2),
        "agreement": round(100 * agree / count, 3),
        "largest_difference": f"{largest:.3g}",
        "codes": sum(each.codes for each in found),
        "ties": sum(each.ties for each in found),
        "no_ties": sum(each.others for each in found),
        "layers_that_differ": " ".join(
            f"{each.path}:{each.ties + each.others}" for each in found if each.ties + each.others
        ),
        "on_integers": f"{sum(form == 'int8' for form in comparison.forms.values())}/{len(comparison.forms)}",
        "images_per_second": round(count / seconds, 2),
        "device": describe_device(torch.device("cpu")),
    }


def _counted(
    task: ImageNetTask, mine: torch.Tensor, theirs: torch.Tensor, labels: torch.Tensor, right: list[int], agree: int
) -> tuple[list[int], int]:
    """How many answers of each are right, and on how many they agree, with those of a batch added."""
    remap = (task.images.num_classes or {}).get(mine.shape[1])
    labels = labels if remap is None else remap[labels]
    tops = mine.argmax(dim=1), theirs.argmax(dim=1)
    right = [total + int((top == labels).sum()) for total, top in zip(right, tops, strict=True)]
    return right, agree + int((tops[0] == tops[1]).sum())


def key(task: ImageNetTask, cell: Cell, target: str) -> dict[str, Any]:
    """What tells a row from others."""
    options = " ".join(f"{name}={value}" for name, value in cell.options)
    own = (cell.model, cell.method, cell.spec, target, cell.calib_size, options)
    return dict(zip(KEY, (task.data.name, task.split_size, *own), strict=True))


def stored(path: Path) -> set[tuple[str, ...]]:
    """Keys of the rows that a CSV file has."""
    if not path.exists():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        return {tuple(row.get(name) or "" for name in KEY) for row in csv.DictReader(file)}


@app.command()
def exported(
    backbone: Annotated[list[str], typer.Option(help="Repeatable.")],
    bits: Annotated[list[str], typer.Option(help="Repeatable.")],
    method: Annotated[list[str], typer.Option(help="Repeatable.")],
    data: Annotated[str, typer.Option(help="The data set, as for iasvit run imagenet.")] = "mini",
    data_root: Annotated[Path | None, typer.Option(help="Folder with the data.")] = None,
    data_name: Annotated[str | None, typer.Option(help="With --data folder: the data set's name in rows.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of the model.")] = None,
    calib_size: Annotated[int | None, typer.Option(help="Number of calibration images.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Repeatable; NAME=VALUE, for methods that take it.")] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate this many images only.")] = None,
    saved: Annotated[
        Path | None,
        typer.Option(help="The saved model of the one cell (iasvit run --save), in place of quantizing again."),
    ] = None,
    target: Annotated[str, typer.Option(help="As for iasvit export.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="Of floats: float32, or float64 on both sides.")] = "float32",
    codes: Annotated[
        int, typer.Option(help="Number of images whose codes are compared. This takes memory and time.")
    ] = 100,
    threads: Annotated[int, typer.Option(help="Threads of torch and of the runtime.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="CSV file to append to; results/exported/equality.csv, or equality_float64.csv."),
    ] = None,
) -> None:
    """Compare the codes and outputs of exported files with the models'."""
    if precision not in ("float32", "float64"):
        raise IasvitError(f"--precision {shown(precision)} is not known; there are float32 and float64")
    double = precision == "float64"
    if double and target == "openvino":
        raise IasvitError("--precision float64 runs in ONNX Runtime; leave --target out")
    target = "onnx" if double else target
    torch.set_num_threads(threads)
    out = out or Path(f"results/exported/equality{'_float64' if double else ''}.csv")
    if saved is not None and len(backbone) * len(bits) * len(method) > 1:
        raise IasvitError("--saved is one model; name one --backbone, one --bits and one --method")
    taken = {name for each in method for name in iasvit.methods.method_options(each)}
    for text in option or []:
        if text.partition("=")[0] not in taken:
            raise IasvitError(f"--option {text}: none of these methods takes it; they take {', '.join(sorted(taken))}")
    for name in method:
        takes = [text for text in option or [] if text.partition("=")[0] in iasvit.methods.method_options(name)]
        task, cells = ImageNetTask.grid(
            bits=bits,
            seed=[0],
            backbone=backbone,
            method=[name],
            data=data,
            data_root=data_root,
            data_name=data_name,
            checkpoint=checkpoint,
            calib_size=calib_size,
            option=takes,
            device="cpu",
            limit=limit,
        )
        for cell in cells:
            if tuple(str(value) for value in key(task, cell, target).values()) in stored(out):
                continue
            model = quantized(task, cell) if saved is None else iasvit.load(saved)
            row = compared_in_double(task, cell, model) if double else compared(task, cell, model, target, codes)
            print(row, flush=True)
            append(out, row)


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, to which other processes may add theirs; the first one brings the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        writer = csv.DictWriter(file, list(row))
        if not path.stat().st_size:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main(app)
