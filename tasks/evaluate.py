"""`iasvit evaluate FILE`: what a saved model scores, beside the full-precision model that it was made from."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from iasvit.benchmark.evaluation import evaluate_file
from iasvit.benchmark.task import Task
from iasvit.cli import main, make_app
from iasvit.errors import IasvitError
from iasvit.progress import Progress
from tasks.command import make_device, print_logs

app = make_app()


class Kind(str, Enum):
    """The tasks."""

    imagenet = "imagenet"
    coco = "coco"


@app.command()
def evaluate(
    file: Annotated[Path, typer.Argument(help="A file that iasvit.save or run --save wrote.")],
    model: Annotated[str, typer.Option(help="The full-precision model: deit_t, mask_rcnn_swin_t and so on.")],
    task: Annotated[Kind, typer.Option(help="The task to measure it on.")] = Kind.imagenet,
    data: Annotated[str, typer.Option(help="The data set, as for iasvit run TASK.")] = "mini",
    data_root: Annotated[Path | None, typer.Option(help="Folder with the data, as for iasvit run TASK.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="The full-precision model's weights.")] = None,
    pretrained: Annotated[
        bool, typer.Option(help="Use trained weights for the full-precision model, or random ones.")
    ] = True,
    limit: Annotated[int | None, typer.Option(help="Evaluate this many images only.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1. [default: cuda if there is one, else cpu]")
    ] = None,
) -> None:
    """Print every metric of a saved model, beside those of its full-precision model. No row is stored."""
    print_logs()
    measured = _task(task, data, data_root, checkpoint, pretrained, limit, device)
    result = evaluate_file(measured, file, model, Progress(model, quiet=False))
    made = result.quantization
    print(f"{file}: {model} {made.method} {made.spec}, {measured.split_size} images of {measured.data.name}\n")
    print(result.table(measured.scored))


def _task(
    kind: Kind,
    data: str,
    data_root: Path | None,
    checkpoint: Path | None,
    pretrained: bool,
    limit: int | None,
    device: str | None,
) -> Task:
    """The task of this kind on a data set; IasvitError for one that it does not know."""
    options = {"checkpoint": checkpoint, "pretrained": pretrained, "limit": limit, "device": make_device(device)}
    if kind is Kind.imagenet:
        from tasks.classification.setup import make_setup
        from tasks.imagenet import ImageNetTask

        return ImageNetTask(make_setup(data, data_root, **options))
    from tasks.coco import CocoTask
    from tasks.detection import setup

    known = [each.value for each in setup.Data]
    if data not in known:
        raise IasvitError(f"--data {data} is not known; there are {', '.join(known)}")
    return CocoTask(setup.make_setup(setup.Data(data), data_root, **options))


if __name__ == "__main__":
    main(app)
