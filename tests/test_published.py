"""Published values: sound, whole, and shown with their source."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from result_rows import PUBLISHED_HEADER, line_of

from iasvit.errors import IasvitError
from iasvit.published import published_documents, read_published

ROOT = Path(__file__).parent.parent


def test_the_published_values_are_sound() -> None:
    published = read_published(ROOT / "results" / "published.csv")
    assert len(published) > 250
    assert set(published["task"]) == {"imagenet", "coco"}
    assert published["value"].between(0.1, 100).all()
    ias_vit = published[
        (published["method"] == "ias_vit") & (published["w_bits"] == 3) & (published["model"] == "deit_s")
    ]
    assert ias_vit["value"].tolist() == [55.78]
    full = published[published["method"] == "fp32"].set_index(["model", "metric"])["value"]
    quantized = published[published["method"] != "fp32"]
    best = quantized.groupby(["model", "metric"])["value"].max()
    assert (best <= full.reindex(best.index) + 0.5).all()  # every model has its full precision, and little exceeds it


def test_the_published_values_equal_the_shared_reference() -> None:
    reference = ROOT.parent / "shared" / "reference" / "published.csv"
    if not reference.is_file():
        pytest.skip("no shared reference beside the project")
    assert (ROOT / "results" / "published.csv").read_bytes() == reference.read_bytes()


def test_published_tables_have_gap_best_and_source(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    lines = ["imagenet,swin_b,a,4,4,top1,50,Paper A", "imagenet,vit_s,b,4,4,top1,60.5,Paper B"]
    lines += ["imagenet,vit_s,a,4,4,top1,60,Paper A", "imagenet,vit_s,fp32,32,32,top1,81.39,Paper A"]
    path.write_text(PUBLISHED_HEADER + "\n".join(lines) + "\n")
    (document,) = published_documents(read_published(path))
    assert line_of(document.sections, "fp32") == ["fp32", "81.39", "–"]
    assert line_of(document.sections, "a") == ["a", "<u>60.00</u> (-21.39)", "**50.00**"]
    assert line_of(document.sections, "b") == ["b", "**60.50** (-20.89)", "–"]
    assert "- Paper A: a.\n- Paper B: b." in document.sections
    assert isinstance(document.frame, pd.DataFrame)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("imagenet,vit_s,a,3,3,top1,101,x", "line 3: value is '101', but 0 to 100"),
        ("imagenet,vit_s,a,3,3,top1,n/a,x", "line 3: value is 'n/a'"),
        ("imagenet,vit_s,a,three,3,top1,1,x", "line 3: w_bits is 'three'"),
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
