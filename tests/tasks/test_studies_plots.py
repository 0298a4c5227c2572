"""Plots of the studies' files: what they show, and that the committed files give the committed plots."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from tasks.studies import plots

RESULTS = Path(__file__).parents[2] / "results"


def test_errors_by_layer_have_a_line_for_each_method(tmp_path: Path) -> None:
    lines = [f"deit_t,W3A3,{m},32,{layer},k,{e},{e}" for m in ("a$", "b") for layer, e in (("x", 0.1), ("y", 0.0))]
    path = tmp_path / "errors.csv"
    path.write_text("\n".join(["model,bits,method,images,layer,kind,own,streamed", *lines]))
    (written,) = plots.draw(path, "layer-errors", plots.layer_errors, "error by layer")
    assert written == tmp_path / "plots" / "layer-errors-deit_t-w3a3.svg"
    svg = written.read_text()
    for text in ("mini deit_t, W3A3: error by layer", ">a$<", ">b<"):
        assert text in svg


def test_a_loss_surface_has_an_axis_for_each_variant() -> None:
    places = [(v, a, b, a * a + b) for v in ("direct", "stage 1") for a in (-1, 0, 1) for b in (0, 1)]
    svg = plots.loss_surface(pd.DataFrame(places, columns=["variant", "alpha", "beta", "loss"]), "title")
    for text in ("title", ">direct<", ">stage 1<"):
        assert text in svg


def test_code_grids_have_an_axis_for_each_quantizer() -> None:
    shares = [("values", 2.0 ** (i - 3), 0.2) for i in range(3)]
    shares += [(name, value, 0.5) for name in ("uniform", "SULQ") for value in (0, 1)]
    svg = plots.code_grids(pd.DataFrame(shares, columns=["series", "value", "share"]), "title")
    for text in ("title", ">uniform<", ">SULQ: codes<", "values, by half octave"):
        assert text in svg


@pytest.mark.parametrize(
    ("file", "name", "plot", "text", "count"),
    [
        ("mini_errors.csv", "layer-errors", plots.layer_errors, "error by layer", 2),
        ("mini_surface.csv", "loss-surface", plots.loss_surface, "loss around a block's weights", 1),
        ("mini_attention.csv", "code-grids", plots.code_grids, "post-softmax values and codes", 2),
    ],
)
def test_the_committed_files_are_drawn(
    tmp_path: Path, file: str, name: str, plot: Callable[[pd.DataFrame, str], str], text: str, count: int
) -> None:
    shutil.copy(RESULTS / file, tmp_path)
    written = plots.draw(tmp_path / file, name, plot, text)
    assert len(written) == count
    assert all((RESULTS / "plots" / path.name).is_file() for path in written)
    first = [path.read_bytes() for path in written]
    plots.draw(tmp_path / file, name, plot, text)
    assert [path.read_bytes() for path in written] == first
