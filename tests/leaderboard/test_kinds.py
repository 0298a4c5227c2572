"""Published, real and embedded numbers, data sets, bit-widths and data never share a table."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from board_fakes import grids, notes, numbers
from result_rows import PUBLISHED_HEADER, make_row

from iasvit.benchmark.results import Row
from iasvit.benchmark.task import EMBEDDED, REAL
from iasvit.leaderboard.aggregate import measured_documents, table
from iasvit.leaderboard.markdown import PUBLISHED, Document
from iasvit.leaderboard.page import page
from iasvit.leaderboard.published import published_documents, read_published
from iasvit.leaderboard.views import page_values, plots

DRAWN = {"data_kind": EMBEDDED, "data_description": "drawn scenes"}
PHOTOGRAPHS = {"data_kind": REAL, "data_description": "real data"}


def first_number(document: Document) -> list[float]:
    """Of each table the mean of noise on vit_s."""
    return [numbers(grid["noise"]["vit_s"])[0] for grid in grids(document.sections)]


def test_data_sets_and_bits_are_documents_of_their_own() -> None:
    rows = [make_row(dataset="a", top1=1.0, **DRAWN), make_row(dataset="b", top1=2.0, **PHOTOGRAPHS)]
    rows += [make_row(dataset="a", spec="W4A4", w_bits=4, a_bits=4, top1=4.0, **DRAWN)]
    documents = {document.name: document for document in measured_documents(rows)}
    assert list(documents) == ["fake-a-w3a3", "fake-a-w4a4", "fake-b-w3a3"]
    assert [first_number(document) for document in documents.values()] == [[1.0], [4.0], [2.0]]
    assert documents["fake-a-w3a3"].title == "fake on a, W3A3: measured on drawn scenes"
    assert documents["fake-b-w3a3"].title == "fake on b, W3A3: measured on real data"


def test_rows_that_say_nothing_of_their_data_count_as_real() -> None:
    (document,) = measured_documents([make_row(data_kind="", data_description="")])
    assert (document.kind, document.heading) == (REAL, "measured on real data")


def test_one_data_set_of_two_kinds_is_two_documents(tmp_path: Any) -> None:
    rows = [make_row(top1=1.0, seed=0, **DRAWN), make_row(top1=2.0, seed=1, **PHOTOGRAPHS)]
    documents = measured_documents(rows)
    assert [document.name for document in documents] == ["fake-mini-embedded-w3a3", "fake-mini-real-w3a3"]
    assert [first_number(document) for document in documents] == [[1.0], [2.0]]
    assert sorted(plots(documents)) == ["fake-mini-embedded-w3a3-seconds.svg", "fake-mini-real-w3a3-seconds.svg"]


def test_the_three_kinds_stay_in_documents_and_tables_of_the_page_of_their_own(tmp_path: Any) -> None:
    path = tmp_path / "published.csv"
    path.write_text(PUBLISHED_HEADER + "imagenet,vit_s,noise,3,3,top1,68.25,x\n")
    published = read_published(path)
    rows = [make_row(task="imagenet", dataset=name, **kind) for name, kind in (("a", DRAWN), ("b", DRAWN))]
    rows += [make_row(task="imagenet", dataset="imagenet", **PHOTOGRAPHS)]
    documents = [*measured_documents(rows, published), *published_documents(published)]
    assert [document.kind for document in documents] == [EMBEDDED, EMBEDDED, REAL, PUBLISHED]
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page(page_values(documents)))[1]
    shown = [(table["kind"], table["headings"]["W3A3"], len(table["cells"])) for table in json.loads(data)["tables"]]
    assert shown == [
        (REAL, "Measured on real data", 1),
        (EMBEDDED, "Measured on drawn scenes", 1),
        (EMBEDDED, "Measured on drawn scenes", 1),
        (PUBLISHED, "Published: values from papers, not measured here", 1),
    ]


def test_split_sizes_are_tables_of_their_own_the_largest_first() -> None:
    rows = [make_row(top1=1.0), make_row(split_size=50, top1=5.0)]
    (document,) = measured_documents(rows)
    assert first_number(document) == [5.0, 1.0]
    assert document.sections.index("top1, 50 images") < document.sections.index("top1, 20 images")
    assert ", data " not in document.sections
    assert [value.value for value in page_values([document])] == [5.0]


def two_data() -> list[Row]:
    """The second data are measured later."""
    values = (("aaaa", 1.0, "2026-01-01T00:00:00Z"), ("0000", 2.0, "2026-01-02T00:00:00Z"))
    return [make_row(seed=i, data_fingerprint=f, top1=x, time=t) for i, (f, x, t) in enumerate(values)]


def test_two_data_of_one_size_are_tables_of_their_own_the_latest_first() -> None:
    (document,) = measured_documents(two_data())
    assert first_number(document) == [2.0, 1.0]
    assert document.sections.index("20 images, data 0000") < document.sections.index("20 images, data aaaa")
    assert document.frame["data_fingerprint"].tolist() == ["0000", "aaaa"]
    assert document.frame["n"].tolist() == [1, 1]
    assert "20 images, data aaaa" in table(two_data())
    (single,) = measured_documents(two_data()[:1])
    assert ", data " not in single.sections


def test_a_plot_is_of_one_data() -> None:
    rows = [*two_data(), make_row(spec="W4A4", w_bits=4, a_bits=4, data_fingerprint="aaaa")]
    documents = measured_documents(rows)
    assert list(plots(documents)) == ["fake-mini-w3a3-seconds.svg"]
    rows += [make_row(spec="W4A4", w_bits=4, a_bits=4, data_fingerprint="0000", seed=1)]
    assert "fake-mini-bits.svg" in plots(measured_documents(rows))


@pytest.mark.parametrize("name", ["a|b", "a\\|b", "a\nb", "<b>x</b>", "a`b"])
def test_a_name_cannot_break_a_table(name: str) -> None:
    rows = [make_row(method=name), make_row(model=name, seed=1, status="failed", reason=f"no {name}", top1=None)]
    (document,) = measured_documents(rows)
    shown = name.replace("\n", " ").replace("<", "&lt;")
    (grid,) = grids(document.sections)
    assert list(grid) == ["fp32", *sorted([shown, "noise"])]
    assert list(grid["noise"]) == ["vit_s", shown]
    assert any("failed: no a" in note or "failed: no &lt;b>x" in note for note in notes(document.sections))
    (cost,) = [grid for grid in grids(document.details) if "device" in grid[shown]]
    assert cost[shown]["device"] == "cpu: test"
