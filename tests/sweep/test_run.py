"""The sweep itself: rows in one store, what is tried again, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import sweep_fakes
from sweep_fakes import Inline, Swept, write_suite
from torch import Tensor

from iasvit.benchmark.harness import run_cells
from iasvit.benchmark.results import ResultStore, Row, read_rows
from iasvit.progress import Progress
from iasvit.sweep.engine import Event
from iasvit.sweep.plan import Plan, make_plan, plan_grids
from iasvit.sweep.run import sweep
from iasvit.sweep.suite import Needs, read_suite
from iasvit.sweep.worker import Outcome, Work, measure

LOST = Outcome(error="the machine is gone")
FULL = Outcome(error="OutOfMemoryError: CUDA out of memory", out_of_memory=True)


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    sweep_fakes.install(monkeypatch, tmp_path)


@pytest.fixture
def store() -> ResultStore:
    return ResultStore("runs", pytest.fail)


def plan(store: ResultStore, method: str = "noise", seeds: str = "0, 1, 2", gpu: float = 0, **options: bool) -> Plan:
    grid = f'bits = ["W3A3"]\nseed = [{seeds}]\nmethod = ["{method}"]'
    suite = read_suite(write_suite(Path("s.toml"), grid, top=f"[resources]\ngpu = {gpu}"))
    return make_plan(plan_grids(suite), store, **options)


def lines(store: ResultStore) -> list[tuple[str, int, str]]:
    """(method, seed, status) of every line of the file, in order."""
    rows, problems = read_rows(store.path("swept", "mini"))
    assert not problems
    return [(row["method"], row["seed"], row["status"]) for row in rows]


def test_rows_are_those_of_a_run_in_one_process(store: ResultStore) -> None:
    todo = plan(store).todo
    engine = Inline(lambda work, needs: measure(Work.from_json(work.to_json())))
    assert sweep(todo, engine, store, tell=str) == []
    assert engine.closed
    assert lines(store) == [("fp32", 0, "ok"), *(("noise", seed, "ok") for seed in range(3))]
    (planned,) = plan_grids(read_suite(Path("s.toml")))
    alone = run_cells(planned.task, planned.cells, ResultStore("alone"), checkpoint_root=Path("c"), quiet=True)
    for row, other in zip(plan(store).rows(store), alone, strict=True):
        differing = {name for name in row if row[name] != other[name]}
        assert {name for name in differing if "seconds" not in name} <= {"images_per_second", "peak_memory_mib", "time"}


def test_a_second_start_skips_what_is_done(store: ResultStore) -> None:
    sweep(plan(store).todo[:2], Inline(), store, tell=str)
    again = plan(store)
    assert [work.key.seed for work in again.todo] == [2]
    assert again.todo[0].reference == store.find(
        again.todo[0].key._replace(method="fp32", spec="W32A32", seed=0, calib_size=0)
    )
    sweep(again.todo, Inline(), store, tell=str)
    assert lines(store) == [("fp32", 0, "ok"), *(("noise", seed, "ok") for seed in range(3))]
    assert plan(store).todo == []
    assert len(plan(store, force=True).todo) == 3


def test_what_is_lost_is_tried_again_and_stored_once(store: ResultStore) -> None:
    tried: list[int] = []

    def act(work: Work, needs: Needs) -> Outcome:
        tried.append(work.key.seed)
        return LOST if work.key.seed == 1 and tried.count(1) < 3 else measure(work)

    told: list[str] = []
    assert sweep(plan(store).todo, Inline(act), store, retries=2, tell=told.append) == []
    assert sorted(tried) == [0, 1, 1, 1, 2]
    assert sorted(lines(store)) == [("fp32", 0, "ok"), *(("noise", seed, "ok") for seed in range(3))]
    assert any("seed 1 failed on here: the machine is gone; again, attempt 2 of 3" in line for line in told)
    assert told[-1].startswith("[3/3] swept mini: vit_s noise W3A3 seed 1: ")
    assert told[-1].endswith("3 done, 0 running, 0 waiting, 0 failed, about 0 s left")


def test_what_fails_for_good_is_reported_and_the_rest_goes_on(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = plan(store, "frail", seeds="0, 1").todo  # without IASVIT_TEST_LOG it is a defect
    (first, *_) = failures = sweep(todo, Inline(), store, retries=1, tell=str)
    assert [failure.attempts for failure in failures] == [2, 2]
    assert first.title == "swept mini: vit_s frail W3A3 seed 0"
    assert first.reason.startswith("KeyError: 'IASVIT_TEST_LOG'")
    assert lines(store) == [("fp32", 0, "ok"), ("frail", 0, "failed"), ("frail", 1, "failed")]
    monkeypatch.setenv("IASVIT_TEST_LOG", "log")
    assert len(plan(store, "frail", seeds="0, 1").todo) == 2  # a failed cell is no measured one


@pytest.mark.parametrize(("gpu", "alone"), [(0.25, True), (1, False)])
def test_a_cell_without_gpu_memory_is_retried_alone(store: ResultStore, gpu: float, alone: bool) -> None:
    def act(work: Work, needs: Needs) -> Outcome:
        return Outcome([]) if needs.gpu == 1 and alone else FULL

    engine = Inline(act)
    failures = sweep(plan(store, seeds="0", gpu=gpu).todo, engine, store, tell=str)
    assert [needs.gpu for _, needs in engine.submitted] == ([0.25, 1] if alone else [1])
    assert [failure.attempts for failure in failures] == ([] if alone else [1])


def test_gpu_memory_that_a_method_ran_out_of_is_recognised(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    (work,) = plan(store, seeds="0").todo
    monkeypatch.setattr("harness_fakes.Noise.quantize", full)
    assert measure(work).out_of_memory
    monkeypatch.setattr("harness_fakes.FakeTask.load_model", full)
    assert measure(work) == Outcome([], "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB", True)


def test_a_worker_that_sees_other_data_measures_nothing(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    (work,) = plan(store, seeds="0").todo
    monkeypatch.setenv("IASVIT_TEST_DATA", "d2")
    assert measure(work) == Outcome(
        [], "the worker has data_fingerprint 'd2', but the sweep has 'd1'; give both the same files"
    )


def test_ctrl_c_closes_the_engine_and_keeps_what_is_done(store: ResultStore) -> None:
    def act(work: Work, needs: Needs) -> Outcome:
        if work.key.seed == 1:
            raise KeyboardInterrupt
        return measure(work)

    engine = Inline(act)
    with pytest.raises(KeyboardInterrupt):
        sweep(plan(store).todo, engine, store, tell=str)
    assert engine.closed
    assert lines(store) == [("fp32", 0, "ok"), ("noise", 0, "ok")]


def test_time_left_comes_from_like_cells(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("iasvit.sweep.run.time.monotonic", lambda: now[0])

    def act(work: Work, needs: Needs) -> Outcome:
        now[0] += 60 + work.key.seed
        return Outcome([])

    told: list[str] = []
    sweep(plan(store, seeds="0, 1, 2, 3, 4, 5").todo, Inline(act), store, tell=told.append)
    assert told[0].endswith("60 s on here; 1 done, 0 running, 5 waiting, 0 failed, about 5 min left")
    assert told[4].endswith("5 done, 0 running, 1 waiting, 0 failed, about 62 s left")


def test_counts_are_said_while_nothing_happens(store: ResultStore) -> None:
    class Slow(Inline):
        def events(self, seconds: float) -> list[Event]:
            quiet = self.current is not None and not told
            return [] if quiet else super().events(seconds)

    told: list[str] = []
    sweep(plan(store).todo, Slow(lambda work, needs: Outcome([])), store, tell=told.append)
    assert told[0] == "0 done, 1 running, 2 waiting, 0 failed, time left not known yet"


def test_a_full_precision_row_that_is_enough_is_measured_once(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recall(task: Swept, row: Row) -> Tensor:
        return Swept.predict(task, row["model"], task.load_model(row["model"]), Progress())

    monkeypatch.setattr(Swept, "recall", recall)
    full: list[bool] = []

    def act(work: Work, needs: Needs) -> Outcome:
        outcome = measure(Work.from_json(work.to_json()))
        full.append(len(outcome.rows) == 2)
        return outcome

    engine = Inline(act)
    todo = plan(store).todo
    assert sweep(todo, engine, store, tell=str) == []
    assert full == [True, False, False]
    assert lines(store) == [("fp32", 0, "ok"), *(("noise", seed, "ok") for seed in range(3))]
    assert sweep(plan(store, "frail").todo, Inline(lambda work, needs: LOST), store, retries=0, tell=str)
    failed = sweep(todo, Inline(lambda work, needs: LOST), store, retries=0, tell=str)
    assert len(failed) == 3  # those that waited are not forgotten where the first one fails
