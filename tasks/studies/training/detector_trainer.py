"""A mini detector's training: a run that is stopped after any step goes on from there to the same weights."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from iasvit.errors import IasvitError, reason
from iasvit.files import replacing
from tasks.mini import detectors, zoo
from tasks.mini.detection import PackedScenes
from tasks.studies.training.common import Report
from tasks.studies.training.detector_data import Prefetch, scenes_of_step, to_batch
from tasks.studies.training.optimization import make_optimizer, make_schedule
from tasks.studies.training.recipes import Recipe


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


class Trainer:
    """One process's part of a run, at some step of it."""

    def __init__(self, run: Run, rank: int) -> None:
        self.run, self.rank = run, rank
        self.device = torch.device(run.device)
        self.step, self.seconds, self.losses = 0, 0.0, []
        self.interrupted = False
        state = read_state(run)
        if state is None:
            self.model, self.origin = start_model(run)
        else:
            self.model, self.origin = detectors.build(run.detector), state["origin"]
            self.model.load_state_dict(state["model"])
        self.model = self.model.to(self.device).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.model, run.recipe, fused=self.device.type == "cuda")
        self.schedule = make_schedule(self.optimizer, run.recipe)
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    @property
    def progress(self) -> float:
        """How far the run is, from 0 to 1."""
        if self.run.steps is not None:
            return self.step / self.run.steps
        return min(1.0, self.seconds / self.run.max_seconds)

    def scenes(self, step: int) -> PackedScenes:
        """This process's scenes in a step."""
        run = self.run
        return scenes_of_step(run.seed, step, run.recipe.batch_size, self.rank, run.processes)

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
        run, start, last_save, seconds_before = self.run, time.time(), time.time(), self.seconds
        report = Report(run.detector, run.recipe.batch_size, run.report_seconds, self.step)
        prefetch = Prefetch(self.scenes, self.step)
        stop = False
        with _signals() as signals:
            while not stop and self.progress < 1:
                # All processes must agree on the clock.
                progress = _agree(self.progress, run.processes)
                self.losses.append(float(self.advance(prefetch.take(self.step), progress)))
                self.step += 1
                now = time.time()
                self.seconds = _agree(seconds_before + now - start, run.processes)
                late = run.stop_after is not None and now - start >= run.stop_after
                stop = bool(_agree(float(late or bool(signals)), run.processes))
                if self.rank == 0:
                    loss = float(np.mean(self.losses[-50:]))
                    report(self.step, self.seconds, self.progress, self.optimizer, loss)
                    if now - last_save >= run.save_seconds:
                        last_save = now
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


def read_state(run: Run) -> dict[str, Any] | None:
    """What an interrupted run goes on from; None where there is nothing.

    Raises:
        IasvitError: it is of a run with other options, or cannot be read.
    """
    if not run.state_path.is_file():
        return None
    try:
        state = torch.load(run.state_path, map_location="cpu", weights_only=True)
        before = json.loads(state["identity"])
    except Exception as error:  # whatever torch's unpickler raises on a damaged file
        raise IasvitError(
            f"{run.state_path} cannot be read ({reason(error)}); delete it to start the run again"
        ) from None
    now = json.loads(json.dumps(run.identity))
    if before != now:
        changed = ", ".join(key for key in now if now[key] != before.get(key))
        raise IasvitError(
            f"{run.state_path} is of a run with other options ({changed}); give the same ones to go on with it, or "
            f"delete it"
        )
    return state


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
