"""The result store: nothing is lost, nothing is merged, nothing is left out silently."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from result_rows import append_rows, make_row

from iasvit.benchmark.results import Key, ResultStore, check_writable, format_options, read_rows
from iasvit.errors import IasvitError


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, reports: list[str]) -> ResultStore:
    return ResultStore(tmp_path / "runs", reports.append)


def file_of(store: ResultStore) -> Path:
    return store.path("fake", "mini")


def test_runs_that_begin_together_find_the_same_folder_writable(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: check_writable(tmp_path / "runs" / "x.csv", tmp_path / "runs"), range(400)))
    assert not list((tmp_path / "runs").iterdir())


def test_a_row_comes_back_as_it_was_stored(store: ResultStore) -> None:
    row = make_row(reason='a "quoted", part', command="python x.py --a 'b c'", iterations=None, top1=1 / 3)
    store.append(row)
    assert store.find(Key.of(row)) == row
    assert list(store.find(Key.of(row))) == list(store.rows().columns)


def test_rows_of_a_task_and_data_set_share_a_file(store: ResultStore) -> None:
    for dataset in ("mini", "mini-hard"):
        store.append(make_row(dataset=dataset))
    assert sorted(path.name for path in store.folder.iterdir()) == ["fake-mini-hard.csv", "fake-mini.csv"]
    assert sorted(store.rows()["dataset"]) == ["mini", "mini-hard"]


@pytest.mark.parametrize(
    "change",
    [
        *({"task": "other"}, {"dataset": "x"}, {"split_size": 5}, {"model": "vit_b"}, {"weights": "file"}),
        *({"data_fingerprint": "d2"}, {"config_fingerprint": "c2"}),
        *({"method": "x"}, {"spec": "W4A4"}, {"seed": 1}, {"calib_size": 9}, {"options": "lr=1"}),
    ],
)
def test_everything_that_decides_a_number_is_in_the_key(store: ResultStore, change: dict) -> None:
    store.append(make_row())
    assert store.has(Key.of(make_row()))
    assert not store.has(Key.of(make_row(**change)))


def test_of_equal_keys_the_latest_counts_and_nothing_is_deleted(store: ResultStore) -> None:
    for value, when in ((1.0, "2026-01-01T00:00:00Z"), (2.0, "2026-01-03T00:00:00Z"), (3.0, "2026-01-02T00:00:00Z")):
        store.append(make_row(top1=value, time=when))
    assert store.rows()["top1"].tolist() == [2.0]
    assert store.find(Key.of(make_row()))["top1"] == 2.0
    store.append(make_row(top1=4.0, time="2026-01-03T00:00:00Z"))  # within one second, order decides
    assert store.find(Key.of(make_row()))["top1"] == 4.0
    assert len(file_of(store).read_text().splitlines()) == 5


def test_a_failed_cell_counts_as_not_measured(store: ResultStore) -> None:
    store.append(make_row(status="failed", reason="why", top1=None))
    assert not store.has(Key.of(make_row()))
    assert store.find(Key.of(make_row()))["reason"] == "why"


def test_a_reader_sees_what_another_process_appended(store: ResultStore) -> None:
    assert not store.has(Key.of(make_row()))
    ResultStore(store.folder).append(make_row())
    assert store.has(Key.of(make_row()))
    ResultStore(store.folder).append(make_row(seed=1))
    assert store.has(Key.of(make_row(seed=1)))


@pytest.mark.parametrize("widening", [False, True])
def test_concurrent_writers_lose_nothing(store: ResultStore, reports: list[str], widening: bool) -> None:
    """Also while some of them add columns, which replaces the file under the others."""
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=append_rows, args=(store.folder, w, 50, f"metric{w}" if widening else None))
        for w in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    rows, problems = read_rows(file_of(store))
    assert problems == []
    assert sorted(row["seed"] for row in rows) == sorted(1000 * w + i for w in range(4) for i in range(50))
    if widening:
        assert all(row[f"metric{row['seed'] // 1000}"] == row["seed"] % 1000 for row in rows if row["seed"] % 10 == 9)


def test_a_writer_that_waited_for_a_replaced_file_writes_to_the_new_one(store: ResultStore) -> None:
    store.append(make_row())
    path = file_of(store)
    with open(path) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        writer = threading.Thread(target=ResultStore(store.folder).append, args=(make_row(seed=1),))
        writer.start()
        time.sleep(0.3)  # until it waits for the lock of the old file
        copy = path.with_suffix(".new")
        copy.write_bytes(path.read_bytes())
        os.replace(copy, path)
    writer.join(30)
    assert store.rows()["seed"].tolist() == [0, 1]


def test_a_row_that_a_killed_writer_cut_off_is_reported_and_merges_with_none(
    store: ResultStore, reports: list[str]
) -> None:
    """Wherever it was cut."""
    store.append(make_row(seed=0))
    whole = file_of(store).read_bytes()
    store.append(make_row(seed=1))
    line = file_of(store).read_bytes()[len(whole) :]
    for cut in (1, 20, len(line) // 2, len(line) - 10, len(line) - 2):
        store = ResultStore(store.folder, reports.append)
        reports.clear()
        file_of(store).write_bytes(whole + line[:cut])
        assert store.rows()["seed"].tolist() == [0]
        assert reports == [f"{file_of(store)} line 3 was cut off while it was written; row left out"]
        reports.clear()
        store.append(make_row(seed=2))
        assert store.rows()["seed"].tolist() == [0, 2]
        assert len(reports) == 1  # in other words now: it has a newline
        assert f"{file_of(store)} line 3" in reports[0]


def test_a_whole_row_without_newline_counts(store: ResultStore, reports: list[str]) -> None:
    store.append(make_row(seed=0))
    file_of(store).write_bytes(file_of(store).read_bytes().rstrip(b"\n"))  # as some editors leave it
    store.append(make_row(seed=1))
    assert store.rows()["seed"].tolist() == [0, 1]
    assert reports == []


@pytest.mark.parametrize("size", [1, 30, 200])
def test_a_header_that_was_cut_off_is_written_anew(store: ResultStore, size: int) -> None:
    store.append(make_row())
    file_of(store).write_bytes(file_of(store).read_bytes()[:size])
    store.append(make_row(seed=7))
    assert store.rows()["seed"].tolist() == [7]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (",W3A3,1,", ",W3A3,one,"),
        (",W3A3,1,", ",W3A3,,"),
        (",W3A3,1,", ",W3A3,1,1,"),
        (",70.0,", ",seventy,"),
        (",ok,", ",perhaps,"),
        ("cpu: test", '"cpu: test'),
        ("cpu: test", "cpu\udcff"),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:0"),
    ],
)
def test_a_malformed_row_is_reported_by_file_and_line(
    store: ResultStore, reports: list[str], old: str, new: str
) -> None:
    for seed in range(3):
        store.append(make_row(seed=seed))
    lines = file_of(store).read_text().splitlines(keepends=True)
    assert old in lines[2]
    lines[2] = lines[2].replace(old, new)
    file_of(store).write_bytes("".join(lines).encode(errors="surrogateescape"))
    assert store.rows()["seed"].tolist() == [0, 2]
    assert len(reports) == 1
    assert reports[0].startswith(f"{file_of(store)} line 3 is malformed")
    assert store.has(Key.of(make_row(seed=2)))
    assert len(reports) == 1  # once, not at each look


def test_a_malformed_row_stays_in_the_file_when_columns_are_added(store: ResultStore, reports: list[str]) -> None:
    store.append(make_row(seed=0))
    with open(file_of(store), "ab") as file:
        file.write(b"some note \xff\n")
    store.append(make_row(seed=1, top5=99.0))
    assert store.rows()["seed"].tolist() == [0, 1]
    assert store.rows()["top5"].isna().tolist() == [True, False]
    assert b"some note \xff\n" in file_of(store).read_bytes()
    assert len(reports) == 1


def test_a_foreign_file_is_neither_read_nor_changed(store: ResultStore, reports: list[str]) -> None:
    store.folder.mkdir()
    file_of(store).write_text("a,b\n1,2\n")
    assert store.rows().empty
    assert "not the header" in reports[0]
    with pytest.raises(IasvitError, match="not the header"):
        store.append(make_row())
    assert file_of(store).read_text() == "a,b\n1,2\n"


def test_line_breaks_in_a_value_make_no_second_line(store: ResultStore) -> None:
    store.append(make_row(reason="two\r\nlines\0", status="failed"))
    assert store.rows()["reason"].tolist() == ["two lines "]


@given(text=st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    store = ResultStore(tmp_path_factory.mktemp("runs"), pytest.fail)
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    store.append(make_row(command=text))
    store.append(make_row(seed=1))
    clean = store.rows()["command"].tolist()[0]
    assert [c for c in clean if c != " "] == [c for c in text if c not in " \r\n\0"]
    assert len(store.rows()) == 2


def test_a_row_that_lacks_a_column_is_refused(store: ResultStore) -> None:
    row = make_row()
    del row["git_commit"]
    with pytest.raises(IasvitError, match="git_commit"):
        store.append(row)
    assert not store.folder.exists()


def test_a_folder_that_cannot_be_made_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(IasvitError, match="cannot be written"):
        ResultStore(tmp_path / "file" / "runs").append(make_row())


_FULL_DISK = """
import resource, sys
from result_rows import make_row
from iasvit.errors import IasvitError
from iasvit.benchmark.results import ResultStore
store = ResultStore(sys.argv[1])
store.append(make_row())
size = store.path("fake", "mini").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
for extra in ({}, {"top5": 1.0}):
    try:
        store.append(make_row(seed=1, **extra))
    except IasvitError as error:
        print(error)
"""


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, store: ResultStore, reports: list[str]) -> None:
    """A limit on file size lets 20 bytes of the row through, as a disk does that fills up."""
    run = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(store.folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        check=True,
    )
    assert run.stdout.count("cannot be written") == 2
    assert store.rows()["seed"].tolist() == [0]
    assert reports == []
    assert [path.name for path in store.folder.iterdir()] == ["fake-mini.csv"]
    assert file_of(store).read_bytes().endswith(b"Z\n")


def test_options_have_one_spelling() -> None:
    assert format_options([("lr", 4e-5), ("iterations", 100)]) == "iterations=100;lr=4e-05"
    assert format_options([]) == ""
