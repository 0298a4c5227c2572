"""The harness: what is measured, skipped, resumed, and what becomes of what goes wrong."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import harness_fakes
import pytest
import torch
from harness_fakes import Broken, FakeTask, Noise

from iasvit.benchmark import provenance
from iasvit.benchmark.estimate import estimate, format_estimates
from iasvit.benchmark.harness import Cell, exit_status, make_jobs, run_cells
from iasvit.benchmark.locks import locked
from iasvit.benchmark.results import Key, ResultStore, Row
from iasvit.errors import IasvitError
from iasvit.progress import CheckpointError, Progress, fingerprint


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    harness_fakes.install(monkeypatch)
    monkeypatch.setattr(Noise, "steps", [])


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "runs", pytest.fail)


def run(task: FakeTask, cells: list[Cell], store: ResultStore, **options: bool) -> list[Row]:
    return run_cells(task, cells, store, checkpoint_root=store.folder.parent / "checkpoint", quiet=True, **options)


def cell(method: str = "noise", model: str = "vit_s", seed: int = 0, **options: object) -> Cell:
    return Cell(model, method, "W3A3", seed, 8, tuple(sorted(options.items())))


def test_a_cell_becomes_a_row_with_its_cost_and_origin(store: ResultStore) -> None:
    task = FakeTask()
    (row,) = run(task, [Cell("vit_s", "noise", "w4a8", 1, 8, (("iterations", 2),))], store)
    reread = ResultStore(store.folder).find(Key.of(row))
    assert reread == row
    expected = {"task": "fake", "dataset": "mini", "split_size": 20, "model": "vit_s", "method": "noise"}
    expected |= {"spec": "W4A8", "w_bits": 4, "a_bits": 8, "seed": 1, "calib_size": 8, "options": "iterations=2"}
    expected |= {"iterations": 2, "status": "ok", "reason": "", "fp_top1": 80.0, "model_file": ""}
    expected |= {"torch": torch.__version__.split("+")[0], "schema_version": 3, "data_fingerprint": "d1"}
    expected |= {"calib_used": 8}
    expected |= {"config_fingerprint": "", "method_version": 1, "task_version": 1}
    expected |= {"data_kind": "embedded", "data_description": "drawn images"}
    got = {name: row[name].split("+")[0] if name == "torch" else row[name] for name in expected}
    assert got == expected
    assert 0 < row["top1"] < 80
    assert row["reconstruction_seconds"] <= row["quantization_seconds"]
    assert row["images_per_second"] > 0
    assert row["peak_memory_mib"] > 10


def test_the_full_precision_model_is_evaluated_once_and_stored(store: ResultStore) -> None:
    task = FakeTask()
    run(task, [cell(seed=seed) for seed in range(3)], store)
    assert len(task.predicted) == 4
    full = store.rows().set_index("method").loc["fp32"]
    assert (full["spec"], full["w_bits"], full["seed"], full["top1"], full["agreement"]) == ("W32A32", 32, 0, 80, 100)
    run(task, [cell(seed=3)], store)
    assert (store.rows()["method"] == "fp32").sum() == 1
    assert (store.path("fake", "mini").read_text().count(",fp32,")) == 1


def test_full_precision_can_be_asked_for_as_a_cell(store: ResultStore) -> None:
    (row,) = run(FakeTask(), [cell("fp32")], store)
    assert (row["method"], row["top1"]) == ("fp32", 80.0)
    assert len(store.rows()) == 1


def test_a_stored_cell_is_skipped_and_force_measures_it_again(store: ResultStore) -> None:
    task = FakeTask()
    (first,) = run(task, [cell()], store)
    loaded = len(task.loaded)
    (again,) = run(task, [cell()], store)
    assert again == first
    assert len(task.loaded) == loaded
    run(task, [cell()], store, force=True)
    assert Noise.steps == [0, 1, 2] * 2
    assert store.path("fake", "mini").read_text().count(",noise,3,3,") == 2
    assert len(store.rows()) == 2  # the cell and full precision


@pytest.mark.parametrize(
    "other", [cell(seed=1), cell(model="vit_b"), cell(iterations=4), Cell("vit_s", "noise", "W4A4", 0, 8)]
)
def test_a_cell_that_differs_is_measured(store: ResultStore, other: Cell) -> None:
    rows = run(FakeTask(), [cell(), other], store)
    assert len(store.rows()["method"][store.rows()["method"] == "noise"]) == 2
    assert Key.of(rows[0]) != Key.of(rows[1])


def test_other_weights_under_the_same_name_are_another_cell(store: ResultStore) -> None:
    run(FakeTask("a.safetensors"), [cell()], store)
    run(FakeTask("b.safetensors"), [cell()], store)
    assert sorted(store.rows()["weights"]) == ["a.safetensors"] * 2 + ["b.safetensors"] * 2


def test_same_seed_same_number(tmp_path: Path) -> None:
    tops = [run(FakeTask(), [cell(seed=5)], ResultStore(tmp_path / name))[0]["top1"] for name in "ab"]
    assert tops[0] == tops[1]


def test_an_option_that_is_none_is_the_methods_default(store: ResultStore) -> None:
    (row,) = run(FakeTask(), [cell(iterations=None)], store)
    assert (row["options"], row["iterations"]) == ("", 3)


def test_a_method_that_raises_leaves_a_failed_row_and_the_others_go_on(store: ResultStore) -> None:
    cells = [cell("broken", how="nan"), cell("broken"), cell()]
    rows = run(FakeTask(), cells, store)
    assert [row["status"] for row in rows] == ["failed", "failed", "ok"]
    assert [row["reason"] for row in rows[:2]] == ["layer 'fc' outputs NaN", "RuntimeError: two lines"]
    assert rows[0]["top1"] is None
    assert rows[2]["agreement"] > 40  # Broken zeroed the weights that it was given
    assert exit_status(rows) == 1
    assert exit_status(rows[2:]) == 0
    assert sorted(store.rows()["status"]) == ["failed", "failed", "ok", "ok"]


def test_a_failed_cell_is_tried_again(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run(FakeTask(), [cell("broken")], store)
    monkeypatch.setattr(Broken, "quantize", lambda self, model, *args: model)
    (row,) = run(FakeTask(), [cell("broken")], store)
    assert row["status"] == "ok"
    assert store.rows()["status"].tolist() == ["ok", "ok"]


def test_an_evaluation_that_gives_no_number_is_a_failure(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    task = FakeTask()
    score = task.score
    monkeypatch.setattr(
        task, "score", lambda p, r: score(p, r) if p is r else {**score(p, r), "top1": float("nan")}, raising=False
    )
    (row,) = run(task, [cell()], store)
    assert row["status"] == "failed"
    assert "top1" in row["reason"]
    assert row["agreement"] is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (cell("nope"), "'nope' is not registered; the registered ones are noise"),
        (cell(speed=3), "no option 'speed'; it knows seed"),
        (Cell("vit_s", "noise", "W9A9", 0, 8), "W9A9"),
        (Cell("vit_s", "noise", "W3A3", 0, 0), "calibration size is 0"),
    ],
)
def test_bad_input_is_found_before_any_cell_runs(store: ResultStore, bad: Cell, message: str) -> None:
    task = FakeTask()
    with pytest.raises(IasvitError, match=message):
        run(task, [cell(), bad], store)
    assert task.loaded == []
    assert not store.folder.exists()


def test_a_model_that_cannot_be_loaded_is_the_users_input_not_a_failed_cell(store: ResultStore) -> None:
    with pytest.raises(IasvitError, match="no checkpoint"):
        run(FakeTask(), [cell(), cell(model="missing")], store)
    assert (store.rows()["status"] == "ok").all()
    assert "missing" not in set(store.rows()["model"])


def test_a_full_disk_stops_the_run(store: ResultStore) -> None:
    with pytest.raises(OSError, match="No space left"):
        run(FakeTask(), [cell("broken", how="full"), cell()], store)
    assert store.rows()["method"].tolist() == ["fp32"]


def test_a_checkpoint_that_cannot_be_written_stops_the_run(tmp_path: Path, store: ResultStore) -> None:
    (tmp_path / "checkpoint").touch()
    with pytest.raises(CheckpointError, match=r"checkpoint.safetensors cannot be written"):
        run(FakeTask(), [cell()], store)
    assert store.rows()["method"].tolist() == ["fp32"]


def test_interrupt_passes_through_and_the_rerun_goes_on_inside_the_cell(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Noise, step: int) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Noise, "after", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(FakeTask(), [cell()], store)
    assert Noise.steps == [0, 1]
    (row,) = run(FakeTask(), [cell()], store)
    assert Noise.steps == [0, 1, 2]
    (whole,) = run(FakeTask(), [cell()], ResultStore(store.folder.parent / "whole"))
    assert row["top1"] == whole["top1"]
    assert list((store.folder.parent / "checkpoint").iterdir()) == []  # discarded


def interrupted(store: ResultStore, monkeypatch: pytest.MonkeyPatch, **options: bool) -> None:
    """A run that ends when its first step is saved."""

    def interrupt(self: Noise, step: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Noise, "after", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(FakeTask(), [cell()], store, **options)


@pytest.mark.parametrize("change", ["method", "task", "threads", "torch", "timm", "device"])
def test_what_another_version_or_machine_began_is_not_gone_on_with(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    interrupted(store, monkeypatch)
    checkpoint = store.folder.parent / "checkpoint"
    assert len(list(checkpoint.iterdir())) == 1
    if change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "0")
    elif change == "timm":
        versions = {**provenance.versions(), "timm": "0"}
        monkeypatch.setattr(provenance, "versions", lambda: versions)
    elif change == "device":
        monkeypatch.setattr(provenance, "describe_device", lambda device: "cpu: another")
    else:
        monkeypatch.setattr(Noise if change == "method" else FakeTask, "version", 2, raising=False)
    run_cells(FakeTask(), [cell()], store, checkpoint_root=checkpoint)
    assert Noise.steps == [0, 0, 1, 2]
    assert list(checkpoint.iterdir()) == []
    assert capsys.readouterr().err.count("this cell starts again and its checkpoint is removed: ") == 1


@pytest.mark.parametrize("force", [False, True])
def test_a_checkpoint_that_outlives_its_row_is_no_measurement(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], force: bool
) -> None:
    """As where a run dies between the row and the checkpoint's removal."""
    checkpoint = store.folder.parent / "checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "discard", lambda self: None)
        run(FakeTask(), [cell()], store)
    assert len(list(checkpoint.iterdir())) == 1
    Noise.steps.clear()
    run_cells(FakeTask(), [cell()], store, checkpoint_root=checkpoint, force=force)
    assert Noise.steps == ([0, 1, 2] if force else [])
    assert list(checkpoint.iterdir()) == []
    assert "its checkpoint is removed" not in capsys.readouterr().err


def test_a_forced_run_that_was_interrupted_goes_on(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run(FakeTask(), [cell()], store)
    Noise.steps.clear()
    interrupted(store, monkeypatch, force=True)
    run(FakeTask(), [cell()], store)  # stored already; what the forced run has done is kept
    run(FakeTask(), [cell()], store, force=True)
    assert Noise.steps == [0, 1, 2]


def test_a_cell_that_another_process_measures_is_put_off_and_then_taken_from_the_store(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task, cells = FakeTask(), [cell(), cell(seed=1)]
    checkpoint = store.folder.parent / "checkpoint"
    first, _ = make_jobs(task, cells)
    lock = locked(checkpoint / f"{fingerprint(*first.key)}.lock", wait=False)  # another's: a descriptor of its own
    assert lock.__enter__()

    def finish_elsewhere(self: Noise, step: int) -> None:
        if self.seed == 1 and step == 2:
            (row,) = run_cells(task, cells[:1], store, checkpoint_root=checkpoint.with_name("other"), quiet=True)
            assert row["status"] == "ok"
            lock.__exit__(None, None, None)

    monkeypatch.setattr(Noise, "after", finish_elsewhere)
    rows = run_cells(task, cells, store, checkpoint_root=checkpoint)
    assert [row["seed"] for row in rows] == [0, 1]
    assert Noise.steps == [0, 1, 2] * 2
    shown = capsys.readouterr().err
    assert "[1/2] fake mini: vit_s noise W3A3 seed 0: another process measures it; postponed" in shown
    assert "[1/2] fake mini: vit_s noise W3A3 seed 0: stored already" in shown
    assert list(checkpoint.iterdir()) == []


def test_the_lock_of_a_dead_process_does_not_block(store: ResultStore) -> None:
    (job,) = make_jobs(FakeTask(), [cell()])
    path = store.folder.parent / "checkpoint" / f"{fingerprint(*job.key)}.lock"
    path.parent.mkdir()
    path.touch()
    (row,) = run(FakeTask(), [cell()], store)
    assert row["status"] == "ok"
    assert not path.exists()


_KILLED = """
import sys, torch
import harness_fakes
from iasvit import methods
from iasvit.cli import main, make_app
from iasvit.benchmark.harness import Cell, run_cells
from iasvit.benchmark.results import ResultStore
import signal
import typer
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and hand that on
methods._entries = lambda: harness_fakes.ENTRIES
app = make_app()
@app.command()
def go():
    cells = [Cell("vit_s", "noise", "W3A3", 0, 8), Cell("vit_s", "killed", "W3A3", 0, 8)]
    run_cells(harness_fakes.FakeTask(), cells, ResultStore("runs"))
main(app)
"""


def run_killed(folder: Path, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])  # this process's iasvit, wherever it is
    env = {**os.environ, "PYTHONPATH": path, "IASVIT_TEST_SIGNAL": str(int(number))}
    return subprocess.run([sys.executable, "-c", _KILLED], cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_killed_inside_a_cell_resumes_there(tmp_path: Path, number: signal.Signals) -> None:
    first = run_killed(tmp_path, number)
    store = ResultStore(tmp_path / "runs", pytest.fail)
    assert store.rows()["method"].tolist() == ["fp32", "noise"]
    if number == signal.SIGKILL:
        assert first.returncode == -signal.SIGKILL
    else:
        assert first.returncode == 130
        assert first.stderr.strip().splitlines()[-1].startswith("interrupted; run the same command again")
        assert "Traceback" not in first.stderr
    second = run_killed(tmp_path, number)
    assert second.returncode == 0, second.stderr
    assert "vit_s noise W3A3 seed 0: stored already" in second.stderr
    assert (tmp_path / "steps.txt").read_text().split() == ["0", "1", "2"]  # each step once, over both runs
    values = store.rows().set_index("method")["top1"]
    assert values["killed"] == values["noise"]  # the same steps, interrupted and not
    assert not list((tmp_path / ".iasvit" / "checkpoints").iterdir())


def test_a_defect_shows_where_it_is_and_bad_input_does_not(
    store: ResultStore, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cells(FakeTask(), [cell("broken")], store, checkpoint_root=store.folder / "j")
    assert "harness_fakes.py" in capsys.readouterr().err
    run_cells(FakeTask(), [cell("broken", how="nan")], store, checkpoint_root=store.folder / "j")
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert "failed: layer 'fc' outputs NaN" in shown


def test_quiet_prints_nothing(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    run(FakeTask(), [cell(), cell("broken")], store)
    assert capsys.readouterr() == ("", "")


# --dry-run


def test_an_estimate_runs_no_method_and_says_what_it_rests_on(store: ResultStore) -> None:
    task = FakeTask()
    cells = [cell(), cell(iterations=6), cell(seed=1), cell("broken"), cell(iterations=5, model="vit_b")]
    before = estimate(task, cells, store)
    assert [item.basis for item in before[3:]] == ["no measurement yet", "rough, from one timed forward"]
    assert before[3].seconds is None
    assert not store.folder.exists()
    assert Noise.steps == []

    run(task, cells[:1], store)
    row = {**store.find(Key.of(run(task, cells[:1], store)[0]))}
    row |= {"reconstruction_seconds": 10.0, "quantization_seconds": 14.0, "evaluation_seconds": 2.0}
    store.append(row)
    after = estimate(task, cells, store)
    assert [item.seconds for item in after[:3]] == [0.0, 10.0 * 6 / 3 + 4 + 2, 16.0]
    assert after[0].basis == "stored already"
    assert estimate(task, cells[:1], store, force=True)[0].seconds == 16.0
    text = format_estimates(after)
    assert "| vit_s | broken | W3A3 | 0 | ? | no measurement yet |" in text
    assert "5 cells, about 42 s, and 1 of unknown cost" in text


# Progress


def test_a_phase_inside_another_counts_for_itself_and_the_checkpoint_knows_a_running_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 5.0, 7.0, 20.0])
    monkeypatch.setattr("iasvit.progress.time.perf_counter", lambda: next(clock))
    progress = Progress(checkpoint=tmp_path / "j")
    with progress.phase("outer"):
        with progress.phase("inner"):
            pass
        progress.save(0, {"x": torch.zeros(1)})
        resumed = Progress(checkpoint=tmp_path / "j")
        resumed.restore()
    assert progress.seconds == {"outer": 1 + 2 + 13, "inner": 4}
    assert resumed.seconds == {"outer": 3, "inner": 4}


def test_a_record_is_written_first_and_then_where_seconds_have_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 105.0, 110.0, 119.9])
    monkeypatch.setattr("iasvit.progress.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(Progress, "SAVE_EVERY", 10.0)
    progress, steps = Progress(checkpoint=tmp_path / "j"), []
    for step in range(4):
        progress.save(step, {"x": torch.zeros(1)})
        steps.append(Progress(checkpoint=tmp_path / "j").restore()[0])
    assert steps == [0, 0, 2, 2]


def test_a_log_gets_whole_lines_and_none_for_short_phases(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("vit_s", quiet=False)
    with progress.phase("short", 3) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Progress, "LINE_EVERY", 1e-9)
    with progress.phase("reconstruction", 3) as bar:
        for _ in range(3):
            bar.update()
    shown = capsys.readouterr().err
    assert "\r" not in shown
    assert [line.split(" after")[0] for line in shown.splitlines()] == [
        f"vit_s reconstruction: {n}/3" for n in (1, 2, 3)
    ]


# Provenance


def test_peak_memory_is_of_the_work_and_not_of_the_process() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the resident set's high-water mark cannot be reset here")
    memory = provenance.PeakMemory(torch.device("cpu"))
    base = memory.mib()
    big = torch.ones(64 * 2**20)  # 256 MiB
    high = memory.mib()
    assert high > base + 200
    del big
    assert memory.mib() > high - 50
    assert provenance.PeakMemory(torch.device("cpu")).mib() < high - 200


def test_peak_memory_leaves_out_what_only_awaits_the_collector() -> None:
    class Loop:
        pass

    loop = Loop()
    loop.itself = loop
    gone = weakref.ref(loop)
    gc.disable()
    try:
        del loop
        assert gone() is not None
        provenance.PeakMemory(torch.device("cpu"))
        assert gone() is None
    finally:
        gc.enable()


def test_a_command_names_no_absolute_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["/opt/x/bin/iasvit", "run", "--data-root", f"{tmp_path}/a b", f"--out={tmp_path}/../c", "-1"]
    )
    assert provenance.command() == "iasvit run --data-root 'a b' --out=../c -1"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "tasks" / "x.py"), "--bits", "W3A3"])
    assert provenance.command() == "python tasks/x.py --bits W3A3"
