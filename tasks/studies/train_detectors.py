"""Train the mini detectors: `python -m tasks.studies.train_detectors --detector mask_rcnn_swin_t --steps 6000`.

Every step's scenes are drawn when it needs them and never again: rendering costs a hundredth of a step on a CPU. Mask
R-CNN starts from the mini zoo's backbone where the zoo has one, Cascade Mask R-CNN from the Mask R-CNN of its backbone.
A run that stops, or is stopped, goes on where it was when the same command is given again.

    python -m tasks.studies.train_detectors --detector mask_rcnn_swin_t --max-seconds 10000 --processes 2
    python -m tasks.studies.train_detectors --detector mask_rcnn_swin_t --device cuda --max-seconds 550 --processes 8
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import LaunchConfig, elastic_launch

from iasvit.cli import INTERRUPTED
from iasvit.errors import IasvitError
from iasvit.files import replacing
from tasks.command import print_logs
from tasks.mini import detectors, zoo
from tasks.mini.detection import IMAGE_SIZE, PackedScenes, pack
from tasks.studies.optimization import make_optimizer, make_schedule

logger = logging.getLogger(__name__)

LOG_NAME = "detectors.csv"
LOG_COLUMNS = (
    "detector", "seed", "step", "images", "seconds", "train_loss", "bbox_mAP", "segm_mAP", "val_images", "device",
    "start", "final",
)  # fmt: skip
STRIDE = 1_000_000_000  # training scenes between one seed's and the next's


@dataclass(frozen=True)
class Recipe:
    """How a mini detector is trained: AdamW, linear warm-up, cosine to 0; no decay on norms, biases and tables."""

    lr: float = 1e-3
    weight_decay: float = 0.05
    batch_size: int = 16  # of all processes together
    warmup: float = 0.03  # fraction of the run
    clip: float = 5.0  # gradient norm
    flip: bool = True  # turns and mirrors: no class becomes another by them


@dataclass(frozen=True)
class Run:
    """One training run. Exactly one of steps and max_seconds is not None."""

    detector: str
    recipe: Recipe
    seed: int
    device: str
    out: Path
    steps: int | None = None
    max_seconds: float | None = None  # of training, all invocations together
    stop_after: float | None = None  # seconds of this invocation
    processes: int = 1
    init: Path | None = None
    save_seconds: float = 120.0
    report_seconds: float = 20.0
    val_images: int = 500

    @property
    def state_path(self) -> Path:
        """What an interrupted run goes on from."""
        return self.out / f"{self.detector}.state.pt"

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {
            "detector": self.detector,
            "seed": self.seed,
            "steps": self.steps,
            "max_seconds": self.max_seconds,
            "processes": self.processes,
            "recipe": dataclasses.asdict(self.recipe),
        }


# ---- data ------------------------------------------------------------------------------------------------------------


def scenes_of_step(run: Run, step: int, rank: int) -> PackedScenes:
    """The scenes that one process sees in one step: no other step or process sees them."""
    own = run.recipe.batch_size // run.processes
    # Scenes without objects are left out, so that each process has the double of its share to draw from.
    return pack("train", run.seed * STRIDE + 2 * own * (step * run.processes + rank), own)


class Prefetch:
    """The batches of the steps to come, each drawn while the step before it runs."""

    def __init__(self, run: Run, first: int, rank: int) -> None:
        self._run, self._rank = run, rank
        self._pool = ThreadPoolExecutor(1)
        self._next = self._submit(first)

    def _submit(self, step: int) -> Future[PackedScenes]:
        return self._pool.submit(scenes_of_step, self._run, step, self._rank)

    def take(self, step: int) -> PackedScenes:
        """The batch of the next step."""
        batch, self._next = self._next.result(), self._submit(step + 1)
        return batch

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def to_batch(scenes: PackedScenes, flip: bool, generator: np.random.Generator) -> dict[str, list]:
    """Scenes as a detector's data preprocessor takes them in training: BGR images and samples with their objects."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    inputs, samples = [], []
    shape = (IMAGE_SIZE, IMAGE_SIZE)
    for row in range(len(scenes)):
        image = scenes.images[row]
        classes, boxes, masks = scenes.objects(row)
        if flip:
            turns, mirror = int(generator.integers(4)), bool(generator.integers(2))
            image, boxes, masks = turned(image, boxes, masks, turns, mirror)
        sample = DetDataSample(
            metainfo={"img_id": row, "img_shape": shape, "ori_shape": shape, "scale_factor": (1.0, 1.0)}
        )
        sample.gt_instances = InstanceData(
            labels=torch.from_numpy(classes),
            bboxes=torch.from_numpy(np.ascontiguousarray(boxes)),
            masks=BitmapMasks(np.ascontiguousarray(masks, dtype=np.uint8), *shape),
        )
        inputs.append(torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))))
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}


def turned(
    image: np.ndarray, boxes: np.ndarray, masks: np.ndarray, turns: int, mirror: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A square image (H×H×3), its boxes (k×4) and masks (k×H×H) after quarter turns to the left and a mirroring."""
    size = len(image)
    x0, y0, x1, y1 = boxes.T
    for _ in range(turns):
        image, masks = np.rot90(image), np.rot90(masks, axes=(1, 2))
        x0, y0, x1, y1 = y0, size - x1, y1, size - x0
    if mirror:
        image, masks = image[:, ::-1], masks[:, :, ::-1]
        x0, x1 = size - x1, size - x0
    return image, np.stack([x0, y0, x1, y1], axis=1).astype(np.float32), masks


# ---- training --------------------------------------------------------------------------------------------------------


def average_gradients(parameters: list[nn.Parameter], processes: int) -> None:
    """Replace each gradient by its mean over the processes; through host memory, as they may share one device."""
    if processes == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).cpu()
    dist.all_reduce(flat)
    flat = (flat / processes).to(gradients[0].device)
    for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = mean.view_as(parameter)


def start_model(run: Run) -> tuple[nn.Module, str]:
    """The detector before its first step, and in words what its backbone starts from.

    Raises:
        IasvitError: `run.init` is no checkpoint of a mini detector, or of one with another backbone.
    """
    model = detectors.build(run.detector, run.seed)
    kind, backbone = detectors.split_name(run.detector)
    init = run.init
    if init is None and kind != "mask_rcnn":
        for folder in (run.out, zoo.CHECKPOINTS):
            path = detectors.checkpoint_path(f"mask_rcnn_{backbone}", folder)
            init = init or (path if path.is_file() else None)
    if init is not None:
        if detectors.split_name(init.stem)[1] != backbone:
            raise IasvitError(f"--init {init} has another backbone than {run.detector}")
        detectors.start_from_detector(model, init.stem, init)
        return model, init.stem
    if zoo.checkpoint_path(backbone).is_file():
        detectors.start_from_zoo(model, run.detector)
        return model, backbone
    return model, "random"


@torch.no_grad()
def measure(model: nn.Module, name: str, val_images: int) -> dict[str, float]:
    """COCO metrics, in percent, of a mini detector on the first validation scenes."""
    from iasvit.progress import Progress
    from tasks.detection.data import MiniCocoImages
    from tasks.detection.runner import evaluate

    images = MiniCocoImages(val_images)
    config = detectors.detector_config(name)
    return evaluate(model, images.dataset(config), images.metric(config.classes), Progress())


class Trainer:
    """One process's part of a run, at some step of it."""

    def __init__(self, run: Run, rank: int) -> None:
        self.run, self.rank = run, rank
        self.device = torch.device(run.device)
        self.step, self.seconds, self.losses = 0, 0.0, []
        self.interrupted = False
        self.state = _read_state(run)
        if self.state is None:
            self.model, self.origin = start_model(run)
        else:
            self.model, self.origin = detectors.build(run.detector), self.state["origin"]
            self.model.load_state_dict(self.state["model"])
        self.model = self.model.to(self.device).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.model, run.recipe, fused=self.device.type == "cuda")
        self.schedule = make_schedule(self.optimizer, run.recipe)
        if self.state is not None:
            self.optimizer.load_state_dict(self.state["optimizer"])
            self.step, self.seconds = self.state["step"], self.state["seconds"]
        self.state = None

    @property
    def progress(self) -> float:
        """How far the run is, from 0 to 1."""
        if self.run.steps is not None:
            return self.step / self.run.steps
        return min(1.0, self.seconds / self.run.max_seconds)

    def advance(self, scenes: PackedScenes, progress: float) -> Tensor:
        """One step on this process's scenes; returns its own loss. What is drawn at random depends on the step alone.

        Raises:
            IasvitError: the loss is not finite.
        """
        recipe, number = self.run.recipe, (self.run.seed, self.step, self.rank)
        torch.manual_seed(int(np.random.SeedSequence(number).generate_state(1)[0]))
        batch = to_batch(scenes, recipe.flip, np.random.default_rng(number))
        self.schedule.step_update(progress)
        data = self.model.data_preprocessor(batch, training=True)
        losses = self.model.loss(data["inputs"], data["data_samples"])
        loss, _ = self.model.parse_losses(losses)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.parameters, self.run.processes)
        norm = nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
        if not math.isfinite(float(norm)):
            raise IasvitError(f"training {self.run.detector} diverged at step {self.step}; lower --lr")
        self.optimizer.step()
        return loss.detach()

    def train(self) -> bool:
        """Train until the end, or as long as this invocation may; whether the end is reached."""
        run, began, saved, said = self.run, time.time(), time.time(), time.time()
        before, first = self.seconds, self.step
        prefetch = Prefetch(run, self.step, self.rank)
        stop = False
        with _signals() as signals:
            while not stop and self.progress < 1:
                # All processes must agree on the clock.
                progress = _agree(self.progress, run.processes)
                self.losses.append(float(self.advance(prefetch.take(self.step), progress)))
                self.step += 1
                now = time.time()
                self.seconds = _agree(before + now - began, run.processes)
                late = run.stop_after is not None and now - began >= run.stop_after
                stop = bool(_agree(float(late or bool(signals)), run.processes))
                if self.rank == 0 and now - said >= run.report_seconds:
                    said = now
                    rate = (self.step - first) * run.recipe.batch_size / (now - began)
                    logger.info(
                        f"{run.detector} {self.seconds:6.0f} s  step {self.step}  {self.progress:4.0%}  loss "
                        f"{np.mean(self.losses[-50:]):.3f}  {rate:.1f} images/s"
                    )
                if self.rank == 0 and now - saved >= run.save_seconds:
                    saved = now
                    self.save()
            self.interrupted = bool(signals)
        prefetch.close()
        if self.rank == 0:
            self.save()
        return self.progress >= 1

    def save(self) -> None:
        """Write what the run goes on from."""
        state = {
            "identity": json.dumps(self.run.identity, sort_keys=True),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "origin": self.origin,
        }
        self.run.out.mkdir(parents=True, exist_ok=True)
        with replacing(self.run.state_path) as temporary:
            torch.save(state, temporary)

    def finish(self, final: bool) -> dict[str, float]:
        """Round the weights as the checkpoint does, measure them, and write checkpoint and log line."""
        run = self.run
        stored = detectors.build(run.detector)
        stored.load_state_dict({key: value.to(torch.float32) for key, value in zoo.as_stored(self.model).items()})
        scores = measure(stored.to(self.device), run.detector, run.val_images)
        row = {
            "detector": run.detector,
            "seed": run.seed,
            "step": self.step,
            "images": self.step * run.recipe.batch_size,
            "seconds": round(self.seconds, 1),
            "train_loss": round(float(np.mean(self.losses[-200:])), 4) if self.losses else "",
            "bbox_mAP": scores["bbox_mAP"],
            "segm_mAP": scores["segm_mAP"],
            "val_images": run.val_images,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "start": self.origin,
            "final": int(final),
        }
        metadata = {key: value for key, value in row.items() if key != "seconds"}
        metadata |= {"recipe": dataclasses.asdict(run.recipe), "torch": torch.__version__}
        zoo.save(stored, detectors.checkpoint_path(run.detector, run.out), metadata)
        _log(run.out / LOG_NAME, row)
        logger.info(
            f"{run.detector} step {self.step}  bbox_mAP {scores['bbox_mAP']:.1f}  segm_mAP {scores['segm_mAP']:.1f}"
        )
        return scores


def _agree(value: float, processes: int) -> float:
    """The largest of the processes' values."""
    if processes == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return float(shared)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append to, so that a step is never cut in the middle."""
    received: list[int] = []
    old = {
        number: signal.signal(number, lambda got, _: received.append(got)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _read_state(run: Run) -> dict[str, Any] | None:
    if not run.state_path.is_file():
        return None
    state = torch.load(run.state_path, map_location="cpu", weights_only=True)
    before = json.loads(state["identity"])
    now = json.loads(json.dumps(run.identity))
    if before != now:
        changed = ", ".join(key for key in now if now[key] != before.get(key))
        raise IasvitError(
            f"{run.state_path} is of a run with other options ({changed}); give the same ones to go on with it, or "
            f"delete it"
        )
    return state


def _log(path: Path, row: dict[str, Any]) -> None:
    """Append one line to detectors.csv, with the heading in a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, LOG_COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def train(run: Run) -> bool:
    """One process of a run; whether the run has reached its end. torchrun's environment says which of several it is."""
    rank = 0
    if run.processes > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        rank = dist.get_rank()
    try:
        trainer = Trainer(run, rank)
        done = trainer.train()
    finally:
        if run.processes > 1:
            dist.destroy_process_group()
    if rank == 0:
        trainer.finish(final=done)
        if done:
            run.state_path.unlink(missing_ok=True)
    if trainer.interrupted and run.processes > 1:
        sys.exit(INTERRUPTED)  # the launcher, told to stop too, would not take what is returned
    return done


def _train_process(run: Run) -> None:
    print_logs(logging.INFO)
    try:
        train(run)
    except IasvitError as error:
        logger.error("%s: %s", run.detector, error)
        sys.exit(2)


def run_all(run: Run) -> None:
    """Train in as many processes as asked for.

    Raises:
        IasvitError: bad input, or a process that failed.
    """
    if run.recipe.batch_size % run.processes:
        raise IasvitError(f"--batch-size {run.recipe.batch_size} is no multiple of --processes {run.processes}")
    if run.device.startswith("cuda") and not torch.cuda.is_available():
        raise IasvitError(f"--device {run.device}: this machine has no usable CUDA device; use --device cpu")
    _read_state(run)  # says what is wrong before processes start
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
        elastic_launch(config, _train_process)(run)
    except SignalException:  # which the processes got too
        logger.warning("interrupted; the same command again goes on where this one stopped")
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
        "--max-seconds", type=float, help="of training, all invocations together; the learning rate reaches 0 then"
    )
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="leave, to be resumed, after this long")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--processes", type=int, default=1, help="that share a batch, and the device")
    parser.add_argument("--out", type=Path, default=zoo.CHECKPOINTS, help="folder of checkpoint, state and log")
    parser.add_argument("--init", type=Path, help="checkpoint DETECTOR.safetensors to start from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--val-images", type=int, default=500)
    for field in ("batch_size", "lr", "weight_decay"):
        default = getattr(Recipe, field)
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args(arguments)
    for name in ("steps", "max_seconds", "stop_after", "processes", "val_images", "batch_size", "lr"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} is {value}, but must be above 0")
    return Run(
        detector=options.detector,
        recipe=Recipe(lr=options.lr, weight_decay=options.weight_decay, batch_size=options.batch_size),
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
    """Exit status: 0, or 2 for bad input. Ctrl-C ends a run after its step, with its state saved."""
    print_logs(logging.INFO)
    try:
        run_all(parse(arguments))
    except IasvitError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
