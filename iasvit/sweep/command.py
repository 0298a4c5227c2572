"""What `iasvit sweep` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from iasvit.benchmark.harness import CHECKPOINT_ROOT
from iasvit.benchmark.results import ResultStore
from iasvit.leaderboard.aggregate import table
from iasvit.sweep.engine import check_room
from iasvit.sweep.engines import make_engine
from iasvit.sweep.plan import format_plan, make_plan, plan_grids
from iasvit.sweep.run import RETRIES, say, sweep
from iasvit.sweep.suite import find_suite, read_suite, shipped


def suites() -> str:
    """The suites that come with the package, a line each."""
    return "\n".join(f"{name:<20} {read_suite(path).description}" for name, path in shipped().items())


def run(
    suite: str,
    engine: str,
    address: str | None,
    results: Path,
    *,
    needs: Mapping[str, float | None] | None = None,
    retries: int = RETRIES,
    checkpoints: Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    stale: bool = False,
) -> bool:
    """Run a suite, and print its tables; or with `dry_run` what its cells would cost.

    Args:
        suite: a TOML file, or the name of a suite of the package.
        engine: "local" or "ray".
        address: see `make_engine`.
        results: folder of the store.
        needs: of cells, in place of the suite's: cpu, gpu, memory_gib.
        retries: see `sweep`.
        checkpoints: folder; None for the harness's own on this machine, and for none on a cluster.
        dry_run: measure nothing.
        force: measure also cells that are stored.
        stale: measure also cells that are stored of another version.

    Returns:
        Whether a cell failed.

    Raises:
        IasvitError: the suite, the engine or the results folder is at fault; nothing has run then.
    """
    read = read_suite(find_suite(suite)).with_needs(**(needs or {}))
    store = ResultStore(results)
    planned = plan_grids(read)
    if dry_run:
        print(format_plan(planned, store, force=force, stale=stale))
        return False
    if checkpoints is None and engine == "local":
        checkpoints = CHECKPOINT_ROOT
    plan = make_plan(planned, store, force=force, stale=stale, checkpoints=checkpoints)
    runner = make_engine(engine, address)
    try:
        check_room(runner, [part.grid for part in planned])
        for task, dataset in sorted({(key.task, key.dataset) for key in plan.keys}):
            store.check(task, dataset)
    except BaseException:
        runner.close()
        raise
    count, todo = len(plan.keys), len(plan.todo)
    say(f"{read.name}: {count} cells, {count - todo} stored already, {todo} to measure")
    failures = sweep(plan.todo, runner, store, retries=retries)
    print(table(plan.rows(store)))
    print("\nrows: " + ", ".join(sorted({str(store.path(key.task, key.dataset)) for key in plan.keys})))
    for failure in failures:
        say(f"failed after {failure.attempts} attempts: {failure.title}: {failure.reason}")
    return bool(failures)
