"""Plots: what is drawn."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any

import pytest
from result_rows import make_row

from iasvit.benchmark.results import Row
from iasvit.benchmark.task import Metric
from iasvit.leaderboard import plots as drawing
from iasvit.leaderboard.aggregate import measured_documents
from iasvit.leaderboard.views import plots

SPECS = (("W3A3", 3), ("W4A4", 4))


def texts(svg: str) -> list[str]:
    """All texts of an SVG, which is well-formed."""
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of all figures that are drawn."""
    found: list[Any] = []
    svg = drawing.svg

    def keep(figure: Any, axes: Sequence[Any]) -> str:
        found.extend(axes)
        return svg(figure, axes)

    monkeypatch.setattr(drawing, "svg", keep)
    return found


def rows() -> list[Row]:
    found = [
        make_row(
            **{"model": model, "method": f"m{i}", "spec": spec, "w_bits": b, "a_bits": b, "top1": 10.0 * i + b},
            **{"quantization_seconds": float(i), "data_description": "photographs"},
        )
        for model in ("vit_s", "swin_t")
        for i in (1, 2, 3)
        for spec, b in SPECS
    ]
    return [*found, make_row(method="mixed", spec="W3A3,head=W8A8")]


def test_a_metric_is_drawn_against_bits_for_each_model(axes: list[Any]) -> None:
    drawn = plots(measured_documents(rows()))
    assert set(drawn) == {"fake-mini-bits.svg", "fake-mini-w3a3-seconds.svg", "fake-mini-w4a4-seconds.svg"}
    words = texts(drawn["fake-mini-bits.svg"])
    assert {"vit_s", "swin_t", "m1", "m3", "W3A3", "W4A4", "fp32", "top1"} <= set(words)
    assert "fake on mini: top1 against bits, measured on photographs" in words
    assert "mixed" not in words
    first = axes[0]
    assert first.get_title() == "vit_s"
    lines = {container.get_label(): container.lines[0].get_xydata().tolist() for container in first.containers}
    assert lines == {f"m{i}": [[0.0, 10.0 * i + 3], [1.0, 10.0 * i + 4]] for i in (1, 2, 3)}
    assert first.lines[0].get_ydata() == [80.0, 80.0]
    assert plots(measured_documents(rows())) == drawn


@pytest.mark.parametrize(
    ("better", "front"),
    [(True, [[1.0, 50.0], [3.0, 60.0]]), (False, [[1.0, 50.0], [2.0, 40.0], [4.0, 30.0]])],
)
def test_the_front_is_of_what_nothing_faster_is_better_than(
    axes: list[Any], monkeypatch: pytest.MonkeyPatch, better: bool, front: list[list[float]]
) -> None:
    monkeypatch.setattr("board_fakes.Classification.metrics", (Metric("top1", primary=True, higher_is_better=better),))
    values = enumerate((50.0, 40.0, 60.0, 30.0), start=1)
    found = [make_row(method=f"m{s}", quantization_seconds=float(s), top1=top1) for s, top1 in values]
    found += [make_row(method="w", a_bits=32, spec="W3A3", quantization_seconds=1.0, top1=99.0 if better else 1.0)]
    (svg,) = plots(measured_documents(found)).values()
    (ax,) = axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert drawn.pop("Pareto front") == front
    assert len(drawn) == 5
    assert ax.get_ylabel() == ("top1" if better else "top1 (lower is better)")
    assert "w, weights only" in texts(svg)


def test_a_name_is_drawn_as_it_stands() -> None:
    values = {"method": "a$x$", "model": "$\\frac$ <b>", "device": "cpu: \x1b\x00$"}
    (svg,) = plots(measured_documents([make_row(**values)])).values()
    words = texts(svg)
    assert {"a$x$", "$\\frac$ <b>"} <= set(words)
    assert any("seconds on cpu:   $, measured" in re.sub(r"[\xa0]", " ", word) for word in words)


def test_failed_cells_are_not_drawn() -> None:
    failed = {"status": "failed", "reason": "x", "top1": None}
    assert plots(measured_documents([make_row(**failed)])) == {}
    (svg,) = plots(measured_documents([make_row(), make_row(method="broken", seed=1, **failed)])).values()
    assert "broken" not in texts(svg)
