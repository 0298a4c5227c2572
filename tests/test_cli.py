"""The command line: what it lists, and one sentence and a status for everything that goes wrong."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import harness_fakes
import pytest
import typer
from harness_fakes import FakeTask
from result_rows import make_row

from iasvit import cli
from iasvit.benchmark import task
from iasvit.benchmark.harness import Cell, exit_status, run_cells
from iasvit.benchmark.results import ResultStore
from iasvit.cli import main, make_app
from iasvit.errors import IasvitError

app = make_app()


class WithCommand(FakeTask):
    """A fake task that runs from the command line."""

    @classmethod
    def command(cls) -> typer.Typer:
        return app


@app.command()
def fake(method: str = "noise", how: str = "defect") -> None:
    """A fake task."""
    options = (("how", how),) if method == "broken" else ()
    rows = run_cells(FakeTask(), [Cell("vit_s", method, "W3A3", 0, 8, options)], ResultStore("runs"))
    raise typer.Exit(exit_status(rows))


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    harness_fakes.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    values = {"fake": "test_cli:WithCommand", "gone": "gone.x:Gone", "mute": "harness_fakes:FakeTask"}
    entries = [EntryPoint(name, value, task.GROUP) for name, value in values.items()]
    monkeypatch.setattr(task, "entry_points", lambda group: entries)


def status(monkeypatch: pytest.MonkeyPatch, *args: str, of: typer.Typer | None = None) -> int:
    monkeypatch.setattr(sys, "argv", ["iasvit", *args])
    with pytest.raises(SystemExit) as exit_:
        main(of)
    return exit_.value.code


@pytest.mark.parametrize("as_script", [False, True])
@pytest.mark.parametrize(
    ("args", "expected", "last_line"),
    [
        ([], 0, "[1/1] top1 "),
        (["--method", "broken", "--how", "nan"], 1, "[1/1] failed: layer 'fc' outputs NaN"),
        (
            ["--method", "nope"],
            2,
            "error: method 'nope' is not registered; the registered ones are noise, killed, broken",
        ),
        (["--method", "noise[x]"], 2, "error: method 'noise[x]' is neither a name"),
        (["--method", "broken", "--how", "interrupt"], 130, "interrupted; run the same command again"),
        (["--method", "broken", "--how", "full"], 2, "error: the disk is full"),
        (["--speed", "3"], 2, "Error: No such option: --speed"),
    ],
)
def test_a_task_exits_alike_from_the_command_and_as_a_script(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_script: bool,
    args: list[str],
    expected: int,
    last_line: str,
) -> None:
    before = [] if as_script else ["run", "fake"]
    assert status(monkeypatch, *before, *args, of=app if as_script else None) == expected
    shown = capsys.readouterr().err
    assert shown.strip().splitlines()[-1].startswith(last_line)
    assert "Traceback" not in shown


def test_the_same_command_again_skips_what_is_stored(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(monkeypatch, "run", "fake") == 0
    assert status(monkeypatch, "run", "fake") == 0
    assert "stored already" in capsys.readouterr().err
    assert ResultStore("runs").rows()["command"].tolist() == ["iasvit run fake"] * 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "nope"], "error: task 'nope' is not registered; the registered ones are fake, gone, mute"),
        (["run", "gone"], "error: task 'gone' is registered as gone.x:Gone, but loading that failed: No module"),
        (["run", "mute"], "error: task 'fake' has no command"),
        (["show", "bad.csv"], "error: bad.csv is not a quantized model"),
        (["nope"], "Error: No such command 'nope'."),
        (["leaderboard", "--published", "bad.csv"], "error: bad.csv has no column 'task'"),
        (["leaderboard", "--out", "bad.csv"], "error: bad.csv cannot be written: File exists"),
        (["leaderboard", "--readme", "none.md"], "error: none.md cannot be read: No such file or directory"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    Path("bad.csv").write_text("a,b\n1,2\n")
    assert status(monkeypatch, *args) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(message)


def test_an_error_that_is_nobodys_input_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = make_app()

    @broken.command()
    def _broken() -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(PermissionError):
        main(broken)


def test_a_full_disk_names_the_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    full = make_app()

    @full.command()
    def _full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "maps/3.bin")

    assert status(monkeypatch, of=full) == 2
    assert capsys.readouterr().err.startswith("error: the disk is full at maps/3.bin; ")


def test_bad_input_is_a_value_error_for_library_callers() -> None:
    assert issubclass(IasvitError, ValueError)


def test_tasks_are_listed_without_being_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(monkeypatch, "run", "--help") == 0
    assert "gone.x:Gone" in capsys.readouterr().out


def test_list_names_methods_and_tasks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.undo()
    assert status(monkeypatch, "list") == 0
    words = capsys.readouterr().out.split()
    assert "ias_vit" in words
    assert "iasvit.sos:IASViT" in words
    assert "imagenet" in words
    assert words.index("methods:") < words.index("ias_vit") < words.index("tasks:") < words.index("imagenet")


def test_list_methods_says_what_each_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.undo()
    assert status(monkeypatch, "list", "methods") == 0
    text = capsys.readouterr().out
    assert "ias_vit: I&S-ViT" in text
    assert "reference: arXiv:2311.10126" in " ".join(text.split())
    assert status(monkeypatch, "list", "models") == 2
    assert "iasvit list takes methods, or nothing, but 'models' was given" in capsys.readouterr().err


def test_show_prints_a_saved_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run_cells(FakeTask(), [Cell("vit_s", "rtn", "W4A8", 0, 8)], ResultStore("runs"), save=Path(), quiet=True)
    assert status(monkeypatch, "show", row["model_file"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["method:", "rtn"] in lines
    assert ["head", "4", "-"] in lines  # rtn leaves activations alone


def test_a_command_that_no_package_has(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda **which: [])
    assert status(monkeypatch, "evaluate", "x") == 2
    assert "'evaluate'" in capsys.readouterr().err


def test_a_folder_of_rows_that_is_not_there_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(monkeypatch, "leaderboard", "--runs", "mistyped") == 0
    assert capsys.readouterr().err == "warning: mistyped is not a folder, so no measured values are shown\n"


def test_leaderboard_fills_readme_by_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ResultStore("results/runs/reference").append(make_row())
    Path("README.md").write_text("<!-- table:fake-mini-w3a3 -->\n<!-- /table -->\n")
    assert status(monkeypatch, "leaderboard") == 0
    made = [
        "leaderboard.md",
        "index.html",
        "plots/fake-mini-w3a3-seconds.svg",
        "fake-mini-w3a3.md",
        "fake-mini-w3a3.csv",
    ]
    assert capsys.readouterr().out.split() == [*(f"results/{name}" for name in made), "README.md"]
    assert "| noise  | 70.00 |" in Path("README.md").read_text()


@pytest.mark.parametrize("statement", ["import iasvit", "import iasvit.cli"])
def test_imports_stay_light(statement: str) -> None:
    """Neither `import iasvit` nor `iasvit --help` may pull in what only some commands need."""
    heavy = ("matplotlib", "mmdet", "mmengine", "torch", "timm", "pandas")
    code = f"{statement}; import sys; print([m for m in {heavy} if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert run.stdout.strip() == "[]"
