"""Where a number comes from: code, versions, command, device, and the memory it took."""

from __future__ import annotations

import ast
import gc
import hashlib
import io
import os
import platform
import resource
import shlex
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[1]  # iasvit
# The core modules that decide numbers; `code_hash` adds the method's own.
_CORE = ("quantizers", "nn", "models", "calibration", "reparam", "reconstruction", "spec")
# Modules of the core that a method imports and that decide none.
_NEUTRAL = ("errors", "methods", "progress")


@cache
def git_commit() -> str:
    """The commit of the checkout that this package runs from, "-dirty" added where files differ.

    IASVIT_COMMIT says it instead where the code was copied without its history; else it is "unknown" there.
    """
    if given := os.environ.get("IASVIT_COMMIT"):
        return given

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(PACKAGE), *args], capture_output=True, text=True, check=True, timeout=20
        ).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not some other repository that we are installed inside
        commit = git("rev-parse", "--short=12", "HEAD").strip()
        return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of python, torch, timm and iasvit."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "timm", "iasvit")}}


def command() -> str:
    """The command line of this process, paths relative to the current folder, so that it reads the same elsewhere."""
    script, *args = sys.argv
    words = ["python", os.path.relpath(script)] if script.endswith(".py") else [os.path.basename(script)]
    return shlex.join(words + [_relative(arg) for arg in args])


def _relative(arg: str) -> str:
    option, equals, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
    return option + equals + (os.path.relpath(value) if os.path.isabs(value) else value)


def describe_device(device: torch.device) -> str:
    """ "cpu: <model of the processor>" or "cuda: <name of the GPU>"."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return device.type
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"cpu: {line.partition(':')[2].strip()}"
    except OSError:
        pass
    return f"cpu: {platform.processor() or platform.machine()}"


class PeakMemory:
    """The most memory used since it was made: on a GPU what torch allocated there, else the process's resident set.

    The resident set's high-water mark is reset through Linux's /proc; where that cannot be done, the process's peak
    since its start is all there is. What nothing refers to any more is freed first, so that it does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()  # quantized models and their graphs refer to themselves, and would wait for Python's collector
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._can_reset = True
        except OSError:
            self._can_reset = False

    def mib(self) -> float:
        """The peak so far in MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if self._can_reset:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def code_hash(module: str) -> str:
    """Twelve hex digits that change when code does that decides the numbers of a method.

    That is the core's quantizers, layers, adapters, calibration, reparameterization and reconstruction, the method's
    module, and whatever of its own package or of the core it imports. Comments, docstrings and blank lines do not
    count.

    Args:
        module: where the method's class is defined, for example "iasvit.sos".
    """
    top = module.partition(".")[0]
    roots = {PACKAGE.name: PACKAGE.parent}
    if top not in roots and (root := _root(top)) is not None:
        roots[top] = root
    todo = [f"{PACKAGE.name}.{name}" for name in _CORE] + [module]
    neutral = {f"{PACKAGE.name}.{name}" for name in _NEUTRAL} | {PACKAGE.name}
    texts: dict[str, str] = {}
    while todo:
        name = todo.pop()
        if name in texts or name in neutral or name.partition(".")[0] not in roots:
            continue
        if (path := _file(roots[name.partition(".")[0]], name)) is None:
            continue
        source = path.read_text(encoding="utf-8")
        texts[name] = _significant(source)
        todo += _imports(source, name if path.name == "__init__.py" else name.rpartition(".")[0])
    return hashlib.sha256("".join(f"{name}\n{texts[name]}\n" for name in sorted(texts)).encode()).hexdigest()[:12]


def _root(top: str) -> Path | None:
    """The folder that holds a top-level package or module."""
    try:
        spec = find_spec(top)
    except ValueError:  # __main__ of a script
        return None
    if spec is None or not spec.origin:
        return None
    return Path(spec.origin).parent.parent if spec.submodule_search_locations else Path(spec.origin).parent


def _file(root: Path, name: str) -> Path | None:
    path = root.joinpath(*name.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def _imports(source: str, package: str) -> Iterator[str]:
    """Names that may be modules, of all imports in a source file of this package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -(node.level - 1) or None] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _significant(source: str) -> str:
    """The source without comments, docstrings and blank lines."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and body:
            first = body[0]
            own_line = first.lineno > getattr(node, "lineno", 0)
            if own_line and isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    text = "\n".join(lines)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    return "\n".join(line.rstrip() for line in lines if line.strip())
