"""The leaderboard's files: the same bytes each time, and nobody else's is touched."""

from __future__ import annotations

import multiprocessing
import re
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from board_fakes import grids, numbers
from result_rows import PUBLISHED_HEADER, append_rows, make_row

from iasvit.benchmark.results import Key, ResultStore, Row, read_rows
from iasvit.errors import IasvitError
from iasvit.leaderboard import write_leaderboard

ROWS = [make_row(seed=seed, top1=value) for seed, value in enumerate((70.0, 71.0, 72.0))]
ROWS += [make_row(seed=seed, model="swin_t", top1=60.0, fp_top1=81.0) for seed in range(3)]
ROWS += [make_row(seed=seed, method="other", top1=71.5) for seed in range(3)]
ROWS += [make_row(method="fp32", spec="W32A32", w_bits=32, a_bits=32, calib_size=0, top1=80.0, code_hash="")]


def store_rows(folder: Path, rows: list[Row]) -> None:
    for row in rows:
        ResultStore(folder).append(row)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def write_all(tmp_path: Path, out: str, order: int = 1, readme: Path | None = None) -> dict[str, bytes]:
    runs = tmp_path / f"runs-{out}"
    rows = ROWS[::order]
    store_rows(runs, rows[:5])
    store_rows(runs / "reference", rows[5:])
    (tmp_path / "published.csv").write_text(
        PUBLISHED_HEADER + "imagenet,vit_s,fp32,32,32,top1,81,x\nimagenet,vit_s,a,3,3,top1,1,x\n"
    )
    write_leaderboard(runs, tmp_path / "published.csv", tmp_path / out, readme)
    return files(tmp_path / out)


def test_the_same_rows_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    first = write_all(tmp_path, "a")
    assert sorted(first) == [
        *("fake-mini-w3a3.csv", "fake-mini-w3a3.md", "imagenet-published-w3a3.csv", "imagenet-published-w3a3.md"),
        *("index.html", "leaderboard.md", "plots/fake-mini-w3a3-seconds.svg"),
    ]
    assert write_all(tmp_path, "b", order=-1) == first
    assert b"published" not in first["fake-mini-w3a3.md"]
    assert b"not measured here" in first["imagenet-published-w3a3.md"]
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    write_leaderboard(tmp_path / "runs-a", tmp_path / "published.csv", tmp_path / "a")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == again


def test_the_latest_of_equal_keys_counts_across_files(tmp_path: Path) -> None:
    store_rows(tmp_path / "runs", [make_row(top1=1.0, time="2026-01-02T00:00:00Z")])
    store_rows(tmp_path / "runs" / "reference", [make_row(top1=2.0, time="2026-01-01T00:00:00Z")])
    write_leaderboard(tmp_path / "runs", tmp_path / "none.csv", tmp_path / "out")
    assert pd.read_csv(tmp_path / "out" / "fake-mini-w3a3.csv")["top1"].tolist() == [1.0]


def test_what_has_no_rows_any_more_goes_and_other_files_stay(tmp_path: Path) -> None:
    write_all(tmp_path, "a")
    (tmp_path / "a" / "notes.md").write_text("mine\n")
    (tmp_path / "a" / "plots" / "study (1).svg").write_text("<svg/>")
    write_leaderboard(tmp_path / "none", tmp_path / "published.csv", tmp_path / "a")
    assert list(files(tmp_path / "a")) == [
        *("imagenet-published-w3a3.csv", "imagenet-published-w3a3.md", "index.html", "leaderboard.md", "notes.md"),
        "plots/study (1).svg",
    ]


def test_plots_that_others_made_are_shown_with_its_own(tmp_path: Path) -> None:
    (tmp_path / "a" / "plots").mkdir(parents=True)
    (tmp_path / "a" / "plots" / "study (1).svg").write_text("<svg/>")
    (tmp_path / "a" / "plots" / "fake-mini-w3a3-seconds.svg").write_text("of an earlier release, without a marker")
    made = write_all(tmp_path, "a")
    index = made["leaderboard.md"].decode()
    assert index.count("![") == 2
    assert "<img" not in made["index.html"].decode()  # the page is one file, without images
    assert "![fake-mini-w3a3-seconds](plots/fake-mini-w3a3-seconds.svg)" in index
    assert "![study (1)](plots/study%20%281%29.svg)" in index
    assert made["plots/study (1).svg"] == b"<svg/>"
    assert made["plots/fake-mini-w3a3-seconds.svg"].startswith(b"<?xml")
    assert write_all(tmp_path, "a") == made


def test_a_text_that_a_spreadsheet_would_run_is_quoted(tmp_path: Path) -> None:
    store_rows(tmp_path / "runs", [make_row(method="=1+1", model="@x", top1=-1.0, weights="+w", device="-d")])
    write_leaderboard(tmp_path / "runs", tmp_path / "none.csv", tmp_path / "out")
    (row,) = pd.read_csv(tmp_path / "out" / "fake-mini-w3a3.csv").to_dict("records")
    assert [row[name] for name in ("method", "model", "weights", "device")] == ["'=1+1", "'@x", "'+w", "'-d"]
    assert row["top1"] == -1.0


def test_specs_whose_names_are_the_same_have_tables_of_their_own(tmp_path: Path) -> None:
    specs = {"W3A3,head=W8A8": 1.0, "W3A3,*head=W8A8": 2.0, "W3A3": 3.0}
    store_rows(tmp_path / "runs", [make_row(spec=spec, top1=value) for spec, value in specs.items()])
    write_leaderboard(tmp_path / "runs", tmp_path / "none.csv", tmp_path / "out")
    tables = [pd.read_csv(path) for path in sorted((tmp_path / "out").glob("*.csv"))]
    assert {table["spec"][0]: table["top1"][0] for table in tables} == specs
    assert all(len(table) == 1 for table in tables)
    assert (tmp_path / "out" / "fake-mini-w3a3.md").is_file()
    index = (tmp_path / "out" / "leaderboard.md").read_text()
    assert all(f"({path.name})" in index for path in (tmp_path / "out").glob("fake-*.md"))


def test_what_breaks_formats_does_not(tmp_path: Path) -> None:
    """Of Markdown a table and a fence, of a plot a formula, of SVG a control character, of the page a placeholder."""
    command = "python x.py --option 'a```b' <!-- /table -->"
    odd = {"method": "a|b$x_{$\x1b@plots@{{ plots }}", "model": "m|\\|<b>", "command": command}
    store_rows(tmp_path / "runs", [make_row(**odd), make_row(**odd, spec="W4A4", w_bits=4, a_bits=4)])
    write_leaderboard(tmp_path / "runs", tmp_path / "none.csv", tmp_path / "out")
    made = files(tmp_path / "out")
    svgs = [text for name, text in made.items() if name.endswith(".svg")]
    assert len(svgs) == 3
    for text in svgs:
        ElementTree.fromstring(text)
        assert b"$x_{$" in text
    page = made["index.html"].decode()
    assert "@plots@{{ plots }}" in page
    assert "|\\\\|\\u003cb\\u003e" in page  # of the model's name, as JSON in HTML
    table = made["fake-mini-w3a3.md"].decode()
    assert f"````sh\n{command}\n````" in table
    widths = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table.splitlines() if line.startswith("| ")}
    assert widths <= {3, 12}


def test_a_reason_of_any_length_is_read_again(tmp_path: Path) -> None:
    store_rows(tmp_path / "runs", [make_row(status="failed", reason="x" * 200_000 + "\udcff", top1=None)])
    (row,), problems = read_rows(tmp_path / "runs" / "fake-mini.csv")
    assert problems == []
    assert row["reason"] == "x" * 100_000 + " ... (200006 characters)"


@pytest.mark.parametrize(
    ("folder", "said"),
    [("\udcff", "is not UTF-8"), ("x" * 300, "File name too long"), ("file", "File exists"), ("file/in", "directory")],
)
def test_rows_that_could_not_be_stored_are_refused_beforehand(tmp_path: Path, folder: str, said: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(IasvitError, match=said) as error:
        ResultStore(tmp_path / folder).check("fake", "mini")
    assert len(str(error.value)) < 300
    for read in (lambda store: store.rows().empty, lambda store: not store.has(Key.of(make_row()))):
        with suppress(IasvitError):  # by a command that is to check the folder later, or by --dry-run
            assert read(ResultStore(tmp_path / folder))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_of_something_else_is_refused_beforehand_and_a_sound_one_stays(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.append(make_row())
    before = files(tmp_path)
    store.check("fake", "mini")
    assert files(tmp_path) == before
    (tmp_path / "other-mini.csv").write_text("a,b\n")
    with pytest.raises(IasvitError, match="not the header of a result file"):
        store.check("other", "mini")
    with pytest.raises(IasvitError, match="File name too long"):
        store.check("other", "x" * 250)


def test_malformed_rows_are_reported_by_line_and_the_rest_is_shown(tmp_path: Path) -> None:
    store_rows(tmp_path / "runs", ROWS)
    path = tmp_path / "runs" / "fake-mini.csv"
    lines = path.read_text().splitlines()
    lines[3] = lines[3].replace(",72.0,", ",seventy,")  # the third seed of noise on vit_s
    path.write_text("\n".join([*lines, "cut off"]))
    reports: list[str] = []
    write_leaderboard(tmp_path / "runs", tmp_path / "none.csv", tmp_path / "out", None, reports.append)
    assert reports == [
        f"{path} line 4 is malformed (could not convert string to float: 'seventy'); row left out",
        f"{path} line 12 was cut off while it was written; row left out",
    ]
    (grid, *_) = grids((tmp_path / "out" / "fake-mini-w3a3.md").read_text())
    assert [numbers(cell)[0] for cell in grid["noise"].values()] == [70.5, 60.0]
    assert grid["noise"]["vit_s"].endswith("n=2)")


def test_appending_while_the_leaderboard_runs_loses_nothing(tmp_path: Path) -> None:
    """Nor does a row that is half written while it is read pass for a malformed one, columns being added or not."""
    runs, out = tmp_path / "runs", tmp_path / "out"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_rows, args=(runs, w, 40, f"metric{w}" if w else None)) for w in range(3)]
    for writer in writers:
        writer.start()
    reports: list[str] = []
    counts = [0]
    while any(writer.is_alive() for writer in writers):
        write_leaderboard(runs, tmp_path / "none.csv", out, None, reports.append)
        path = out / "fake-mini-w3a3.csv"
        counts.append(pd.read_csv(path)["n"].sum() if path.is_file() else 0)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert reports == []
    assert counts == sorted(counts)
    write_leaderboard(runs, tmp_path / "none.csv", out, None, reports.append)
    assert pd.read_csv(out / "fake-mini-w3a3.csv")["n"].tolist() == [120]
    rows, _ = read_rows(runs / "fake-mini.csv")
    assert len(rows) == 120


def test_readme_gets_its_tables_between_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    old = "# x\n<!-- table:fake-mini-w3a3 -->\nold\n<!-- /table -->\nmid\n<!-- table:{} -->\n<!-- /table -->\nend\n"
    readme.write_text(old.format("imagenet-published-w3a3"))
    write_all(tmp_path, "a", readme=readme)
    text = readme.read_text()
    assert "\nold\n" not in text
    assert text.startswith("# x\n<!-- table:fake-mini-w3a3 -->\n**fake on mini, W3A3: measured on ")
    assert text.endswith("\n<!-- /table -->\nend\n")
    first, second = text.split("\nmid\n")
    assert grids(first)[0]["noise"] == {"vit_s": "71.00", "swin_t": "60.00"}
    assert "[Seeds, settings, costs, commands](a/fake-mini-w3a3.md)\n<!-- /table -->" in first
    assert "published values" in second
    assert grids(second)[0]["a"] == {"vit_s": "1.00"}
    assert "published values" not in first
    write_leaderboard(tmp_path / "runs-a", tmp_path / "published.csv", tmp_path / "a", readme)
    assert readme.read_text() == text


def test_a_marker_inside_a_table_does_not_end_it(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:fake-mini-w3a3 -->\n<!-- /table -->\nend\n")
    marker = "<!-- /table --> <!-- table:x -->"
    rows = [make_row(data_description=marker, command=marker, method=method) for method in ("noise", marker)]
    store_rows(tmp_path / "runs", rows)
    for _ in range(2):
        write_leaderboard(tmp_path / "runs", tmp_path / "none.csv", tmp_path / "out", readme)
        text = readme.read_text()
        assert (text.count("<!-- /table -->"), text.count("<!-- table:")) == (1, 1)
        assert text.endswith("\n<!-- /table -->\nend\n")
        assert "measured on &lt;!-- /table -->" in text
        assert "| &lt;!-- /table -->" in text


def test_a_marker_without_rows_is_reported_and_left(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:nothing -->\nkept\n<!-- /table -->\n")
    reports: list[str] = []
    write_leaderboard(tmp_path, tmp_path / "none.csv", tmp_path / "out", readme, reports.append)
    assert readme.read_text() == "<!-- table:nothing -->\nkept\n<!-- /table -->\n"
    assert "'nothing'" in reports[0]


def test_a_marker_without_end_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:fake-mini-w3a3 -->\nrest of the text\n")
    with pytest.raises(IasvitError, match="1 table markers, but 0"):
        write_all(tmp_path, "a", readme=readme)
    assert readme.read_text() == "<!-- table:fake-mini-w3a3 -->\nrest of the text\n"
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(IasvitError, match="cannot be written"):
        write_leaderboard(tmp_path / "none", tmp_path / "none.csv", tmp_path / "a")
