"""Rows say which rules the quantized model keeps, and what a changed network has in full precision; tables show it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import harness_fakes
import pytest
from harness_fakes import FakeTask
from result_rows import make_row
from torch import Tensor, nn

from iasvit.benchmark.harness import Cell, run_cells
from iasvit.benchmark.results import ResultStore
from iasvit.leaderboard.aggregate import measured_documents
from iasvit.methods import GROUP
from iasvit.progress import Progress
from iasvit.spec import QuantSpec
from iasvit.transforms import relu_mlps


@dataclass
class Changed:
    """Min-max of a network whose GELUs have become ReLUs."""

    seed: int = 0
    name: ClassVar[str] = "changed"

    def quantize(self, model: nn.Module, calibration: Tensor, spec: QuantSpec, progress: Progress) -> nn.Module:
        from baselines.minmax import MinMax

        return MinMax().quantize(relu_mlps(model, calibration, iterations=0), calibration, spec, progress)


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    harness_fakes.install(monkeypatch)
    monkeypatch.setitem(harness_fakes.ENTRIES, "changed", EntryPoint("changed", f"{__name__}:Changed", GROUP))


def test_rows_and_tables_have_the_rules(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "runs")
    cells = [Cell("vit_s", method, "W3A3", 0, 4) for method in ("changed", "rtn")]
    rows = run_cells(FakeTask(), cells, store, checkpoint_root=tmp_path / "checkpoints", quiet=True)
    changed, rtn = rows
    assert changed["admission"].startswith("8 codes at 3 bits; integer zero-points; static; activations per tensor")
    assert changed["admission"].endswith("float: image; network changed by relu_mlps")
    assert changed["transformed"].startswith("top1=")
    assert "9 activations; network unchanged" in rtn["admission"]
    assert rtn["transformed"] == ""
    kept = store.rows().set_index("method")
    assert kept.loc["changed", "admission"] == changed["admission"]
    old = make_row(task="fake", method="older")
    (document,) = [d for d in measured_documents([*rows, old]) if d.identity == ("fake", "mini", "W3A3")]
    text = document.markdown()
    assert f"Computed rules of changed: {changed['admission']}." in text
    assert f"changed on vit_s: in full precision the changed network has {changed['transformed']}." in text
    assert "Computed rules of older" not in text
