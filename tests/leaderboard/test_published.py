"""Published values: sound, whole, and shown with their source."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from board_fakes import detector_row, grids, mark, notes, numbers
from result_rows import PUBLISHED_HEADER, make_row

from iasvit.errors import IasvitError
from iasvit.leaderboard.aggregate import measured_documents
from iasvit.leaderboard.published import published_documents, read_published
from iasvit.leaderboard.views import page_values

ROOT = Path(__file__).parents[2]
ON_PAPERS_DATA = {"task": "imagenet", "dataset": "imagenet", "data_kind": "real"}


def test_the_published_values_are_sound() -> None:
    published = read_published(ROOT / "results" / "published.csv")
    assert len(published) > 250
    assert set(published["task"]) == {"imagenet", "coco"}
    assert published["value"].between(0.1, 100).all()
    assert not published.duplicated(["task", "model", "method", "w_bits", "a_bits", "metric"]).any()
    unquantized = published["w_bits"] == 32  # "fp32", and networks that a transform has changed
    assert all(name == "fp32" or "unquantized" in name for name in published.loc[unquantized, "method"])
    assert set(published.loc[~unquantized, "w_bits"]) <= set(range(2, 9))
    assert set(published.loc[published["method"] == "fp32", "a_bits"]) == {32}
    ias_vit = published[
        (published["method"] == "ias_vit") & (published["w_bits"] == 3) & (published["model"] == "deit_s")
    ]
    assert ias_vit["value"].tolist() == [55.78]
    full = published[published["method"] == "fp32"].set_index(["model", "metric"])["value"]
    quantized = published[published["method"] != "fp32"]
    best = quantized.groupby(["model", "metric"])["value"].max()
    assert (best <= full.reindex(best.index) + 0.5).all()  # every model has its full precision, and little exceeds it


@pytest.mark.parametrize("name", ["published.csv", "published_more.csv"])
def test_the_published_values_hold_all_of_the_shared_reference(name: str) -> None:
    reference = ROOT.parent / "shared" / "reference" / name
    if not reference.is_file():
        pytest.skip("no shared reference beside the project")
    lines = reference.read_text().splitlines()
    assert len(lines) > 250
    assert set(lines) - set((ROOT / "results" / "published.csv").read_text().splitlines()) == set()


def test_published_tables_have_gap_best_and_source(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    lines = ["imagenet,swin_b,a,4,4,top1,50,Paper A", "imagenet,vit_s,b,4,4,top1,60.5,Paper B"]
    lines += ["imagenet,vit_s,a,4,4,top1,60,Paper A", "imagenet,vit_s,fp32,32,32,top1,81.39,Paper A"]
    path.write_text(PUBLISHED_HEADER + "\n".join(lines) + "\n")
    (document,) = published_documents(read_published(path))
    (grid,) = grids(document.sections)
    assert {method: list(map(numbers, line.values())) for method, line in grid.items()} == {
        "fp32": [[81.39], []],
        "a": [[60.0, -21.39], [50.0]],
        "b": [[60.5, -20.89], []],
    }
    assert list(grid["a"]) == ["vit_s", "swin_b"]
    assert [mark(grid[method]["vit_s"]) for method in "ab"] == ["second", "best"]
    assert notes(document.sections) == ["Paper A: a.", "Paper B: b."]
    assert isinstance(document.frame, pd.DataFrame)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("imagenet,vit_s,a,3,3,top1,101,x", "line 3: value is '101', but a number from 0 to 100 is expected of top1"),
        ("imagenet,vit_s,a,3,3,top1,-1,x", "line 3: value is '-1', but a number from 0 to 100"),
        ("imagenet,vit_s,a,3,3,top1,n/a,x", "line 3: value is 'n/a'"),
        ("imagenet,vit_s,a,3,3,undeclared,inf,x", "line 3: value is 'inf', but a finite number is expected"),
        ("depth,vit_s,a,3,3,rmse,-0.1,x", "line 3: value is '-0.1', but a finite number of at least 0 is expected"),
        ("depth,vit_s,a,3,3,rmse,inf,x", "line 3: value is 'inf', but a finite number of at least 0 is expected"),
        ("depth,vit_s,a,3,3,log_likelihood,1,x", "value is '1', but a finite number of at most 0 is expected"),
        ("imagenet,vit_s,a,three,3,top1,1,x", "line 3: w_bits is 'three', but 1 to 32"),
        ("imagenet,vit_s,a,3,3.5,top1,1,x", "line 3: a_bits is '3.5'"),
        ("imagenet,vit_s,a,3,0,top1,1,x", "line 3: a_bits is '0'"),
        ("imagenet,vit_s,a,33,3,top1,1,x", "line 3: w_bits is '33', but 1 to 32"),
        ("imagenet,vit_s,a,3,3,top1,1,", "line 3 names no source"),
        ("imagenet,vit_s,b,3,3,top1,2,y", "line 3 repeats the cell"),
        ("imagenet,vit_s,b,3,3,top1,2,y,z,1", "cannot be read as CSV"),
    ],
)
def test_a_wrong_published_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(PUBLISHED_HEADER + "imagenet,vit_s,b,3,3,top1,1,x\n" + line + "\n")
    with pytest.raises(IasvitError, match=message):
        read_published(path)


def test_values_beyond_a_hundred_and_below_zero_are_read(tmp_path: Path) -> None:
    """A metric's range is its declaration's; one that nobody declares may be any finite number."""
    path = tmp_path / "p.csv"
    lines = ["depth,m,fp32,32,32,rmse,812.5,x", "depth,m,a,4,4,rmse,1203.25,x", "depth,m,b,4,4,rmse,1e3,x"]
    lines += ["depth,m,a,4,4,log_likelihood,-250,x", "imagenet,m,a,4,4,perplexity,-1e6,x"]
    path.write_text(PUBLISHED_HEADER + "\n".join(lines) + "\n")
    published = read_published(path)
    assert list(published["value"]) == [812.5, 1203.25, 1000.0, -250.0, -1e6]
    (document,) = [each for each in published_documents(published) if each.name.startswith("depth")]
    (grid, *_) = grids(document.sections)
    assert {method: numbers(line["m"]) for method, line in grid.items() if line["m"]} == {
        "fp32": [812.5],
        "a": [1203.25, 390.75],
        "b": [1000.0, 187.5],
    }
    assert [mark(grid[method]["m"]) for method in "ab"] == ["second", "best"]


# With what was measured


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "published.csv"
    lines = ["imagenet,vit_s,fp32,32,32,top1,81.39,x", "imagenet,vit_s,noise,3,3,top1,68.25,x"]
    lines += [
        "imagenet,vit_s,noise,4,4,top1,75,x",
        "imagenet,deit_t,noise,3,3,top1,9,x",
        "coco,vit_s,noise,3,3,top1,8,x",
    ]
    path.write_text(PUBLISHED_HEADER + "\n".join(lines) + "\n")
    return path


def test_the_published_value_is_shown_with_the_measured_real_one(published: Path) -> None:
    rows = [make_row(**ON_PAPERS_DATA, method=m, seed=s) for m in ("noise", "new") for s in (0, 1)]
    rows += [make_row(**ON_PAPERS_DATA, model="swin_t")]
    (document,) = measured_documents(rows, read_published(published))
    (grid,) = grids(document.sections)
    assert grid["fp32"] == {"vit_s": "80.00 (published 81.39, -1.39)", "swin_t": "80.00"}
    assert grid["noise"]["vit_s"].endswith("(-10.00, published 68.25, +1.75, n=2)")
    assert "published" not in grid["noise"]["swin_t"] + grid["new"]["vit_s"]
    assert "Published: the paper's value on the whole validation split, and the difference of ours from it." in notes(
        document.sections
    )
    data = document.frame.set_index(["method", "model"])
    columns = list(data.columns)
    at = columns.index("fp_top1")
    assert columns[at : at + 4] == ["fp_top1", "gap_top1", "published_top1", "gap_published_top1"]
    assert data.loc[("noise", "vit_s"), columns[at : at + 4]].tolist() == [80.0, -10.0, 68.25, 1.75]
    assert data.loc[("noise", "vit_s"), "published_fp_top1"] == 81.39
    assert data.loc[("new", "vit_s"), ["published_top1", "gap_published_top1"]].isna().all()
    (first, *_) = [value for value in page_values([document]) if (value.method, value.model) == ("noise", "vit_s")]
    assert first.note == "published 68.25, +1.75"


@pytest.mark.parametrize(
    "values",
    [
        {"dataset": "mini", "data_kind": "embedded"},
        {"data_kind": "embedded"},
        {"dataset": "imagenette"},  # ten of the classes: real, but not what the papers measured on
        {"spec": "W3A3,head=W8A8"},
        {"spec": "W6A6", "w_bits": 6, "a_bits": 6},
        {"method": "noise[-a]"},
    ],
)
def test_nothing_else_is_compared_with_the_papers(published: Path, values: dict) -> None:
    row = make_row(**{**ON_PAPERS_DATA, **values})
    (document,) = measured_documents([row], read_published(published))
    assert "published 68" not in document.sections
    assert "68.25" not in document.frame.to_csv()
    assert "published" not in page_values([document])[0].note


def test_both_values_of_a_detector_have_theirs(published: Path) -> None:
    lines = "coco,mask_rcnn_swin_t,noise,3,3,bbox_mAP,40,x\ncoco,mask_rcnn_swin_t,noise,3,3,segm_mAP,38.5,x\n"
    published.write_text(PUBLISHED_HEADER + lines)
    (document,) = measured_documents(
        [detector_row(41.0, 38.0, dataset="coco", data_kind="real")], read_published(published)
    )
    boxes, masks = grids(document.sections)
    assert numbers(boxes["noise"]["mask_rcnn_swin_t"]) == [41.0, -5.0, 40.0, 1.0]
    assert numbers(masks["noise"]["mask_rcnn_swin_t"]) == [38.0, -3.6, 38.5, -0.5]
