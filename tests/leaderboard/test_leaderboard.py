"""The leaderboard: the right aggregates, nothing mixed, the same bytes each time."""

from __future__ import annotations

import multiprocessing
import random
import re
import statistics
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from result_rows import PUBLISHED_HEADER, append_rows, line_of, make_row

from iasvit.benchmark import staleness
from iasvit.benchmark.results import Key, ResultStore, Row, read_rows
from iasvit.errors import IasvitError
from iasvit.leaderboard import write_leaderboard
from iasvit.leaderboard.aggregate import measured_documents, table
from iasvit.leaderboard.views import drawn_files, plots

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _current_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staleness, "current_code", lambda method: "def")


def store_rows(folder: Path, rows: list[Row]) -> None:
    for row in rows:
        ResultStore(folder).append(row)


def grid_rows() -> list[Row]:
    rows = [make_row(seed=seed, top1=value) for seed, value in enumerate((70.0, 71.0, 72.0))]
    rows += [make_row(seed=seed, model="swin_t", top1=60.0, fp_top1=81.0) for seed in range(3)]
    rows += [make_row(seed=seed, method="other", top1=71.5) for seed in range(3)]
    return [*rows, make_row(method="fp32", spec="W32A32", w_bits=32, a_bits=32, calib_size=0, top1=80.0, code_hash="")]


def test_a_table_has_mean_deviation_gap_best_and_dash() -> None:
    (document,) = measured_documents(grid_rows())
    assert line_of(document.sections, "method") == ["method", "vit_s", "swin_t"]
    assert line_of(document.sections, "fp32") == ["fp32", "80.00", "81.00"]
    assert line_of(document.sections, "noise") == ["noise", "<u>71.00 ± 1.00</u> (-9.00)", "**60.00 ± 0.00** (-21.00)"]
    assert line_of(document.sections, "other") == ["other", "**71.50 ± 0.00** (-8.50)", "–"]
    assert "3 seeds a cell" in document.sections
    assert "Standard error of top1 from the size of the split: at most 1.50." in document.sections
    assert "```sh\npython x.py\n```" in document.sections
    assert document.name == "fake-mini-w3a3"


def test_the_data_file_has_every_aggregate() -> None:
    (document,) = measured_documents(grid_rows())
    data = document.frame.set_index(["method", "model"]).loc[("noise", "vit_s")]
    assert (data["top1"], data["top1_std"], data["fp_top1"], data["gap_top1"]) == (71.0, 1.0, 80.0, -9.0)
    assert (data["n"], data["failed"], data["stale"], data["agreement"]) == (3, 0, "no", 90.0)
    assert (data["quantization_seconds"], data["packed_bytes"], data["split_size"]) == (3.0, 30, 20)


def test_cost_is_that_of_one_device_and_accuracy_of_all() -> None:
    rows = [make_row(seed=seed, quantization_seconds=30.0, top1=60.0 + seed) for seed in range(2)]
    rows.append(make_row(seed=2, quantization_seconds=1.0, top1=62.0, device="cuda: test"))
    rows.append(make_row(seed=0, method="fast", quantization_seconds=2.0, device="cuda: test"))
    rows.append(make_row(seed=0, method="slow", quantization_seconds=40.0))
    (document,) = measured_documents(rows)
    data = document.frame.set_index("method")
    assert data["device"].tolist() == ["cuda: test", "cpu: test", "cpu: test"]
    assert data.loc["noise", ["top1", "n", "quantization_seconds"]].tolist() == [61.0, 3, 30.0]
    drawn = plots([document])["fake-mini-w3a3-seconds.svg"]
    assert "seconds on cpu: test" in drawn
    assert ">slow<" in drawn
    assert ">fast<" not in drawn


def test_different_numbers_of_seeds_are_said_cell_by_cell() -> None:
    (document,) = measured_documents([*grid_rows(), make_row(model="deit_t", top1=50.0)])
    cells = line_of(document.sections, "noise")
    assert cells[1:] == [
        "<u>71.00 ± 1.00</u> (-9.00, n=3)",
        "**50.00** (-30.00, n=1)",
        "**60.00 ± 0.00** (-21.00, n=3)",
    ]
    assert "n seeds a cell" in document.sections


def test_failed_cells_say_so() -> None:
    broken = {"status": "failed", "reason": "layer 'fc' puts out NaN", "top1": None, "agreement": None}
    rows = [*grid_rows(), make_row(model="deit_t", **broken), make_row(model="vit_s", seed=3, **broken)]
    (document,) = measured_documents(rows)
    assert line_of(document.sections, "noise")[1:3] == ["<u>71.00 ± 1.00</u> (-9.00, 1 failed)", "failed"]
    assert "- noise on deit_t, seed 0, failed: layer 'fc' puts out NaN" in document.sections
    (only,) = measured_documents([make_row(**broken)])
    assert line_of(only.sections, "noise") == ["noise", "failed"]
    assert only.frame["n"].tolist() == [0]


def test_a_failure_does_not_outlive_a_later_success() -> None:
    rows = [make_row(status="failed", reason="x", top1=None), make_row(time="2026-01-02T00:00:00Z")]
    (document,) = measured_documents(rows)
    assert "failed" not in document.sections


def test_data_sets_bits_and_split_sizes_never_share_a_table() -> None:
    rows = [make_row(dataset=name, top1=float(n)) for n, name in enumerate(("mini", "mini-hard", "imagenet"), start=1)]
    rows += [make_row(spec="W4A4", w_bits=4, a_bits=4, top1=4.0), make_row(split_size=50, top1=5.0)]
    documents = {document.name: document for document in measured_documents(rows)}
    assert list(documents) == ["fake-imagenet-w3a3", "fake-mini-w3a3", "fake-mini-w4a4", "fake-mini-hard-w3a3"]
    assert "measured on real data" in documents["fake-imagenet-w3a3"].title
    assert "embedded mini benchmark" in documents["fake-mini-w3a3"].title
    assert "mini-hard" in documents["fake-mini-hard-w3a3"].title
    assert "stress variant" in documents["fake-mini-hard-w3a3"].title
    for name, values in {"fake-imagenet-w3a3": "3", "fake-mini-hard-w3a3": "2", "fake-mini-w4a4": "4"}.items():
        assert line_of(documents[name].sections, "noise")[1].startswith(f"**{values}.00**")
        assert documents[name].sections.count("| noise") == 1
    mini = documents["fake-mini-w3a3"].sections
    large, small = mini.split("top1, 20 images")
    assert "top1, 50 images" in large
    assert line_of(large, "noise")[1] == "**5.00** (-75.00)"
    assert line_of(small, "noise")[1] == "**1.00** (-79.00)"


def test_settings_and_weights_are_never_averaged_over() -> None:
    rows = [make_row(options="iterations=1;lr=2", top1=1.0), make_row(options="iterations=9;lr=2", top1=9.0)]
    rows += [make_row(model="vit_b", weights=name, options="iterations=9;lr=2", top1=5.0) for name in ("x", "y")]
    rows += [make_row(method="one", options="iterations=5")]
    (document,) = measured_documents(rows)
    assert line_of(document.sections, "method")[1:] == ["vit_s", "vit_b [x]", "vit_b [y]"]
    assert line_of(document.sections, "noise (iterations=1)")[1:] == ["1.00 (-79.00)", "–", "–"]
    assert line_of(document.sections, "noise (iterations=9)")[1] == "<u>9.00</u> (-71.00)"
    assert line_of(document.sections, "one")[1] == "**70.00** (-10.00)"
    assert "- noise (iterations=9): calib_size=8, iterations=9, lr=2." in document.sections


def detector_row(box: float, mask: float, **values: object) -> Row:
    row = make_row(**{"task": "coco", "model": "mask_rcnn_swin_t", **values})
    row |= {"bbox_mAP": box, "bbox_mAP_50": 60.0, "segm_mAP": mask, "fp_bbox_mAP": 46.0, "fp_segm_mAP": 41.6}
    return {name: value for name, value in row.items() if name not in ("top1", "top1_se", "fp_top1", "agreement")}


def test_a_detector_has_a_table_of_boxes_and_one_of_masks(tmp_path: Path) -> None:
    rows = [detector_row(40.0, 38.0), detector_row(39.0, 38.5, method="other")]
    rows += [detector_row(41.0, 37.0, model="cascade_mask_rcnn_swin_t")]
    (document,) = measured_documents(rows)
    boxes, masks = document.sections.split("segm_mAP, 20 images")
    assert "bbox_mAP, 20 images" in boxes
    assert line_of(boxes, "method") == ["method", "mask_rcnn_swin_t", "cascade_mask_rcnn_swin_t"]
    assert line_of(boxes, "fp32") == ["fp32", "46.00", "46.00"]
    assert line_of(boxes, "noise") == ["noise", "**40.00** (-6.00)", "**41.00** (-5.00)"]
    assert line_of(boxes, "other") == ["other", "<u>39.00</u> (-7.00)", "–"]
    assert line_of(masks, "noise")[1] == "<u>38.00</u> (-3.60)"
    assert line_of(masks, "other")[1] == "**38.50** (-3.10)"
    assert "bbox_mAP_50:" in document.details
    store_rows(tmp_path / "runs", [*rows, make_row(task="imagenet")])
    write_leaderboard(tmp_path / "runs", tmp_path / "none.csv", tmp_path / "out")
    plots = {path.name for path in (tmp_path / "out" / "plots").iterdir()}
    assert {"coco-mini-bbox_map-w3a3-seconds.svg", "coco-mini-segm_map-w3a3-seconds.svg"} <= plots
    html = (tmp_path / "out" / "index.html").read_text()
    row = re.search(r'data-method="noise" data-model="mask_rcnn_swin_t">.*', html)[0]
    assert '<td class="number value" data-value="40.00">40.00</td>' in row
    assert "<td>bbox_<wbr>mAP</td><td>coco</td>" in row
    assert html.count('data-task="coco"') == 6
    assert html.count('data-task="imagenet"') == 1


def test_images_that_could_not_be_read_are_said() -> None:
    (document,) = measured_documents([make_row(unreadable=2.0), make_row(seed=1, unreadable=2.0)])
    assert "- 2 images of the split could not be read and were left out." in document.sections


def test_a_runs_own_table_has_its_cells_and_no_command() -> None:
    text = table([make_row(), make_row(method="other", top1=20.0), make_row(method="fp32", spec="W32A32")])
    assert line_of(text, "fp32") == ["fp32", "80.00"]
    assert line_of(text, "noise") == ["noise", "**70.00** (-10.00)"]
    assert "python x.py" not in text
    assert "W32A32" not in text
    assert line_of(table([make_row()], ["agreement"]), "noise") == ["noise", "**90.00**"]
    assert table([]) == ""


@st.composite
def stores(draw: st.DrawFn) -> list[dict]:
    """Rows of random cells, some measured twice, some failed, in random order."""
    keys = st.tuples(st.sampled_from("ab"), st.sampled_from(["vit_s", "swin_t"]), st.sampled_from(["W3A3", "W4A4"]))
    count = draw(st.integers(1, 25))
    rows = []
    for minute in range(count):
        method, model, spec = draw(keys)
        failed = draw(st.booleans()) and draw(st.booleans())
        top1 = None if failed else draw(st.integers(0, 10000)) / 100
        rows.append(
            make_row(
                method=method,
                model=model,
                spec=spec,
                seed=draw(st.integers(0, 3)),
                top1=top1,
                status="failed" if failed else "ok",
                reason="it did" if failed else "",
                time=f"2026-01-01T00:{minute:02d}:00Z",
            )
        )
    return draw(st.permutations(rows))


@given(stores())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_aggregates_equal_a_plain_computation(rows: list[dict]) -> None:
    newest: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda row: row["time"]):
        key = (row["spec"], row["method"], row["model"], row["seed"])
        newest[key] = row
    expected: dict[tuple, list[dict]] = {}
    for (spec, method, model, _), row in newest.items():
        expected.setdefault((spec, method, model), []).append(row)
    frames = [document.frame for document in measured_documents(rows)]
    found = {(c["spec"], c["method"], c["model"]): c for frame in frames for c in frame.to_dict("records")}
    assert found.keys() == expected.keys()
    for key, cell in found.items():
        values = [row["top1"] for row in expected[key] if row["status"] == "ok"]
        assert (cell["n"], cell["failed"]) == (len(values), len(expected[key]) - len(values))
        if values:
            assert cell["top1"] == pytest.approx(statistics.fmean(values), abs=1e-4)
            assert cell["gap_top1"] == pytest.approx(statistics.fmean(values) - 80.0, abs=1e-4)
        if len(values) > 1:
            assert cell["top1_std"] == pytest.approx(statistics.stdev(values), abs=1e-4)


@given(stores(), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_order_of_rows_changes_nothing(rows: list[dict], random: random.Random) -> None:
    """Also of rows that several processes measured in the same second by different commands."""
    keys = {Key.of(row): {**row, "command": f"python {i}.py", "time": "2026"} for i, row in enumerate(rows)}
    same_second = list(keys.values())
    first = [document.markdown() + document.frame.to_csv() for document in measured_documents(same_second)]
    random.shuffle(same_second)
    assert [document.markdown() + document.frame.to_csv() for document in measured_documents(same_second)] == first


# Files


def write_all(tmp_path: Path, out: str, order: int = 1, readme: Path | None = None) -> dict[str, bytes]:
    runs = tmp_path / f"runs-{out}"
    rows = grid_rows()[::order]
    store_rows(runs, rows[:5])
    store_rows(runs / "reference", rows[5:])
    (tmp_path / "published.csv").write_text(
        PUBLISHED_HEADER + "imagenet,vit_s,fp32,32,32,top1,81,x\nimagenet,vit_s,a,3,3,top1,1,x\n"
    )
    write_leaderboard(runs, tmp_path / "published.csv", tmp_path / out, readme)
    found = [path for path in sorted((tmp_path / out).rglob("*")) if path.is_file()]
    return {path.relative_to(tmp_path / out).as_posix(): path.read_bytes() for path in found}


def test_the_same_rows_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    first = write_all(tmp_path, "a")
    assert sorted(first) == [
        *("fake-mini-w3a3.csv", "fake-mini-w3a3.md", "imagenet-published-w3a3.csv", "imagenet-published-w3a3.md"),
        "index.html",
        "leaderboard.md",
        "plots/fake-mini-w3a3-seconds.svg",
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
    assert "**1.00** (-79.00)" in (tmp_path / "out" / "fake-mini-w3a3.md").read_text()


def test_a_table_without_rows_goes_and_other_files_stay(tmp_path: Path) -> None:
    write_all(tmp_path, "a")
    (tmp_path / "a" / "notes.md").write_text("mine\n")
    write_leaderboard(tmp_path / "none", tmp_path / "published.csv", tmp_path / "a")
    left = [path.name for path in sorted((tmp_path / "a").rglob("*")) if path.is_file()]
    assert left == [
        "imagenet-published-w3a3.csv",
        "imagenet-published-w3a3.md",
        "index.html",
        "leaderboard.md",
        "notes.md",
    ]


def test_malformed_rows_are_reported_by_line_and_the_rest_is_there(tmp_path: Path) -> None:
    store_rows(tmp_path / "runs", grid_rows())
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
    sections = (tmp_path / "out" / "fake-mini-w3a3.md").read_text()
    assert line_of(sections, "noise")[1:] == [
        "<u>70.50 ± 0.71</u> (-9.50, n=2)",
        "**60.00 ± 0.00** (-21.00, n=3)",
    ]


def test_appending_while_the_leaderboard_runs_loses_nothing(tmp_path: Path) -> None:
    """Nor does a row that is half written while it is read pass for a malformed one, columns being added or not."""
    runs, out = tmp_path / "runs", tmp_path / "out"
    context = multiprocessing.get_context("spawn")
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
    assert text.startswith("# x\n<!-- table:fake-mini-w3a3 -->\n**fake on mini, W3A3: measured on the embedded mini")
    assert text.endswith("\n<!-- /table -->\nend\n")
    first, second = text.split("\nmid\n")
    assert "71.00 ± 1.00" in first
    assert "published values" in second
    assert "published values" not in first
    write_leaderboard(tmp_path / "runs-a", tmp_path / "published.csv", tmp_path / "a", readme)
    assert readme.read_text() == text


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


# Plots


def plotted(tmp_path: Path, errors: str | None = None) -> dict[str, str]:
    runs, out = tmp_path / "runs", tmp_path / "out"
    rows = [
        make_row(
            task="imagenet",
            model=m,
            method=f"m{i}",
            spec=s,
            w_bits=b,
            a_bits=b,
            top1=10.0 * i + b,
            quantization_seconds=i,
        )
        for m in ("vit_s", "swin_t")
        for i in (1, 2, 3)
        for s, b in (("W3A3", 3), ("W4A4", 4))
    ]
    rows.append(make_row(task="imagenet", method="mixed", spec="W3A3,head=W8A8"))
    store_rows(runs, rows)
    out.mkdir(exist_ok=True)
    if errors is not None:
        (out / "mini_errors.csv").write_text(errors)
    write_leaderboard(runs, tmp_path / "none.csv", out)
    return {path.name: path.read_text() for path in (out / "plots").glob("*")}


def test_plots_are_drawn_for_each_task_and_data_set_and_are_the_same_again(tmp_path: Path) -> None:
    drawn = plotted(tmp_path)
    assert set(drawn) == {"imagenet-mini-bits.svg", "imagenet-mini-w3a3-seconds.svg", "imagenet-mini-w4a4-seconds.svg"}
    bits = drawn["imagenet-mini-bits.svg"]
    for text in ("vit_s", "swin_t", "m1", "m3", "W3A3", "W4A4", "fp32", "not on real data"):
        assert f">{text}<" in bits or text in bits
    assert "mixed" not in bits
    (tmp_path / "out" / "plots" / "old.svg").write_text("left from rows that are gone")
    assert plotted(tmp_path) == drawn
    index = (tmp_path / "out" / "leaderboard.md").read_text()
    assert all(f"(plots/{name})" in index for name in drawn)


def test_errors_by_layer_are_drawn_where_they_were_measured(tmp_path: Path) -> None:
    lines = [f"deit_t,W3A3,{m},32,{layer},k,{e},{e}" for m in ("a", "b") for layer, e in (("x", 0.1), ("y", 0.0))]
    drawn = plotted(tmp_path, "\n".join(["model,bits,method,images,layer,kind,own,streamed", *lines]))
    assert "mini deit_t, W3A3" in drawn["layer-errors-deit_t-w3a3.svg"]
    with pytest.raises(IasvitError, match=r"mini_errors\.csv is not of `python -m tasks\.mini\.errors`"):
        plotted(tmp_path, "model,bits\ndeit_t,W3A3\n")


def test_a_loss_surface_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    lines = [
        f"deit_t,W3A3,5,{v},{a},{b},{a * a + b}" for v in ("direct", "stage 1") for a in (-1, 0, 1) for b in (0, 1)
    ]
    text = "\n".join(["model,bits,block,variant,alpha,beta,loss", *lines])
    (tmp_path / "out" / "mini_surface.csv").write_text(text)
    drawn = plotted(tmp_path)["loss-surface-deit_t-w3a3.svg"]
    assert "direct" in drawn
    assert "stage 1" in drawn


def test_code_grids_are_drawn_where_they_were_measured(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    lines = [f"deit_t,3 bits,4,values,{i},{2.0 ** (i - 3)},0.2" for i in range(3)]
    lines += [
        f"deit_t,3 bits,4,{name},{i},{value},0.5" for name in ("uniform", "SULQ") for i, value in ((0, 0), (1, 1))
    ]
    path = tmp_path / "out" / "mini_attention.csv"
    path.write_text("\n".join(["model,bits,block,series,code,value,share", *lines]))
    drawn = plotted(tmp_path)["code-grids-deit_t-3-bits.svg"]
    for text in ("mini deit_t, 3 bits", "uniform", "SULQ", "values, by half octave"):
        assert text in drawn
    assert plotted(tmp_path)["code-grids-deit_t-3-bits.svg"] == drawn
    path.write_text("model,bits\ndeit_t,3 bits\n")
    with pytest.raises(IasvitError, match=r"is not of `python -m tasks\.mini\.attention`"):
        plotted(tmp_path)


def test_the_committed_measurements_are_drawn_the_same_twice() -> None:
    drawn = drawn_files(ROOT / "results")
    grids = "code-grids-deit_t-3-bits.svg"
    assert {grids, "layer-errors-deit_t-w3a3.svg", "loss-surface-deit_t-w3a3.svg"} <= set(drawn)
    for name in ("uniform", "log2", "log-sqrt2", "SULQ"):
        assert f">{name}: codes<" in drawn[grids]
    assert drawn_files(ROOT / "results") == drawn
