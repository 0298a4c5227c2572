"""Suites: what is read, and one sentence for each mistake."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path

import pytest
import sweep_fakes
from sweep_fakes import Mode, Swept, write_suite

from iasvit.benchmark.results import ResultStore
from iasvit.benchmark.task import load_task_class
from iasvit.cli import main
from iasvit.errors import IasvitError
from iasvit.sweep import command
from iasvit.sweep.plan import make_plan, plan_grids
from iasvit.sweep.suite import Needs, arguments, find_suite, read_suite, shipped

SOUND = 'bits = ["W3A3"]\nseed = [0]\nmethod = ["noise"]'


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    sweep_fakes.install(monkeypatch, tmp_path)


def status(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["iasvit", "sweep", *map(str, args)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def test_a_suite_is_grids_with_needs() -> None:
    first = f'{SOUND}\nmode = "striped"\ndata_root = "data"\nlr = 1'
    top = 'description = "two grids"\n[resources]\ncpu = 2\ngpu = 0.25'
    suite = read_suite(write_suite(Path("two.toml"), first, f"{SOUND}\nresources = {{gpu = 2}}", top=top))
    assert (suite.name, suite.description, len(suite.grids)) == ("two", "two grids", 2)
    assert [grid.needs for grid in suite.grids] == [Needs(2, 0.25), Needs(2, 2)]
    assert suite.with_needs(gpu=1, cpu=None).grids[0].needs == Needs(2, 1)
    given = arguments(Swept, suite.grids[0].options, "here")
    assert given["mode"] is Mode.striped
    assert given["data_root"] == Path("data").absolute()  # a worker elsewhere has another current folder
    assert type(given["lr"]) is float


def test_cells_are_all_combinations_and_stored_ones_are_left_out() -> None:
    path = write_suite(
        Path("s.toml"), 'bits = ["W3A3", "w4a4"]\nseed = [0, 1]\nmethod = ["noise"]\nbackbone = ["a", "b"]'
    )
    planned = plan_grids(read_suite(path))
    plan = make_plan(planned, ResultStore("runs"))
    assert len(plan.keys) == len(set(plan.keys)) == len(plan.todo) == 8
    assert {(key.model, key.spec, key.seed) for key in plan.keys} == {
        (model, spec, seed) for model in "ab" for spec in ("W3A3", "W4A4") for seed in (0, 1)
    }
    assert command.run("s.toml", "local", None, Path("runs"), dry_run=True) is False
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("grid = 3", "x.toml has no grid; write at least one table [[grid]]"),
        ("[[grid]", "x.toml is not a TOML file: "),
        ("speed = 3", "x.toml: the key 'speed' is not known; there are description, resources, grid"),
        ("description = 3", "x.toml: description is 3, but a text is expected"),
        ("[resources]\ntpu = 1", "x.toml, resources: the key 'tpu' is not known; there are cpu, gpu, memory_gib"),
        ('[resources]\ncpu = "2"', "x.toml, resources: cpu is '2', but a number is expected"),
        ("[resources]\ngpu = 1.5", "x.toml, resources: gpu is 1.5, but above 1 a whole number is expected"),
        ("[resources]\ncpu = 0", "x.toml, resources: cpu is 0, but 1 or more is expected"),
    ],
)
def test_a_file_that_is_no_suite(text: str, sentence: str) -> None:
    Path("x.toml").write_text(text if "grid" in text else f'{text}\n[[grid]]\ntask = "swept"\n{SOUND}')
    with pytest.raises(IasvitError) as error:
        read_suite(Path("x.toml"))
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("grid", "sentence"),
    [
        (f"task = 3\n{SOUND}", "x.toml, grid 2: task is 3, but a text is expected"),
        (f'task = "nope"\n{SOUND}', "x.toml, grid 2: task 'nope' is not registered; the registered ones are"),
        (f'task = "gone"\n{SOUND}', "x.toml, grid 2: task 'gone' is registered as nowhere:Gone, but loading"),
        (f'task = "mute"\n{SOUND}', "task 'fake' has no grid"),
        (
            f"{SOUND}\nspeed = 3",
            "x.toml, grid 2: the key 'speed' is not known; there are task, resources, bits, seed, ",
        ),
        (f'{SOUND}\ndevice = "cuda"', "x.toml, grid 2: device is not a key; with gpu under resources"),
        ("seed = [0]", "x.toml, grid 2 lacks the key bits"),
        ('bits = "W3A3"\nseed = [0]', "x.toml, grid 2: bits is 'W3A3', but a list of one or more values"),
        ("bits = []\nseed = [0]", "x.toml, grid 2: bits is [], but a list of one or more values"),
        ("bits = [3]\nseed = [0]", "x.toml, grid 2: bits is 3, but a text is expected"),
        ('bits = ["W3"]\nseed = [0]\nmethod = ["noise"]', "x.toml, grid 2: bits 'W3' are not of the form"),
        ('bits = ["W9A9"]\nseed = [0]\nmethod = ["noise"]', "x.toml, grid 2: bits 'W9A9' name 9 bits"),
        ('bits = ["W3A3"]\nseed = [0.5]', "x.toml, grid 2: seed is 0.5, but a whole number is expected"),
        ('bits = ["W3A3"]\nseed = [true]', "x.toml, grid 2: seed is true, but a whole number is expected"),
        (f'{SOUND}\nmode = "dotted"', "x.toml, grid 2: mode is 'dotted', but one of plain, striped is expected"),
        (f"{SOUND}\nlabels = 1", "x.toml, grid 2: labels is 1, but true or false is expected"),
        ('bits = ["W3A3"]\nseed = [0]\nmethod = ["nope"]', "x.toml, grid 2: method 'nope' is not registered"),
        (f'{SOUND}\nbackbone = ["b"]', "x.toml, grid 2 has the cell swept mini: b noise W3A3 seed 0, which x.toml"),
        (f"{SOUND}\nresources = 3", "x.toml, grid 2, resources is 3, but a table with cpu, gpu, memory_gib"),
    ],
)
def test_a_mistake_in_a_grid_is_one_sentence_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], grid: str, sentence: str
) -> None:
    write_suite(Path("x.toml"), f'{SOUND}\nbackbone = ["b"]', grid)
    assert status(monkeypatch, "x.toml") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {sentence}")
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "iasvit sweep needs a suite: a TOML file, or a name that iasvit sweep --list prints"),
        (["nope"], "suite 'nope' is neither a file nor one of coco, coco-mini, imagenet, "),
        (["s.toml", "--engine", "slurm"], "--engine slurm is not known; there are local, ray"),
        (["s.toml", "--address", "head:6379"], "--address does not go with --engine local; --engine ray takes it"),
        (["s.toml", "--gpu", "-1"], "--gpu: gpu is -1, but 0 or more is expected"),
        (["s.toml", "--gpu", "99"], "s.toml, grid 1: a cell needs 99 GPUs, but no machine of engine local has more"),
        (["s.toml", "--cpu", "999"], "s.toml, grid 1: a cell needs 999 CPUs, but no machine of engine local has more"),
        (["s.toml", "--memory", "99999"], "s.toml, grid 1: a cell needs 99999 GiB of memory, but no machine of"),
    ],
)
def test_bad_options_are_one_sentence_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], sentence: str
) -> None:
    write_suite(Path("s.toml"), SOUND)
    assert status(monkeypatch, *args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {sentence}")
    assert not Path("results").exists()


def test_the_suites_of_the_package_are_sound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(shipped()) == ["coco", "coco-mini", "imagenet", "imagenet-mini", "imagenet-mini-hard"]
    for name, path in shipped().items():
        assert find_suite(name) == path
        suite = read_suite(path)
        assert suite.description
        for grid in suite.grids:  # their methods and options are checked without data or models
            arguments(load_task_class(grid.task), grid.options, grid.where)
    assert status(monkeypatch, "--list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(shipped())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("imagenet", 8 * 3 * 6),
        ("coco", 4 * 2 * 6),
        ("imagenet-mini", 8 * 3 * 6 * 3 + 2 * 3 * 3),
        ("coco-mini", 4 * 3 * 6),
    ],
)
def test_a_suite_has_the_cells_of_its_table(name: str, count: int) -> None:
    grids = read_suite(find_suite(name)).grids
    assert sum(prod(len(v) for v in grid.options.values() if isinstance(v, list)) for grid in grids) == count
