"""Result files of other schemas: what is upgraded, what is kept as it is, and what is left out."""

from __future__ import annotations

import csv
from importlib.metadata import EntryPoint
from pathlib import Path

import harness_fakes
import pytest
from harness_fakes import FakeTask
from result_rows import make_row

from iasvit.benchmark import task as tasks
from iasvit.benchmark.harness import Cell, run_cells
from iasvit.benchmark.results import Key, ResultStore, latest, read_rows
from iasvit.errors import IasvitError

REFERENCE = Path(__file__).parents[2] / "results" / "runs" / "reference"
NEW = ("data_fingerprint", "config_fingerprint", "method_version", "task_version", "data_kind", "data_description")
NEW_IN_3 = ("calib_used",)


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [EntryPoint("fake", "harness_fakes:FakeTask", tasks.GROUP)]
    monkeypatch.setattr(tasks, "entry_points", lambda group: entries)
    harness_fakes.install(monkeypatch)


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, reports: list[str]) -> ResultStore:
    return ResultStore(tmp_path / "runs", reports.append)


def first_schema(**values: object) -> dict[str, object]:
    """A row as schema 1 had it, in its order of columns."""
    row = make_row(**values)
    names = [name for name in row if name not in (*NEW, *NEW_IN_3, "schema_version", "model_file")]
    return {**{name: row[name] for name in names if name not in ("command", "status", "reason", "time")}} | {
        "code_hash": values.get("code_hash", "0123456789ab"),
        **{name: row[name] for name in ("command", "status", "reason", "time")},
    }


def write(store: ResultStore, *rows: dict[str, object], dataset: str = "mini") -> Path:
    path = store.path("fake", dataset)
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_row_of_schema_1_is_upgraded_on_reading(store: ResultStore, reports: list[str]) -> None:
    path = write(store, first_schema())
    before = path.read_bytes()
    (row,), problems = read_rows(path)
    assert problems == reports == []
    assert row == make_row(data_fingerprint="")
    assert path.read_bytes() == before
    write(store, first_schema(dataset="photographs"), dataset="photographs")
    (row,), _ = read_rows(store.path("fake", "photographs"))
    assert (row["data_kind"], row["data_description"]) == ("real", "real data")


def test_a_row_of_schema_2_gets_the_number_of_images_that_its_method_read(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    row = {**make_row(calib_size=256, status="failed"), "schema_version": 2}
    del row["calib_used"]
    given = {
        "minmax": ("", 32),
        "repq_vit": ("init_size=300", 256),
        "ptq4vit[init_size=16]": ("", 16),
        "base_ptq": ("candidates=4;init_size=8", 8),
        "rtn": ("", 0),
        "ias_vit": ("autocast=True;init_size=64;lr=4e-05", 256),
        "fp32": ("", 0),
        "not_installed": ("", None),
        "minmax[-none]": ("", None),
    }
    sizes = {"fp32": 0}
    rows = [
        {**row, "method": method, "options": options, "calib_size": sizes.get(method, 256)}
        for method, (options, _) in given.items()
    ]
    path = write(store, *rows)
    read, problems = read_rows(path)
    assert problems == []
    assert {row["method"]: row["calib_used"] for row in read} == {name: used for name, (_, used) in given.items()}
    store.append(make_row(seed=9))  # which writes the file anew
    assert read_rows(path)[0][:-1] == read


def test_the_committed_rows_of_schema_1_or_later_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for path in sorted(REFERENCE.glob("*.csv")):
        rows, problems = read_rows(path)
        assert problems == []
        assert len(rows) == len(path.read_text().splitlines()) - 1
        assert {row["schema_version"] for row in rows} == {3}
        assert {row["data_kind"] for row in rows} == {"embedded" if "mini" in path.stem else "real"}


def test_appending_rewrites_the_file_in_the_present_schema(store: ResultStore, reports: list[str]) -> None:
    path = write(store, first_schema(top1=1 / 3), first_schema(seed=1))
    with path.open("ab") as file:
        file.write(b"some note \xff\n")
    before = store.rows()
    store.append(make_row(seed=2))
    header, *lines = path.read_bytes().splitlines()
    assert header.startswith(b"schema_version,")
    assert b"code_hash" not in header
    assert lines[2] == b"some note \xff"
    after = store.rows()
    assert after["seed"].tolist() == [0, 1, 2]
    assert after.iloc[:2].equals(before)
    assert sorted(file.name for file in store.folder.iterdir()) == [path.name]
    store.append(make_row(seed=3))  # and now simply at the end
    assert store.rows()["seed"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "missing", ["timm", "model_file", "weights", "options", "method_version", "iterations", "top1"]
)
def test_a_missing_column_gets_its_default(store: ResultStore, reports: list[str], missing: str) -> None:
    row = make_row()
    write(store, {name: value for name, value in row.items() if name != missing})
    defaults = {"method_version": 1, "iterations": None}
    found = store.find(Key.of(row))
    assert reports == []
    if missing == "top1":  # a metric, of which the store knows nothing
        assert found == {name: value for name, value in row.items() if name != missing}
        return
    assert found == {**row, missing: defaults.get(missing, "")}
    store.append(make_row(seed=1))
    assert store.rows()["seed"].tolist() == [0, 1]
    assert store.find(Key.of(row)) == found


def test_an_unknown_column_is_kept(store: ResultStore, reports: list[str]) -> None:
    row = {**make_row(), "weather": "fine, dry", "mood": 3.5}
    path = write(store, row)
    assert store.find(Key.of(row)) == row
    store.append(make_row(seed=1))
    store.append(make_row(seed=2, top5=90.0))  # which rewrites the file
    assert "fine, dry" in path.read_text()
    assert store.find(Key.of(row)) == {**row, "top5": None}
    assert reports == []


@pytest.mark.parametrize("missing", ["task", "split_size", "seed", "status", "time"])
def test_a_file_without_a_column_that_makes_a_row_is_left_out(
    store: ResultStore, reports: list[str], missing: str
) -> None:
    path = write(store, {name: value for name, value in make_row().items() if name != missing})
    assert store.rows().empty
    assert len(reports) == 1
    assert str(path) in reports[0]
    assert missing in reports[0]
    with pytest.raises(IasvitError, match="not the header"):
        store.append(make_row())


def test_a_cell_on_unknown_data_is_measured_again_and_then_gives_way(store: ResultStore) -> None:
    cell = Cell("vit_s", "noise", "W3A3", 0, 8)
    write(store, first_schema(), first_schema(seed=1))
    (row,) = run_cells(FakeTask(), [cell], store, checkpoint_root=store.folder / "checkpoint", quiet=True)
    assert row["data_fingerprint"] == "d1"
    known = store.rows()
    cells = known[known["method"] == "noise"].set_index("seed")["data_fingerprint"]
    assert cells.to_dict() == {0: "d1", 1: ""}


def test_data_and_configurations_are_told_apart(store: ResultStore) -> None:
    cell = Cell("vit_s", "noise", "W3A3", 0, 8)
    for task in (FakeTask(), FakeTask(data="d2"), FakeTask(config="c2")):
        run_cells(task, [cell], store, checkpoint_root=store.folder / "checkpoint", quiet=True)
    assert len(store.rows()) == 6  # each with its full precision


@pytest.mark.parametrize("order", [1, -1])
def test_the_latest_of_known_and_unknown_data(order: int) -> None:
    unknown = make_row(data_fingerprint="", time="2026-01-03T00:00:00Z")
    rows = [unknown, make_row(), make_row(data_fingerprint="d2"), make_row(data_fingerprint="", seed=1)]
    kept = [(row["data_fingerprint"], row["seed"]) for row in latest(rows[::order])]
    assert sorted(kept) == [("", 1), ("d1", 0), ("d2", 0)]
