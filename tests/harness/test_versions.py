"""Versions of methods and tasks: what is said of a row of another one, and when it is measured again."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import harness_fakes
import pytest
from harness_fakes import FakeTask, Noise
from result_rows import make_row

from iasvit.benchmark import task as tasks
from iasvit.benchmark.estimate import estimate
from iasvit.benchmark.harness import Cell, run_cells
from iasvit.benchmark.results import ResultStore, Row
from iasvit.benchmark.task import EMBEDDED, DataSet, data_set
from iasvit.benchmark.versions import method_version, other_version
from iasvit.errors import IasvitError
from iasvit.sos import IASViT

CELL = Cell("vit_s", "noise", "W3A3", 0, 8)


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [EntryPoint("fake", "harness_fakes:FakeTask", tasks.GROUP)]
    monkeypatch.setattr(tasks, "entry_points", lambda group: entries)
    harness_fakes.install(monkeypatch)
    monkeypatch.setattr(Noise, "steps", [])


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "runs", pytest.fail)


def run(store: ResultStore, cell: Cell = CELL, **options: bool) -> Row:
    (row,) = run_cells(FakeTask(), [cell], store, checkpoint_root=store.folder.parent / "checkpoint", **options)
    return row


def raise_version(monkeypatch: pytest.MonkeyPatch, cls: type, version: int, **changelog: str) -> None:
    monkeypatch.setattr(cls, "version", version, raising=False)
    lines = {int(name.removeprefix("v")): line for name, line in changelog.items()}
    monkeypatch.setattr(cls, "changelog", lines, raising=False)


def test_a_method_without_a_version_is_at_its_first() -> None:
    assert method_version("noise") == method_version("fp32") == method_version("gone[-x]") == 1
    assert other_version(make_row()) == ""


def test_a_row_of_another_version_is_named_with_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    raise_version(monkeypatch, Noise, 3, v2="louder", v3="softer")
    assert method_version("noise[-x]") == 3
    assert other_version(make_row()) == "measured by version 1 of noise; the present version is 3 (louder; softer)"
    assert "version 2 of noise; the present version is 3 (softer)" in other_version(make_row(method_version=2))
    assert "version 4 of noise; the present version is 3" in other_version(make_row(method_version=4))
    assert other_version(make_row(method_version=3)) == other_version(make_row(method="gone", method_version=7)) == ""


def test_a_row_of_another_version_of_the_task_too(monkeypatch: pytest.MonkeyPatch) -> None:
    raise_version(monkeypatch, FakeTask, 2, v2="other labels")
    assert "version 1 of fake; the present version is 2 (other labels)" in other_version(make_row())
    assert other_version(make_row(task="gone")) == ""
    raise_version(monkeypatch, Noise, 2)
    both = other_version(make_row())
    assert "of noise" in both
    assert "of fake" in both


def test_stale_measures_again_what_another_version_measured(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(store)
    assert run(store, stale=True) == first
    raise_version(monkeypatch, Noise, 2, v2="louder")
    capsys.readouterr()
    assert run(store) == first
    shown = capsys.readouterr().err
    assert "measured by version 1 of noise; the present version is 2 (louder); --stale measures it again" in shown
    assert [item.seconds == 0 for item in estimate(FakeTask(), [CELL], store)] == [True]
    assert [item.seconds == 0 for item in estimate(FakeTask(), [CELL], store, stale=True)] == [False]
    again = run(store, stale=True)
    assert (again["method_version"], Noise.steps) == (2, [0, 1, 2] * 2)
    assert len(store.rows()) == 2  # the later row counts, and full precision


def test_a_new_cell_is_not_compared_with_another_versions_full_precision(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(store)
    raise_version(monkeypatch, FakeTask, 2)
    run(store, Cell("vit_s", "noise", "W3A3", 1, 8))
    versions = store.rows().set_index(["method", "seed"])["task_version"]
    assert versions.to_dict() == {("fp32", 0): 2, ("noise", 0): 1, ("noise", 1): 2}


def test_this_repositorys_versions_have_their_changelog() -> None:
    assert set(IASViT.changelog) == set(range(2, IASViT.version + 1))


def test_a_task_knows_its_data_sets_and_takes_others_for_real() -> None:
    assert data_set("fake", "mini") == DataSet("mini", EMBEDDED, "drawn images")
    assert data_set("fake", "photographs") == data_set("gone", "photographs") == DataSet("photographs")


def test_a_task_without_a_command_says_so() -> None:
    with pytest.raises(IasvitError, match="fake"):
        FakeTask.command()
