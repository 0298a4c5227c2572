"""What the tasks' commands share: options, cells made from options, checks before anything runs, and the run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn, Protocol, TypeVar

import torch
import typer
from torch import nn

from iasvit import distributed
from iasvit.benchmark.estimate import estimate, format_estimates
from iasvit.benchmark.harness import Cell, exit_status, run_cells
from iasvit.benchmark.parallel import run_side_by_side
from iasvit.benchmark.results import ResultStore
from iasvit.benchmark.task import EMBEDDED, Task
from iasvit.errors import IasvitError, reason, shown
from iasvit.export import check_backend
from iasvit.leaderboard.aggregate import table
from iasvit.methods import get_method, list_methods, load_method_class, method_options, parse_value, split_variant
from iasvit.models import Site, insert_quantizers
from iasvit.quantizers import UniformQuantizer
from iasvit.sos import RECIPES
from iasvit.spec import QuantSpec
from iasvit.threads import free_cores, usable_cores

T = TypeVar("T")

# ---- options ---------------------------------------------------------------------------------------------------------

Bits = Annotated[
    list[str], typer.Option(help='Repeatable. "W4A8"; single layers may have other bits: "W4A4,head=W8A8".')
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        help="Repeatable. A name, or a variant such as ias_vit[-sulq]. [default: those that iasvit list prints first]",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Weights of the model: a safetensors file, or a torch.save file of tensors.")
]
Pretrained = Annotated[bool, typer.Option(help="Use trained weights, or random ones from a fixed seed.")]
Recipe = Annotated[
    str, typer.Option(help='"paper", or "fast": fewer steps at a higher learning rate, unless these are given.')
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(help='Memory that quantization may allocate, such as "8GiB". Results do not depend on it.'),
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        help="Repeatable. NAME=VALUE for any other option of the methods, such as autocast=true.",
        show_default=False,
    ),
]
Seeds = Annotated[list[int], typer.Option(help="Repeatable. Draws the calibration images and seeds the method.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:1. [default: cuda if there is one, else cpu]", show_default=False)
]
Backend = Annotated[
    str | None,
    typer.Option(
        help="Evaluate the exported integer graph by onnxruntime or openvino. [default: PyTorch]",
        show_default=False,
    ),
]
Limit = Annotated[int | None, typer.Option(help="Evaluate this many images only.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the cells and their estimated cost, and measure nothing.")
]
Force = Annotated[bool, typer.Option("--force", help="Also measure cells that are stored.")]
Stale = Annotated[bool, typer.Option("--stale", help="Also measure cells that another version stored.")]
Save = Annotated[Path | None, typer.Option(help="Folder for the quantized models. Each row names its file.")]
Jobs = Annotated[
    int | None,
    typer.Option(
        help="Cells to measure at once on a CPU, each with one thread. [default: all cores on mini, else 1]",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(help="torch's threads, if one cell runs at a time. [default: the idle cores]", show_default=False),
]
Results = Annotated[Path, typer.Option(help="Folder for the rows.")]
RESULTS = Path("results/runs")
MAX_SEED = 2**32 - 1  # what NumPy's generators take


def _fast() -> dict[str, Any]:
    """I&S-ViT's own fast recipe, by the attributes of `Profile`."""
    recipe = RECIPES["fast"]
    iterations, iterations_6_bits = recipe.iterations
    return {
        "iterations": iterations,
        "iterations_6_bits": iterations_6_bits,
        "stage1_share": recipe.stage1_share,
        "lr": recipe.lr,
    }


@dataclass(frozen=True)
class Profile:
    """The defaults of a run.

    Attributes:
        models: by default.
        calib_size: calibration images.
        batch_size: images a reconstruction step.
        iterations: reconstruction steps of a block and stage, below 6 bits.
        iterations_6_bits: the same from 6 bits on.
        lr: of reconstruction.
        stage1_share: of the steps, I&S-ViT's; None leaves it to the method.
        init_size: of the calibration images, those that quantizers are initialised on; None leaves it to the method.
        recipe: of methods that have recipes of their own, which then have the numbers that are not said here.
        fast: what --recipe fast has in place of these, by attribute.
    """

    models: tuple[str, ...] = ()
    calib_size: int = 1024
    batch_size: int = 64
    iterations: int = 1000
    iterations_6_bits: int = 200
    lr: float = 4e-5
    stage1_share: float | None = None
    init_size: int | None = None
    recipe: str = "paper"
    fast: Mapping[str, Any] = field(default_factory=_fast)

    def options(self, spec: QuantSpec, method: str) -> dict[str, Any]:
        """Options for a method at these bits; it takes those that it knows."""
        recipes = getattr(load_method_class(split_variant(method)[0]), "recipes", {})
        if self.recipe in recipes:
            own = {"recipe": self.recipe, "iterations": recipes[self.recipe].iterations}
            # Where images are large or differ in size, batches are what they allow.
            return own | ({"batch_size": self.batch_size, "init_size": self.init_size} if self.init_size else {})
        low = min(spec.w_bits, spec.a_bits) < 6
        iterations = self.iterations if low else self.iterations_6_bits
        options = {
            "recipe": self.recipe if self.recipe == "fast" else None,
            "iterations": iterations,
            "stage1_share": self.stage1_share,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "init_size": self.init_size,
        }
        return {name: value for name, value in options.items() if value is not None}

    def by(self, recipe: str) -> Profile:
        """This profile by the recipe "paper", as it is, or "fast".

        Raises:
            IasvitError: there is no such recipe.
        """
        if recipe not in RECIPES:
            raise IasvitError(f"--recipe {shown(recipe)[1:-1]} is not known; there are {', '.join(RECIPES)}")
        if recipe == "paper":
            return self
        return replace(self, recipe="fast", **self.fast)


def profile_option(text: str, name: str, mini: Profile, real: Profile) -> Any:
    """The option for an attribute of a profile. Its help gives the defaults on embedded and on real data."""
    values = [f"{getattr(profile, name):g}" for profile in (mini, real)]
    more = f", {real.iterations_6_bits} from 6 bits on" if name == "iterations" else ""
    return typer.Option(
        help=f"{text} [default: {values[0]} on mini; {values[1]} on real data{more}]", show_default=False
    )


# ---- from options to cells -------------------------------------------------------------------------------------------


class Models(Protocol):
    """Full-precision models by name, as far as they are checked here."""

    def check(self, name: str) -> None:
        """Raise IasvitError where there is no model of that name (the message says what exists), or no weights file."""

    def architecture(self, name: str) -> nn.Module:
        """The model with any weights, or none."""


def make_cells(
    names: Sequence[str],
    specs: Sequence[QuantSpec],
    methods: Sequence[str] | None,
    seeds: Sequence[int],
    calib_size: int | None,
    profile: Profile,
    given: dict[str, Any],
) -> list[Cell]:
    """All combinations. Each has the options that its method takes: the given ones, or else the profile's.

    Args:
        names: of models.
        specs: bits.
        methods: all registered ones by default.
        seeds: of calibration images and methods.
        calib_size: the profile's by default.
        profile: see there.
        given: options of methods by name; one that is None is not given.

    Raises:
        IasvitError: an unknown method, a number that is too small, an option given that none of the methods takes, or
            a value that a method does not take.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for option, least in (("batch_size", 1), ("init_size", 1), ("iterations", 0)):
        if isinstance(value := given.get(option), int | float):
            at_least(_flag(option), value, least)
    at_least("--calib-size", calib_size, 1)
    at_least("--seed", min(seeds), 0)
    if max(seeds) > MAX_SEED:
        raise IasvitError(f"--seed is {max(seeds)}, but {MAX_SEED} at most is expected")
    methods, seeds = unique(methods or list_methods()), unique(seeds)
    calib_size = profile.calib_size if calib_size is None else calib_size
    takes = {method: method_options(method) for method in methods}
    for option in given:
        if not any(option in options for options in takes.values()):
            raise IasvitError(f"{_flag(option)} is not an option of {', '.join(methods)}")
    cells = []
    for name in names:
        for spec in specs:
            for method in methods:
                options = {k: v for k, v in {**profile.options(spec, method), **given}.items() if k in takes[method]}
                made = get_method(method, **options)  # says what is wrong with a value before anything runs
                options = {option: getattr(made, option, value) for option, value in options.items()}
                for seed in seeds:
                    cells.append(Cell(name, method, str(spec), seed, calib_size, tuple(sorted(options.items()))))
    return cells


def through(backend: str | None, cells: Sequence[Cell], device: torch.device) -> list[Cell]:
    """The cells, evaluated by a backend; None for PyTorch.

    Raises:
        IasvitError: no such backend, it is not installed, or the models are not on a CPU.
    """
    if backend is None:
        return list(cells)
    check_backend(backend)
    if device.type != "cpu":
        raise IasvitError(f"--backend {backend} computes on the CPU, but the device is {device}; give --device cpu")
    return [replace(cell, backend=backend) for cell in cells]


def parse_options(texts: Iterable[str], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of methods from NAME=VALUE, the value being a number, true, false or text, with those given otherwise.

    Args:
        texts: of --option.
        given: options that the command has an option for (--iterations); one that is None is not given.

    Raises:
        IasvitError: a text without a name or a value, an option that is given twice, or the seed, which is --seed's.
    """
    options = {name: value for name, value in (given or {}).items() if value is not None}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals or not value:
            raise IasvitError(f"--option {shown(text)} is not of the form NAME=VALUE, such as autocast=true")
        if name == "seed":
            raise IasvitError(f"--option {shown(text)} sets the seed, which --seed does")
        if name in options:
            raise IasvitError(f"--option {shown(text)} gives {shown(name)} a second time; give it once")
        options[name] = parse_value(value)
        if options[name] is None:
            raise IasvitError(f"--option {shown(text)} gives no value; leave it out")
    return options


def _flag(option: str) -> str:
    """An option of methods as a command line has it."""
    named = option in ("iterations", "batch_size", "lr", "init_size", "memory_budget")
    return f"--{option.replace('_', '-')}" if named else f"--option {shown(option)[1:-1]}"


def check_checkpoint(checkpoint: Path | None, names: Sequence[str]) -> None:
    """Raise IasvitError if one file is given as the weights of several models."""
    if checkpoint is not None and len(names) > 1:
        raise IasvitError(
            f"--checkpoint holds one model, but {len(names)} are asked for: {', '.join(names)}; choose one of them"
        )


def check_models(models: Models, names: Sequence[str], specs: Sequence[QuantSpec]) -> None:
    """Check before anything runs what would stop a model: its name, weights file, modules, or an override of bits.

    Raises:
        IasvitError: with the fault.
    """

    def quantizer(site: Site) -> UniformQuantizer:
        return UniformQuantizer(site.n_bits)

    for name in names:
        models.check(name)
        for spec in specs:
            try:
                insert_quantizers(models.architecture(name), spec, quantizer, quantizer)
            except IasvitError as error:
                raise IasvitError(f"model {name!r} cannot be quantized to {spec}: {error}") from None


def make_device(name: str | None) -> torch.device:
    """The device of that name; by default cuda where there is one, else cpu. Each process has its own GPU.

    Raises:
        IasvitError: there is no such device here, or there are more processes than GPUs.
    """
    name = distributed.own_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # "meta" is a device without values
    except (RuntimeError, AssertionError, NotImplementedError, UnicodeError) as error:
        why = reason(error).partition(".")[0]
        raise IasvitError(f"--device {shown(name)[1:-1]} cannot be used here ({why}); cpu can") from None
    return device


def unique(values: Iterable[T]) -> list[T]:
    """The values without repetitions, in order."""
    return list(dict.fromkeys(values))


def at_least(option: str, value: float | None, least: int) -> None:
    """Raise IasvitError where the value given for an option is too small."""
    if value is not None and value < least:
        raise IasvitError(f"{option} is {value}, but {least} or more is expected")


# ---- the run ---------------------------------------------------------------------------------------------------------


def run(
    task: Task,
    cells: Sequence[Cell],
    results: Path,
    *,
    printed: Sequence[str],
    dry_run: bool = False,
    force: bool = False,
    stale: bool = False,
    save: Path | None = None,
    jobs: int | None = None,
    threads: int | None = None,
) -> NoReturn:
    """Measure the cells and print their table, or print their estimated cost. Then exit the command.

    Args:
        task: where models and data come from.
        cells: what to measure.
        results: folder for the rows.
        printed: metrics that get a table, where the task scores them.
        dry_run: only print the estimated cost.
        force: measure also cells that are stored.
        stale: measure also cells that are stored of another version.
        save: folder for the quantized models; None keeps none.
        jobs: cells at once; by default on a CPU as many as there are cores for embedded data, else 1.
        threads: of torch, where one cell runs at a time; by default the cores that are idle.

    Raises:
        typer.Exit: always; status 1 where a cell failed, else 0.
        IasvitError: as `run_cells`.
    """
    at_least("--jobs", jobs, 1)
    at_least("--threads", threads, 1)
    store = ResultStore(results)
    count = _jobs(task, jobs, threads)
    if torch.device(task.device).type == "cpu":
        torch.set_num_threads(1 if count > 1 else threads or _threads())
    if dry_run:
        print(format_estimates(estimate(task, cells, store, force=force, stale=stale)))
        raise typer.Exit
    if count > 1:
        rows = run_side_by_side(task, cells, store, count, force=force, stale=stale, save=save)
    else:
        rows = run_cells(task, cells, store, force=force, stale=stale, save=save)
    scored = {metric.name for metric in task.scored}
    print(table(rows, [name for name in printed if name in scored]))
    print(f"\nrows: {store.path(task.name, task.data.name)}")
    raise typer.Exit(exit_status(rows))


def _threads() -> int:
    """Default threads of a process: the idle cores if it is the only one, else as many as torchrun says."""
    return free_cores() if distributed.world_size() == 1 else torch.get_num_threads()


def _jobs(task: Task, jobs: int | None, threads: int | None) -> int:
    """How many cells to measure at once."""
    if distributed.world_size() > 1:
        if jobs is not None and jobs > 1:
            raise IasvitError(f"--jobs is {jobs}, but processes of torchrun work on one cell together; leave it out")
        return 1
    on_cpu = torch.device(task.device).type == "cpu"
    if jobs is None:
        return usable_cores() if task.data.kind == EMBEDDED and on_cpu and threads is None else 1
    if jobs > 1 and not on_cpu:
        raise IasvitError(f"--jobs is {jobs}, but cells run side by side on a CPU only; use iasvit sweep for GPUs")
    if jobs > 1 and threads is not None and threads > 1:
        raise IasvitError(f"--threads is {threads}, but cells side by side have one thread each; leave one of them out")
    return jobs


class _Lines(logging.Handler):
    """Prints records on standard error: "warning: …", and what is only told as it is."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        # What each process of several tells of its own images is not told by the first, which alone prints.
        file = sys.__stderr__ if getattr(record, "own", False) else sys.stderr
        print(f"{level}{record.getMessage()}", file=file, flush=True)


def print_logs(level: int = logging.WARNING) -> None:
    """Let the tasks' loggers print what is of this level or above on standard error."""
    logger = logging.getLogger("tasks")
    logger.setLevel(level)
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())
