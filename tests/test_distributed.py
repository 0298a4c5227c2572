"""Two processes against one: the same parameters and metrics, one row, and an end of both where one fails."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import process_groups
import pytest
import torch
from process_groups import ROOT, Ended

from iasvit import distributed
from iasvit.errors import IasvitError
from iasvit.launch import Place

CALLS = {
    "one": ("quantize_and_score", 1),
    "two": ("quantize_and_score", 2),
    "learn-1": ("learn", 1),
    "learn-2": ("learn", 2),
    "learn-3": ("learn", 3),
    "resumed": ("resumed", 2),
    "different": ("different", 2),
    "twice": ("twice", 2),
    "fails-in-both": ("fails_in_both", 2),
    "fails-in-one": ("fails_in_one", 2),
    "breaks-in-first": ("breaks_in_first", 2),
    "killed": ("killed", 2),
    "interrupted": ("interrupted", 2),
    "bad-input": ("bad_input", 2),
    "waits-for-ever": ("waits_for_ever", 2),
}
METHODS = ["rtn", "minmax", "base_ptq", "ptq4vit", "repq_vit", "ias_vit"]
CASES = [*(("vit", name) for name in METHODS), ("swin", "ptq4vit"), ("swin", "ias_vit")]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Ended]], Path]:
    """How all groups ended, and the folder of theirs."""
    folder = tmp_path_factory.mktemp("groups")
    return process_groups.run("several_processes", CALLS, folder), folder


def load(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"{name}-{rank}.pt" if name else folder / f"{rank}.pt")


def rows(folder: Path) -> list[dict[str, str]]:
    (file,) = (folder / "runs").glob("*.csv")
    with file.open() as stream:
        return list(csv.DictReader(stream))


def sentences(ended: Ended) -> list[str]:
    """What a process said of its end."""
    return [line for line in ended.err.splitlines() if line.startswith(("error: ", "interrupted"))]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_two_processes_quantize_as_one_does(
    groups: tuple[dict[str, list[Ended]], Path], family: str, method: str
) -> None:
    """To the bit where nothing is learnt; what is learnt differs by the order in which gradients are added."""
    ended, folder = groups
    assert [each.status for each in ended["one"] + ended["two"]] == [0, 0, 0], ended
    one, first, second = (
        load(folder / name, f"{family}-{method}", rank) for name, rank in (("one", 0), ("two", 0), ("two", 1))
    )
    assert one["state"].keys() == first["state"].keys()
    for name, value in one["state"].items():
        assert torch.equal(first["state"][name], second["state"][name])
        learnt = method == "ias_vit" and name.rpartition(".")[2] != "_extra_state" and "_quantizer." not in name
        if not learnt and not (method == "ias_vit" and "weight_quantizer" in name):
            assert torch.equal(value, first["state"][name]), name
        else:
            torch.testing.assert_close(value, first["state"][name], rtol=1e-4, atol=1e-5, msg=name)
    if family == "vit":
        assert (one["own"], first["own"], second["own"]) == (37, 21, 16)
        assert first["scores"] == second["scores"]
        assert first["scores"]["unreadable"] == 1
        if method == "ias_vit":
            assert first["scores"] == pytest.approx(one["scores"], rel=1e-4)
        else:
            assert first["scores"] == one["scores"]


@pytest.mark.parametrize("count", [2, 3])
def test_steps_are_those_of_the_whole_batch(groups: tuple[dict[str, list[Ended]], Path], count: int) -> None:
    """Batches of 6 and of 1, by 2 and 3 processes; also passes over activations, in files too, from place to place."""
    ended, folder = groups
    assert {each.status for each in ended["learn-1"] + ended[f"learn-{count}"]} == {0}, ended
    one = load(folder / "learn-1", "")
    for rank in range(count):
        found = load(folder / f"learn-{count}", "", rank)
        assert found["shared"]
        torch.testing.assert_close(found["passes"], one["passes"], rtol=0, atol=0)
        for batch_size in (6, 1):
            torch.testing.assert_close(found[batch_size], one[batch_size], rtol=1e-6, atol=1e-6)


def test_a_run_goes_on_from_the_first_processs_checkpoint(groups: tuple[dict[str, list[Ended]], Path]) -> None:
    for each in groups[0]["resumed"]:
        assert (each.status, each.out) == (0, "broken off\n" if each is groups[0]["resumed"][0] else ""), each


def test_what_the_processes_are_given_must_be_the_same(groups: tuple[dict[str, list[Ended]], Path]) -> None:
    first, second = groups[0]["different"]
    assert (first.status, second.status) == (0, 0), first
    assert first.out.count("are not the same in process 0 and in process 1") == 2
    assert (second.out, second.err) == ("", "")


def test_a_row_is_stored_once_and_found_by_all(groups: tuple[dict[str, list[Ended]], Path]) -> None:
    ended, folder = groups
    first, second = ended["twice"]
    assert (first.status, second.status) == (0, 0), first
    stored = rows(folder / "twice")
    assert [row["method"] for row in stored] == ["fp32", "odd", "rtn"]
    assert all(row["device"].startswith("cpu: 2 × ") for row in stored)
    assert all(row["command"].startswith("torchrun --nproc-per-node 2 ") for row in stored)
    assert [(folder / "twice" / "runs" / row["model_file"]).is_file() for row in stored[1:]] == [True, True]
    assert first.err.count("stored already") == 2
    assert first.out.splitlines()[-1] == "rows: 2, evaluated: []"  # the second start measures nothing
    assert (second.out, second.err) == ("", "")
    same = [(folder / "twice" / f"rows-{rank}").read_text() for rank in (0, 1)]
    assert same[0] == same[1]
    assert not list((folder / "twice" / "checkpoints").glob("*"))


def test_what_fails_in_all_processes_is_a_failed_row(groups: tuple[dict[str, list[Ended]], Path]) -> None:
    ended, folder = groups
    assert [each.status for each in ended["fails-in-both"]] == [1, 1], ended
    found = [(row["method"], row["status"], row["reason"]) for row in rows(folder / "fails-in-both")[1:]]
    broken = ("odd", "failed", "RuntimeError: two lines")
    assert found == [("odd", "failed", "layer 'fc' puts out NaN"), broken, ("rtn", "ok", "")]


@pytest.mark.parametrize(
    ("name", "statuses", "sentence", "seconds"),
    [
        ("fails-in-one", [2, 2], "error: layer 'fc' puts out NaN here", 15),
        ("breaks-in-first", [2, 2], "error: RuntimeError in process 0 of 2: two lines", 15),
        ("waits-for-ever", [2, 2], "error: file 'x' is not there", 10),
        ("bad-input", [2, 2], "error: ", 10),
        ("interrupted", [130, 130], "interrupted; the same command again goes on where this one stopped", 10),
    ],
)
def test_where_one_fails_all_end_within_seconds_and_one_says_why(
    groups: tuple[dict[str, list[Ended]], Path], name: str, statuses: list[int], sentence: str, seconds: float
) -> None:
    ended = groups[0][name]
    assert [each.status for each in ended] == statuses, ended
    assert max(each.seconds for each in ended) < seconds
    (said,) = [line for each in ended for line in sentences(each)]
    assert said.startswith(sentence)
    assert "Traceback" not in ended[0].err + ended[1].err


def test_a_process_that_is_lost_ends_the_other(groups: tuple[dict[str, list[Ended]], Path]) -> None:
    first, second = groups[0]["killed"]
    assert second.status == -9
    assert first.status == 2, first
    assert first.seconds < 15


# ---- without processes -----------------------------------------------------------------------------------------------


def test_one_process_alone_is_the_plain_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # of somebody else
    assert (distributed.world_size(), distributed.rank(), distributed.processes_here()) == (1, 0, 1)
    assert distributed.own_device("cuda:1") == "cuda:1"
    assert distributed.gathered(lambda: 3) == [3]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is 'two'"),
    ],
)
def test_an_incomplete_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert Place.find() is None
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(IasvitError, match=f"{message}; start them by torchrun"):
        Place.find()


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("cuda", 1, "there are 2 processes on this machine, but 1 GPUs; give torchrun --nproc-per-node 1"),
        ("cuda:1", 2, "--device cuda:1 is one GPU, but there are 2 processes"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, message: str) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(IasvitError, match=message):
        distributed.own_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (distributed.own_device("cuda"), distributed.own_device("cpu")) == ("cuda:1", "cpu")


@pytest.mark.slow
def test_torchrun_starts_the_task(tmp_path: Path) -> None:
    options = ["--backbone", "deit_t", "--limit", "40", "--method", "minmax", "--calib-size", "4"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    texts = []
    for start in (torchrun, [sys.executable]):
        folder = tmp_path / str(len(start))
        folder.mkdir()
        script = [str(ROOT / "tasks" / "imagenet.py"), *options, "--results", "runs"]
        done = subprocess.run([*start, *script], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("[1/1] imagenet mini: deit_t minmax") == 1
        texts.append(done.stdout)
        found = [(row["top1"], row["cosine"]) for row in rows(folder)]
        assert len(found) == 2
    assert texts[0] == texts[1]
