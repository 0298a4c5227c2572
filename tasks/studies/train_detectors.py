"""Train the mini detectors: `python -m tasks.studies.train_detectors --detector mask_rcnn_swin_t --steps 6000`.

Every step's scenes are drawn when it needs them and never again: rendering costs a hundredth of a step on a CPU. Mask
R-CNN starts from the mini zoo's backbone where the zoo has one, Cascade Mask R-CNN from the Mask R-CNN of its backbone.
A run that stops, or is stopped, continues where it was when the same command is run again.

    python -m tasks.studies.train_detectors --detector mask_rcnn_swin_t --max-seconds 10000 --processes 2
    python -m tasks.studies.train_detectors --detector mask_rcnn_swin_t --device cuda --max-seconds 550 --processes 8
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import LaunchConfig, elastic_launch

from iasvit.cli import INTERRUPTED
from iasvit.errors import IasvitError
from iasvit.progress import Progress
from tasks.detection.data import MiniCocoImages
from tasks.mini import detectors
from tasks.studies.training import common
from tasks.studies.training.detector_trainer import Run, Trainer, read_state
from tasks.studies.training.recipes import Recipe

logger = logging.getLogger("tasks.studies.train_detectors")  # __name__ is "__main__" where this is the command
LOG_NAME = "detectors.csv"
INTERRUPTED_MESSAGE = "interrupted; run the same command again to continue where it stopped"


@torch.no_grad()
def measure(model: nn.Module, name: str, val_images: int) -> dict[str, float]:
    """COCO metrics, in percent, of a mini detector on the first validation scenes."""
    from tasks.detection.runner import evaluate  # imports mmengine, which without the extra is not there

    images = MiniCocoImages(val_images)
    config = detectors.detector_config(name)
    return evaluate(model, images.dataset(config), images.metric(config.classes), Progress())


def finish(trainer: Trainer, final: bool) -> None:
    """Round the weights as the checkpoint does, measure them, and write checkpoint and log line."""
    run = trainer.run
    stored = detectors.build(run.detector)
    common.copy_rounded(trainer.model, stored)
    scores = measure(stored.to(trainer.device), run.detector, run.val_images)
    row = {
        "detector": run.detector,
        "seed": run.seed,
        "step": trainer.step,
        "images": trainer.step * run.recipe.batch_size,
        "seconds": round(trainer.seconds, 1),
        "train_loss": round(float(np.mean(trainer.losses[-200:])), 4) if trainer.losses else "",
        "bbox_mAP": scores["bbox_mAP"],
        "segm_mAP": scores["segm_mAP"],
        "val_images": run.val_images,
        "device": common.device_name(trainer.device),
        "start": trainer.origin,
        "final": int(final),
    }
    path = detectors.checkpoint_path(run.detector, run.out)
    common.record(stored, path, run.out / LOG_NAME, run.recipe, row)
    logger.info(
        f"{run.detector} step {trainer.step}  bbox_mAP {scores['bbox_mAP']:.1f}  segm_mAP {scores['segm_mAP']:.1f}"
    )


def train(run: Run) -> bool:
    """One process of a run; whether the run has reached its end. torchrun's environment says which of several it is."""
    rank = 0
    if run.processes > 1:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        os.environ["LOCAL_RANK"] = "0"  # mmengine's logger takes it for a visible GPU; all processes are on run.device
    try:
        trainer = Trainer(run, rank)
        done = trainer.train()
    finally:
        if run.processes > 1:
            dist.destroy_process_group()
    if rank == 0:
        finish(trainer, final=done)
        if done:
            run.state_path.unlink(missing_ok=True)
    if trainer.interrupted and run.processes > 1:
        sys.exit(INTERRUPTED)  # the launcher, told to stop too, would not take what is returned
    if trainer.interrupted and not done:
        logger.warning(INTERRUPTED_MESSAGE)
    return done


def run_all(run: Run) -> None:
    """Train in as many processes as asked for.

    Raises:
        IasvitError: bad input, or a process that failed.
    """
    if run.recipe.batch_size % run.processes:
        raise IasvitError(f"--batch-size {run.recipe.batch_size} is not a multiple of --processes {run.processes}")
    common.check_device(run.device)
    read_state(run)  # says what is wrong before processes start
    if run.processes == 1:
        train(run)
        return
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=run.processes,
        run_id=f"{run.detector}-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a port that is free
        max_restarts=0,
    )
    try:
        elastic_launch(config, common.in_process)(run.detector, train, run)
    except SignalException:  # which the processes got too
        logger.warning(INTERRUPTED_MESSAGE)
    except ChildFailedError:
        raise IasvitError(
            f"training of {run.detector} failed; the message of the process that failed is above"
        ) from None


# ---- command line ----------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> Run:
    """The command line as a run."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.studies.train_detectors", description="Train a mini detector."
    )
    parser.add_argument(
        "--detector", required=True, choices=detectors.names(), metavar="NAME", help=", ".join(detectors.names())
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int)
    length.add_argument(
        "--max-seconds", type=float, help="seconds of training over all invocations; the learning rate then reaches 0"
    )
    common.add_options(parser)
    parser.add_argument(
        "--stop-after", type=float, metavar="SECONDS", help="stop after this long; the same command resumes"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="number of processes that share a batch and the device"
    )
    parser.add_argument("--init", type=Path, help="checkpoint to start from, DETECTOR.safetensors")
    parser.add_argument("--val-images", type=int, default=500)
    options = common.parse(parser, arguments)
    return Run(
        detector=options.detector,
        recipe=common.changed(Recipe(), options),
        seed=options.seed,
        device=options.device,
        out=options.out,
        steps=options.steps,
        max_seconds=options.max_seconds,
        stop_after=options.stop_after,
        processes=options.processes,
        init=options.init,
        val_images=options.val_images,
    )


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for bad input, 130 for Ctrl-C before the first step; later it ends a run after its step."""
    run = parse(arguments)
    return common.exit_status(lambda: run_all(run), INTERRUPTED_MESSAGE)


if __name__ == "__main__":
    sys.exit(main())
