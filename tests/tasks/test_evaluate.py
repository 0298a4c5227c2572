"""`iasvit evaluate` and `iasvit show` on files that `run --save` would keep."""

from __future__ import annotations

from pathlib import Path

import commands
import pytest

from iasvit.benchmark.harness import Cell, run_cells
from iasvit.benchmark.results import ResultStore, Row
from iasvit.benchmark.task import Task
from tasks import coco, imagenet
from tasks.evaluate import app


def saved(task: Task, model: str, folder: Path) -> Row:
    """The row of a cell that rtn quantized, its file in `folder`."""
    store = ResultStore(folder / "runs", pytest.fail)
    (row,) = run_cells(task, [Cell(model, "rtn", "W4A8", 0, 2)], store, save=folder, quiet=True)
    return row


@pytest.mark.parametrize(
    ("kind", "model", "metric"), [("imagenet", "deit_t", "top1"), ("coco", "mask_rcnn_swin_t", "bbox_mAP")]
)
def test_a_saved_model_scores_what_its_row_says(
    kind: str,
    model: str,
    metric: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = {"imagenet": imagenet, "coco": coco}[kind]
    task = module.make_task(module.Data.mini, limit=6)
    row = saved(task, model, tmp_path)
    args = (row["model_file"], "--model", model, "--task", kind, "--limit", 6, "--device", "cpu")
    assert commands.run(app, monkeypatch, *args) == 0
    digits = next(each.digits for each in task.metrics if each.name == metric)
    expected = f"| {metric} | {row[metric]:.{digits}f} | {row[f'fp_{metric}']:.{digits}f} |"
    assert expected in capsys.readouterr().out.splitlines()


def test_bad_input_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint(*args: object) -> str:
        return commands.complaint(app, monkeypatch, capsys, *args)

    file = saved(imagenet.make_task(imagenet.Data.mini, limit=4), "deit_t", tmp_path)["model_file"]
    assert "another architecture than swin_t" in complaint(file, "--model", "swin_t", "--limit", 4)
    assert "does not exist" in complaint(tmp_path / "none", "--model", "deit_t", "--limit", 4)
    assert "--data is 'moon', but task imagenet knows mini" in complaint(file, "--model", "deit_t", "--data", "moon")
