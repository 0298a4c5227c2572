"""Task classes that the tests of the leaderboard register, and readers of what it writes."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from result_rows import make_row

from iasvit.benchmark.results import Row
from iasvit.benchmark.task import Metric, Task


class Classification(Task):
    """The metrics of `make_row`."""

    name = "fake"
    metrics = (
        Metric("top1", primary=True, standard_error="top1_se", minimum=0, maximum=100),
        Metric("top1_se"),
        Metric("agreement"),
        Metric("cosine", digits=4),
        Metric("unreadable", counts=True),
    )
    model_order = ("vit_s", "vit_b", "deit_t", "swin_t")


class Detection(Task):
    """Two primary metrics."""

    name = "coco"
    metrics = (Metric("bbox_mAP", primary=True), Metric("bbox_mAP_50"), Metric("segm_mAP", primary=True))
    model_order = ("mask_rcnn_swin_t", "cascade_mask_rcnn_swin_t")


class Depth(Task):
    """A metric of which less is better."""

    name = "depth"
    metrics = (
        Metric("rmse", digits=3, higher_is_better=False, primary=True, minimum=0),
        Metric("log_likelihood", maximum=0),
    )


TASKS = {"fake": Classification, "imagenet": Classification, "coco": Detection, "depth": Depth, "app": object()}


def entry_points(group: str) -> list[Any]:
    """In place of the installed packages' entry points."""
    return [
        SimpleNamespace(name=name, value=f"fakes:{name}", load=lambda loaded=loaded: loaded)
        for name, loaded in TASKS.items()
    ]


def scored_row(metrics: dict[str, float | None], **values: Any) -> Row:
    """A sound row with these metrics in place of those of `make_row`."""
    row = {
        name: value for name, value in make_row().items() if not re.fullmatch("(fp_)?(top1|top1_se|agreement)", name)
    }
    return {**row, **metrics, **values}


def detector_row(box: float, mask: float, **values: Any) -> Row:
    """A row of the task coco."""
    metrics = {"bbox_mAP": box, "bbox_mAP_50": 60.0, "segm_mAP": mask, "fp_bbox_mAP": 46.0, "fp_segm_mAP": 41.6}
    return scored_row(metrics, **{"task": "coco", "model": "mask_rcnn_swin_t", **values})


def depth_row(rmse: float, **values: Any) -> Row:
    """A row of the task depth."""
    return scored_row({"rmse": rmse, "fp_rmse": 0.5}, **{"task": "depth", **values})


def grids(text: str) -> list[dict[str, dict[str, str]]]:
    """Of each Markdown table in the text: method → model → what the cell says."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.M):
        head, _, *lines = [
            [re.sub(r"\\(.)", r"\1", cell).strip() for cell in re.findall(r"((?:\\.|[^|\\])*)\|", line)[1:]]
            for line in block.splitlines()
        ]
        found.append({line[0]: dict(zip(head[1:], line[1:], strict=True)) for line in lines})
    return found


def numbers(cell: str) -> list[float]:
    """The numbers of a cell in order: mean, deviation, gap …"""
    return [float(text) for text in re.findall(r"(?<![\w=])[+-]?\d+\.\d+", cell)]


def mark(cell: str) -> str:
    """ "best", "second" or ""."""
    return "best" if cell.startswith("**") else "second" if cell.startswith("<u>") else ""


def notes(text: str) -> list[str]:
    """The lines of the text's lists."""
    return [line.removeprefix("- ") for line in text.splitlines() if line.startswith("- ")]
