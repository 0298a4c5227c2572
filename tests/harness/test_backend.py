"""Cells that are evaluated through the exported graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import harness_fakes
import pytest
import torch
from harness_fakes import FakeTask

pytest.importorskip("onnxruntime", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")

from iasvit.benchmark.harness import Cell, run_cells
from iasvit.benchmark.results import ResultStore
from iasvit.errors import IasvitError
from iasvit.leaderboard.cells import labelled
from tasks import command


def test_a_row_says_which_backend_measured_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness_fakes.install(monkeypatch)
    store = ResultStore(tmp_path / "runs", pytest.fail)
    cell = Cell("vit_s", "rtn", "W4A4", 0, 8)
    (through,) = command.through("onnxruntime", [cell], torch.device("cpu"))
    mine, theirs = run_cells(FakeTask(), [cell, through], store, checkpoint_root=tmp_path / "checkpoint")
    assert (mine["options"], theirs["options"]) == ("", "backend=onnxruntime")
    assert mine["status"] == theirs["status"] == "ok"
    assert mine["agreement"] == theirs["agreement"]
    assert theirs["images_per_second"] > 0
    assert theirs["packed_bytes"] == mine["packed_bytes"]
    rows = run_cells(FakeTask(), [cell, through], store, checkpoint_root=tmp_path / "checkpoint")
    assert [row["options"] for row in rows] == ["", "backend=onnxruntime"]  # each from its own stored row
    assert len(store.rows()) == 3
    labels = labelled([mine, theirs])["method_label"]
    assert labels.is_unique
    assert "backend=onnxruntime" in labels[1]


def test_what_no_backend_can_do() -> None:
    cell = Cell("vit_s", "rtn", "W4A4", 0, 8)
    with pytest.raises(IasvitError, match="backend 'tensorrt' is not known; there are onnxruntime, openvino"):
        command.through("tensorrt", [cell], torch.device("cpu"))
    with pytest.raises(IasvitError, match="backend 'tensorrt' is not known"):
        run_cells(FakeTask(), [replace(cell, backend="tensorrt")], ResultStore("runs", pytest.fail))
    with pytest.raises(IasvitError, match="computes on the CPU, but the device is meta; give --device cpu"):
        command.through("onnxruntime", [cell], torch.device("meta"))
    assert command.through(None, [cell], torch.device("meta")) == [cell]
