"""Suites: TOML files that name tasks, backbones, methods, bits and seeds, and what a cell needs to run."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from iasvit.benchmark.task import Task, load_task_class
from iasvit.errors import IasvitError, reason

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUITES = Path(__file__).parent / "suites"
_RESOURCES = ("cpu", "gpu", "memory_gib")
_SUITE_KEYS = ("description", "resources", "grid")
_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path as text"}


@dataclass(frozen=True)
class Needs:
    """What a cell needs to run.

    Attributes:
        cpu: cores, and so the threads of torch.
        gpu: GPUs; a fraction of one shares it.
        memory_gib: main memory in GiB; 0 where it does not matter.
    """

    cpu: float = 1
    gpu: float = 0
    memory_gib: float = 0

    def check(self, where: str) -> None:
        """Raise IasvitError for an amount that cannot be; `where` says whose it is."""
        for name, least in (("cpu", 1), ("gpu", 0), ("memory_gib", 0)):
            if getattr(self, name) < least:
                raise IasvitError(f"{where}: {name} is {getattr(self, name):g}, but {least} or more is expected")
        for name in ("cpu", "gpu"):
            value = getattr(self, name)
            if value > 1 and value != int(value):
                raise IasvitError(f"{where}: {name} is {value:g}, but above 1 a whole number is expected")

    def __str__(self) -> str:
        parts = [f"{self.cpu:g} CPU{'s' if self.cpu > 1 else ''}"]
        parts += [f"{self.gpu:g} GPU{'s' if self.gpu > 1 else ''}"] if self.gpu else []
        parts += [f"{self.memory_gib:g} GiB of memory"] if self.memory_gib else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Grid:
    """All combinations of one task's options.

    Attributes:
        where: what messages call it, "suite.toml, grid 2".
        task: name.
        options: keyword arguments of the task's `grid` as TOML has them; paths are absolute.
        needs: of each cell.
    """

    where: str
    task: str
    options: dict[str, Any]
    needs: Needs = field(default_factory=Needs)


@dataclass(frozen=True)
class Suite:
    """What a file says.

    Attributes:
        name: of the file, without ending.
        description: one line.
        grids: in order.
    """

    name: str
    description: str
    grids: tuple[Grid, ...]

    def with_needs(self, **given: float | None) -> Suite:
        """The suite with these needs (cpu, gpu, memory_gib) in place of each grid's own; None leaves it."""
        given = {name: value for name, value in given.items() if value is not None}
        grids = tuple(replace(grid, needs=replace(grid.needs, **given)) for grid in self.grids)
        for grid in grids:
            grid.needs.check(f"--{next(iter(given)).replace('_gib', '')}" if given else grid.where)
        return replace(self, grids=grids)


def shipped() -> dict[str, Path]:
    """The suites that come with the package, by name."""
    return {path.stem: path for path in sorted(SUITES.glob("*.toml"), key=lambda path: path.stem)}


def find_suite(name: str) -> Path:
    """The file of a suite: a path, or the name of one that comes with the package.

    Raises:
        IasvitError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if name not in shipped():
        raise IasvitError(f"suite {name!r} is neither a file nor one of {', '.join(shipped())}")
    return shipped()[name]


def read_suite(path: Path) -> Suite:
    """Read and check a suite: keys, types, names of tasks. What values mean is checked where cells are planned.

    Raises:
        IasvitError: the file is no TOML, or says something that is not understood; the message names it.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise IasvitError(f"{path} cannot be read: {reason(error)}") from error
    except ValueError as error:  # tomllib's and unicode's
        raise IasvitError(f"{path} is not a TOML file: {error}") from error
    _known(str(path), content, _SUITE_KEYS)
    description = _as(f"{path}: description", content.get("description", ""), str)
    needs = _needs(f"{path}, resources", content.get("resources", {}), Needs())
    tables = content.get("grid", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise IasvitError(f"{path} has no grid; write at least one table [[grid]] with a task, bits and seeds")
    grids = [_grid(f"{path}, grid {number}", dict(table), needs) for number, table in enumerate(tables, start=1)]
    return Suite(path.stem, description, tuple(grids))


def _grid(where: str, table: dict[str, Any], needs: Needs) -> Grid:
    if "task" not in table:
        raise IasvitError(f"{where} names no task; write task = NAME")
    name = _as(f"{where}: task", table.pop("task"), str)
    needs = _needs(f"{where}, resources", table.pop("resources", {}), needs)
    try:
        cls = load_task_class(name)
    except IasvitError as error:
        raise IasvitError(f"{where}: {error}") from error
    options = arguments(cls, table, where)
    table |= {key: str(value.absolute()) for key, value in options.items() if isinstance(value, Path)}
    return Grid(where, name, table, needs)


def arguments(cls: type[Task], table: dict[str, Any], where: str) -> dict[str, Any]:
    """The arguments of a task's `grid` from the keys and values of a suite.

    Raises:
        IasvitError: a key that the task does not know, one that is missing, or a value of another type.
    """
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(cls.grid).parameters.items()
        if name != "device" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    if not parameters:
        cls.grid()  # says that the task has none
    if "device" in table:
        raise IasvitError(
            f"{where}: device is not a key; with gpu under resources a cell runs on a GPU, else on the CPU"
        )
    _known(where, table, ("task", "resources", *parameters))
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in table:
            raise IasvitError(f"{where} lacks the key {name}")
    hints = get_type_hints(cls.grid)
    return {key: _as(f"{where}: {key}", value, hints[key]) for key, value in table.items()}


def _needs(where: str, table: Any, default: Needs) -> Needs:
    if not isinstance(table, dict):
        raise IasvitError(f"{where} is {table!r}, but a table with {', '.join(_RESOURCES)} is expected")
    _known(where, table, _RESOURCES)
    needs = replace(default, **{key: _as(f"{where}: {key}", value, float) for key, value in table.items()})
    needs.check(where)
    return needs


def _known(where: str, table: dict[str, Any], keys: tuple[str, ...]) -> None:
    for key in table:
        if key not in keys:
            raise IasvitError(f"{where}: the key {key!r} is not known; there are {', '.join(keys)}")


def _as(where: str, value: Any, hint: Any) -> Any:
    """The value as its type hint wants it: list, Enum, Path, str, int, float or bool, or one of these or None."""
    if NoneType in get_args(hint):
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
    if item := get_args(hint):
        if not isinstance(value, list) or not value:
            raise IasvitError(f"{where} is {_text(value)}, but a list of one or more values is expected")
        return [_as(where, each, item[0]) for each in value]
    if isinstance(hint, type) and issubclass(hint, Enum):
        choices = [each.value for each in hint]
        if value not in choices:
            raise IasvitError(f"{where} is {_text(value)}, but one of {', '.join(choices)} is expected")
        return hint(value)
    right = (int, float) if hint is float else (str,) if hint is Path else (hint,)
    if type(value) not in right:
        raise IasvitError(f"{where} is {_text(value)}, but {_KINDS[hint]} is expected")
    return hint(value)


def _text(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
