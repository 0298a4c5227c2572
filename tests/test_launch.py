"""Where a process stands among those that torchrun has started, by its environment, without starting any."""

from __future__ import annotations

import pytest
import torch

from iasvit import distributed
from iasvit.errors import IasvitError
from iasvit.launch import Place


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
