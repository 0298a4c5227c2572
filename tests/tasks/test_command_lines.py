"""Command lines drawn by a seed, sound and mad: an exit status of 0 or 2, and never a traceback."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer
from commands import run

from iasvit import methods
from tasks import command, imagenet
from tasks.studies import inspect_model

TEXTS = [
    "",
    "-1",
    "0",
    "abc",
    "1e400",
    "nan",
    "true",
    "½",
    "٣",
    "\udcff",
    "\x1b[31m",
    "a" * 5000,
    "9" * 5000,
    "[" * 5000,
]
NUMBERS = ["1", "2", "3.5", "1e3", "inf", "0x10", "1_0", str(2**64), *TEXTS]
BITS = [
    "W3A3",
    "w4a8",
    "W3A3,head=W8A8",
    "W3A3,*=W32A32",
    "W٣A٣",
    f"W{'3' * 5000}A3",
    "W3A3,he\nad=W8A8",
    "W3A3,=",
    "W0A3",
]
METHODS = [
    "minmax",
    "rtn",
    "ias_vit",
    "ias_vit[-sulq]",
    "ias_vit[softmax=log2,-sos]",
    "ptq4vit[rounds=2]",
    "minmax[-x]",
]
METHODS += ["ias_vit[iterations=x]", "ias_vit[lr=inf]", "ias_vit[seed=3]", "fp32", "ias_vit[" + "-sos" * 500 + "]"]
OPTIONS = ["iterations=3", "iterations=null", "iterations=2.0", "seed=5", "sos=maybe", "init_size=2.5", "lr=[1]"]
OPTIONS += ["lr=Infinity", "lr=-Infinity", "lr=NaN", "batch_size=true", "softmax=3", "softmax=log2;lr=1", "sulq=maybe"]
OPTIONS += [
    "autocast=1",
    "lr={}",
    "lr=" + "[" * 50_000,
    "batch_size=" + "9" * 5000,
    "no_such=1",
    "=",
    "lr",
    "lr=",
    "a\nb=1",
]
POOL: dict[str, list[str]] = {
    "--bits": BITS,
    "--method": METHODS,
    "--option": OPTIONS,
    "--seed": NUMBERS,
    "--calib-size": NUMBERS,
    "--iterations": NUMBERS,
    "--batch-size": NUMBERS,
    "--lr": NUMBERS,
    "--img-size": NUMBERS,
    "--limit": NUMBERS,
    "--device": ["cpu", "meta", "cuda:99", "cpu:7", "mkldnn", *TEXTS],
    "--data": ["mini", "mini-hard", "folder", *TEXTS],
    "--data-root": ["/dev/null", "none", *TEXTS],
    "--data-name": ["x", "a/b", "../x", "mini", *TEXTS],
    "--backbone": ["deit_t", "vit_s", *TEXTS],
    "--checkpoint": ["none.safetensors", "/dev/null", ".", *TEXTS],
    "--results": ["runs", "file", "file/runs", "\udcff", "x" * 300, "/proc/none", "a\x1bb"],
    "--save": ["models", "file", "\udcff", "x" * 300],
    "--no-such": ["1"],
}
SWITCHES = ["--no-labels", "--no-pretrained", "--force", "--stale", "--dry-run", "--dry-run=1", "--", "-x", "extra"]


def lines(seed: int, count: int, pool: dict[str, list[str]]) -> list[list[str]]:
    """So many command lines of one to four options."""
    drawn = random.Random(seed)
    made = []
    for _ in range(count):
        line: list[str] = []
        for _ in range(drawn.randint(1, 4)):
            if drawn.random() < 0.15:
                line.append(drawn.choice(SWITCHES))
            else:
                option = drawn.choice(list(pool))
                line += [option, drawn.choice(pool[option])]
        made.append(line)
    return made


class Reached(typer.Exit):
    """A command line passed all that is checked before anything runs."""


def reach(*args: Any, **options: Any) -> NoReturn:
    raise Reached


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    entries = methods._entries()
    monkeypatch.setattr(methods, "_entries", lambda: entries)  # reading the metadata of all packages takes long


def check(
    app: typer.Typer, line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> int:
    status = run(app, monkeypatch, *line)
    err = capsys.readouterr().err
    assert status in (0, 2), (line, err)
    assert "Traceback" not in err
    return status


def test_options_are_checked_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(imagenet, "make_setup", reach)
    found = [check(imagenet.app, line, monkeypatch, capsys) for line in lines(0, 150, POOL)]
    assert 10 < found.count(0) < 75


def test_data_models_and_folders_are_checked_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_rows(task: object, cells: object, results: Path, **options: Any) -> NoReturn:
        store = command.ResultStore(results)
        store.rows()
        store.check("imagenet", "mini")
        raise Reached

    monkeypatch.setattr(command, "run", no_rows)
    names = (
        "--limit",
        "--data",
        "--data-root",
        "--data-name",
        "--img-size",
        "--checkpoint",
        "--results",
        "--calib-size",
    )
    for line in lines(1, 16, {name: POOL[name] for name in names}):
        check(imagenet.app, [*line, "--backbone", "deit_t", "--method", "rtn"], monkeypatch, capsys)


def test_inspect_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(inspect_model, "make_setup", reach)
    pool = {name: POOL[name] for name in ("--bits", "--method", "--seed", "--iterations", "--device", "--data")}
    pool |= {"--out": POOL["--results"], "--images": NUMBERS}
    for line in lines(2, 80, pool):
        check(inspect_model.app, ["deit_t", *line], monkeypatch, capsys)
