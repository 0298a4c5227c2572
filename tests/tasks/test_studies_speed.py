"""The benchmark of full-size models, on a tiny one: a row's columns, and what a step's kernels are."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import tiny_models
import torch

from iasvit.errors import IasvitError
from iasvit.models import segments
from tasks.studies import speed
from tasks.studies.speed import PHASES, Subject, profile_step

OPTIONS = {"iterations": 2, "batch_size": 2, "autocast": False, "compile": False}


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> Subject:
    """A ViT of 2 blocks in place of the timm model asked for."""
    images = tiny_models.images(4)
    tiny = Subject(tiny_models.vit(), images, images[:2], lambda network, batch: network(batch))
    monkeypatch.setattr(speed, "classifier", lambda *args: tiny)
    return tiny


@pytest.mark.usefixtures("subject")
def test_rows_have_the_phases_and_what_was_run(tmp_path: Path) -> None:
    precision = torch.get_float32_matmul_precision()
    out = tmp_path / "new" / "rows.csv"
    try:
        speed.benchmark(
            ["tiny"], None, ["ias_vit", "minmax"], "W3A3", 4, 1, 2, repeats=1, profile=False, autocast=True, out=out
        )
    finally:
        torch.set_float32_matmul_precision(precision)
    with out.open() as file:
        first, second = csv.DictReader(file)
    assert [first["method"], second["method"]] == ["ias_vit", "minmax"]
    assert (first["model"], first["image"], first["bits"], first["calib_size"]) == ("tiny", "3x32x32", "W3A3", "4")
    assert (first["iterations"], first["batch_size"], first["autocast"], first["compile"]) == (
        "1",
        "2",
        "True",
        "False",
    )
    assert (second["iterations"], second["autocast"]) == ("", "")  # options that the method does not have
    seconds = [float(first[f"{name}_seconds"]) for name in PHASES.values()]
    assert float(first["total_seconds"]) + 0.1 >= sum(seconds) > 0
    for name in ("stage_1", "stage_3"):
        assert float(first[f"{name}_seconds"]) > 0
        assert float(second[f"{name}_seconds"]) == 0
    for name in ("peak_memory_MiB", "fp32_images_per_second", "quantized_images_per_second"):
        assert float(first[name]) > 0
    assert first["device"]
    assert torch.__version__ in first["versions"]


def test_a_profile_is_of_one_middle_block_and_sums_up(subject: Subject) -> None:
    rows = profile_step(subject, "W3A3", OPTIONS, steps=2)
    assert {row["block"] for row in rows} == {segments(subject.model)[len(segments(subject.model)) // 2].name}
    *kernels, last = rows
    assert len(kernels) == 20
    assert last["kernel"] == "all, these and others"
    times = [row["microseconds"] for row in kernels]
    assert times == sorted(times, reverse=True)
    assert last["microseconds"] >= sum(times) - 1
    assert any("mm" in row["kernel"] for row in kernels)


def test_nothing_to_measure_is_said() -> None:
    with pytest.raises(IasvitError, match="name a timm model by --backbone, or a detector by --detector"):
        speed.benchmark(None, None, ["ias_vit"])
