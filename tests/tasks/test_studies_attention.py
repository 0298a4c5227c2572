"""Post-softmax values and code grids: shares of all values, and the levels of the quantizers themselves."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from iasvit.quantizers import Log2Quantizer, SULQuantizer, UniformQuantizer
from tasks.studies.attention import GRIDS, LOWEST_OCTAVE, code_grid, histogram


def test_every_value_is_in_one_bin() -> None:
    values = torch.tensor([[0.0, 2.0**-20, 2.0**-16, 2.0**-3], [0.25, 0.3, 0.5, 1.0]])
    bins = {round(math.log2(row["value"]), 6): row["share"] for row in histogram(values) if row["share"]}
    assert bins == {LOWEST_OCTAVE: 3 / 8, -3: 1 / 8, -2: 2 / 8, -1: 1 / 8, -0.5: 1 / 8}


@pytest.mark.parametrize("kind", GRIDS)
def test_a_grid_is_that_of_the_calibrated_quantizer(kind: str) -> None:
    values = torch.rand(2, 3, 17, 17, generator=torch.Generator().manual_seed(0)).mul_(8).softmax(dim=-1)
    quantizer = {
        "uniform": UniformQuantizer(3),
        "log2": Log2Quantizer(3),
        "log-sqrt2": Log2Quantizer(3, steps_per_octave=2),
        "SULQ": SULQuantizer(3),
    }[kind]
    quantizer.calibrate(values)
    grid = pd.DataFrame(code_grid(values, kind, 3))
    assert grid["code"].tolist() == list(range(8))
    assert grid["value"].tolist() == quantizer.decode(torch.arange(8)).tolist()
    assert grid["share"].sum() == pytest.approx(1.0)
    assert (grid["value"] * grid["share"]).sum() == pytest.approx(quantizer(values).mean().item(), rel=1e-4)


def test_the_committed_file_has_all_grids_of_3_bits() -> None:
    table = pd.read_csv(Path(__file__).parents[2] / "results" / "mini_attention.csv")
    for _, part in table.groupby("model"):
        assert part.groupby("series")["share"].sum().to_numpy() == pytest.approx(1.0, abs=1e-4)
        assert part[part["series"] != "values"].groupby("series")["code"].nunique().to_dict() == dict.fromkeys(GRIDS, 8)
