"""The comparison of numbers of devices: its figures, on one process, and what it makes of several runs."""

from __future__ import annotations

import pytest
import torch

from tasks.studies import devices


def test_figures_of_the_only_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "BATCH", 2)
    found = devices.measure("test_vit", torch.device("cpu"), images=8, calib_size=2, iterations=1, batch_size=2)
    assert found["processes"] == 1
    assert found["minmax_scores"]["unreadable"] == 0
    assert min(value for name, value in found.items() if name.endswith(("_seconds", "_second"))) > 0


def test_ratios_are_above_1_where_more_processes_are_faster() -> None:
    run = {"device": "cpu", "minmax_scores": {"top1": 1.0}, "minmax_parameters": "ab"}
    one = [{**run, "ias_vit_seconds": each, "minmax_images_per_second": 100.0} for each in (9.0, 11.0)]
    two = [{**run, "ias_vit_seconds": 5.0, "minmax_images_per_second": 190.0, "minmax_scores": {"top1": 2.0}}]
    shown = devices.compared({1: one, 2: two})
    assert shown["2 against 1"] == {"ias_vit_seconds": 2.0, "minmax_images_per_second": 1.9}
    assert (shown["same_minmax_parameters"], shown["same_minmax_scores"]) == (True, False)
