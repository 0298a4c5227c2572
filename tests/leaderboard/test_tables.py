"""The tables of measured rows: the right aggregates, and nothing mixed."""

from __future__ import annotations

import random
import statistics

import pytest
from board_fakes import grids, mark, notes, numbers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from result_rows import make_row

from iasvit.benchmark.results import Key, Row
from iasvit.leaderboard.aggregate import measured_documents, table
from iasvit.leaderboard.views import page_values, plots

BROKEN = {"status": "failed", "reason": "layer 'fc' outputs NaN", "top1": None, "agreement": None}


def grid_rows() -> list[Row]:
    rows = [make_row(seed=seed, top1=value) for seed, value in enumerate((70.0, 71.0, 72.0))]
    rows += [make_row(seed=seed, model="swin_t", top1=60.0, fp_top1=81.0) for seed in range(3)]
    rows += [make_row(seed=seed, method="other", top1=71.5) for seed in range(3)]
    return [*rows, make_row(method="fp32", spec="W32A32", w_bits=32, a_bits=32, calib_size=0, top1=80.0, code_hash="")]


def test_a_table_as_it_is_written() -> None:
    (document,) = measured_documents(grid_rows())
    assert document.sections.split("\n\n")[1].splitlines() == [
        "| method | vit_s                       | swin_t                    |",
        "|--------|-----------------------------|---------------------------|",
        "| fp32   | 80.00                       | 81.00                     |",
        "| noise  | <u>71.00 ± 1.00</u> (-9.00) | **60.00 ± 0.00** (-21.00) |",
        "| other  | **71.50 ± 0.00** (-8.50)    | –                         |",
    ]
    assert document.name == "fake-mini-w3a3"


def test_the_short_table_has_means_alone_and_the_best_first() -> None:
    rows = [*grid_rows(), *(make_row(method=name, top1=top1) for name, top1 in (("whole", 50.0), ("better", 55.0)))]
    rows += [make_row(method=name, model="swin_t", top1=50.0) for name in ("whole", "better")]
    rows += [make_row(method="weights", a_bits=32, top1=79.0), make_row(method="noise", model="deit_t", **BROKEN)]
    (document,) = measured_documents([row for row in rows if row["model"] != "deit_t"])
    lines = document.brief.split("\n\n")
    assert lines[0] == "**fake on mini, W3A3: measured on drawn images.** top1, 20 images"
    assert lines[1].splitlines() == [
        "| method                | vit_s | swin_t |",
        "|-----------------------|-------|--------|",
        "| fp32                  | 80.00 | 80.33  |",
        "| noise                 | 71.00 | 60.00  |",
        "| better                | 55.00 | 50.00  |",
        "| whole                 | 50.00 | 50.00  |",
        "| other                 | 71.50 | –      |",
        "| weights, weights only | 79.00 | –      |",
    ]
    assert lines[2] == "Means over seeds, best first; standard error of top1 at most 1.5."
    (document,) = measured_documents(rows)
    assert grids(document.brief)[0]["noise"] == {"vit_s": "71.00", "deit_t": "failed", "swin_t": "60.00"}


def test_a_method_without_one_model_keeps_its_place_in_the_short_table() -> None:
    tops = {"ahead": (70.0, 75.0, None), "whole": (60.0, 65.0, 70.0), "one": (79.0, None, None)}
    rows = [
        make_row(method=method, model=model, top1=top1)
        for method, values in tops.items()
        for model, top1 in zip(("vit_s", "deit_t", "swin_t"), values, strict=True)
        if top1 is not None
    ]
    (document,) = measured_documents(rows)
    assert list(grids(document.brief)[0])[-3:] == ["ahead", "whole", "one"]


def test_of_several_data_the_short_table_has_the_largest() -> None:
    (document,) = measured_documents([*grid_rows(), make_row(split_size=5, top1=1.0), make_row(split_size=5, seed=1)])
    assert len(grids(document.brief)) == 1 < len(grids(document.sections))
    assert "top1, 20 images" in document.brief


def test_a_column_of_text_that_nobody_knows_is_no_metric() -> None:
    rows = [{**row, "operator": "somebody"} for row in grid_rows()]
    (document,), (plain,) = measured_documents(rows), measured_documents(grid_rows())
    assert document.sections == plain.sections
    assert "operator" not in table(rows)


def test_a_table_has_mean_deviation_gap_best_and_notes() -> None:
    (document,) = measured_documents(grid_rows())
    (grid,) = grids(document.sections)
    assert numbers(grid["noise"]["vit_s"]) == [71.0, 1.0, -9.0]
    assert numbers(grid["noise"]["swin_t"]) == [60.0, 0.0, -21.0]
    assert numbers(grid["other"]["vit_s"]) == [71.5, 0.0, -8.5]
    assert {method: mark(line["vit_s"]) for method, line in grid.items()} == {
        "fp32": "",
        "noise": "second",
        "other": "best",
    }
    found = notes(document.sections)
    assert "3 seeds per cell" in found[0]
    assert "Standard error of top1 from the size of the split: at most 1.50." in found
    assert "```sh\npython x.py\n```" in document.sections


def test_the_data_file_has_every_aggregate() -> None:
    (document,) = measured_documents(grid_rows())
    data = document.frame.set_index(["method", "model"]).loc[("noise", "vit_s")]
    assert (data["top1"], data["top1_std"], data["fp_top1"], data["gap_top1"]) == (71.0, 1.0, 80.0, -9.0)
    assert (data["n"], data["failed"], data["other_version"], data["agreement"]) == (3, 0, "", 90.0)
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
    (grid,) = grids(document.sections)
    assert [cell.rpartition(", ")[2] for cell in grid["noise"].values()] == ["n=3)", "n=1)", "n=3)"]
    assert "n seeds per cell" in document.sections


def test_failed_cells_say_so() -> None:
    rows = [*grid_rows(), make_row(model="deit_t", **BROKEN), make_row(model="vit_s", seed=3, **BROKEN)]
    (document,) = measured_documents(rows)
    (grid,) = grids(document.sections)
    assert grid["noise"]["deit_t"] == "failed"
    assert grid["noise"]["vit_s"].endswith("(-9.00, 1 failed)")
    assert "noise on deit_t, seed 0, failed: layer 'fc' outputs NaN" in notes(document.sections)
    (only,) = measured_documents([make_row(**BROKEN)])
    assert grids(only.sections)[0]["noise"] == {"vit_s": "failed"}
    assert only.frame["n"].tolist() == [0]
    assert page_values([only])[0].value is None


def test_a_failure_does_not_outlive_a_later_success() -> None:
    rows = [make_row(status="failed", reason="x", top1=None), make_row(time="2026-01-02T00:00:00Z")]
    (document,) = measured_documents(rows)
    assert "failed" not in document.sections


def test_settings_and_weights_are_never_averaged_over() -> None:
    rows = [make_row(options="iterations=1;lr=2", top1=1.0), make_row(options="iterations=9;lr=2", top1=9.0)]
    rows += [make_row(model="vit_b", weights=name, options="iterations=9;lr=2", top1=5.0) for name in ("x", "y")]
    rows += [make_row(model="swin_t", config_fingerprint=c, seed=s, top1=6.0) for s, c in enumerate(("c1", "c2"))]
    rows += [make_row(method="one", options="iterations=5")]
    (document,) = measured_documents(rows)
    (grid,) = grids(document.sections)
    configurations = ["swin_t [configuration c1]", "swin_t [configuration c2]"]
    assert list(grid["one"]) == ["vit_s", "vit_b [x]", "vit_b [y]", *configurations]
    assert [numbers(cell) for cell in grid["noise (iterations=1, lr=2)"].values()] == [[1.0, -79.0], [], [], [], []]
    assert numbers(grid["noise (iterations=9, lr=2)"]["vit_s"]) == [9.0, -71.0]
    assert mark(grid["one"]["vit_s"]) == "best"
    assert "noise (iterations=9, lr=2): calib_size=8, iterations=9, lr=2." in notes(document.sections)


def test_another_version_is_said_once_for_each_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {("noise", "vit_s"): "measured by version 1 of noise; the present version is 2 (a|b)"}
    said |= {
        ("other", model): "measured by version 3 of other; the present version is 4" for model in ("vit_s", "swin_t")
    }
    monkeypatch.setattr(
        "iasvit.leaderboard.cells.other_version", lambda row: said.get((row["method"], row["model"]), "")
    )
    rows = [
        make_row(model=m, method=x, seed=s) for m in ("vit_s", "swin_t") for x in ("noise", "other") for s in (0, 1)
    ]
    (document,) = measured_documents(rows)
    assert document.brief.endswith("; some values are of earlier versions of a method.")
    assert notes(document.sections)[-2:] == [
        "noise on vit_s: measured by version 1 of noise; the present version is 2 (a\\|b); "
        "`--stale` measures it again.",
        "other: measured by version 3 of other; the present version is 4; `--stale` measures it again.",
    ]
    data = document.frame.set_index(["method", "model"])["other_version"]
    assert (data["noise", "swin_t"], data["noise", "vit_s"]) == ("", said["noise", "vit_s"])
    values = {(value.method, value.model): value for value in page_values([document])}
    assert values["noise", "vit_s"].note == said["noise", "vit_s"]
    assert values["noise", "swin_t"].note == ""


def test_a_runs_own_table_has_its_cells_and_no_command() -> None:
    text = table([make_row(), make_row(method="other", top1=20.0), make_row(method="fp32", spec="W32A32")])
    (grid,) = grids(text)
    assert [numbers(grid[method]["vit_s"]) for method in ("fp32", "noise", "other")] == [[80], [70, -10], [20, -60]]
    assert [mark(line["vit_s"]) for line in grid.values()] == ["", "best", ""]
    assert text.startswith("fake on mini, W3A3: top1, 20 images\n")
    assert "python x.py" not in text
    assert "W32A32" not in text
    (grid,) = grids(table([make_row()], ["agreement", "not a metric of these rows"]))
    assert grid == {"noise": {"vit_s": "**90.00**"}}
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
        values = {"method": method, "model": model, "spec": spec, "seed": draw(st.integers(0, 3))}
        values |= {"top1": None if failed else draw(st.integers(0, 10000)) / 100, "reason": "it did" if failed else ""}
        values |= {"status": "failed" if failed else "ok", "time": f"2026-01-01T00:{minute:02d}:00Z"}
        rows.append(make_row(**values))
    return draw(st.permutations(rows))


LENIENT = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@given(stores())
@settings(max_examples=40, deadline=None, suppress_health_check=LENIENT)
def test_aggregates_equal_a_plain_computation(rows: list[dict]) -> None:
    newest: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda row: row["time"]):
        newest[row["spec"], row["method"], row["model"], row["seed"]] = row
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
@settings(max_examples=20, deadline=None, suppress_health_check=LENIENT)
def test_the_order_of_rows_changes_nothing(rows: list[dict], random: random.Random) -> None:
    """Also of rows that several processes measured in the same second by different commands."""
    keys = {Key.of(row): {**row, "command": f"python {i}.py", "time": "2026"} for i, row in enumerate(rows)}
    same_second = list(keys.values())
    first = [document.markdown() + document.frame.to_csv() for document in measured_documents(same_second)]
    random.shuffle(same_second)
    assert [document.markdown() + document.frame.to_csv() for document in measured_documents(same_second)] == first
