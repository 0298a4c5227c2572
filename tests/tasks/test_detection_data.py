"""COCO's files: what is read, what is said of bad ones, and metrics equal to pycocotools'."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import CLASSES, CONFIG, PREPROCESSOR, Oracle, content, pipeline, predictions, shifted, write
from PIL import Image

pytest.importorskip("mmdet", reason="the coco extra is not installed")

from mmengine.structures import InstanceData
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from iasvit.errors import IasvitError
from iasvit.progress import Progress
from tasks.detection.data import CalibrationImages, CocoImages, DetectorConfig, MiniCocoImages, readable
from tasks.detection.models import coco_classes
from tasks.detection.runner import METRICS, evaluate
from tasks.mini import detection

SIZES = [(640, 480), (300, 500), (123, 77), (200, 200), (500, 333), (90, 400)]


@pytest.fixture
def data() -> dict[str, Any]:
    return content(SIZES)


@pytest.fixture
def root(tmp_path: Path, data: dict[str, Any]) -> Path:
    return write(tmp_path / "coco", data)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_images_keep_the_order_of_their_ids(root: Path, data: dict[str, Any]) -> None:
    images = CocoImages(root)
    assert images.image_ids == sorted(image["id"] for image in data["images"])
    dataset = images.dataset(CONFIG)
    assert [dataset.get_data_info(i)["img_id"] for i in range(len(dataset))] == images.image_ids
    assert dataset.metainfo["classes"] == CLASSES


def test_limit_spreads_over_the_split(root: Path) -> None:
    images = CocoImages(root, limit=2)
    assert len(images) == 2
    assert images.image_ids == [CocoImages(root).image_ids[i] for i in (0, 3)]
    dataset = images.dataset(CONFIG)
    assert [dataset.get_data_info(i)["img_id"] for i in range(len(dataset))] == images.image_ids


def test_calibration_images_are_what_the_detector_reads(root: Path) -> None:
    """Scaled to at most 1333×800, RGB, normalised, padded at the right and the bottom to a multiple of 32."""
    files = CocoImages(root).calibration_files(6, seed=3)
    assert {file.parent.name for file in files} == {"train2017"}
    images = CalibrationImages(files, DetectorConfig(CONFIG.model, pipeline(80, 64), CLASSES))
    for file, image in zip(files, images, strict=True):
        picture = Image.open(file)
        scale = min(80 / max(picture.size), 64 / min(picture.size))
        width, height = (int(side * scale + 0.5) for side in picture.size)
        assert image.shape == (1, 3, -(-height // 32) * 32, -(-width // 32) * 32)
        assert image.dtype == torch.float32
        assert (image[..., height:, :] == 0).all()
        assert (image[..., :, width:] == 0).all()
        # Resizing keeps the mean of noise, roughly; the channels' are told apart by PREPROCESSOR.
        pixels = torch.tensor(np.asarray(picture), dtype=torch.float32).mean((0, 1))
        expected = (pixels - torch.tensor(PREPROCESSOR["mean"])) / torch.tensor(PREPROCESSOR["std"])
        torch.testing.assert_close(image[0, :, :height, :width].mean((1, 2)), expected, rtol=0.05, atol=0.6)


def test_calibration_images_can_be_sliced_and_read_again(root: Path) -> None:
    images = CocoImages(root).calibration(CONFIG, 4, seed=0)
    assert len(images) == 4
    assert len(images[:2]) == 2
    assert torch.equal(list(images[:2])[1], images[1])
    assert torch.equal(list(images)[3], images[-1])


def test_the_seed_chooses_calibration_images(root: Path) -> None:
    images = CocoImages(root)
    assert images.calibration_files(4, 0) == images.calibration_files(4, 0)
    assert any(images.calibration_files(4, 0) != images.calibration_files(4, seed) for seed in (1, 2, 3))
    assert len(set(images.calibration_files(6, 5))) == 6


def test_without_training_images_the_split_itself_is_used_and_it_is_said(
    tmp_path: Path, data: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    files = CocoImages(write(tmp_path, data, ("val2017",))).calibration_files(2, 0)
    assert {file.parent.name for file in files} == {"val2017"}
    assert "no train2017/" in caplog.text


def test_mini_coco_is_drawn_and_goes_with_its_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "VAL_IMAGES", 9)
    images = MiniCocoImages(limit=3)
    root = images.root
    assert images.image_ids == [0, 3, 6]
    images.check_classes(detection.CLASSES)
    config = DetectorConfig(CONFIG.model, pipeline(128, 128), detection.CLASSES)
    first, second = (images.calibration(config, 2, seed) for seed in (0, 1))
    assert first.shape == (2, 3, 128, 128)
    assert not torch.equal(first, second)
    expected = torch.tensor(detection.render("calibration", 0, 128, detection.OBJECTS).image).permute(2, 0, 1).float()
    mean, std = (torch.tensor(PREPROCESSOR[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(first[0], (expected - mean) / std)
    del images
    assert not root.exists()


# ---- metrics ---------------------------------------------------------------------------------------------------------


def by_pycocotools(images: CocoImages, answers: dict[int, InstanceData]) -> dict[str, float]:
    """The same metrics by pycocotools alone."""
    results: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(images.annotation_file)
        numbers = {category["name"]: category["id"] for category in coco.dataset["categories"]}
        for kind in ("bbox", "segm"):
            entries = []
            for image_id in images.image_ids:
                instances = answers[image_id]
                for i in range(len(instances)):
                    x0, y0, x1, y1 = instances.bboxes[i].tolist()
                    entry = {
                        "image_id": image_id,
                        "category_id": numbers[CLASSES[int(instances.labels[i])]],
                        "score": float(instances.scores[i]),
                    }
                    if kind == "bbox":
                        entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
                    else:
                        entry["segmentation"] = rle.encode(np.asfortranarray(instances.masks[i].numpy()))
                    entries.append(entry)
            evaluation = COCOeval(coco, coco.loadRes(entries), kind)
            evaluation.params.imgIds = images.image_ids
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            for part, value in zip(("", "_50", "_75", "_s", "_m", "_l"), evaluation.stats, strict=False):
                results[f"{kind}_mAP{part}"] = 100 * value
    return results


@pytest.mark.parametrize("limit", [None, 4])
def test_metrics_are_pycocotools(root: Path, limit: int | None) -> None:
    images = CocoImages(root, limit, workers=0)
    answers = predictions(images, shifted, found=0.8)
    scores = evaluate(Oracle(answers), images.dataset(CONFIG), images.metric(CLASSES), Progress())
    expected = by_pycocotools(images, answers)
    assert tuple(scores) == METRICS
    assert 5 < scores["bbox_mAP"] < 95
    assert scores["bbox_mAP"] != scores["segm_mAP"]
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, abs=0.0501) or (value == -100 and np.isnan(scores[name]))


def test_the_truth_itself_scores_100_and_images_left_out_do_not_count(root: Path) -> None:
    images = CocoImages(root, limit=2, workers=0)
    answers = predictions(images, lambda generator, boxes: boxes)
    scores = evaluate(Oracle(answers), images.dataset(CONFIG), images.metric(CLASSES), Progress())
    assert scores["bbox_mAP"] == scores["segm_mAP"] == 100


def test_a_detector_that_finds_nothing_has_0_and_no_value_where_there_is_no_object(tmp_path: Path) -> None:
    images = CocoImages(write(tmp_path, content([(64, 64), (60, 60)])), workers=0)
    answers = predictions(images, shifted, found=0)
    scores = evaluate(Oracle(answers), images.dataset(CONFIG), images.metric(CLASSES), Progress())
    assert {name: value for name, value in scores.items() if value == value} == {
        name: 0.0 for name in METRICS if not name.endswith(("_m", "_l"))
    }


def test_evaluation_leaves_the_generators_and_standard_output_alone(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = CocoImages(root, limit=1, workers=0)
    network = Oracle(predictions(images, shifted))
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    evaluate(network, images.dataset(CONFIG), images.metric(CLASSES), Progress())
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert capsys.readouterr().out == ""


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_missing_files_and_folders(tmp_path: Path, data: dict[str, Any]) -> None:
    with pytest.raises(IasvitError, match=r"missing does not exist; --data-root"):
        CocoImages(tmp_path / "missing")
    with pytest.raises(IasvitError, match=r"instances_val2017.json cannot be read"):
        CocoImages(tmp_path)
    root = write(tmp_path, data, splits=())
    with pytest.raises(IasvitError, match=r"image folder .*val2017 cannot be read"):
        CocoImages(root)
    write(tmp_path, data)
    (root / "val2017" / "986.png").unlink()
    with pytest.raises(IasvitError, match=r"val2017 lacks 1 of the 6 images .* such as 986.png"):
        CocoImages(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: "{", "is not JSON"),
        (lambda data: [], "has no list 'images'"),
        (lambda data: {**data, "categories": 3}, "has no list 'categories'"),
        (lambda data: {**data, "images": []}, "lists no image"),
        (lambda data: {**data, "images": [{"id": 4}]}, r"'images' has no 'file_name' \(id 4\)"),
        (lambda data: {**data, "annotations": [{**data["annotations"][0], "category_id": 6}]}, "unknown category 6"),
        (lambda data: {**data, "annotations": [{**data["annotations"][0], "image_id": 6}]}, "belongs to image 6"),
    ],
)
def test_annotation_files_that_are_none(root: Path, data: dict[str, Any], change: Callable, message: str) -> None:
    changed = change(data)
    text = changed if isinstance(changed, str) else json.dumps(changed)
    (root / "annotations" / "instances_val2017.json").write_text(text)
    with pytest.raises(IasvitError, match=message) as error:
        CocoImages(root)
    assert "instances_val2017.json" in str(error.value)


def test_categories_that_are_not_the_models_classes(root: Path) -> None:
    images = CocoImages(root)
    images.check_classes(CLASSES)
    with pytest.raises(IasvitError, match=r"no category 'star', .* circle, line"):
        images.check_classes(("circle", "box", "star"))
    with pytest.raises(IasvitError, match="objects of category 'line'"):
        images.check_classes(("circle", "box"))
    with pytest.raises(IasvitError, match="no category 'person'"):
        images.check_classes(coco_classes())


def test_more_calibration_images_than_there_are(root: Path) -> None:
    with pytest.raises(IasvitError, match=r"--calib-size is 7, but .* has 6 images"):
        CocoImages(root).calibration(CONFIG, 7, 0)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"no image"), lambda path: path.unlink()])
def test_an_image_that_cannot_be_read_is_named(root: Path, workers: int, damage: Callable[[Path], object]) -> None:
    images = CocoImages(root, workers=workers)
    network = Oracle(predictions(images, shifted))
    dataset = images.dataset(CONFIG)
    damage(root / "val2017" / "972.png")
    with pytest.raises(IasvitError) as error:
        evaluate(network, dataset, images.metric(CLASSES), Progress(), workers)
    assert str(error.value).startswith(f"image {root}/val2017/972.png cannot be read: ")
    assert "\n" not in str(error.value)


def test_a_calibration_image_that_cannot_be_read_is_named_before_a_method_runs(root: Path) -> None:
    bad = root / "train2017" / "972.png"
    bad.write_bytes(b"no image")
    with pytest.raises(IasvitError, match=r"train2017/972\.png cannot be read"):
        CocoImages(root).calibration(CONFIG, 6, 0)


def test_a_pipeline_without_a_loader() -> None:
    with pytest.raises(IasvitError, match="no LoadImageFromFile, but Resize, PackDetInputs"):
        readable(pipeline(10, 10)[1:])
    steps = readable([*pipeline(10, 10), {"type": "LoadAnnotations", "with_bbox": True}])
    assert [step["type"] for step in steps[1:]] == ["Resize", "PackDetInputs"]
