"""COCO detection and instance segmentation: `iasvit run coco`, or `python tasks/coco.py`.

Without a data set, a GPU or a network it runs the embedded mini COCO; with `--data coco` it is the papers' task on
mmdet's and the Swin authors' detectors. It needs the extra `coco`. See --help.
"""

from __future__ import annotations

if __name__ == "__main__":  # before imports that take seconds
    from iasvit.interrupts import end_on_signals
    from iasvit.threads import wait_passively

    end_on_signals()
    wait_passively()

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from torch import Tensor, nn

from iasvit.benchmark.harness import Cell
from iasvit.benchmark.task import DataSet, Metric, Row, Task
from iasvit.cli import main, make_app
from iasvit.errors import IasvitError
from iasvit.progress import Progress
from tasks import command
from tasks.command import unique
from tasks.detection.models import DETECTORS, predict_images
from tasks.detection.setup import (
    DATA_ROOT,
    DATA_SETS,
    MINI,
    PAPER,
    Backbone,
    Data,
    Scope,
    Setup,
    make_setup,
    model_names,
    scoped,
)

app = make_app()
number = partial(command.profile_option, mini=MINI, real=PAPER)


class CocoTask(Task):
    """Detection and instance segmentation.

    Args:
        setup: data set, images, detectors and device, as `make_setup` gives them.
    """

    name = "coco"
    metrics = tuple(
        Metric(f"{kind}_mAP{part}", primary=not part, minimum=0, maximum=100)
        for part in ("", "_50", "_75", "_s", "_m", "_l")
        for kind in ("bbox", "segm")
    )
    data_sets: ClassVar[dict[str, DataSet]] = DATA_SETS
    model_order: ClassVar[tuple[str, ...]] = tuple(f"{kind}_{each.value}" for kind in DETECTORS for each in Backbone)

    def __init__(self, setup: Setup) -> None:
        self.data = setup.data
        self.images = setup.images
        self.models = setup.models
        self.device = setup.device
        self.split_size = len(setup.images)

    @classmethod
    def command(cls) -> typer.Typer:
        """The command line of `iasvit run coco`."""
        return app

    @classmethod
    def grid(
        cls,
        *,
        bits: list[str],
        seed: list[int],
        backbone: list[Backbone] | None = None,
        detector: list[str] | None = None,
        method: list[str] | None = None,
        scope: Scope = Scope.detector,
        data: Data = Data.mini,
        data_root: Path | None = None,
        config: Path | None = None,
        checkpoint: Path | None = None,
        pretrained: bool = True,
        calib_size: int | None = None,
        init_size: int | None = None,
        iterations: int | None = None,
        recipe: str = "paper",
        batch_size: int | None = None,
        lr: float | None = None,
        memory_budget: str | None = None,
        option: list[str] | None = None,
        device: str | None = None,
        limit: int | None = None,
        backend: str | None = None,
    ) -> tuple[CocoTask, list[Cell]]:
        """See `Task`; the parameters are the command's options."""
        if config is not None and (backbone or detector):
            raise IasvitError(
                "--config names a detector with its backbone; --detector and --backbone do not go with it"
            )
        models = [config.stem] if config is not None else model_names(detector, backbone, data)
        specs = unique([scoped(text, scope) for text in bits])
        given = {
            "iterations": iterations,
            "batch_size": batch_size,
            "lr": lr,
            "init_size": init_size,
            "memory_budget": memory_budget,
        }
        given = command.parse_options(option or [], given)
        cells = command.make_cells(models, specs, method, seed, calib_size, data.profile.by(recipe), given)
        on = command.make_device(device)
        cells = command.through(backend, cells, on)
        command.check_checkpoint(checkpoint, models)
        setup = make_setup(
            data,
            data_root,
            config=config,
            checkpoint=checkpoint,
            pretrained=pretrained,
            device=on,
            limit=limit,
        )
        task = cls(setup)
        command.check_models(task.models, models, specs)
        for model in models:
            task.images.check_classes(task.models.config(model).classes)
        task.images.check_calibration(cells[0].calib_size)
        return task, cells

    def load_model(self, model: str) -> nn.Module:
        """See `Task`.

        Raises:
            IasvitError: the detector cannot be had, or its classes are not the data's categories.
        """
        self.images.check_classes(self.models.config(model).classes)
        return self.models.load(model).to(self.device)

    def weights(self, model: str) -> str:
        """See `Task`."""
        return self.models.weights(model)

    def data_fingerprint(self) -> str:
        """See `Task`."""
        return self.images.fingerprint

    def config_fingerprint(self, model: str) -> str:
        """See `Task`; of the detector, its thresholds, the transforms of its images, and its classes."""
        return self.models.config(model).fingerprint

    def calibration(self, model: str, n: int, seed: int) -> Tensor | Sequence[Tensor]:
        """See `Task`; images of different sizes come as a sequence of 1×3×H×W."""
        return self.images.calibration(self.models.config(model), n, seed)

    def forward(self, network: nn.Module, images: Tensor) -> Any:
        """See `Task`; mmdet's detectors do not take images alone."""
        return predict_images(network, images)

    def predict(self, model: str, network: nn.Module, progress: Progress) -> dict[str, float]:
        """See `Task`; the metrics, which mmdet's metric gathers while the images pass."""
        from tasks.detection.runner import evaluate

        config = self.models.config(model)
        metric = self.images.metric(config.classes)
        return evaluate(network, self.images.dataset(config), metric, progress, self.images.workers)

    def recall(self, row: Row) -> dict[str, float]:
        """See `Task`."""
        return {metric.name: row[metric.name] for metric in self.metrics}

    def score(self, outputs: dict[str, float], reference: dict[str, float]) -> dict[str, float]:
        """See `Task`."""
        return outputs


@app.command()
def coco(
    backbone: Annotated[
        list[Backbone] | None, typer.Option(help="Repeatable. [default: swin_t]", show_default=False)
    ] = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeatable. mask_rcnn, cascade_mask_rcnn, or with --data coco mmdet's name of a Swin Mask R-CNN. "
            "[default: both]",
            show_default=False,
        ),
    ] = None,
    bits: command.Bits = ["W4A4"],  # noqa: B006
    method: command.Methods = None,
    scope: Annotated[Scope, typer.Option(help="Quantize the whole detector, or its backbone only.")] = Scope.detector,
    data: Annotated[Data, typer.Option(help="mini is embedded; coco is COCO 2017.")] = Data.mini,
    data_root: Annotated[
        Path | None,
        typer.Option(
            help=f"Folder with COCO's annotations/, val2017/ and train2017/. [default: ${DATA_ROOT}]",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="An mmdet configuration with a Swin backbone, in place of --detector and --backbone."),
    ] = None,
    checkpoint: command.Checkpoint = None,
    pretrained: command.Pretrained = True,
    calib_size: Annotated[int | None, number("Number of calibration images.", "calib_size")] = None,
    init_size: Annotated[int | None, number("Number of them that initialise the quantizers.", "init_size")] = None,
    iterations: Annotated[int | None, number("Learning steps per block and stage.", "iterations")] = None,
    recipe: command.Recipe = "paper",
    batch_size: Annotated[int | None, number("Images per learning step.", "batch_size")] = None,
    lr: Annotated[float | None, number("Learning rate.", "lr")] = None,
    memory_budget: command.MemoryBudget = None,
    options: command.MethodOptions = None,
    seed: command.Seeds = [0],  # noqa: B006
    device: command.Device = None,
    limit: command.Limit = None,
    backend: command.Backend = None,
    dry_run: command.DryRun = False,
    force: command.Force = False,
    stale: command.Stale = False,
    save: command.Save = None,
    jobs: command.Jobs = None,
    threads: command.Threads = None,
    results: command.Results = command.RESULTS,
) -> None:
    """Quantize and evaluate detectors: all detectors, backbones, bits, methods and seeds combined.

    Each combination is a cell. Its row goes to a CSV file when it is done. Stored cells are skipped, and an interrupted
    run continues where it stopped.
    """
    command.print_logs()
    task, cells = CocoTask.grid(
        bits=bits,
        seed=seed,
        backbone=backbone,
        detector=detector,
        method=method,
        scope=scope,
        data=data,
        data_root=data_root,
        config=config,
        checkpoint=checkpoint,
        pretrained=pretrained,
        calib_size=calib_size,
        init_size=init_size,
        iterations=iterations,
        recipe=recipe,
        batch_size=batch_size,
        lr=lr,
        memory_budget=memory_budget,
        option=options,
        device=device,
        limit=limit,
        backend=backend,
    )
    printed = ("bbox_mAP", "segm_mAP")
    command.run(
        task,
        cells,
        results,
        printed=printed,
        dry_run=dry_run,
        force=force,
        stale=stale,
        save=save,
        jobs=jobs,
        threads=threads,
    )


if __name__ == "__main__":
    main(app)
