"""The equality study in float64, on a tiny model: a row's figures, and files that several processes write."""

from __future__ import annotations

import csv
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch

pytest.importorskip("onnxruntime", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")

import iasvit
from iasvit.benchmark.harness import Cell
from iasvit.errors import IasvitError
from tasks.studies import exported as study


def test_a_row_in_float64() -> None:
    model = iasvit.quantize(tiny_models.vit(depth=1), tiny_models.images(), "W4A4", "repq_vit")
    images = tiny_models.images(30, seed=1)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    labels[:3] = (labels[:3] + 1) % 10
    batches = [(images[:28], labels[:28], None), (images[28:], labels[28:], None)]
    task: Any = SimpleNamespace(
        data=SimpleNamespace(name="mini"),
        split_size=30,
        images=SimpleNamespace(num_classes=None, batches=lambda config: batches),
        models=SimpleNamespace(config=lambda name: None),
    )
    cell = Cell(model="vit", method="repq_vit", spec="W4A4", seed=0, calib_size=12)
    row = study.compared_in_double(task, cell, model)
    assert (row["images"], row["target"]) == (30, "onnx")
    assert (row["top1"], row["top1_exported"], row["agreement"]) == (90, 90, 100)
    tokens, maps = 17 * 32, 2 * 17 * 17  # inputs of four layers (fc2's is four times as wide), Q, K and V, the head's
    assert row["codes"] == 30 * (tokens * (3 + 4 + 3) + maps + 32)
    assert (row["ties"], row["no_ties"], row["layers_that_differ"]) == (0, 0, "")


def write(path: Path, number: int) -> None:
    for index in range(20):
        study.append(path, {"number": number, "index": index})


def test_rows_of_several_processes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write, args=(path, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with path.open(newline="") as file:
        rows = [(int(row["number"]), int(row["index"])) for row in csv.DictReader(file)]
    assert sorted(rows) == [(number, index) for number in range(4) for index in range(20)]


def test_bad_input() -> None:
    given = (["deit_t"], ["W4A4"], ["minmax"])
    with pytest.raises(IasvitError, match="--precision 'float16' is not known; there are float32 and float64"):
        study.exported(*given, precision="float16")
    with pytest.raises(IasvitError, match="--precision float64 runs in ONNX Runtime; leave --target out"):
        study.exported(*given, precision="float64", target="openvino")
