"""The engine of a Ray cluster: a machine that is lost, nothing left behind, and addresses where no cluster is."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sweep_fakes
from sweep_fakes import write_suite

from iasvit.benchmark.results import ResultStore, read_rows
from iasvit.errors import IasvitError
from iasvit.sweep import ray_engine
from iasvit.sweep.engine import Event, check_room
from iasvit.sweep.engines import make_engine
from iasvit.sweep.plan import Plan, make_plan, plan_grids
from iasvit.sweep.ray_engine import RayEngine, check_address
from iasvit.sweep.run import sweep
from iasvit.sweep.suite import read_suite

SMALL = {"object_store_memory": 100 * 2**20, "include_dashboard": False}


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("IASVIT_TEST_LOG", str(tmp_path / "log"))
    sweep_fakes.install(monkeypatch, tmp_path)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without cores, and what a test adds to it."""
    pytest.importorskip("ray", reason="the extra cluster is not installed")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
    yield made
    made.shutdown()


def plan(store: ResultStore, seeds: int, method: str = "frail", top: str = "") -> Plan:
    grid = f'bits = ["W3A3"]\nseed = {list(range(seeds))}\nmethod = ["{method}"]'
    return make_plan(plan_grids(read_suite(write_suite(Path("s.toml"), grid, top=top))), store)


@pytest.mark.slow
def test_a_machine_lost_in_mid_sweep_loses_nothing_and_nothing_is_there_twice(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IASVIT_TEST_SLEEP", "3")
    _, second = (cluster.add_node(num_cpus=1, **SMALL) for _ in range(2))
    store = ResultStore("runs", pytest.fail)
    todo = plan(store, 6).todo
    engine = RayEngine(cluster.address)
    assert sorted(node.cpu for node in engine.nodes()) == [0, 1, 1]
    told: list[str] = []
    counts = {"started": 0, "ended": 0}

    def events(seconds: float) -> list[Event]:
        found = RayEngine.events(engine, seconds)
        for event in found:
            counts["started" if event.outcome is None else "ended"] += 1
        running = counts["started"] - counts["ended"]
        if running == 2 and counts["ended"] >= 1 and "killed" not in counts:  # each machine has a cell
            counts["killed"] = 1
            cluster.remove_node(second, allow_graceful=False)
        return found

    def tell(line: str) -> None:
        print(line)
        told.append(line)

    monkeypatch.setattr(engine, "events", events)
    assert sweep(todo, engine, store, tell=tell) == []
    lost = [line for line in told if "NodeDiedError" in line]
    assert lost
    assert all(line.endswith("; again, attempt 2 of 3") for line in lost)
    assert told[-1].startswith("[6/6]")
    rows, problems = read_rows(store.path("swept", "mini"))
    assert problems == []
    assert sorted((row["method"], row["seed"], row["status"]) for row in rows) == [
        ("fp32", 0, "ok"),
        *(("frail", seed, "ok") for seed in range(6)),
    ]
    assert plan(store, 6).todo == []


@pytest.mark.slow
def test_ctrl_c_ends_the_tasks(cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IASVIT_TEST_SLEEP", "600")
    cluster.add_node(num_cpus=2, **SMALL)
    store = ResultStore("runs", pytest.fail)
    todo = plan(store, 4).todo
    engine = RayEngine(cluster.address)

    def interrupt() -> None:
        while not (tmp_path / "log").exists() or len((tmp_path / "log").read_text().splitlines()) < 2:
            time.sleep(0.1)
        import _thread

        _thread.interrupt_main()

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        sweep(todo, engine, store, tell=print)
    pids = [int(line.split()[2]) for line in (tmp_path / "log").read_text().splitlines()]
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not store.path("swept", "mini").exists()
    time.sleep(2)
    assert len((tmp_path / "log").read_text().splitlines()) == 2  # those that waited did not start


@pytest.mark.slow
def test_more_than_any_machine_has(cluster: Any) -> None:
    cluster.add_node(num_cpus=2, num_gpus=2, **SMALL)
    engine = RayEngine(cluster.address)
    try:
        for top, what in (("gpu = 3", "3 GPUs"), ("cpu = 3", "3 CPUs"), ("memory_gib = 9999", "9999 GiB of memory")):
            suite = read_suite(write_suite(Path("s.toml"), 'bits = ["W3A3"]\nseed = [0]', top=f"[resources]\n{top}"))
            with pytest.raises(IasvitError, match=f"a cell needs {what}, but no machine of engine ray has more than "):
                check_room(engine, suite.grids)
        check_room(engine, read_suite(write_suite(Path("s.toml"), 'bits = ["W3A3"]\nseed = [0]')).grids)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:1", "--address 127.0.0.1:1 cannot be reached: Connection refused"),
        ("head", "--address head is not of the form HOST:PORT, such as head:6379"),
        ("127.0.0.1:99999999", "--address 127.0.0.1:99999999 cannot be reached: "),
        ("nowhere.invalid:6379", "--address nowhere.invalid:6379 cannot be reached: "),
        ("ray://127.0.0.1:10001", "--address ray://127.0.0.1:10001 belongs to the Ray client, which is not supported"),
    ],
)
def test_an_address_that_is_none(address: str, sentence: str) -> None:
    start = time.monotonic()
    with pytest.raises(IasvitError) as error:
        check_address(address)
    assert str(error.value).startswith(sentence)
    assert time.monotonic() - start < 30


def test_an_address_where_something_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own attempt takes two minutes, and then ends the process."""
    monkeypatch.setattr(ray_engine, "JOIN_SECONDS", 1.0)
    monkeypatch.setattr(ray_engine, "_JOIN", "import time; time.sleep(60)")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(IasvitError, match=f"--address {address}: no Ray cluster has answered within 1 s"):
            check_address(address)
        monkeypatch.setattr(ray_engine, "_JOIN", "raise SystemExit('RuntimeError: Version mismatch')")
        with pytest.raises(IasvitError, match="the Ray cluster cannot be joined: RuntimeError: Version mismatch"):
            check_address(address)


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(IasvitError, match="--engine ray needs the package ray; install iasvit with the extra cluster"):
        make_engine("ray", os.environ.get("RAY_ADDRESS"))
