"""ImageNet classification: `iasvit run imagenet`, or `python tasks/imagenet.py`.

Without a data set, a GPU or a network it runs the embedded mini benchmark; with `--data imagenet` it is the papers'
task on timm's models. See --help.
"""

from __future__ import annotations

if __name__ == "__main__":  # before imports that take seconds
    from iasvit.interrupts import end_on_signals
    from iasvit.threads import wait_passively

    end_on_signals()
    wait_passively()

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import typer
from torch import Tensor, nn

from iasvit import distributed
from iasvit.benchmark.harness import Cell
from iasvit.benchmark.task import DataSet, Metric, Task
from iasvit.cli import main, make_app
from iasvit.errors import IasvitError
from iasvit.progress import Progress
from iasvit.spec import QuantSpec
from tasks import command
from tasks.classification.folders import AnyFolderImages
from tasks.classification.metrics import CLASSIFICATION_METRICS, UNLABELLED_METRICS, Predictions, classification_scores
from tasks.classification.models import PAPER_BACKBONES
from tasks.classification.setup import (
    DATA_ROOT,
    MINI,
    PAPER,
    SOURCES,
    Setup,
    find_source,
    known_data_sets,
    make_setup,
)
from tasks.command import at_least, unique
from tasks.fingerprint import fingerprint

app = make_app()
number = partial(command.profile_option, mini=MINI, real=PAPER)


class ImageNetTask(Task):
    """Image classification.

    Args:
        setup: data set, images, models and device, as `make_setup` gives them.
    """

    name = "imagenet"
    metrics = CLASSIFICATION_METRICS
    data_sets: ClassVar[dict[str, DataSet]] = known_data_sets()
    model_order: ClassVar[tuple[str, ...]] = tuple(PAPER_BACKBONES)

    def __init__(self, setup: Setup) -> None:
        self.data = setup.data
        self.images = setup.images
        self.models = setup.models
        self.device = setup.device
        self.split_size = len(setup.images)  # unreadable images included

    @classmethod
    def command(cls) -> typer.Typer:
        """The command line of `iasvit run imagenet`."""
        return app

    @classmethod
    def grid(
        cls,
        *,
        bits: list[str],
        seed: list[int],
        backbone: list[str] | None = None,
        method: list[str] | None = None,
        data: str = "mini",
        data_root: Path | None = None,
        data_name: str | None = None,
        labels: bool = True,
        checkpoint: Path | None = None,
        pretrained: bool = True,
        img_size: int | None = None,
        calib_size: int | None = None,
        iterations: int | None = None,
        recipe: str = "paper",
        batch_size: int | None = None,
        lr: float | None = None,
        memory_budget: str | None = None,
        option: list[str] | None = None,
        device: str | None = None,
        limit: int | None = None,
        backend: str | None = None,
    ) -> tuple[ImageNetTask, list[Cell]]:
        """See `Task`; the parameters are the command's options."""
        at_least("--img-size", img_size, 1)
        profile = find_source(data).profile.by(recipe)
        backbones = unique(backbone or profile.models)
        specs = unique([QuantSpec.parse(text) for text in bits])
        given = command.parse_options(
            option or [], {"iterations": iterations, "batch_size": batch_size, "lr": lr, "memory_budget": memory_budget}
        )
        cells = command.make_cells(backbones, specs, method, seed, calib_size, profile, given)
        on = command.make_device(device)
        cells = command.through(backend, cells, on)
        command.check_checkpoint(checkpoint, backbones)
        setup = make_setup(
            data,
            data_root,
            checkpoint=checkpoint,
            pretrained=pretrained,
            device=on,
            limit=limit,
            data_name=data_name,
            labels=labels,
            img_size=img_size,
        )
        task = cls(setup)
        command.check_models(task.models, backbones, specs)
        for name in backbones:
            task.check_classes(name, task.models.architecture(name))
        task.images.check_calibration(cells[0].calib_size)
        return task, cells

    @property
    def scored(self) -> tuple[Metric, ...]:
        """See `Task`; without labels the agreement with the full-precision model comes first."""
        return UNLABELLED_METRICS if self.images.num_classes is None else self.metrics

    def load_model(self, model: str) -> nn.Module:
        """See `Task`.

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
            raise IasvitError(f"backbone {model!r} has no classifier, so there are no outputs to compare")
        if allowed is not None and network.num_classes not in allowed:
            counts = " or ".join(str(count) for count in allowed)
            without = ", or leave labels out with --no-labels" if isinstance(self.images, AnyFolderImages) else ""
            raise IasvitError(
                f"backbone {model!r} has {network.num_classes} classes, but the labels of {self.data.name} are of "
                f"{counts}; choose a model or weights with as many{without}"
            )

    def weights(self, model: str) -> str:
        """See `Task`."""
        return self.models.weights(model)

    def data_fingerprint(self) -> str:
        """See `Task`."""
        return self.images.fingerprint

    def config_fingerprint(self, model: str) -> str:
        """See `Task`; of what images are made before the model sees them."""
        config = self.models.config(model)
        keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        return fingerprint({key: config[key] for key in keys})

    def calibration(self, model: str, n: int, seed: int) -> Tensor:
        """See `Task`."""
        return self.images.calibration(self.models.config(model), n, seed)

    def predict(self, model: str, network: nn.Module, progress: Progress) -> Predictions:
        """See `Task`; each process evaluates whole batches, which are the same however many processes there are."""
        share = len(self.images) // distributed.world_size()

        def outputs() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            with progress.phase("evaluation", share) as bar:
                for images, labels, positions in self.images.batches(self.models.config(model), distributed.own()):
                    logits = network(images.to(self.device, non_blocking=True))
                    remap = (self.images.num_classes or {}).get(logits.shape[1])
                    yield logits, labels if remap is None else remap[labels], positions
                    bar.update(len(images))

        with torch.inference_mode():
            return Predictions.collect(outputs(), len(self.images))

    def score(self, outputs: Predictions, reference: Predictions) -> dict[str, float]:
        """See `Task`."""
        scored = {metric.name for metric in self.scored}
        scores = classification_scores(outputs, reference)
        return {name: value for name, value in scores.items() if name in scored}


@app.command()
def imagenet(
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Repeatable. {' '.join(PAPER_BACKBONES)}; on real data also any name that timm knows. "
            "[default: deit_t and swin_t on mini, deit_s on real data]",
            show_default=False,
        ),
    ] = None,
    bits: command.Bits = ["W3A3"],  # noqa: B006
    method: command.Methods = None,
    data: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(SOURCES)}. mini and mini-hard are embedded; imagenette downloads 99 MB; folder takes "
            "your own images, a folder per class."
        ),
    ] = "mini",
    data_root: Annotated[
        Path | None,
        typer.Option(
            help=f"Folder with ImageNet's train/ and val/ [default: ${DATA_ROOT}], or the folder for Imagenette. With "
            "--data folder, val/ is evaluated and train/, with folders of any names, is for calibration. If there is "
            "only one of them, or only class folders, a fixed seed draws a fifth of each class for calibration.",
            show_default=False,
        ),
    ] = None,
    data_name: Annotated[
        str | None,
        typer.Option(
            help="With --data folder: the data set's name in rows. [default: the folder's name]", show_default=False
        ),
    ] = None,
    labels: Annotated[
        bool,
        typer.Option(
            help="With --data folder: --no-labels takes images in any folders, and measures agreement and cosine only."
        ),
    ] = True,
    checkpoint: command.Checkpoint = None,
    pretrained: command.Pretrained = True,
    img_size: Annotated[
        int | None,
        typer.Option(
            help="Image size of the model in pixels. [default: from --checkpoint's position embedding, else timm's]",
            show_default=False,
        ),
    ] = None,
    calib_size: Annotated[int | None, number("Number of calibration images.", "calib_size")] = None,
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
    """Quantize and evaluate classification models: all backbones, bits, methods and seeds combined.

    Each combination is a cell. Its row goes to a CSV file when it is done. Stored cells are skipped, and an interrupted
    run continues where it stopped.
    """
    command.print_logs()
    task, cells = ImageNetTask.grid(
        bits=bits,
        seed=seed,
        backbone=backbone,
        method=method,
        data=data,
        data_root=data_root,
        data_name=data_name,
        labels=labels,
        checkpoint=checkpoint,
        pretrained=pretrained,
        img_size=img_size,
        calib_size=calib_size,
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
    printed = ("top1", "agreement", "cosine")
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
