"""What tests/test_distributed.py runs in one process and in two."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import harness_fakes
import tiny_models
import torch
from torch import Tensor, nn

import iasvit
from iasvit import distributed, methods, sos, steps
from iasvit.benchmark.harness import Cell, exit_status, run_cells
from iasvit.benchmark.results import ResultStore
from iasvit.benchmark.task import EMBEDDED, DataSet
from iasvit.calibration import ActivationStore
from iasvit.cli import main, make_app
from iasvit.errors import IasvitError
from iasvit.launch import launched
from iasvit.progress import Progress
from iasvit.reconstruction import optimize
from tasks.classification.setup import Setup
from tasks.imagenet import ImageNetTask

torch.set_num_threads(1)
DEVICE = os.environ.get("IASVIT_TEST_DEVICE", "cpu")
LEARNING = {"iterations": 4, "batch_size": 6, "lr": 1e-3}
# What is drawn within a step is drawn by each process, so nothing is.
BLOCKWISE = {"iterations": 4, "batch_size": 6, "lr": 0.1, "scale_lr": 1e-2, "drop": 0.0, "initialisation": "observed"}
STRAIGHT = {**BLOCKWISE, "lr": 1e-2}
OPTIONS: dict[str, dict[str, Any]] = {
    "ias_vit": LEARNING,
    "adalog": {"rounds": 1, "steps": 1},
    "adalog_retrained": {**BLOCKWISE, "rounds": 1, "steps": 1},
    "aphq_vit": {**BLOCKWISE, "relu_iterations": 4},
    "brecq": BLOCKWISE,
    "fima_q": BLOCKWISE,
    "glf_q": {**STRAIGHT, "rotation": False, "relu_iterations": 4},
    "ls_vit": BLOCKWISE,
    "qdrop": BLOCKWISE,
    "unison": {
        **STRAIGHT,
        **{"initialisation": "propagated", "init_size": 8},
        **{"joint_iterations": 4, "joint_batch_size": 6, "crop": 1.0, "flip": False},
    },
}


# ---- quantize and evaluate -------------------------------------------------------------------------------------------


class Images:
    """37 images in batches of 8: five batches, the last of five images."""

    num_classes: ClassVar[dict[int, None]] = {10: None}
    fingerprint = "tiny"

    def __len__(self) -> int:
        return 38  # one cannot be read

    def prepare(self) -> None:
        """Nothing."""

    def batches(self, config: dict[str, Any], which: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        images, labels = tiny_models.images(37, seed=5), torch.arange(37) % 10
        for at in torch.arange(37).split(8)[which]:
            yield images[at], labels[at], at


class Models:
    """A tiny ViT."""

    def load(self, name: str) -> nn.Module:
        return tiny_models.vit()

    def config(self, name: str) -> dict[str, Any]:
        return {}


def task(device: torch.device) -> ImageNetTask:
    return ImageNetTask(Setup(DataSet("tiny", EMBEDDED), Images(), Models(), device))


LEARNT = (("vit", "ias_vit"), ("swin", "ias_vit"))
LEARNT_BY_BLOCK = tuple(("vit", name) for name, options in OPTIONS.items() if "drop" in options)
CASES = (
    *(("vit", name) for name in ("rtn", "minmax", "base_ptq", "ptq4vit", "repq_vit")),
    *(("vit", name) for name in ("gptq", "gptaq", "erq", "adalog")),
    ("swin", "ptq4vit"),
    *LEARNT,
    *LEARNT_BY_BLOCK,
)


def quantize_and_score(folder: Path, cases: tuple[tuple[str, str], ...] = CASES) -> None:
    """Methods on tiny models; the states and metrics of each process go to files."""
    with launched():
        device = torch.device(distributed.own_device(DEVICE))
        for family, method in cases:
            model = tiny_models.MODELS[family]().to(device)
            quantized = iasvit.quantize(model, tiny_models.images(), "W4A4", method, **OPTIONS.get(method, {}))
            found: dict[str, Any] = {"state": {name: value.cpu() for name, value in quantized.state_dict().items()}}
            if family == "vit":
                on = task(device)
                with torch.no_grad():
                    reference, outputs = (on.predict("vit", network, Progress()) for network in (model, quantized))
                found["scores"] = on.score(outputs, reference)
                found["own"] = len(outputs)
            torch.save(found, folder / f"{family}-{method}-{distributed.rank()}.pt")


def in_halves(folder: Path) -> None:
    """What is learnt by one process that adds up the gradients of the two halves of each batch, as two processes do."""

    def gradients(self: steps._Step) -> None:
        indices = self.batches.index_select(0, self.number)[0]
        for half in (indices[0::2], indices[1::2]):
            self.loss(half, self.number[0].to(torch.float32)).backward(self.share * (len(half) / len(indices)))

    steps._Step._gradients = gradients
    quantize_and_score(folder, (*LEARNT, *LEARNT_BY_BLOCK))


def in_graphs(folder: Path) -> None:
    """What is learnt where both halves of a step are captured at the third: all that a capture does but itself."""

    class Captured:
        def __init__(self) -> None:
            self.count = 0

        def __call__(self, function: Callable[[], None], prepare: Callable[[], None]) -> None:
            if self.count == steps._Step.EAGER:
                prepare()
            function()
            self.count += 1

    plain = steps._Step.__init__

    def begin(self: steps._Step, *arguments: Any) -> None:
        plain(self, *arguments)
        self.graphs = [Captured(), Captured()]

    steps._Step.__init__ = begin
    quantize_and_score(folder, LEARNT)


def learn(folder: Path) -> None:
    """Steps on batches of 6 and of 1, which leaves a process without an image; and passes over images of two sizes."""
    with launched():
        found = {}
        for batch_size in (6, 1):
            torch.manual_seed(0)
            layer = nn.Linear(5, 3).double().float()
            inputs, targets = ActivationStore(), ActivationStore()
            inputs.append(torch.randn(11, 5))
            targets.append(torch.randn(11, 3))
            settings = {"iterations": 7, "batch_size": batch_size, "lr": 1e-2}
            optimize(layer, list(layer.parameters()), inputs, targets, seed=3, **settings)
            found[batch_size] = {"weight": layer.weight.detach(), "bias": layer.bias.detach()}
        store = ActivationStore(memory_budget=300, folder=folder)
        for size in (2, 2, 3, 3, 3, 2):
            store.append(torch.arange(float(size)).expand(1, size) + len(store))
        doubled = store.map(lambda x: (x, 2 * x, x.sum(dim=1)), 2, "double")
        again = doubled.map(lambda x: (x[1] + x[2][:, None], *x[1:]), 2, "again")
        found["passes"] = [again.gather([image]) for image in range(6)]
        found["shared"] = again.parts[1] is doubled.parts[1]
        torch.save(found, folder / f"{distributed.rank()}.pt")


# ---- the command -----------------------------------------------------------------------------------------------------


@dataclass
class Odd(harness_fakes.Noise):
    """Goes wrong as `how` says; the number in front of it is the process in which it does, without one in all."""

    how: str = ""

    name: ClassVar[str] = "odd"

    def after(self, step: int) -> None:
        """Called after a step."""
        where, _, how = self.how.rpartition("-")
        if step != 1 or where not in ("", str(distributed.rank())):
            return
        if how == "fails":
            raise IasvitError(f"layer 'fc' outputs NaN{' here' if where else ''}")
        if how == "breaks":
            raise RuntimeError("two\nlines")
        if how in ("interrupt", "kill") and not Path(how).exists():
            time.sleep(0.5)  # the other process waits for this one by now
            Path(how).touch()
            os.kill(os.getpid(), signal.SIGINT if how == "interrupt" else signal.SIGKILL)


def command(folder: Path, *hows: str, bits: str = "W4A4", **options: Any) -> None:
    """The command line of a task with cells of `Odd` and one of `rtn`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    methods._entries = lambda: {
        **harness_fakes.ENTRIES,
        "odd": methods.EntryPoint("odd", "several_processes:Odd", methods.GROUP),
    }
    app = make_app()

    @app.command()
    def go() -> None:
        cells = [Cell("tiny", "odd", bits, 0, 4, (("how", how),)) for how in hows]
        cells.append(Cell("tiny", "rtn", "W4A4", 0, 4))
        fake = harness_fakes.FakeTask()
        rows = run_cells(fake, cells, ResultStore("runs"), checkpoint_root=Path("checkpoints"), **options)
        Path(f"rows-{distributed.rank()}").write_text(repr([(row["status"], row["time"]) for row in rows]))
        print(f"rows: {len(rows)}, evaluated: {fake.predicted}")
        raise SystemExit(exit_status(rows))

    sys.argv = ["iasvit"]
    main(app)


def twice(folder: Path) -> None:
    """Two starts, one after the other."""
    for _ in range(2):
        try:
            command(folder, "fine", save=Path("models"))
        except SystemExit as ended:
            if ended.code:
                raise


def fails_in_both(folder: Path) -> None:
    command(folder, "fails", "breaks")


def fails_in_one(folder: Path) -> None:
    command(folder, "1-fails")


def breaks_in_first(folder: Path) -> None:
    command(folder, "0-breaks")


def killed(folder: Path) -> None:
    command(folder, "1-kill")


def interrupted(folder: Path) -> None:
    command(folder, "0-interrupt")


def bad_input(folder: Path) -> None:
    command(folder, "fine", bits="W9A9")


def waits_for_ever(folder: Path) -> None:
    """One process fails where the other is in the midst of a collective operation."""

    app = make_app()

    @app.command()
    def go() -> None:
        if distributed.rank() == 1:
            time.sleep(0.5)
            raise IasvitError("file 'x' is not there")
        distributed.add_up(torch.ones(3))

    sys.argv = ["iasvit"]
    main(app)


def different(folder: Path) -> None:
    """The processes are given different things."""
    with launched():
        images = tiny_models.images(4, seed=distributed.rank())
        for model, given in ((tiny_models.vit(distributed.rank()), images[:2] * 0), (tiny_models.vit(), images)):
            try:
                iasvit.quantize(model, given, "W4A4", "minmax")
            except IasvitError as error:
                print(error)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def resumed(folder: Path) -> None:
    """A run that one process breaks off in a block, and the run that goes on from its checkpoint."""
    model, images = tiny_models.vit(), tiny_models.images()
    stage, at, left = sos.IASViT.optimize_stage, [], [IasvitError("broken off")]

    def broken(self: sos.IASViT, job: Any, number: int, iterations: int) -> None:
        at.append(job.segment.name)
        if job.segment.name == "blocks.1" and left:
            raise left.pop()
        stage(self, job, number, iterations)

    sos.IASViT.optimize_stage = broken
    with launched():
        checkpoint = folder / "checkpoint"
        try:
            iasvit.quantize(model, images, "W4A4", progress=Progress(checkpoint=checkpoint), **LEARNING)
        except IasvitError as error:
            print(error)
        at.clear()
        again = iasvit.quantize(model, images, "W4A4", progress=Progress(checkpoint=checkpoint), **LEARNING)
        whole = iasvit.quantize(model, images, "W4A4", **LEARNING)
        assert at[0] == "blocks.1"
        assert tiny_models.same_bits(again.state_dict(), whole.state_dict())
