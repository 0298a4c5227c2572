"""`iasvit submit`: one cell of somebody's method, and whether the quantized model keeps the admission rules."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch

from iasvit.benchmark.harness import run_cells
from iasvit.benchmark.results import ResultStore, Row
from iasvit.benchmark.task import load_task_class
from iasvit.benchmark.versions import forget
from iasvit.errors import IasvitError, reason, shown
from iasvit.methods import GROUP, list_methods
from iasvit.rules import sentence, violations
from iasvit.threads import free_cores

_REGISTERED_NAME = re.compile(r"(\w+)(\[.*\])?")


@dataclass(frozen=True)
class Verdict:
    """What came of a submission.

    Attributes:
        row: as the benchmark stores it.
        faults: a sentence for each rule that is broken, or one for a method that failed; none where all is well.
    """

    row: Row
    faults: tuple[str, ...]

    def __str__(self) -> str:
        """The row, a line a column, and the verdict."""
        held = {name: value for name, value in self.row.items() if value is not None and value != ""}
        width = max(map(len, held))
        lines = [
            f"{name:<{width}}  {f'{value:.6g}' if isinstance(value, float) else value}" for name, value in held.items()
        ]
        verdict = "not admitted" if self.faults else "keeps the admission rules"
        return "\n".join([*lines, "", f"verdict: {verdict}", *(f"- {fault}" for fault in self.faults)])


def submit(target: str, name: str | None = None, *, task: str = "imagenet", **options: Any) -> Verdict:
    """Measure one cell of a method and read off the admission rules that its quantized model keeps; store nothing.

    Args:
        target: a Python file, a module, or a method that is registered.
        name: of the method's class, where the file or module has several.
        task: of the registry.
        **options: of the task's `grid`, with one value each for what makes the cell: backbone=["deit_t"],
            bits=["W4A4"], seed=[0]; `method` apart.

    Raises:
        IasvitError: there is no such file or module, it cannot be imported, has no method, or an option is wrong.
    """
    with _registered(target, name) as method, TemporaryDirectory() as folder:
        benchmark, cells = load_task_class(task).grid(method=[method], **options)
        if len(cells) != 1:
            raise IasvitError(
                f"a submission is one cell, but {len(cells)} are asked for; give one backbone and one bits"
            )
        if torch.device(benchmark.device).type == "cpu":
            torch.set_num_threads(free_cores())
        root = Path(folder)
        (row,) = run_cells(benchmark, cells, ResultStore(root / "runs"), checkpoint_root=root / "checkpoints")
    return Verdict(row, tuple(_faults(row)))


def _faults(row: Row) -> list[str]:
    if row["status"] != "ok":
        return [f"The method failed: {row['reason'].rstrip('.')}."]
    return [sentence(violation) for violation in violations(row["admission"])]


@contextmanager
def _registered(target: str, name: str | None) -> Iterator[str]:
    """The name of the target's method, which is registered meanwhile as if its package were installed."""
    match = _REGISTERED_NAME.fullmatch(target)
    if match and match[1] in list_methods(by_name=True):
        yield target
        return
    is_file = target.endswith(".py") or "/" in target
    path, module = list(sys.path), None
    with TemporaryDirectory() as folder:
        try:
            sys.path.insert(0, str(Path(target).resolve().parent if is_file else Path.cwd()))
            module = _load_file(Path(target)) if is_file else _load_module(target)
            method = _method_of(module, target, name)
            metadata = Path(folder) / "iasvit_submission-0.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: iasvit-submission\nVersion: 0\n")
            entry = f"[{GROUP}]\n{method.name} = {module.__name__}:{method.__qualname__}\n"
            (metadata / "entry_points.txt").write_text(entry, encoding="utf-8")
            sys.path.insert(0, folder)
            importlib.invalidate_caches()
            yield method.name
        finally:
            sys.path[:] = path
            importlib.invalidate_caches()
            if is_file and module is not None:
                sys.modules.pop(module.__name__, None)
            forget()


def _load_file(path: Path) -> ModuleType:
    """The module that a file is, imported by its name from its folder."""
    if not path.is_file():
        raise IasvitError(f"{path} is no file; give a method's Python file, its module, or a registered name")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise IasvitError(f"{path} cannot be imported; its name must be a Python name with .py behind it")
    found = importlib.util.find_spec(path.stem)
    if found is None or found.origin is None or Path(found.origin).resolve() != path.resolve():
        raise IasvitError(f"{path} has the name of another module, {path.stem}; rename the file")
    return _import(path.stem, str(path))


def _load_module(target: str) -> ModuleType:
    if not all(part.isidentifier() for part in target.split(".")):
        raise IasvitError(f"{shown(target)} is no file, module or registered method; registered are {_names()}")
    try:
        known = importlib.util.find_spec(target) is not None
    except ImportError:  # a package that the module is in
        known = False
    if not known:
        raise IasvitError(f"{target} is no file, module or registered method; registered are {_names()}")
    return _import(target, target)


def _names() -> str:
    return ", ".join(list_methods(by_name=True))


def _import(name: str, shown_as: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        where = f" in line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        text = error.msg if isinstance(error, SyntaxError) else reason(error)
        raise IasvitError(f"{shown_as} cannot be imported: {type(error).__name__}{where}: {text}") from error


def _method_of(module: ModuleType, target: str, name: str | None) -> type[Any]:
    """The class of a module that is a method."""
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    methods = {cls.__name__: cls for cls in own if hasattr(cls, "quantize") and hasattr(cls, "name")}
    if name is not None and name not in methods:
        raise IasvitError(f"{target} has no method {shown(name)}; it has {', '.join(methods) or 'none'}")
    if not methods:
        raise IasvitError(
            f"{target} has no method: a class with a name and quantize(model, calibration, spec, progress)"
        )
    if name is None and len(methods) > 1:
        raise IasvitError(f"{target} has several methods: {', '.join(methods)}; choose one with --class")
    cls: type[Any] = methods[name] if name else next(iter(methods.values()))
    if not hasattr(cls, "__dataclass_fields__"):
        raise IasvitError(
            f"{cls.__name__} of {target} is no dataclass, whose fields are a method's options; make it one"
        )
    if not isinstance(cls.name, str) or not re.fullmatch(r"\w+", cls.name):
        raise IasvitError(
            f"{cls.__name__} of {target} has the name {shown(cls.name)}; letters, digits and _ are allowed"
        )
    if cls.name in list_methods(by_name=True):
        raise IasvitError(f"{cls.__name__} of {target} has the name {cls.name!r}, which is registered; choose another")
    return cls
