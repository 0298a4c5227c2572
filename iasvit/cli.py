"""The `iasvit` command, and the exit handling that tasks run as scripts share with it."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import entry_points
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from iasvit.benchmark.task import GROUP as TASKS
from iasvit.benchmark.task import list_tasks, load_task_class
from iasvit.errors import IasvitError
from iasvit.interrupts import Ended, interruptible, is_default

BY_NAME = "iasvit.methods.by_name"  # as in iasvit.methods, which imports torch
COMMANDS = "iasvit.commands"  # what needs models and data of tasks, and so is no part of the core
BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def make_app(**settings: Any) -> typer.Typer:
    """A typer app with plain messages; tasks make theirs with it."""
    return typer.Typer(
        add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=False, **settings
    )


def main(app: typer.Typer | None = None) -> NoReturn:
    """Run an app, the `iasvit` command by default, and exit.

    Status 0, or what the app chose (1: a cell failed); 2 with one sentence and no traceback for bad input and a full
    disk; 130 for Ctrl-C, 143 for SIGTERM, both with what a command cleans up. If torchrun started several processes,
    one prints the reason and all end.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path need not be UTF-8
    before = _handle_signals()
    try:
        with _processes():
            (app or _app)()
    except Ended:
        raise
    except IasvitError as error:
        _exit(f"error: {error}", BAD_INPUT)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        location = f" at {error.filename}" if error.filename else ""
        _exit(f"error: the disk is full{location}; free space and run the same command again", BAD_INPUT)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as status:
        if status.code == INTERRUPTED:  # typer's answer to Ctrl-C
            _interrupted()
        if status.code == TERMINATED:
            _exit("terminated; run the same command again to continue where it stopped", TERMINATED)
        raise
    finally:
        for number, handler in before.items() if not _several() else ():  # torchrun terminates what is ending anyway
            signal.signal(number, handler)
    sys.exit(0)


def _processes() -> AbstractContextManager[None]:
    """The group of the processes that torchrun started; nothing if it started one or none."""
    if not _several():
        return nullcontext()
    with interruptible():
        from iasvit.launch import launched  # torch, which takes seconds
    return launched()


def _several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1" or "RANK" in os.environ


def _handle_signals() -> dict[int, Any]:
    """Let SIGINT and SIGTERM, unless somebody handles or ignores them, unwind the stack, so that all is cleaned up.

    Returns:
        Signal → the handler that it had.
    """
    process = os.getpid()

    def terminate(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a worker that this process forked
            os._exit(TERMINATED)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # cleaning up is not broken off
        sys.exit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        return {}
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
    return {number: signal.signal(number, handler) for number, handler in handlers.items() if is_default(number)}


def _interrupted() -> NoReturn:
    _exit("interrupted; run the same command again to continue where it stopped", INTERRUPTED)


def _exit(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)


class _Tasks(TyperGroup):
    """The registered tasks as commands; one is imported when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(list_tasks())

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Tasks"):
            formatter.write_dl([(name, entry.value) for name, entry in list_tasks().items()])

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name.startswith("-"):
            return None  # an option that does not exist; the parser says so
        with interruptible():
            return typer.main.get_command(load_task_class(cmd_name).command())


_app = make_app(help="Low-bit post-training quantization of vision transformers: benchmark and tables.")
_run = make_app(cls=_Tasks)
_app.add_typer(_run, name="run", help="Run a task: iasvit run TASK --help.")


@_run.callback()
def _run_task() -> None:
    """Run a task: iasvit run TASK --help."""


@_app.command("list")
def _list(
    what: Annotated[str, typer.Argument(help='"methods" describes each method.', show_default=False)] = "",
) -> None:
    """Print the registered methods and tasks, and where each comes from."""
    if what not in ("", "methods"):
        raise IasvitError(f"iasvit list takes methods, or nothing, but {what!r} was given")
    if what:
        from iasvit.methods import descriptions  # torch, which takes seconds

        print("\n\n".join(map(str, descriptions())))
        return
    for group, heading in (("iasvit.methods", "methods"), (BY_NAME, "methods that run only by name"), (TASKS, "tasks")):
        print(f"{heading}:")
        for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
            print(f"  {entry.name:<20} {entry.value}")


@_app.command("show")
def _show(
    file: Annotated[Path, typer.Argument(help="A file that iasvit.save, run --save or iasvit export wrote.")],
) -> None:
    """Print how a saved or exported model was made, its sizes, and the bits of each layer."""
    if file.suffix == ".onnx":
        from iasvit.export.show import summary
    else:
        from iasvit.summary import summary

    print(summary(file))


@_app.command("export")
def _export(
    file: Annotated[Path, typer.Argument(help="A file that iasvit.save or run --save wrote.")],
    out: Annotated[Path, typer.Argument(help="The ONNX file to write.")],
    target: Annotated[
        str, typer.Option(help="onnxruntime, onnx (standard operators only) or openvino.")
    ] = "onnxruntime",
    opset: Annotated[int, typer.Option(help="Version of ONNX's operators.")] = 20,
    vnni: Annotated[
        bool, typer.Option("--vnni", help="Make W8A8 faster on CPUs with VNNI. Other CPUs may then give wrong results.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a saved model as an ONNX graph that runs on integers."""
    from iasvit.artifact import load
    from iasvit.export import export_onnx

    forms = export_onnx(load(file), out, target=target, opset=opset, vnni=vnni, force=force)
    floats = [f"{path} ({form.removeprefix('float, ')})" for path, form in forms.items() if form != "int8"]
    print(f"{out}: {len(forms) - len(floats)} of {len(forms)} layers and products on integers")
    print(f"in float: {', '.join(floats) or 'none'}")


@_app.command("sweep")
def _sweep(
    suite: Annotated[
        str | None, typer.Argument(help="A TOML file, or a name that --list prints.", show_default=False)
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray (needs the extra cluster).")] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a Ray cluster, or auto. [default: $RAY_ADDRESS, else a cluster started here]"),
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder for the rows.")] = Path("results/runs"),
    cpu: Annotated[float | None, typer.Option(help="Cores per cell. [default: from the suite]")] = None,
    gpu: Annotated[
        float | None, typer.Option(help="GPUs per cell; a fraction shares one. [default: from the suite]")
    ] = None,
    memory: Annotated[float | None, typer.Option(help="Memory per cell in GiB. [default: from the suite]")] = None,
    retries: Annotated[int, typer.Option(min=0, help="How often a cell that fails is tried again.")] = 2,
    checkpoints: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoints, from which interrupted cells continue; with ray all machines must share it. "
            "[default: .iasvit/checkpoints; none with ray]",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and their estimated cost, and run nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Also measure cells that are stored.")] = False,
    stale: Annotated[bool, typer.Option("--stale", help="Also measure cells that another version stored.")] = False,
    list_suites: Annotated[bool, typer.Option("--list", help="Print the suites that come with the package.")] = False,
) -> None:
    """Run a suite, whole grids of cells, on this machine or on a Ray cluster. Stored cells are skipped."""
    if _several():
        raise IasvitError("iasvit sweep starts processes itself; start it without torchrun")
    from iasvit.sweep import command

    if list_suites:
        print(command.suites())
        return
    if suite is None:
        raise IasvitError("iasvit sweep needs a suite: a TOML file, or a name that iasvit sweep --list prints")
    failed = command.run(
        suite,
        engine,
        address,
        results,
        needs={"cpu": cpu, "gpu": gpu, "memory_gib": memory},
        retries=retries,
        checkpoints=checkpoints,
        dry_run=dry_run,
        force=force,
        stale=stale,
    )
    raise typer.Exit(int(failed))


@_app.command("leaderboard")
def _leaderboard(
    runs: Annotated[Path, typer.Option(help="Folder with measured rows; subfolders are read too.")] = Path(
        "results/runs"
    ),
    published: Annotated[Path, typer.Option(help="CSV file with published values.")] = Path("results/published.csv"),
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("results"),
    readme: Annotated[
        Path | None, typer.Option(help="File with <!-- table:NAME --> markers. [default: README.md, if it exists]")
    ] = None,
) -> None:
    """Write the tables under results/, and README's, from the measured and the published values."""
    from iasvit.benchmark.results import warn
    from iasvit.leaderboard import write_leaderboard

    if not runs.is_dir():
        warn(f"{runs} is not a folder, so no measured values are shown")
    if readme is None and Path("README.md").is_file():
        readme = Path("README.md")
    for path in write_leaderboard(runs, published, out, readme):
        print(path)


@_app.command("submit")
def _submit(
    method: Annotated[str, typer.Argument(help="A Python file, a module, or a registered method.", metavar="METHOD")],
    name: Annotated[
        str | None, typer.Option("--class", help="The method's class, where METHOD has several.", show_default=False)
    ] = None,
    backbone: Annotated[str, typer.Option(help="A backbone of the mini benchmark.")] = "deit_t",
    bits: Annotated[str, typer.Option(help='Bits of weights and activations, "W3A3".')] = "W4A4",
    seed: Annotated[int, typer.Option(help="Of calibration images and method.")] = 0,
    calib_size: Annotated[int | None, typer.Option(help="Calibration images. [default: those of mini]")] = None,
    limit: Annotated[int, typer.Option(help="Images that are evaluated.")] = 1000,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="Repeatable; NAME=VALUE, of the method.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="[cuda where there is one, else cpu]")] = None,
) -> None:
    """Measure one mini cell of your method, print its row, and say which admission rules it breaks.

    METHOD is executed. Nothing is stored. Exit status: 0 where all rules are kept, 1 where one is broken or the method
    failed, 2 for bad input.
    """
    with interruptible():
        from iasvit.submit import submit  # torch, which takes seconds

    verdict = submit(
        method,
        name,
        backbone=[backbone],
        bits=[bits],
        seed=[seed],
        calib_size=calib_size,
        limit=limit,
        option=options,
        device=device,
    )
    print(verdict)
    raise typer.Exit(int(bool(verdict.faults)))


_HANDED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _hand_on(context: typer.Context) -> None:
    """Run the command of this name that an installed package has."""
    name = context.info_name
    entries = list(entry_points(group=COMMANDS, name=name))
    if not entries:
        raise IasvitError(f"no installed package has the command {name!r}; install the package tasks")
    with interruptible():
        command = typer.main.get_command(entries[0].load())
    command.main(args=context.args, prog_name=f"iasvit {name}", standalone_mode=True)


@_app.command("evaluate", context_settings=_HANDED_ON)
def _evaluate(context: typer.Context) -> None:
    """Measure a saved model on a task's data: iasvit evaluate --help."""
    _hand_on(context)


@_app.command("inspect", context_settings=_HANDED_ON)
def _inspect(context: typer.Context) -> None:
    """Print each layer's ranges, quantizer and error: iasvit inspect --help."""
    _hand_on(context)


if __name__ == "__main__":
    main()
