"""`iasvit evaluate` and `iasvit show` on files that `run --save` would keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import commands
import pytest

from iasvit.benchmark.harness import Cell, run_cells
from iasvit.benchmark.results import ResultStore, Row
from iasvit.benchmark.task import Task
from tasks.classification import setup as classification
from tasks.coco import CocoTask
from tasks.detection import setup as detection
from tasks.evaluate import app
from tasks.imagenet import ImageNetTask


def saved(task: Task, model: str, folder: Path) -> Row:
    """The row of a cell that rtn quantized, its file in `folder`."""
    store = ResultStore(folder / "runs", pytest.fail)
    (row,) = run_cells(task, [Cell(model, "rtn", "W4A8", 0, 2)], store, save=folder, quiet=True)
    return row


def images(limit: int) -> Task:
    return ImageNetTask(classification.make_setup("mini", limit=limit))


def detection_images(limit: int) -> Task:
    return CocoTask(detection.make_setup(detection.Data.mini, limit=limit))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "model", "metric"),
    [(images, "deit_t", "top1"), (detection_images, "mask_rcnn_swin_t", "bbox_mAP")],
)
def test_a_saved_model_scores_what_its_row_says(
    make: Callable[[int], Task],
    model: str,
    metric: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = make(6)
    row = saved(task, model, tmp_path)
    args = (row["model_file"], "--model", model, "--task", task.name, "--limit", 6, "--device", "cpu")
    assert commands.run(app, monkeypatch, *args) == 0
    digits = next(each.digits for each in task.metrics if each.name == metric)
    expected = f"| {metric} | {row[metric]:.{digits}f} | {row[f'fp_{metric}']:.{digits}f} |"
    assert expected in capsys.readouterr().out.splitlines()


def test_bad_input_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint(*args: object) -> str:
        return commands.complaint(app, monkeypatch, capsys, *args)

    file = saved(images(4), "deit_t", tmp_path)["model_file"]
    assert "another architecture than swin_t" in complaint(file, "--model", "swin_t", "--limit", 4)
    assert "does not exist" in complaint(tmp_path / "none", "--model", "deit_t", "--limit", 4)
    for task in ("imagenet", "coco"):
        assert "--data moon" in complaint(file, "--task", task, "--model", "deit_t", "--data", "moon")
