"""Rows of earlier code: marked, and marked otherwise where the present code measured the same again."""

from __future__ import annotations

from typing import Any

import pytest
from result_rows import line_of, make_row

from iasvit.benchmark import staleness
from iasvit.benchmark.results import Row
from iasvit.benchmark.staleness import equal_code
from iasvit.leaderboard.aggregate import measured_documents
from iasvit.leaderboard.markdown import Document
from iasvit.leaderboard.page import page
from iasvit.leaderboard.views import page_values

AGAIN = "2026-01-02T00:00:00Z"
NOTE = "‡ measured by earlier code; the present code, measuring {} of the method's cells again, got the same values"


@pytest.fixture(autouse=True)
def _present_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staleness, "current_code", lambda method: "new")


def measured(code: str, **values: Any) -> Row:
    return make_row(code_hash=code, time=AGAIN if code == "new" else "2026-01-01T00:00:00Z", **values)


def document(*rows: Row) -> Document:
    """Of the rows in either order, which must not matter."""
    (found,) = measured_documents(rows)
    (again,) = measured_documents(rows[::-1])
    assert found.sections == again.sections
    return found


def both(**later: Any) -> list[Row]:
    """A cell measured by old and by new code, and two more cells of the old."""
    others = [measured("old", model=model) for model in ("deit_t", "swin_t")]
    return [measured("old"), measured("new", **later), *others]


def test_the_present_code_of_a_method_is_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from iasvit.benchmark.provenance import code_hash

    assert staleness.current_code("ias_vit[-sulq]") == code_hash("iasvit.sos")
    assert staleness.current_code("gone") is None


def test_rows_of_other_code_are_marked() -> None:
    found = document(measured("new"), measured("old", model="swin_t"))
    assert line_of(found.sections, "noise")[1:] == ["**70.00** (-10.00)", "**70.00**† (-10.00)"]
    assert "- † measured by other code than the present; measure it again with --force." in found.sections
    assert "‡" not in found.sections
    assert found.frame[["model", "stale", "compared"]].values.tolist() == [["swin_t", "yes", 0], ["vit_s", "no", 0]]


def test_equal_values_of_one_cell_vouch_for_the_others() -> None:
    found = document(*both())
    assert line_of(found.sections, "noise")[1:] == ["**70.00** (-10.00)", *["**70.00**‡ (-10.00)"] * 2]
    assert f"- {NOTE.format(1)} to the last digit." in found.sections
    assert "†" not in found.sections
    assert found.frame["stale"].tolist() == ["same values", "same values", "no"]
    assert found.frame["compared"].tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    "later",
    [
        {"top1": 70.0000001},
        {"agreement": 90.5},  # not the metric that is shown, but a metric
        {"agreement": None},
        {"device": "cuda: another"},
        {"torch": "3"},
        {"status": "failed", "reason": "x", "top1": None, "agreement": None},
        {"seed": 1},
        {"options": "iterations=9"},
        {"weights": "other"},
        {"split_size": 10},
        {"method": "other"},
    ],
)
def test_anything_else_does_not(later: dict[str, Any]) -> None:
    assert equal_code(both(**later)) == {}
    documents = measured_documents([*both(**later), measured("new", model="unrelated")])
    sections = "".join(found.sections for found in documents)
    assert "†" in sections
    assert "‡" not in sections


def test_one_cell_that_differs_outweighs_all_that_do_not() -> None:
    rows = [*both(), measured("new", model="deit_t", top1=70.5)]
    assert equal_code(rows) == {}
    assert line_of(document(*rows).sections, "noise")[1:] == [
        "**70.00** (-10.00)",
        "**70.50** (-9.50)",
        "**70.00**† (-10.00)",
    ]


def test_a_failure_beside_equal_cells_changes_nothing() -> None:
    failed = {"status": "failed", "reason": "out of memory", "top1": None, "agreement": None}
    assert equal_code([*both(), measured("new", model="deit_t", **failed)]) == {("noise", "old"): 1}


def test_chains_of_equal_code_count_as_their_weakest_link() -> None:
    chain = [measured("old"), measured("middle"), measured("middle", seed=2), measured("new", seed=2)]
    chain += [measured("middle", seed=3), measured("new", seed=3)]
    assert equal_code(chain) == {("noise", "middle"): 2, ("noise", "old"): 1}
    rows = [*chain, measured("old", model="swin_t"), measured("middle", model="deit_t")]
    assert line_of(document(*rows).sections, "noise")[2:] == ["**70.00**‡ (-10.00, n=1)"] * 2
    # The chain says equal, but a cell of old and new says otherwise.
    assert equal_code([*rows, measured("new", model="swin_t", top1=1.0)]) == {("noise", "middle"): 2}
    # A chain that does not reach the present code is none.
    assert equal_code([row for row in rows if row["code_hash"] != "new"]) == {}


def test_a_variant_runs_the_code_of_its_method() -> None:
    rows = [*both(), measured("old", method="noise[-a]"), measured("old", method="other")]
    found = document(*rows)
    assert line_of(found.sections, "noise[-a]")[1] == "**70.00**‡ (-10.00)"
    assert line_of(found.sections, "other")[1] == "**70.00**† (-10.00)"
    assert "- † measured by other code" in found.sections
    assert NOTE.format(1) in found.sections


def test_a_cell_is_as_stale_as_the_stalest_of_its_seeds() -> None:
    seeds = [measured("older", model="swin_t", seed=1), measured("new", model="swin_t", seed=2)]
    assert line_of(document(*both(), *seeds).sections, "noise")[3] == "**70.00 ± 0.00**† (-10.00, n=3)"
    assert line_of(document(*both(), seeds[1]).sections, "noise")[3] == "**70.00 ± 0.00**‡ (-10.00, n=2)"


def test_different_counts_are_said_by_method() -> None:
    rows = [{**row, "method": "b"} for row in [*both(), measured("old", seed=1), measured("new", seed=1)]]
    assert NOTE.format("1 (noise) or 2 (b)") in document(*both(), *rows).sections


def test_the_page_bears_the_marks_and_says_why() -> None:
    rows = [*both(), measured("older", model="vit_b")]
    values = {value.model: value for value in page_values(measured_documents(rows))}
    assert {model: value.note for model, value in values.items()} == {
        "vit_s": "",
        "deit_t": "‡",
        "swin_t": "‡",
        "vit_b": "†",
    }
    assert NOTE.format(1) in values["deit_t"].how
    assert "measured by other code than the present" in values["vit_b"].how
    assert "measured by" not in values["vit_s"].how
    html = page(list(values.values()), [])
    assert "70.00 ‡</td>" in html
    assert "70.00 †</td>" in html
