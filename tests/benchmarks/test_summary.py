"""The summary that `tox -e bench` keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import summary

RAW = {
    "machine_info": {
        "cpu": {"brand_raw": "A CPU", "flags": ["avx2", "sse"], "count": 2},
        "system": "Linux",
        "python_version": "3.11.7",
    },
    "commit_info": {"id": "abc"},
    "datetime": "2026-11-27",
    "benchmarks": [
        {
            "name": "test_step",
            "group": "g",
            "extra_info": {"seconds_over_plain": 1.25},
            "stats": {"min": 0.123456, "rounds": 1},
        },
        {"name": "test_render", "group": "h", "extra_info": {}, "stats": {"min": 2.0, "rounds": 5}},
    ],
}


def test_what_matters_is_kept_and_ratios_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw.json").write_text(json.dumps(RAW))
    summary.main([str(tmp_path / "raw.json"), "--out", str(tmp_path / "out.json"), "--note", "idle"])
    made = json.loads((tmp_path / "out.json").read_text())
    assert (made["machine"]["processor"], made["machine"]["flags"]) == ("A CPU", ["avx2"])
    assert (made["commit"], made["note"]) == ("abc", "idle")
    assert made["benchmarks"] == [
        {"name": "test_step", "group": "g", "seconds_over_plain": 1.25, "seconds": 0.1235, "rounds": 1},
        {"name": "test_render", "group": "h", "seconds": 2.0, "rounds": 5},
    ]
    assert capsys.readouterr().out == "  1.25 × the plain version's seconds: test_step\n"


def test_a_part_of_the_benchmarks_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "raw.json").write_text(json.dumps(RAW))
    summary.main([str(tmp_path / "raw.json"), "-k", "step", "-s"])
    assert [file.name for file in tmp_path.iterdir()] == ["raw.json"]
