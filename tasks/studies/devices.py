"""What several devices gain: `python -m tasks.studies.devices` on a machine with two GPUs, or with `--device cpu`.

It starts itself by torchrun, in turn with one process and with two, and prints JSON: images a second of evaluation,
seconds of I&S-ViT, the ratios, and whether parameters and metrics are the same. A full-size model with random weights
sees random images that are in memory already: how long it takes does not depend on the values, and no disk counts.

    torchrun --nproc-per-node 2 -m tasks.studies.devices --measure

measures those processes alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar

import torch
import typer
from torch import Tensor, nn

import iasvit
from iasvit import distributed
from iasvit.benchmark.provenance import describe_device
from iasvit.benchmark.task import EMBEDDED, DataSet
from iasvit.cli import main, make_app
from iasvit.errors import IasvitError
from iasvit.progress import Progress
from tasks.classification.folders import Batch, DataConfig
from tasks.classification.models import TimmModels
from tasks.classification.setup import Setup
from tasks.command import make_device
from tasks.imagenet import ImageNetTask

app = make_app()
BATCH = 64  # images of an evaluation


class RandomImages:
    """As many images as are asked for, all batches the same; see `tasks.classification.data.Images`."""

    num_classes: ClassVar[dict[int, None]] = {1000: None}
    fingerprint = "random"

    def __init__(self, batch: Tensor, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def prepare(self) -> None:
        """See `Images`; nothing."""

    def batches(self, config: DataConfig, which: slice = slice(None)) -> Iterator[Batch]:
        """See `Images`."""
        for at in torch.arange(self.count).split(BATCH)[which]:
            yield self.batch[: len(at)], at % 1000, at

    def check_calibration(self, n: int) -> None:
        """See `Images`; nothing."""

    def calibration(self, config: DataConfig, n: int, seed: int) -> Tensor:
        """See `Images`."""
        return torch.randn(n, *self.batch.shape[1:], generator=torch.Generator().manual_seed(seed))


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float]:
    """What work() gives, and its seconds, from the moment when all processes begin until all are done."""
    wait(device)
    start = time.perf_counter()
    result = work()
    wait(device)
    return result, time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait for this process's device and for the others."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    distributed.gathered(lambda: None)


def measure(
    backbone: str, device: torch.device, images: int, calib_size: int, iterations: int, batch_size: int, **learning: Any
) -> dict[str, Any]:
    """Figures of the processes that this one is one of.

    Args:
        backbone: timm's name.
        device: of this process.
        images: evaluated.
        calib_size, iterations, batch_size: of I&S-ViT at W4A4.
        learning: further options of it.
    """
    models = TimmModels(pretrained=False)
    size = models.config(backbone)["input_size"]
    batch = torch.randn(BATCH, *size, generator=torch.Generator().manual_seed(0))
    batch = batch.pin_memory() if device.type == "cuda" else batch

    def task(count: int) -> ImageNetTask:
        return ImageNetTask(Setup(DataSet("random", EMBEDDED), RandomImages(batch, count), models, device))

    few, many = task(4 * BATCH * distributed.world_size()), task(images)
    network = many.load_model(backbone)
    calibration = many.images.calibration({}, calib_size, 0)
    found: dict[str, Any] = {"processes": distributed.world_size(), "device": describe_device(device)}
    simple, found["minmax_seconds"] = timed(device, lambda: iasvit.quantize(network, calibration, "W4A4", "minmax"))
    outputs: dict[str, Any] = {}
    networks: dict[str, nn.Module] = {"full_precision": network, "minmax": simple}
    with torch.no_grad():
        for name, each in networks.items():
            few.predict(backbone, each, Progress())
            outputs[name], seconds = timed(device, lambda each=each: many.predict(backbone, each, Progress()))
            found[f"{name}_images_per_second"] = images / seconds
    found["minmax_scores"] = many.score(outputs["minmax"], outputs["full_precision"])
    found["minmax_parameters"] = distributed.digest(simple.state_dict().values())
    options = {"iterations": iterations, "batch_size": batch_size, **learning}
    iasvit.quantize(network, calibration[: 2 * batch_size], "W4A4", **{**options, "iterations": 4})  # compiles
    few_images = calibration[:32]
    found["ptq4vit_seconds"] = timed(device, lambda: iasvit.quantize(network, few_images, "W4A4", "ptq4vit"))[1]
    progress = Progress()
    work = lambda: iasvit.quantize(network, calibration, "W4A4", progress=progress, **options)  # noqa: E731
    found["ias_vit_seconds"] = timed(device, work)[1]
    for stage in (1, 3):
        found[f"stage_{stage}_seconds"] = progress.seconds[f"reconstruction, stage {stage}"]
    found["passes_seconds"] = progress.seconds["reconstruction"]
    return found


def compared(runs: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of the runs of each number of processes, how many times better than the first's, and what is the same."""
    first, *others = runs
    shown: dict[str, Any] = {"device": {count: found[0]["device"] for count, found in runs.items()}}
    names = [name for name in runs[first][0] if name.endswith("_seconds") or name.endswith("_per_second")]
    medians = {n: {name: statistics.median(run[name] for run in runs[n]) for name in names} for n in runs}
    shown["medians"] = {n: {name: round(value, 3) for name, value in medians[n].items()} for n in runs}
    for count in others:
        ratios = {name: medians[count][name] / medians[first][name] for name in names}
        better = {name: ratio if name.endswith("_per_second") else 1 / ratio for name, ratio in ratios.items()}
        shown[f"{count} against {first}"] = {name: round(value, 2) for name, value in better.items()}
    for name in ("minmax_parameters", "minmax_scores"):
        shown[f"same_{name}"] = len({json.dumps(run[name]) for found in runs.values() for run in found}) == 1
    return shown


@app.command()
def devices(
    processes: Annotated[list[int], typer.Option(help="Repeatable. Numbers of processes to compare.")] = [1, 2],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="Runs per number of processes.")] = 2,
    measured: Annotated[bool, typer.Option("--measure", help="Measure in these processes, and start none.")] = False,
    backbone: Annotated[str, typer.Option(help="timm's name of the model.")] = "deit_small_patch16_224",
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: cuda if there is one, else cpu]")] = None,
    images: Annotated[int, typer.Option(help="Number of images to evaluate.")] = 8192,
    calib_size: Annotated[int, typer.Option(help="Number of calibration images.")] = 1024,
    iterations: Annotated[int, typer.Option(help="Learning steps per block and stage.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Images per learning step.")] = 64,
    autocast: Annotated[bool, typer.Option(help="Multiply in bfloat16 while learning.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Learn with compiled steps.")] = False,
) -> None:
    """Time evaluation and I&S-ViT with several numbers of processes, a device each."""
    if measured:
        learning = {"autocast": autocast, "compile": compiled}
        found = measure(backbone, make_device(device), images, calib_size, iterations, batch_size, **learning)
        print(json.dumps(found), flush=True)
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    env = {"OMP_NUM_THREADS": "1", **os.environ}  # as torchrun sets it for several processes
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in processes}
    for _ in range(repeats):
        for count in processes:
            command = [*torchrun, str(count), "-m", "tasks.studies.devices", "--measure", *sys.argv[1:]]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise IasvitError(f"the run with {count} processes ended with status {done.returncode}")
            print(done.stdout, end="", file=sys.stderr, flush=True)
            runs[count].append(json.loads(done.stdout.splitlines()[-1]))
    print(json.dumps(compared(runs), indent=1))


if __name__ == "__main__":
    main(app)
