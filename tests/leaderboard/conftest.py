"""All tests of the leaderboard run with the registered tasks of `board_fakes`."""

from __future__ import annotations

import board_fakes
import pytest


@pytest.fixture(autouse=True)
def _registered_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iasvit.benchmark.task.entry_points", board_fakes.entry_points)
