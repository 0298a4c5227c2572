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
import fcntl
import logging
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iasvit.errors import IasvitError
from tasks.command import print_logs
from tasks.mini import zoo
from tasks.studies.optimization import make_optimizer, make_schedule

logger = logging.getLogger(__name__)
VAL_IMAGES = 5000
LOG_NAME = "training.csv"
LOG_COLUMNS = (
    "backbone",
    "seed",
    "step",
    "epoch",
    "seconds",
    "train_loss",
    "top1",
    "images",
    "device",
    "start",
    "final",
)


@dataclass(frozen=True)
class Recipe:
    """How one backbone is trained. AdamW, linear warm-up, cosine to 0; no decay on norms, biases and embeddings.

    Real backbones' post-LayerNorm channels differ in range by factors of 2 to 12; a high learning rate kept up for
    long, and LayerNorm weights free of decay, is what grows such channels here.
    """

    lr: float = 1.5e-3
    weight_decay: float = 0.05
    batch_size: int = 256
    warmup: float = 0.05  # fraction of the run
    label_smoothing: float = 0.05
    clip: float = 1.0  # gradient norm
    beta2: float = 0.99
    shift: int = 4  # random translation, pixels either way, edges reflected
    flip: bool = True
    jitter: float = 0.2  # brightness, contrast and colour gains, relative
    seed: int = 0  # added to --seed, so that vit_s and deit_s part ways


RECIPES: dict[str, Recipe] = {
    # The ViT recipe is AugReg's in small: less augmentation, more decay, plain labels.
    "vit_s": Recipe(lr=1.0e-3, weight_decay=0.2, label_smoothing=0.0, shift=2, jitter=0.1, seed=100),
    "vit_b": Recipe(lr=8e-4, weight_decay=0.2, label_smoothing=0.0, shift=2, jitter=0.1, seed=100),
    "deit_t": Recipe(lr=1.5e-3),
    "deit_s": Recipe(lr=1.2e-3),
    "deit_b": Recipe(lr=1.0e-3),
    "swin_t": Recipe(lr=1.2e-3),
    "swin_s": Recipe(lr=1.0e-3),
    "swin_b": Recipe(lr=1.0e-3),
}


@dataclass(frozen=True)
class Run:
    """One training run: what `train` needs besides the data. Exactly one of steps, epochs and deadline is not None."""

    backbone: str
    recipe: Recipe
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


# ---- data ----------------------------------------------------------------------------------------------------------


def _render_into(folder: Path, split: str, start: int, count: int) -> None:
    from tasks.mini import scenes

    images, labels = scenes.render_images(split, start, count, zoo.IMAGE_SIZE)
    np.load(folder / f"{split}.images.npy", mmap_mode="r+")[start : start + count] = images
    np.load(folder / f"{split}.labels.npy", mmap_mode="r+")[start : start + count] = labels


def render_split(folder: Path, split: str, count: int, workers: int, chunk: int = 500) -> None:
    """Render images 0 … count - 1 of a split into `folder`, as <split>.images.npy (uint8 n×H×W×3) and .labels.npy.

    Files that hold that many images already are kept, so that one folder serves several invocations.
    """
    done = folder / f"{split}.{count}.done"
    if done.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shape = (count, zoo.IMAGE_SIZE, zoo.IMAGE_SIZE, 3)
    np.lib.format.open_memmap(folder / f"{split}.images.npy", mode="w+", dtype=np.uint8, shape=shape)
    np.lib.format.open_memmap(folder / f"{split}.labels.npy", mode="w+", dtype=np.int64, shape=(count,))
    starts = range(0, count, chunk)
    if workers <= 1:
        for start in starts:
            _render_into(folder, split, start, min(chunk, count - start))
    else:
        with ProcessPoolExecutor(workers) as pool:
            jobs = [pool.submit(_render_into, folder, split, start, min(chunk, count - start)) for start in starts]
            for job in jobs:
                job.result()
    done.touch()


def open_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (uint8 n×H×W×3) and labels (int64 n) that `render_split` wrote, memory-mapped."""
    return np.load(folder / f"{split}.images.npy", mmap_mode="r"), np.load(folder / f"{split}.labels.npy")


def to_device(images: np.ndarray, device: torch.device, chunk: int = 20_000) -> Tensor:
    """uint8 n×H×W×3 in a file map → uint8 n×3×H×W on the device, a chunk at a time."""
    n, height, width, channels = images.shape
    whole = torch.empty((n, channels, height, width), dtype=torch.uint8, device=device)
    for start in range(0, n, chunk):
        part = torch.from_numpy(np.array(images[start : start + chunk])).to(device)
        whole[start : start + chunk] = part.permute(0, 3, 1, 2)
    return whole


def permutations(n: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless index batches (int64, CPU), epoch after epoch of shuffled images; what does not fill a batch is left."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=generator)
        yield from order[: n // batch * batch].view(-1, batch)


class Batches(nn.Module):
    """Augments and normalises batches of resident images.

    Args:
        images: uint8 n×3×H×W.
        mean, std: three floats each, for images in [0, 1].
    """

    def __init__(self, images: Tensor, recipe: Recipe, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.images = images
        self.recipe = recipe
        self.register_buffer("mean", torch.tensor(mean, device=images.device).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, device=images.device).view(1, 3, 1, 1))
        self.register_buffer("channel", torch.arange(3, device=images.device).view(1, 3, 1, 1))
        self.register_buffer("position", torch.arange(images.shape[-1], device=images.device))

    def forward(self, index: Tensor) -> Tensor:
        """Image numbers (int64 b) → augmented, normalised images (float32 b×3×H×W); random state: the global one."""
        recipe, size, b, device = self.recipe, self.images.shape[-1], len(index), index.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, device=device) * 2 - 1

        offset = (uniform(2, b, 1) * (recipe.shift + 0.5)).round().long()
        rows, columns = self.position + offset[0], self.position + offset[1]
        if recipe.flip:
            columns = torch.where(uniform(b, 1) > 0, columns, size - 1 - columns)
        rows, columns = (size - 1 - (size - 1 - axis.abs()).abs() for axis in (rows, columns))  # reflect at the edges
        x = self.images[index.view(b, 1, 1, 1), self.channel, rows.view(b, 1, size, 1), columns.view(b, 1, 1, size)]
        x = x.float() / 255
        contrast = 1 + recipe.jitter * uniform(b, 1, 1, 1)
        gain = 1 + recipe.jitter * (uniform(b, 1, 1, 1) + 0.5 * uniform(b, 3, 1, 1))
        level = x.mean((1, 2, 3), keepdim=True)
        x = (((x - level) * contrast + level) * gain).clamp(0, 1)
        return (x - self.mean) / self.std


# ---- training ------------------------------------------------------------------------------------------------------


def _compile_blocks(model: nn.Module) -> None:
    """Compile block by block: equal blocks share one compilation, so 24 of them take seconds, not minutes."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # Swin: two kinds of block in each of four stages
    torch._dynamo.config.automatic_dynamic_shapes = False
    for module in model.modules():
        if type(module).__name__ in ("Block", "SwinTransformerBlock"):
            module.compile(dynamic=False)


class Stepper:
    """One training step: batch, loss, gradient, AdamW. On CUDA captured as one graph, which costs one launch.

    Capture or compilation that fails falls back to plain steps and says so.
    """

    WARMUP = 5  # plain steps before capture: compilation and the optimizer's state happen there

    def __init__(self, model: nn.Module, batches: Batches, labels: Tensor, run: Run) -> None:
        self.model, self.batches, self.labels, self.run = model, batches, labels, run
        recipe, self.cuda = run.recipe, labels.is_cuda
        self.index = torch.zeros(recipe.batch_size, dtype=torch.int64, device=labels.device)
        self.loss = torch.zeros((), device=labels.device)  # of the last step
        kind = {"fused": True, "capturable": True} if self.cuda else {}
        self.optimizer = make_optimizer(model, recipe, betas=(0.9, recipe.beta2), **kind)
        self.schedule = make_schedule(self.optimizer, recipe)
        # A learning rate in a tensor is read by the captured graph at each replay.
        self.lr = torch.zeros((), device=labels.device)
        self.parameters = list(model.parameters())
        self.cuda_graph: torch.cuda.CUDAGraph | None = None
        self.count = 0
        if self.cuda and run.compile:
            _compile_blocks(model)

    def _step(self) -> None:
        images, labels = self.batches(self.index), self.labels[self.index]
        # The cache of cast weights would outlive a captured step, hence cache_enabled=False.
        half = torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if self.cuda else nullcontext()
        with half:
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.run.recipe.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.run.recipe.clip)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.synchronize()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                self._step()
            self.cuda_graph = graph
        except RuntimeError as error:
            logger.warning(
                "%s: CUDA graph capture failed, going on without: %s", self.run.backbone, str(error).splitlines()[0]
            )

    def __call__(self, index: Tensor, progress: float) -> None:
        """Train on the images of these numbers (int64 batch_size, CPU); the run is at `progress`, from 0 to 1."""
        self.index.copy_(index, non_blocking=True)
        self.schedule.step_update(progress)
        if self.cuda:
            self.lr.fill_(self.optimizer.param_groups[0]["lr"])
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr
        if self.cuda and self.run.graph and self.count == self.WARMUP:
            self._capture()
        if self.cuda_graph is not None:
            self.cuda_graph.replay()
        elif self.cuda and self.count < self.WARMUP:
            stream = torch.cuda.Stream()  # capture wants what it replays to have run on a side stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._warm()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            self._step()
        self.count += 1

    def _warm(self) -> None:
        try:
            self._step()
        except Exception as error:
            if not self.run.compile or self.count > 0:
                raise
            logger.warning(
                "%s: torch.compile failed, going on without: %s", self.run.backbone, str(error).splitlines()[0]
            )
            for module in self.model.modules():
                module._compiled_call_impl = None  # what Module.compile sets
            self._step()


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


def _log(run: Run, row: dict[str, object]) -> None:
    """Append one line to training.csv, whole even where several backbones' processes write at once."""
    run.out.mkdir(parents=True, exist_ok=True)
    line = ",".join(str(row[column]) for column in LOG_COLUMNS) + "\n"
    file = os.open(run.out / LOG_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)  # else two first writers would both see an empty file
        if os.fstat(file).st_size == 0:
            line = ",".join(LOG_COLUMNS) + "\n" + line
        os.write(file, line.encode())
    finally:
        os.close(file)


def _evaluate(
    run: Run, model: nn.Module, stored: nn.Module, val: tuple[Tensor, Tensor], row: dict[str, object]
) -> float:
    """Round the weights as the checkpoint does, measure them, and write checkpoint and log line; top-1 in percent."""
    stored.load_state_dict({key: value.float() for key, value in zoo.as_stored(model).items()})
    top1 = accuracy(stored, *val)
    row = row | {"backbone": run.backbone, "seed": run.seed, "top1": round(top1, 2), "device": _device_name(run.device)}
    row["start"] = "random" if run.init is None else run.init.stem
    _log(run, row)
    # No times here: the same run gives the same file.
    metadata = {key: value for key, value in row.items() if key != "seconds"}
    metadata |= {"recipe": dataclasses.asdict(run.recipe), "val_images": len(val[0]), "torch": torch.__version__}
    zoo.save(stored, zoo.checkpoint_path(run.backbone, run.out), metadata)
    logger.info(
        f"{run.backbone:7s} step {row['step']}  top-1 {top1:.2f} on {len(val[0])} validation images, "
        f"loss {row['train_loss']}"
    )
    return top1


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


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
    """
    device, recipe = torch.device(run.device), run.recipe
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed = run.seed + recipe.seed
        torch.manual_seed(seed)
        train_images, train_labels = open_split(data, "train")
        images, labels = to_device(train_images, device), torch.from_numpy(train_labels).to(device)
        val_images, val_labels = open_split(data, "val")
        val = to_device(val_images, device), torch.from_numpy(val_labels).to(device)
        if len(images) < recipe.batch_size:
            raise IasvitError(
                f"--train-images {len(images)} do not fill a batch of {recipe.batch_size} (--batch-size); give more"
            )
        model = zoo.build(run.backbone, seed)
        if run.init is not None:
            zoo.load_weights(model, run.init)
        model.to(device).train()
        stored = zoo.build(run.backbone, seed).to(device)  # holds the rounded weights for evaluation
        batches = Batches(images, recipe, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
        step_once = Stepper(model, batches, labels, run)
        per_epoch = len(images) // recipe.batch_size
        steps = math.ceil(run.epochs * per_epoch) if run.epochs is not None else run.steps
        clock, start = Clock(steps, run.deadline), time.time()
        progress, evaluated, top1, said, said_step = 0.0, 0, 0.0, start, 0
        losses: list[float] = []
        for step, index in enumerate(permutations(len(images), recipe.batch_size, seed), 1):
            step_once(index, progress)
            if step % 10 == 0 or step == steps:
                losses.append(float(step_once.loss))  # waits for the device: the clock reads finished work
                if not math.isfinite(losses[-1]):
                    raise IasvitError(f"training {run.backbone} diverged at step {step}: loss {losses[-1]}; lower --lr")
                progress = clock.progress(step)
            elif steps is not None:
                progress = clock.progress(step)
            now = time.time()
            if losses and now - said >= run.report_seconds:
                rate = (step - said_step) * recipe.batch_size / (now - said)
                logger.info(
                    f"{run.backbone:7s} {now - start:5.0f} s  step {step}  {progress:4.0%}  "
                    f"lr {float(step_once.optimizer.param_groups[0]['lr']):.1e}  loss {losses[-1]:.3f}  "
                    f"{rate:.0f} images/s"
                )
                said, said_step = now, step
            if int(progress * run.evaluations) > evaluated or progress >= 1:
                evaluated = int(progress * run.evaluations)
                row = {
                    "step": step,
                    "epoch": round(step / per_epoch, 2),
                    "seconds": round(now - start, 1),
                    "train_loss": round(float(np.mean(losses or float(step_once.loss))), 4),
                    "images": len(images),
                    "final": int(progress >= 1),
                }
                losses.clear()
                top1 = _evaluate(run, model, stored, val, row)
                if progress >= 1:
                    break
    return top1


# ---- command line --------------------------------------------------------------------------------------------------


def _train_in_process(run: Run, data: Path) -> None:
    print_logs(logging.INFO)
    torch.set_num_threads(1)  # the device does the work
    try:
        train(run, data)
    except IasvitError as error:
        logger.error("%s: %s", run.backbone, error)
        sys.exit(2)


def _train_side_by_side(runs: list[Run], data: Path) -> None:
    """One process a backbone on one device. Those that fail are named once all have ended."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // len(runs))))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_train_in_process, args=(run, data)) for run in runs]
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
        help="train until this long after the command began, rendering included; "
        "the learning rate reaches 0 then (the last evaluation comes on top)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--out", type=Path, default=zoo.CHECKPOINTS, help="folder of checkpoints and training.csv")
    parser.add_argument("--data", type=Path, help="folder to keep the rendered scenes in; a temporary one otherwise")
    parser.add_argument("--init", type=Path, help="checkpoint of the one backbone to start from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-images", type=int, default=200_000)
    parser.add_argument("--val-images", type=int, default=VAL_IMAGES)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that render")
    parser.add_argument("--evaluations", type=int, default=4, help="spread over the run, the last at its end")
    for field in ("batch_size", "lr", "weight_decay"):
        parser.add_argument(
            f"--{field.replace('_', '-')}", type=type(getattr(Recipe, field)), help="instead of the recipe's"
        )
    parser.add_argument("--no-compile", action="store_true", help="CUDA: do not compile the blocks")
    parser.add_argument("--no-graph", action="store_true", help="CUDA: do not capture the step as a CUDA graph")
    options = parser.parse_args(arguments)
    for name in ("steps", "epochs", "max_seconds", "train_images", "val_images", "evaluations", "batch_size"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} is {value}, but must be above 0")
    return options


def run_all(options: argparse.Namespace) -> None:
    """Render the data once, then train every backbone asked for: side by side on CUDA, one by one on a CPU."""
    deadline = time.time() + options.max_seconds if options.max_seconds is not None else None
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise IasvitError(f"--device {options.device}: this machine has no usable CUDA device; use --device cpu")
    names = list(dict.fromkeys(options.backbone))
    if options.init is not None:
        if len(names) > 1:
            raise IasvitError(f"--init is of one backbone, but {len(names)} are asked for: {', '.join(names)}")
        zoo.load_weights(zoo.build(names[0]), options.init)  # says what is wrong before anything is rendered
    changes = {key: getattr(options, key) for key in ("batch_size", "lr", "weight_decay")}
    changes = {key: value for key, value in changes.items() if value is not None}
    runs = [
        Run(
            backbone=name,
            recipe=dataclasses.replace(RECIPES[name], **changes),
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
    print_logs(logging.INFO)
    try:
        run_all(parse(arguments))
    except IasvitError as error:
        logger.error("%s", error)
        return 2
    except KeyboardInterrupt:
        logger.warning("interrupted; checkpoints hold the last evaluation")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
