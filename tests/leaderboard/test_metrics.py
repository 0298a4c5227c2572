"""What a metric and the order of models are comes from the task's class, or else from the columns."""

from __future__ import annotations

from pathlib import Path

import pytest
from board_fakes import depth_row, detector_row, grids, mark, numbers, scored_row
from result_rows import PUBLISHED_HEADER, make_row

from iasvit.benchmark.task import Metric
from iasvit.leaderboard.aggregate import measured_documents
from iasvit.leaderboard.metrics import further, model_order, task_metrics
from iasvit.leaderboard.published import published_documents, read_published
from iasvit.leaderboard.views import page_values, plots


def test_a_registered_task_declares_its_metrics() -> None:
    metrics = task_metrics("fake", make_row(cosine=0.9, loss=1.0))
    assert [metric.name for metric in metrics] == ["top1", "top1_se", "agreement", "cosine", "loss"]
    assert [metric.name for metric in metrics if metric.primary] == ["top1"]
    assert (metrics[3].digits, metrics[4]) == (4, Metric("loss"))
    assert [metric.name for metric in further(metrics)] == ["agreement", "cosine", "loss"]


@pytest.mark.parametrize("task", ["not registered", "app"])
def test_the_columns_of_another_task_are_enough(task: str) -> None:
    metrics = task_metrics(task, make_row())
    assert metrics == (Metric("top1", primary=True), Metric("top1_se"), Metric("agreement"))
    assert model_order(task) == ()
    (document,) = measured_documents([make_row(task=task, model=name) for name in ("swin_t", "a")])
    (grid, *_) = grids(document.sections)
    assert list(grid["noise"]) == ["a", "swin_t"]


def test_rows_without_the_primary_metric_show_the_first_that_they_have() -> None:
    """A run on images without labels has neither top1 nor its full-precision value."""
    rows = [scored_row({"agreement": 60.0, "unreadable": 0.0}), make_row(seed=1, dataset="labelled")]
    labelled, unlabelled = measured_documents(rows)
    (grid,) = grids(unlabelled.sections)
    assert numbers(grid["noise"]["vit_s"]) == [60.0]
    assert "top1" not in unlabelled.markdown()
    assert "top1" in labelled.sections
    assert len(page_values([unlabelled])) == 1
    assert list(plots([unlabelled])) == ["fake-mini-w3a3-seconds.svg"]


def test_models_are_in_the_tasks_order_and_then_by_name() -> None:
    models = ("zoo", "swin_t", "vit_b", "abc", "vit_s")
    rows = [make_row(model=name) for name in models] + [make_row(model="vit_b", weights="x", seed=1)]
    (document,) = measured_documents(rows)
    (grid, *_) = grids(document.sections)
    assert list(grid["noise"]) == ["vit_s", "vit_b []", "vit_b [x]", "swin_t", "abc", "zoo"]


def test_where_less_is_better_the_least_is_the_best() -> None:
    rows = [depth_row(0.7, quantization_seconds=1.0), depth_row(0.6121, method="fine", quantization_seconds=9.0)]
    rows += [depth_row(0.9, method="slow", quantization_seconds=20.0)]
    (document,) = measured_documents(rows)
    (grid, *_) = grids(document.sections)
    cells = {method: line["vit_s"] for method, line in grid.items()}
    assert {method: mark(cell) for method, cell in cells.items() if method != "fp32"} == {
        "fine": "best",
        "noise": "second",
        "slow": "",
    }
    assert numbers(cells["fine"]) == [0.612, 0.112]
    assert numbers(cells["noise"]) == [0.7, 0.2]  # value - full precision, whichever is better
    assert document.frame.set_index("method")["gap_rmse"].to_dict() == {"fine": 0.1121, "noise": 0.2, "slow": 0.4}
    values = {value.method: value for value in page_values([document])}
    assert [method for method, value in values.items() if value.best] == ["fine"]
    assert values["fine"].digits == 3
    assert values["noise"].gap == pytest.approx(0.2)
    (drawn,) = plots([document]).values()
    assert "rmse (lower is better)" in drawn


def test_published_values_too(tmp_path: Path) -> None:
    path = tmp_path / "published.csv"
    path.write_text(PUBLISHED_HEADER + "".join(f"depth,m,{x},4,4,rmse,{v},x\n" for x, v in (("a", 0.7), ("b", 0.6))))
    (document,) = published_documents(read_published(path))
    (grid,) = grids(document.sections)
    assert {method: mark(line["m"]) for method, line in grid.items()} == {"fp32": "", "a": "second", "b": "best"}
    assert [value.method for value in page_values([document]) if value.best] == ["b"]


def test_a_detector_has_tables_values_and_plots_of_boxes_and_of_masks() -> None:
    rows = [detector_row(40.0, 38.0), detector_row(39.0, 38.5, method="other")]
    rows += [detector_row(41.0, 37.0, model="cascade_mask_rcnn_swin_t")]
    (document,) = measured_documents(rows)
    boxes, masks = grids(document.sections)
    assert list(boxes["noise"]) == ["mask_rcnn_swin_t", "cascade_mask_rcnn_swin_t"]
    assert [numbers(cell) for cell in boxes["fp32"].values()] == [[46.0], [46.0]]
    assert [numbers(cell) for cell in boxes["noise"].values()] == [[40.0, -6.0], [41.0, -5.0]]
    assert [numbers(cell) for cell in masks["other"].values()] == [[38.5, -3.1], []]
    assert (mark(boxes["noise"]["mask_rcnn_swin_t"]), mark(masks["noise"]["mask_rcnn_swin_t"])) == ("best", "second")
    assert "bbox_mAP_50:" in document.details
    assert [value.metric for value in page_values([document])] == ["bbox_mAP"] * 3 + ["segm_mAP"] * 3
    assert set(plots([document])) == {"coco-mini-bbox_map-w3a3-seconds.svg", "coco-mini-segm_map-w3a3-seconds.svg"}


def test_images_that_were_left_out_are_said() -> None:
    (document,) = measured_documents([make_row(unreadable=2.0), make_row(seed=1, unreadable=2.0)])
    assert "- unreadable: 2 images of the split were left out." in document.sections
    assert "unreadable" not in document.details
    (document,) = measured_documents([make_row(unreadable=0.0)])
    assert "unreadable" not in document.markdown()
