"""What training a backbone and training a detector share: options, processes, the log, checkpoints."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import fcntl
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from iasvit.cli import BAD_INPUT, INTERRUPTED
from iasvit.errors import IasvitError
from tasks.command import print_logs
from tasks.mini import zoo
from tasks.studies.training.recipes import Recipe

logger = logging.getLogger(__name__)
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)
RECIPE_OPTIONS = {"batch_size": int, "lr": float, "weight_decay": float}
POSITIVE = (
    "steps", "epochs", "max_seconds", "stop_after", "train_images", "val_images", "evaluations", "processes",
    "batch_size", "lr",
)  # fmt: skip


# ---- command line ----------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that both commands have: device, folder, seed, and what replaces a recipe's values."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--out", type=Path, default=zoo.CHECKPOINTS, help="folder for the checkpoints and the log")
    parser.add_argument("--seed", type=int, default=0)
    for name, kind in RECIPE_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="in place of the recipe's value")


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options, of which counts, times and the learning rate are positive; else the parser exits with status 2."""
    options = parser.parse_args(arguments)
    for name in POSITIVE:
        value = getattr(options, name, None)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} is {value}, but must be above 0")
    return options


def changed(recipe: AnyRecipe, options: argparse.Namespace) -> AnyRecipe:
    """The recipe with what the options give in place of its own values."""
    given = {name: getattr(options, name) for name in RECIPE_OPTIONS}
    return dataclasses.replace(recipe, **{name: value for name, value in given.items() if value is not None})


def check_device(device: str) -> None:
    """Raises IasvitError where a CUDA device is named and there is none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise IasvitError(f"--device {device}: this machine has no usable CUDA device; use --device cpu")


def exit_status(train: Callable[[], None], interrupted: str) -> int:
    """Run a command: 0, 2 with one sentence for bad input, 130 with `interrupted` for Ctrl-C."""
    print_logs(logging.INFO)
    try:
        train()
    except IasvitError as error:
        logger.error("%s", error)
        return BAD_INPUT
    except KeyboardInterrupt:
        logger.warning("%s", interrupted)
        return INTERRUPTED
    return 0


def in_process(name: str, train: Callable[..., Any], *arguments: Any) -> None:
    """What one process of several does; the model's name is in front of its message, and its status is that above."""
    print_logs(logging.INFO)
    torch.set_num_threads(1)
    try:
        train(*arguments)
    except IasvitError as error:
        logger.error("%s: %s", name, error)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:  # the process that started this one has the message
        sys.exit(INTERRUPTED)


# ---- log and checkpoints ---------------------------------------------------------------------------------------------


class Report:
    """Says now and then how far a run is, and how many images a second it has trained on since the line before."""

    def __init__(self, name: str, batch_size: int, every: float, step: int) -> None:
        self.name, self.batch_size, self.every = name, batch_size, every
        self.time, self.step = time.time(), step  # of the line before

    def __call__(
        self, step: int, seconds: float, progress: float, optimizer: torch.optim.Optimizer, loss: float
    ) -> None:
        """Log a line where `every` seconds have gone by since the last; the run has trained for `seconds`."""
        now = time.time()
        if now - self.time < self.every:
            return
        lr = float(optimizer.param_groups[0]["lr"])  # of CUDA graphs a tensor; reading it waits for the device
        rate = (step - self.step) * self.batch_size / (now - self.time)
        logger.info(
            f"{self.name:7s} {seconds:5.0f} s  step {step}  {progress:4.0%}  lr {lr:.1e}  loss {loss:.3f}  "
            f"{rate:.1f} images/s"
        )
        self.time, self.step = now, step


def device_name(device: torch.device) -> str:
    """What the log says of the device: "cpu", or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def copy_rounded(model: nn.Module, stored: nn.Module) -> None:
    """Give `stored` the weights that a checkpoint of `model` holds: rounded to fp16."""
    stored.load_state_dict({key: value.float() for key, value in zoo.as_stored(model).items()})


def record(stored: nn.Module, path: Path, log: Path, recipe: Recipe, row: dict[str, Any], **metadata: Any) -> None:
    """Write a checkpoint, and a line of the log that says how good it is.

    Args:
        stored: model to save.
        path: of the checkpoint.
        log: CSV file.
        recipe: goes into the checkpoint's metadata, as the row does but for its time: the same run gives the same file.
        row: column → value, in the order of the columns.
        metadata: more of it.
    """
    metadata |= {name: value for name, value in row.items() if name != "seconds"}
    metadata |= {"recipe": dataclasses.asdict(recipe), "torch": torch.__version__}
    zoo.save(stored, path, metadata)
    append_row(log, row)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a line to a CSV file, with the heading in a new one; whole even where several processes write at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # else two first writers would both see an empty file
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if file.seek(0, os.SEEK_END) == 0:
            writer.writeheader()
        writer.writerow(row)
