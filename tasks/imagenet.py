"""ImageNet classification: `iasvit run imagenet`, or `python tasks/imagenet.py`.

Without a data set, a GPU or a network it runs the embedded mini benchmark; with `--data imagenet` it is the papers'
task on timm's models. See --help.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import torch
import typer
from torch import Tensor, nn

from iasvit.benchmark.estimate import estimate, format_estimates
from iasvit.benchmark.harness import exit_status, run_cells
from iasvit.benchmark.results import ResultStore
from iasvit.benchmark.task import EMBEDDED, DataSet, Metric, Task
from iasvit.cli import main, make_app
from iasvit.errors import IasvitError
from iasvit.leaderboard.aggregate import table
from iasvit.methods import list_methods
from iasvit.progress import Progress, fingerprint
from iasvit.spec import QuantSpec
from tasks.classification.data import (
    MINI_BATCH,
    MINI_BATCH_GPU,
    FolderImages,
    ImagenetteImages,
    Images,
    MiniImages,
)
from tasks.classification.folders import AnyFolderImages, folder_dataset
from tasks.classification.metrics import UNLABELLED_METRICS, Predictions, classification_scores
from tasks.classification.models import MiniModels, Models, TimmModels
from tasks.command import at_least, check_models, make_cells, make_device, parse_options, unique

DATA_ROOT = "IASVIT_IMAGENET"
T = TypeVar("T")


class Data(str, Enum):
    """The data sets."""

    mini = "mini"
    mini_hard = "mini-hard"
    imagenette = "imagenette"
    imagenet = "imagenet"
    folder = "folder"

    @property
    def embedded(self) -> bool:
        """Whether it needs nothing but this repository."""
        return self in (Data.mini, Data.mini_hard)


# Names that a folder cannot have: of the other data sets, and of the tables of published values.
RESERVED = (*(data.value for data in Data if data is not Data.folder), "published")


@dataclass(frozen=True)
class Profile:
    """What a run does unless told otherwise.

    Attributes:
        backbones: by default.
        calib_size: calibration images.
        batch_size: images a reconstruction step.
        iterations: reconstruction steps of a block and stage, below 6 bits.
        iterations_6_bits: the same from 6 bits on.
        lr: of reconstruction.
    """

    backbones: tuple[str, ...]
    calib_size: int
    batch_size: int
    iterations: int
    iterations_6_bits: int
    lr: float

    def options(self, spec: QuantSpec) -> dict[str, Any]:
        """Options for methods that reconstruct, at these bits."""
        low = min(spec.w_bits, spec.a_bits) < 6
        iterations = self.iterations if low else self.iterations_6_bits
        return {"iterations": iterations, "batch_size": self.batch_size, "lr": self.lr}


PAPER = Profile(("deit_s",), calib_size=1024, batch_size=64, iterations=1000, iterations_6_bits=200, lr=4e-5)
MINI = Profile(("deit_t", "swin_t"), calib_size=256, batch_size=16, iterations=200, iterations_6_bits=200, lr=1e-3)


class ImageNetTask(Task):
    """Image classification for the harness (see `iasvit.benchmark.task.Task`).

    Args:
        dataset: its name in result rows.
        images: what is evaluated and calibrated on.
        models: where full-precision models come from.
        device: where they run.
    """

    name = "imagenet"
    metrics = (
        Metric("top1", primary=True, standard_error="top1_se"),
        Metric("top1_se"),
        Metric("top5", standard_error="top5_se"),
        Metric("top5_se"),
        Metric("agreement"),
        Metric("cosine", digits=4),
        Metric("unreadable", digits=0, higher_is_better=False, counts=True),
    )
    data_sets: ClassVar[dict[str, DataSet]] = {
        "mini": DataSet("mini", EMBEDDED, "the embedded mini benchmark (drawn scenes, small models), not on real data"),
        "mini-hard": DataSet(
            "mini-hard",
            EMBEDDED,
            "mini-hard, the embedded benchmark's stress variant (a real ViT's channel spread transplanted)",
        ),
    }

    def __init__(self, dataset: str, images: Images, models: Models, device: torch.device) -> None:
        self.data = self.data_sets.get(dataset, DataSet(dataset))
        self.images = images
        self.models = models
        self.device = device

    @property
    def scored(self) -> tuple[Metric, ...]:
        """See `iasvit.benchmark.task.Task`."""
        unlabelled = self.images.num_classes is None
        return tuple(metric for metric in self.metrics if not unlabelled or metric.name in UNLABELLED_METRICS)

    @classmethod
    def command(cls) -> typer.Typer:
        """See `iasvit.benchmark.task.Task`."""
        return app

    def data_fingerprint(self) -> str:
        """See `iasvit.benchmark.task.Task`."""
        return fingerprint(self.data.name, len(self.images))

    @property
    def split_size(self) -> int:
        """Images evaluated, unreadable ones included."""
        return len(self.images)

    def load_model(self, model: str) -> nn.Module:
        """See `iasvit.benchmark.task.Task`.

        Raises:
            IasvitError: the model cannot be had, or its classes are not the data's.
        """
        network = self.models.load(model)
        self.check_classes(model, network)
        self.images.prepare()
        return network.to(self.device)

    def check_classes(self, model: str, network: nn.Module) -> None:
        """Raise IasvitError where the network's classes are not the data's, or it has none."""
        allowed = self.images.num_classes
        if allowed is None and network.num_classes == 0:
            raise IasvitError(f"backbone {model!r} has no classifier, so that there are no answers to compare")
        if allowed is not None and network.num_classes not in allowed:
            counts = " or ".join(str(count) for count in allowed)
            without = ", or leave labels out with --no-labels" if isinstance(self.images, AnyFolderImages) else ""
            raise IasvitError(
                f"backbone {model!r} has {network.num_classes} classes, but the labels of {self.data.name} are of "
                f"{counts}; choose a model or weights with as many{without}"
            )

    def weights(self, model: str) -> str:
        """See `iasvit.benchmark.task.Task`."""
        return self.models.weights(model)

    def calibration(self, model: str, n: int, seed: int) -> Tensor:
        """See `iasvit.benchmark.task.Task`."""
        return self.images.calibration(self.models.config(model), n, seed)

    def predict(self, model: str, network: nn.Module, progress: Progress) -> Predictions:
        """See `iasvit.benchmark.task.Task`."""

        def answers() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            with progress.phase("evaluation", len(self.images)) as bar:
                for images, labels, positions in self.images.batches(self.models.config(model)):
                    logits = network(images.to(self.device, non_blocking=True))
                    remap = (self.images.num_classes or {}).get(logits.shape[1])
                    yield logits, labels if remap is None else remap[labels], positions
                    bar.update(len(images))

        with torch.inference_mode():
            return Predictions.collect(answers(), len(self.images))

    def score(self, predictions: Predictions, reference: Predictions) -> dict[str, float]:
        """See `iasvit.benchmark.task.Task`."""
        scores = classification_scores(predictions, reference)
        return {metric.name: scores[metric.name] for metric in self.scored}


def make_task(
    data: Data,
    data_root: Path | None = None,
    *,
    checkpoint: Path | None = None,
    pretrained: bool = True,
    device: torch.device | None = None,
    limit: int | None = None,
    data_name: str | None = None,
    labels: bool = True,
    img_size: int | None = None,
) -> ImageNetTask:
    """The task on a data set.

    Args:
        data: which.
        data_root: folder of imagenet (IASVIT_IMAGENET by default) or folder, or where imagenette lies or is downloaded
            to.
        checkpoint: weights from this file.
        pretrained: otherwise trained weights, or random ones.
        device: None for the CPU.
        limit: evaluate only so many images.
        data_name: the data set's name in rows, of a folder; None for the folder's own.
        labels: of a folder; without, only what needs none is measured.
        img_size: see `TimmModels`.

    Raises:
        IasvitError: data that is not there, or holds nothing that can be evaluated; an argument of other data.
    """
    device = device or torch.device("cpu")
    if data is not Data.folder and (data_name is not None or not labels):
        option = "--no-labels" if data_name is None else "--data-name"
        raise IasvitError(f"{option} does not go with --data {data.value}; --data folder takes it")
    dataset, images, models = data.value, None, TimmModels(pretrained, checkpoint, img_size)
    pin_memory = device.type == "cuda"
    if data.embedded:
        if data_root is not None:
            raise IasvitError(
                f"--data-root does not go with --data {data.value}; --data imagenet and --data folder read a folder"
            )
        if img_size is not None:
            raise IasvitError(f"--img-size does not go with --data {data.value}, whose images are of one size")
        models = MiniModels(data is Data.mini_hard, pretrained, checkpoint)
        images = MiniImages(limit, MINI_BATCH_GPU if device.type == "cuda" else MINI_BATCH)
    elif data is Data.imagenette:
        images = ImagenetteImages(data_root or Path(torch.hub.get_dir()) / "iasvit", limit, pin_memory)
    elif data is Data.imagenet:
        root = data_root or (Path(os.environ[DATA_ROOT]) if os.environ.get(DATA_ROOT) else None)
        if root is None:
            raise IasvitError(
                f"--data imagenet needs a folder: give --data-root FOLDER or set {DATA_ROOT} to one that holds "
                f"train/ and val/"
            )
        images = FolderImages(root, limit, pin_memory)
    else:
        if data_root is None:
            raise IasvitError("--data folder needs a folder of images: give --data-root FOLDER")
        dataset = folder_dataset(data_root, data_name, labels, RESERVED)
        images = AnyFolderImages(data_root, limit, pin_memory, labels=labels)
    return ImageNetTask(dataset, images, models, device)


app = make_app()


@app.command()
def imagenet(
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeatable. vit_s vit_b deit_t deit_s deit_b swin_t swin_s swin_b, or with real data any timm name. "
            "[default: deit_t and swin_t for mini, deit_s for real data]",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[list[str], typer.Option(help='Repeatable; "W4A8", also "W3A3,head=W8A8".')] = ["W3A3"],  # noqa: B006
    method: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable; also a variant as ias_vit[-sulq]. [default: all]", show_default=False),
    ] = None,
    data: Annotated[
        Data,
        typer.Option(
            help="mini and mini-hard are embedded; imagenette downloads 99 MB; folder: any, with a folder a class."
        ),
    ] = Data.mini,
    data_root: Annotated[
        Path | None,
        typer.Option(
            help=f"Folder that holds ImageNet's train/ and val/ [default: ${DATA_ROOT}], or where Imagenette goes. Of "
            "--data folder: val/ is evaluated and train/, a tree of any names, calibrated on. With one of them, or "
            "class folders alone, a fifth of each class, drawn by a fixed seed, is calibrated on, the rest evaluated.",
            show_default=False,
        ),
    ] = None,
    data_name: Annotated[
        str | None,
        typer.Option(help="Of --data folder: the data set's name in rows. [default: the folder's]", show_default=False),
    ] = None,
    labels: Annotated[
        bool,
        typer.Option(help="Of --data folder: without, any images and classes; agreement and cosine alone."),
    ] = True,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The backbone's weights: safetensors, or torch.save's of tensors.")
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Trained weights, or random ones of a fixed seed.")] = True,
    img_size: Annotated[
        int | None,
        typer.Option(
            help="Pixels a side of timm's model. [default: those of --checkpoint's position embedding, else timm's]",
            show_default=False,
        ),
    ] = None,
    calib_size: Annotated[
        int | None, typer.Option(help=f"Calibration images. [{MINI.calib_size} mini, {PAPER.calib_size} real]")
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            help=f"Steps a block and stage. [{MINI.iterations} mini; real {PAPER.iterations}, "
            f"from 6 bits on {PAPER.iterations_6_bits}]"
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help=f"Images a step. [{MINI.batch_size} mini, {PAPER.batch_size} real]")
    ] = None,
    lr: Annotated[float | None, typer.Option(help=f"Learning rate. [{MINI.lr:g} mini, {PAPER.lr:g} real]")] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            help="Repeatable; NAME=VALUE, any other option of the methods, as autocast=true.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[list[int], typer.Option(help="Repeatable; of calibration images and method.")] = [0],  # noqa: B006
    device: Annotated[str | None, typer.Option(help="[cuda where there is one, else cpu]")] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate only so many images.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and their estimated cost.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Measure also cells that are stored.")] = False,
    results: Annotated[Path, typer.Option(help="Folder for the rows.")] = Path("results/runs"),
) -> None:
    """Quantize and evaluate classification models: every backbone at all bits by every method with all seeds.

    Rows go to a CSV file as cells are done; a cell that is stored already is skipped, an interrupted one goes on.
    """
    profile = MINI if data.embedded else PAPER
    for option, value, least in (
        ("--calib-size", calib_size, 1),
        ("--batch-size", batch_size, 1),
        ("--iterations", iterations, 0),
        ("--seed", min(seed), 0),
        ("--img-size", img_size, 1),
    ):
        at_least(option, value, least)
    given = {"iterations": iterations, "batch_size": batch_size, "lr": lr}
    backbones, specs = unique(backbone or profile.backbones), unique([QuantSpec.parse(text) for text in bits])
    cells = make_cells(
        backbones,
        specs,
        unique(method or list_methods()),
        unique(seed),
        calib_size or profile.calib_size,
        profile,
        {name: value for name, value in given.items() if value is not None} | parse_options(options or []),
    )
    if checkpoint is not None and len(backbones) > 1:
        raise IasvitError(
            f"--checkpoint is of one backbone, but {len(backbones)} are asked for: {', '.join(backbones)}"
        )
    task = make_task(
        data,
        data_root,
        checkpoint=checkpoint,
        pretrained=pretrained,
        device=make_device(device),
        limit=limit,
        data_name=data_name,
        labels=labels,
        img_size=img_size,
    )
    check_models(task.models, backbones, specs)
    for name in backbones:
        task.check_classes(name, task.models.architecture(name))
    task.images.check_calibration(cells[0].calib_size)
    store = ResultStore(results)
    if dry_run:
        print(format_estimates(estimate(task, cells, store, force=force)))
        return
    rows = run_cells(task, cells, store, force=force)
    print(
        table(
            rows, [name for name in ("top1", "agreement", "cosine") if name in {metric.name for metric in task.scored}]
        )
    )
    print(f"\nrows: {store.path(task.name, task.data.name)}")
    raise typer.Exit(exit_status(rows))


if __name__ == "__main__":
    main(app)
