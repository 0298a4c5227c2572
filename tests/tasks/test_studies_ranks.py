"""Rank correlations between a mini model and the real one."""

from __future__ import annotations

from pathlib import Path

import pytest
from result_rows import make_row

from iasvit.benchmark.results import ResultStore
from iasvit.errors import IasvitError
from tasks.studies.ranks import correlations, places

REAL = {"a": 10.0, "b": 20.0, "c": 30.0, "d": 40.0, "e": 50.0}


def stored(folder: Path, dataset: str, values: dict[str, float], **more: object) -> None:
    store = ResultStore(folder)
    for method, top1 in values.items():
        store.append(make_row(task="imagenet", dataset=dataset, method=method, top1=top1, **more))


def test_spearmans_rho_of_means_over_seeds(tmp_path: Path) -> None:
    stored(tmp_path, "photos", REAL, model="big", data_kind="real")
    stored(tmp_path, "mini", {"a": 1.0, "b": 2.0, "c": 5.0, "d": 4.0, "e": 6.0})
    stored(tmp_path, "mini", {"a": 3.0}, seed=1)  # mean 2.0: level with b
    stored(tmp_path, "mini", {"z": 99.0})  # of which the real model has no value
    found = correlations(places(tmp_path, "photos", "top1"), places(tmp_path, "mini", "top1"))
    # ranks 1 2 3 4 5 against 1.5 1.5 4 3 5; Pearson's r of these is 8.5 / sqrt(10 · 9.5)
    assert found.to_dict("records") == [{"spec": "W3A3", "model": "vit_s", "methods": 5, "rho": 0.872}]


def test_too_few_methods_in_common_give_no_value(tmp_path: Path) -> None:
    stored(tmp_path, "photos", REAL, model="big", data_kind="real")
    stored(tmp_path, "mini", {"a": 1.0, "b": 2.0, "c": 5.0, "d": 4.0})
    assert correlations(places(tmp_path, "photos", "top1"), places(tmp_path, "mini", "top1")).empty


def test_weights_only_earlier_data_and_failed_rows_do_not_count(tmp_path: Path) -> None:
    stored(tmp_path, "mini", {"a": 1.0}, data_fingerprint="old", time="2025-01-01T00:00:00Z")
    stored(tmp_path, "mini", {"b": 2.0}, a_bits=32)
    stored(tmp_path, "mini", {"c": 3.0})
    stored(tmp_path, "mini", {"d": 4.0}, status="failed")
    assert list(places(tmp_path, "mini", "top1")["method"]) == ["c"]


def test_no_rows_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(IasvitError, match="has no row of mini"):
        places(tmp_path, "mini", "top1")
