"""Model files of measured cells: their names, what a row says of them, and what becomes of them later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness_fakes
import pytest
import torch
from harness_fakes import FakeTask

import iasvit
from iasvit.benchmark.evaluation import evaluate_file
from iasvit.benchmark.harness import Cell, run_cells
from iasvit.benchmark.results import ResultStore, Row
from iasvit.errors import IasvitError, StorageError
from iasvit.summary import layer_bits, summary

RTN = Cell("vit_s", "rtn", "W4A8,head=W6A6", 0, 8)


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    harness_fakes.install(monkeypatch)


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "runs", pytest.fail)


def run(store: ResultStore, *cells: Cell, **options: Any) -> list[Row]:
    return run_cells(FakeTask(), cells, store, checkpoint_root=store.folder.parent / "checkpoint", **options)


def test_each_cell_keeps_a_file_of_its_own_that_its_row_names(store: ResultStore) -> None:
    cells = [RTN, Cell("vit_s", "rtn", "W4A8,head=W6A6", 1, 8), Cell("vit/s", "rtn", "W4A8,head=W6A6", 0, 8)]
    rows = run(store, *cells, save=store.folder / "models")
    files = [store.folder / row["model_file"] for row in rows]
    assert len(set(files)) == 3
    assert all(file.parent == store.folder / "models" and file.is_file() for file in files)
    assert store.rows().set_index(["method", "model", "seed"])["model_file"]["fp32", "vit_s", 0] == ""


def test_a_file_outside_the_results_is_named_as_its_folder_was_given(
    store: ResultStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (row,) = run(store, RTN, save=Path("kept"))
    assert Path(row["model_file"]).parent == Path("kept")
    assert iasvit.load(row["model_file"]).quantization.spec == "W4A8,head=W6A6"


def test_a_model_that_cannot_be_saved_is_said_and_counts(
    store: ResultStore, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = run(store, Cell("vit_s", "noise", "W3A3", 0, 8), save=store.folder / "models")
    assert (row["status"], row["model_file"]) == ("ok", "")
    assert "no model file of vit_s noise W3A3: " in capsys.readouterr().err
    assert list((store.folder / "models").iterdir()) == []


def test_a_folder_that_cannot_be_used_stops_the_run_before_it_begins(store: ResultStore, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        run(store, RTN, save=tmp_path / "file")
    assert not store.folder.exists()


def test_a_cell_stored_without_its_file_is_said_to_be(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    run(store, RTN, quiet=True)
    run(store, RTN, save=store.folder)
    assert "without a model file; --force measures it again" in capsys.readouterr().err


def test_a_file_scores_what_its_row_says(store: ResultStore) -> None:
    (row,) = run(store, RTN, save=store.folder)
    found = evaluate_file(FakeTask(), store.folder / row["model_file"], "vit_s")
    assert found.scores == {name: row[name] for name in ("top1", "top1_se", "agreement")}
    assert found.full_precision["top1"] == row["fp_top1"]
    assert f"| top1 | {row['top1']:.2f} | 80.00 |" in found.table(FakeTask.metrics)


def test_a_file_of_another_model_is_refused(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = run(store, RTN, save=store.folder)
    other = FakeTask()
    load = other.load_model
    monkeypatch.setattr(other, "load_model", lambda model: torch.nn.Sequential(load(model)))
    with pytest.raises(IasvitError):
        evaluate_file(other, store.folder / row["model_file"], "vit_s")


def test_show_says_how_a_file_was_made_and_the_bits_of_each_layer(store: ResultStore) -> None:
    (row,) = run(store, RTN, save=store.folder)
    path = store.folder / row["model_file"]
    text = summary(path)
    assert text.startswith("method:      rtn\nspec:        W4A8,head=W6A6\n")
    assert f"{row['model_bytes']} bytes" in text
    assert f"{row['packed_bytes']} bytes" in text
    bits = {name: (weights, inputs) for name, weights, inputs in layer_bits(iasvit.load(path))}
    assert bits["head"][0] == "6"
    assert bits["blocks.0.mlp.fc1"][0] == "4"
    assert all(name in text for name in bits)
