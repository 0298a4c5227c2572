"""COCO detection and instance segmentation: `iasvit run coco`, or `python tasks/coco.py`.

Without a data set, a GPU or a network it runs the embedded mini COCO; with `--data coco` it is the papers' task on
mmdet's and the Swin authors' detectors. It needs the extra `coco`. See --help.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from torch import Tensor, nn

from iasvit.benchmark.estimate import estimate, format_estimates
from iasvit.benchmark.harness import exit_status, run_cells
from iasvit.benchmark.results import ResultStore, Row
from iasvit.benchmark.task import EMBEDDED, DataSet, Metric, Task
from iasvit.cli import main, make_app
from iasvit.errors import IasvitError
from iasvit.leaderboard.aggregate import table
from iasvit.methods import list_methods
from iasvit.progress import Progress, fingerprint
from iasvit.spec import QuantSpec
from tasks.command import at_least, check_models, make_cells, make_device, parse_options, unique
from tasks.detection.checkpoints import PUBLISHED
from tasks.detection.data import CocoImages, MiniCocoImages
from tasks.detection.mmdet_setup import prepare
from tasks.detection.models import (
    DETECTORS,
    ConfigDetector,
    Detectors,
    MiniDetectors,
    PublishedDetectors,
    coco_classes,
)
from tasks.mini.scenes import CLASSES

DATA_ROOT = "IASVIT_COCO"
HEADS = ("neck", "rpn_head", "roi_head")
_PARTS = ("", "_50", "_75", "_s", "_m", "_l")
METRICS = tuple(f"{kind}_mAP{part}" for kind in ("bbox", "segm") for part in _PARTS)
PRIMARY = ("bbox_mAP", "segm_mAP")


class Data(str, Enum):
    """The data sets."""

    mini = "mini"
    coco = "coco"


class Backbone(str, Enum):
    """The backbones."""

    swin_t = "swin_t"
    swin_s = "swin_s"
    swin_b = "swin_b"


class Scope(str, Enum):
    """What of a detector is quantized."""

    detector = "detector"
    backbone = "backbone"


@dataclass(frozen=True)
class Profile:
    """What a run does unless told otherwise.

    Attributes:
        calib_size: calibration images.
        init_size: of them, those that quantizers are initialised on.
        batch_size: images a reconstruction step.
        iterations: reconstruction steps of a block and stage, below 6 bits.
        iterations_6_bits: the same from 6 bits on.
        lr: of reconstruction.
    """

    calib_size: int
    init_size: int
    batch_size: int
    iterations: int
    iterations_6_bits: int
    lr: float

    def options(self, spec: QuantSpec) -> dict[str, Any]:
        """Options for methods that take them, at these bits."""
        low = min(spec.w_bits, spec.a_bits) < 6
        iterations = self.iterations if low else self.iterations_6_bits
        return {
            "iterations": iterations,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "init_size": self.init_size,
        }


# Activations of one photograph at 800×1333 are hundreds of megabytes a layer: quantizers start from few of them.
PAPER = Profile(calib_size=256, init_size=4, batch_size=1, iterations=1000, iterations_6_bits=200, lr=4e-5)
MINI = Profile(calib_size=64, init_size=8, batch_size=4, iterations=100, iterations_6_bits=100, lr=1e-3)


class CocoTask(Task):
    """Detection and instance segmentation for the harness (see `iasvit.benchmark.task.Task`).

    Args:
        dataset: its name in result rows.
        images: what is evaluated and calibrated on.
        models: where full-precision detectors come from.
        device: where they run.
    """

    name = "coco"
    metrics = tuple(Metric(name, primary=name in PRIMARY) for name in METRICS)
    data_sets: ClassVar[dict[str, DataSet]] = {
        "mini": DataSet("mini", EMBEDDED, "the embedded mini benchmark (drawn scenes, small models), not on real data")
    }

    def __init__(self, dataset: str, images: CocoImages, models: Detectors, device: torch.device) -> None:
        self.data = self.data_sets.get(dataset, DataSet(dataset))
        self.images = images
        self.models = models
        self.device = device

    @classmethod
    def command(cls) -> typer.Typer:
        """See `iasvit.benchmark.task.Task`."""
        return app

    def data_fingerprint(self) -> str:
        """See `iasvit.benchmark.task.Task`."""
        return fingerprint(self.data.name, len(self.images))

    @property
    def split_size(self) -> int:
        """Images evaluated."""
        return len(self.images)

    def load_model(self, model: str) -> nn.Module:
        """See `iasvit.benchmark.task.Task`.

        Raises:
            IasvitError: the detector cannot be had, or its classes are not the data's categories.
        """
        self.images.check_classes(self.models.config(model).classes)
        return self.models.load(model).to(self.device)

    def weights(self, model: str) -> str:
        """See `iasvit.benchmark.task.Task`."""
        return self.models.weights(model)

    def calibration(self, model: str, n: int, seed: int) -> Tensor | Sequence[Tensor]:
        """See `iasvit.benchmark.task.Task`; images of different sizes come as a sequence of 1×3×H×W."""
        return self.images.calibration(self.models.config(model), n, seed)

    def forward(self, network: nn.Module, images: Tensor) -> Any:
        """See `iasvit.benchmark.task.Task`; mmdet's detectors do not answer images alone."""
        return predict_images(network, images)

    def predict(self, model: str, network: nn.Module, progress: Progress) -> dict[str, float]:
        """See `iasvit.benchmark.task.Task`; the metrics, which mmdet's metric gathers while the images pass."""
        from tasks.detection.runner import evaluate

        dataset = self.images.dataset(self.models.config(model))
        return evaluate(network, dataset, self.images.metric(), progress, self.images.workers)

    def recall(self, row: Row) -> dict[str, float]:
        """See `iasvit.benchmark.task.Task`."""
        return {name: row[name] for name in METRICS}

    def score(self, predictions: dict[str, float], reference: dict[str, float]) -> dict[str, float]:
        """See `iasvit.benchmark.task.Task`."""
        return predictions


def predict_images(network: nn.Module, images: Tensor) -> Any:
    """Boxes, labels, scores and masks of a detector for normalised images (B, 3, H, W), as mmdet's data samples."""
    from mmdet.structures import DetDataSample

    shape = tuple(images.shape[-2:])
    meta = {"img_shape": shape, "ori_shape": shape, "batch_input_shape": shape, "scale_factor": (1.0, 1.0)}
    return network(images, [DetDataSample(metainfo=meta) for _ in images], mode="predict")


def make_task(
    data: Data,
    data_root: Path | None = None,
    *,
    config: Path | None = None,
    checkpoint: Path | None = None,
    pretrained: bool = True,
    device: torch.device | None = None,
    limit: int | None = None,
) -> CocoTask:
    """The task on a data set.

    Args:
        data: which.
        data_root: folder of coco; IASVIT_COCO by default.
        config: the detector of this mmdet configuration, instead of the known ones.
        checkpoint: weights from this file.
        pretrained: otherwise trained weights, or random ones.
        device: None for the CPU.
        limit: evaluate only so many images.

    Raises:
        IasvitError: the coco extra is not installed; data that is not there or is no COCO; a configuration that cannot
            be used.
    """
    prepare()
    if data is Data.mini:
        if data_root is not None:
            raise IasvitError("--data-root does not go with --data mini; --data coco reads a folder")
        images: CocoImages = MiniCocoImages(limit)
    else:
        root = data_root or (Path(os.environ[DATA_ROOT]) if os.environ.get(DATA_ROOT) else None)
        if root is None:
            raise IasvitError(
                f"--data coco needs a folder: give --data-root FOLDER or set {DATA_ROOT} to one that holds "
                f"annotations/ and val2017/"
            )
        images = CocoImages(root, limit)
    models: Detectors
    if config is not None:
        classes = CLASSES if data is Data.mini else coco_classes()
        models = ConfigDetector(config, classes, pretrained, checkpoint)
    else:
        models = (MiniDetectors if data is Data.mini else PublishedDetectors)(pretrained, checkpoint)
    return CocoTask(data.value, images, models, device or torch.device("cpu"))


def model_names(detectors: Sequence[str] | None, backbones: Sequence[Backbone] | None, data: Data) -> list[str]:
    """Detectors on backbones, as "mask_rcnn_swin_t"; a published detector's full name stands for itself.

    Raises:
        IasvitError: an unknown detector, or backbones for detectors that have theirs.
    """
    published = [] if data is Data.mini else [name for name in PUBLISHED if "-" in name]
    names = []
    for kind in unique(detectors or DETECTORS):
        if kind in published:
            names.append(kind)
        elif kind in DETECTORS:
            names += [f"{kind}_{backbone.value}" for backbone in unique(backbones or [Backbone.swin_t])]
        else:
            raise IasvitError(f"detector {kind!r} does not exist; there are {', '.join([*DETECTORS, *published])}")
    if backbones and all(name in published for name in names):
        raise IasvitError(f"--backbone does not go with --detector {names[0]}, which has its own")
    return names


def scoped(bits: str, scope: Scope) -> QuantSpec:
    """The bits as a spec that says what of the detector is quantized; the bits' own overrides come last, and win."""
    first, *overrides = bits.split(",")
    left = [f"{head}.*=W32A32" for head in HEADS] if scope is Scope.backbone else []
    return QuantSpec.parse(",".join([first, *left, *overrides]))


app = make_app()


@app.command()
def coco(
    backbone: Annotated[
        list[Backbone] | None, typer.Option(help="Repeatable. [default: swin_t]", show_default=False)
    ] = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeatable. mask_rcnn, cascade_mask_rcnn, or with --data coco the name of a Swin Mask R-CNN of "
            "mmdet's. [default: both]",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[list[str], typer.Option(help='Repeatable; "W6A6", also "W4A4,neck.*=W8A8".')] = ["W4A4"],  # noqa: B006
    method: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable; also a variant as ias_vit[-sulq]. [default: all]", show_default=False),
    ] = None,
    scope: Annotated[Scope, typer.Option(help="What is quantized.")] = Scope.detector,
    data: Annotated[Data, typer.Option(help="mini is embedded.")] = Data.mini,
    data_root: Annotated[
        Path | None,
        typer.Option(
            help=f"Folder that holds COCO's annotations/, val2017/ and train2017/ [default: ${DATA_ROOT}].",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="An mmdet configuration with a Swin backbone, instead of the known detectors.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The detector's weights: safetensors, or torch.save's of tensors.")
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Trained weights, or random ones of a fixed seed.")] = True,
    calib_size: Annotated[
        int | None, typer.Option(help=f"Calibration images. [{MINI.calib_size} mini, {PAPER.calib_size} coco]")
    ] = None,
    init_size: Annotated[
        int | None,
        typer.Option(
            help=f"Of them, those that quantizers are initialised on. [{MINI.init_size} mini, {PAPER.init_size} coco]"
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            help=f"Steps a block and stage. [{MINI.iterations} mini; coco {PAPER.iterations}, "
            f"from 6 bits on {PAPER.iterations_6_bits}]"
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help=f"Images a step. [{MINI.batch_size} mini, {PAPER.batch_size} coco]")
    ] = None,
    lr: Annotated[float | None, typer.Option(help=f"Learning rate. [{MINI.lr:g} mini, {PAPER.lr:g} coco]")] = None,
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
    """Quantize and evaluate detectors: every detector on every backbone at all bits by every method with all seeds.

    Rows go to a CSV file as cells are done; a cell that is stored already is skipped, an interrupted one goes on.
    """
    profile = MINI if data is Data.mini else PAPER
    for option, value, least in (
        ("--calib-size", calib_size, 1),
        ("--init-size", init_size, 1),
        ("--batch-size", batch_size, 1),
        ("--iterations", iterations, 0),
        ("--seed", min(seed), 0),
    ):
        at_least(option, value, least)
    if config is not None and (backbone or detector):
        raise IasvitError("--config names a detector with its backbone; --detector and --backbone do not go with it")
    models = [config.stem] if config is not None else model_names(detector, backbone, data)
    specs = unique([scoped(text, scope) for text in bits])
    given = {"iterations": iterations, "batch_size": batch_size, "lr": lr, "init_size": init_size}
    cells = make_cells(
        models,
        specs,
        unique(method or list_methods()),
        unique(seed),
        calib_size or profile.calib_size,
        profile,
        {name: value for name, value in given.items() if value is not None} | parse_options(options or []),
    )
    if checkpoint is not None and len(models) > 1:
        raise IasvitError(
            f"--checkpoint is of one detector, but {len(models)} are asked for: {', '.join(models)}; choose one by "
            f"--detector and --backbone"
        )
    task = make_task(
        data,
        data_root,
        config=config,
        checkpoint=checkpoint,
        pretrained=pretrained,
        device=make_device(device),
        limit=limit,
    )
    check_models(task.models, models, specs)
    for model in models:
        task.images.check_classes(task.models.config(model).classes)
    task.images.check_calibration(cells[0].calib_size)
    store = ResultStore(results)
    if dry_run:
        print(format_estimates(estimate(task, cells, store, force=force)))
        return
    rows = run_cells(task, cells, store, force=force)
    print(table(rows, PRIMARY))
    print(f"\nrows: {store.path(task.name, task.data.name)}")
    raise typer.Exit(exit_status(rows))


if __name__ == "__main__":
    main(app)
