"""Result rows for the tests of store and leaderboard, without torch, so that writers in processes start fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iasvit.benchmark.results import ResultStore, Row

PUBLISHED_HEADER = "task,model,method,w_bits,a_bits,metric,value,source\n"


def make_row(**values: Any) -> Row:
    """A sound result row, with these values changed or added."""
    row: Row = {
        **{"schema_version": 3, "task": "fake", "dataset": "mini", "split_size": 20, "data_fingerprint": "d1"},
        **{"config_fingerprint": "", "model": "vit_s", "weights": "", "method": "noise", "w_bits": 3, "a_bits": 3},
        **{
            "spec": "W3A3",
            "seed": 0,
            "calib_size": 8,
            "calib_used": 8,
            "options": "",
            "method_version": 1,
            "task_version": 1,
        },
        **{"data_kind": "embedded", "data_description": "drawn images"},
        **{"top1": 70.0, "top1_se": 1.5, "agreement": 90.0, "fp_top1": 80.0},
        **{"iterations": 3, "calibration_seconds": 1.0, "reconstruction_seconds": 2.0, "quantization_seconds": 3.0},
        **{"evaluation_seconds": 0.5, "images_per_second": 40.0, "peak_memory_mib": 100.5, "model_bytes": 60},
        **{
            "packed_bytes": 30,
            "admission": "",
            "transformed": "",
            "model_file": "",
            "device": "cpu: test",
            "threads": 1,
            "python": "3.11.7",
        },
        **{"torch": "2", "timm": "1", "iasvit": "0.1.0", "git_commit": "unknown", "spec_hash": "abc"},
        **{"command": "python x.py", "status": "ok", "reason": "", "time": "2026-01-01T00:00:00Z"},
    }
    return {**row, **values}


def line_of(text: str, start: str) -> list[str]:
    """The cells of the first table line that starts so, without padding."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def append_rows(folder: Path, writer: int, count: int, metric: str | None) -> None:
    """What one of several concurrent writers does: rows of different lengths, and now and then a new column."""
    store = ResultStore(folder)
    for index in range(count):
        extra = {metric: float(index)} if metric and index % 10 == 9 else {}
        store.append(make_row(seed=1000 * writer + index, command="x" * (50 * writer), **extra))
