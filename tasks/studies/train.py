"""Train the mini backbones: `python -m tasks.studies.train --backbone deit_t --steps 20000 --device cuda --out DIR`.

The training scenes are rendered once, by all cores, into a file that every backbone's process maps; images stay on the
device as uint8 and are augmented there. With --steps or --epochs the run is reproducible to the bit on one machine;
with --max-seconds the learning rate follows the clock, and the number of steps that fitted is recorded.

    python -m tasks.studies.train --backbone deit_t --backbone swin_t --device cuda --max-seconds 480 \\
        --train-images 400000
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iasvit.errors import IasvitError
from tasks.mini import zoo
from tasks.studies.training import common
from tasks.studies.training.backbone_data import Batches, load_split, permutations, render_split
from tasks.studies.training.backbone_step import Stepper
from tasks.studies.training.recipes import BACKBONE_RECIPES, BackboneRecipe

logger = logging.getLogger("tasks.studies.train")  # __name__ is "__main__" where this is the command
VAL_IMAGES = 5000
LOG_NAME = "training.csv"


@dataclass(frozen=True)
class Run:
    """One training run: what `train` needs besides the data. Exactly one of steps, epochs and deadline is not None."""

    backbone: str
    recipe: BackboneRecipe
    seed: int
    device: str
    out: Path
    steps: int | None = None
    epochs: float | None = None
    deadline: float | None = None  # in seconds of time.time()
    evaluations: int = 4
    compile: bool = True
    graph: bool = True
    report_seconds: float = 15.0
    init: Path | None = None  # checkpoint to start from


# ---- training ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Top-1 in percent of a model with `pretrained_cfg` on raw images (uint8 n×3×H×W), in fp32.

    Decoded images of the model's size go through no resize or crop: timm's evaluation transform is the identity here
    but for normalisation.
    """
    mean, std = (
        torch.tensor(model.pretrained_cfg[key], device=images.device).view(1, 3, 1, 1) for key in ("mean", "std")
    )
    right = 0
    for start in range(0, len(images), batch):
        x = (images[start : start + batch].float() / 255 - mean) / std
        right += int((model(x).argmax(1) == labels[start : start + batch]).sum())
    return 100 * right / len(images)


class Clock:
    """How far a run is, from 0 to 1: by steps where they are given, else by time from the first steps to the deadline.

    Compilation happens in the first steps and must not eat the warm-up of the learning rate, so time counts after it.
    """

    def __init__(self, steps: int | None, deadline: float | None) -> None:
        self.steps, self.deadline = steps, deadline
        self.ready: float | None = None

    def progress(self, step: int) -> float:
        """After this many steps, all of them finished on the device."""
        if self.steps is not None:
            return step / self.steps
        if self.ready is None:
            self.ready = time.time() if step > Stepper.WARMUP else None
            return 0.0
        return min(1.0, (time.time() - self.ready) / max(self.deadline - self.ready, 1e-3))


def train(run: Run, data: Path) -> float:
    """Train one backbone on the splits rendered into `data`; returns its top-1 in percent.

    Checkpoint and log line are written at every evaluation, so that a run cut short leaves its latest weights.

    Raises:
        IasvitError: too few images for a batch, a loss that is not finite, or a checkpoint that does not fit.
    """
    device, recipe = torch.device(run.device), run.recipe
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed = run.seed + recipe.seed
        torch.manual_seed(seed)
        images, labels = load_split(data, "train", device)
        val = load_split(data, "val", device)
        if len(images) < recipe.batch_size:
            raise IasvitError(
                f"--train-images {len(images)} do not fill a batch of {recipe.batch_size} (--batch-size); give more"
            )
        model = zoo.build(run.backbone, seed)
        if run.init is not None:
            zoo.load_weights(model, run.init)
        model.to(device).train()
        batches = Batches(images, recipe, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
        stepper = Stepper(model, batches, labels, run.backbone, compile=run.compile, graph=run.graph)
        per_epoch = len(images) // recipe.batch_size
        steps = math.ceil(run.epochs * per_epoch) if run.epochs is not None else run.steps
        clock, start = Clock(steps, run.deadline), time.time()
        report = common.Report(run.backbone, recipe.batch_size, run.report_seconds, step=0)
        progress, evaluated, top1 = 0.0, 0, 0.0
        losses: list[float] = []
        for step, index in enumerate(permutations(len(images), recipe.batch_size, seed), 1):
            stepper(index, progress)
            if step % 10 == 0 or step == steps:
                losses.append(float(stepper.loss))  # waits for the device: the clock reads finished work
                if not math.isfinite(losses[-1]):
                    raise IasvitError(f"training {run.backbone} diverged at step {step}: loss {losses[-1]}; lower --lr")
                progress = clock.progress(step)
            elif steps is not None:
                progress = clock.progress(step)
            seconds = time.time() - start
            if losses:
                report(step, seconds, progress, stepper.optimizer, losses[-1])
            if int(progress * run.evaluations) > evaluated or progress >= 1:
                evaluated = int(progress * run.evaluations)
                row = {
                    "step": step,
                    "epoch": round(step / per_epoch, 2),
                    "seconds": round(seconds, 1),
                    "train_loss": round(float(np.mean(losses or float(stepper.loss))), 4),
                }
                losses.clear()
                top1 = evaluate(run, model, val, row, images=len(images), final=progress >= 1)
                if progress >= 1:
                    break
    return top1


def evaluate(
    run: Run, model: nn.Module, val: tuple[Tensor, Tensor], row: dict[str, Any], *, images: int, final: bool
) -> float:
    """Measure a model's rounded weights, and write checkpoint and log line.

    Args:
        run: what it is trained by.
        model: as it is now.
        val: images (uint8 n×3×H×W) and labels (int64 n).
        row: columns of the log line: step, epoch, seconds, train_loss.
        images: that are trained on.
        final: whether the run is at its end.

    Returns:
        top-1 in percent.
    """
    stored = zoo.build(run.backbone).to(val[0].device)
    common.copy_rounded(model, stored)
    top1 = accuracy(stored, *val)
    row = {
        "backbone": run.backbone,
        "seed": run.seed,
        **row,
        "top1": round(top1, 2),
        "images": images,
        "device": common.device_name(val[0].device),
        "start": "random" if run.init is None else run.init.stem,
        "final": int(final),
    }
    path = zoo.checkpoint_path(run.backbone, run.out)
    common.record(stored, path, run.out / LOG_NAME, run.recipe, row, val_images=len(val[0]))
    logger.info(
        f"{run.backbone:7s} step {row['step']}  top-1 {top1:.2f} on {len(val[0])} validation images, "
        f"loss {row['train_loss']}"
    )
    return top1


# ---- command line --------------------------------------------------------------------------------------------------


def _train_side_by_side(runs: list[Run], data: Path) -> None:
    """One process a backbone on one device. Those that fail are named once all have ended."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // len(runs))))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=common.in_process, args=(run.backbone, train, run, data)) for run in runs]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
    failed = [run.backbone for run, process in zip(runs, processes, strict=True) if process.exitcode]
    if failed:
        raise IasvitError(f"training of {', '.join(failed)} failed; its message is above")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m tasks.studies.train", description="Train the mini backbones.")
    parser.add_argument(
        "--backbone",
        action="append",
        required=True,
        choices=list(zoo.MINI_BACKBONES),
        metavar="NAME",
        help=f"repeatable: {', '.join(zoo.MINI_BACKBONES)}",
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int)
    length.add_argument("--epochs", type=float)
    length.add_argument(
        "--max-seconds",
        type=float,
        help="stop this many seconds after the start, rendering included; "
        "the learning rate reaches 0 then (the last evaluation comes on top)",
    )
    common.add_options(parser)
    parser.add_argument("--data", type=Path, help="folder for the rendered scenes; a temporary one by default")
    parser.add_argument("--init", type=Path, help="checkpoint to start from, if there is one backbone")
    parser.add_argument("--train-images", type=int, default=200_000)
    parser.add_argument("--val-images", type=int, default=VAL_IMAGES)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="number of processes that render")
    parser.add_argument(
        "--evaluations", type=int, default=4, help="number of evaluations, spread over the run; the last is at its end"
    )
    parser.add_argument("--no-compile", action="store_true", help="CUDA: do not compile the blocks")
    parser.add_argument("--no-graph", action="store_true", help="CUDA: do not capture the step as a CUDA graph")
    return common.parse(parser, arguments)


def run_all(options: argparse.Namespace) -> None:
    """Render the data once, then train every backbone asked for: side by side on CUDA, one by one on a CPU."""
    deadline = time.time() + options.max_seconds if options.max_seconds is not None else None
    common.check_device(options.device)
    names = list(dict.fromkeys(options.backbone))
    if options.init is not None:
        if len(names) > 1:
            raise IasvitError(f"--init holds one backbone, but {len(names)} are asked for: {', '.join(names)}")
        zoo.load_weights(zoo.build(names[0]), options.init)  # says what is wrong before anything is rendered
    runs = [
        Run(
            backbone=name,
            recipe=common.changed(BACKBONE_RECIPES[name], options),
            seed=options.seed,
            device=options.device,
            out=options.out,
            steps=options.steps,
            epochs=options.epochs,
            deadline=deadline,
            evaluations=options.evaluations,
            compile=not options.no_compile,
            graph=not options.no_graph,
            init=options.init,
        )
        for name in names
    ]
    with nullcontext(options.data) if options.data else tempfile.TemporaryDirectory() as folder:
        start = time.time()
        for split, count in (("train", options.train_images), ("val", options.val_images)):
            render_split(Path(folder), split, count, options.workers)
        logger.info("scenes rendered in %.0f s", time.time() - start)
        if len(runs) > 1 and options.device.startswith("cuda"):
            _train_side_by_side(runs, Path(folder))
        else:
            for i, run in enumerate(runs):  # one by one they share what time is left
                if deadline is not None:
                    run = dataclasses.replace(run, deadline=time.time() + (deadline - time.time()) / (len(runs) - i))
                train(run, Path(folder))


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    options = parse(arguments)
    return common.exit_status(lambda: run_all(options), "interrupted; checkpoints hold the last evaluation")


if __name__ == "__main__":
    sys.exit(main())
