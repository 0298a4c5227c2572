"""Mini COCO: what is written is what was drawn, to the bit, and reads as COCO does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iasvit.errors import IasvitError
from tasks.mini import detection
from tasks.mini.scenes import CLASSES, render

# After a deliberate change of the scenes, which raises scenes.VERSION, these change too; the detectors' checkpoints
# were trained on the old ones.
ANNOTATIONS = "b125d1708d55f59d"
PIXELS = "ea6939d815f6cb47"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini-coco")
    detection.write(folder, "val2017", "val", 24)
    return folder


@pytest.fixture(scope="module")
def content(folder: Path) -> dict:
    return json.loads((folder / "annotations" / "instances_val2017.json").read_text())


def read(folder: Path, entry: dict) -> np.ndarray:
    return np.asarray(Image.open(folder / "val2017" / entry["file_name"]))


def test_bytes_are_the_same_on_every_machine(folder: Path, content: dict) -> None:
    pixels = hashlib.sha256()
    for entry in content["images"]:
        pixels.update(read(folder, entry).tobytes())
    annotations = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    assert (annotations.hexdigest()[:16], pixels.hexdigest()[:16]) == (ANNOTATIONS, PIXELS)


def test_images_and_objects_are_the_scenes(folder: Path, content: dict) -> None:
    by_image: dict[int, list[dict]] = {}
    for entry in content["annotations"]:
        by_image.setdefault(entry["image_id"], []).append(entry)
    assert len(content["images"]) == 24
    assert [e["id"] for e in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
    for entry in content["images"]:
        scene = render("val", entry["id"], detection.IMAGE_SIZE, detection.OBJECTS)
        assert np.array_equal(read(folder, entry), scene.image)
        objects = by_image[entry["id"]]
        assert 1 <= len(objects) <= 10
        assert [CLASSES[o["category_id"] - 1] for o in objects] == [CLASSES[c] for c in scene.classes]
        for o, mask, box in zip(objects, scene.masks, scene.boxes, strict=True):
            x, y, width, height = o["bbox"]
            assert [x, y, x + width, y + height] == box.tolist()
            assert o["area"] == mask.sum()


def test_masks_read_by_pycocotools_are_the_visible_pixels(folder: Path, capsys: pytest.CaptureFixture) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="the coco extra is not installed").COCO(
        folder / "annotations" / "instances_val2017.json"
    )
    for index in coco.getImgIds()[:8]:
        scene = render("val", index, detection.IMAGE_SIZE, detection.OBJECTS)
        masks = [coco.annToMask(annotation).astype(bool) for annotation in coco.imgToAnns[index]]
        assert np.array_equal(np.stack(masks), scene.masks)


@pytest.mark.parametrize("mask", [[[1, 1], [0, 1]], [[0, 0], [0, 0]], [[1, 1], [1, 1]], [[0, 1], [0, 0]]])
def test_run_lengths_start_with_zeros(mask: list) -> None:
    mask = np.array(mask, dtype=bool)
    rle = detection.run_lengths(mask)
    values = [i % 2 == 1 for i, length in enumerate(rle["counts"]) for _ in range(length)]
    assert np.array_equal(np.array(values).reshape(mask.shape, order="F"), mask)
    assert all(length > 0 for length in rle["counts"][1:])


def test_the_set_is_hard_enough_to_be_one() -> None:
    """12 categories or more, all in use, objects that overlap, and 500 images."""
    assert detection.VAL_IMAGES >= 500
    scenes = [scene for _, scene in detection.detection_scenes("val", 0, 100)]
    counts = np.bincount(np.concatenate([scene.classes for scene in scenes]), minlength=len(CLASSES))
    assert len(CLASSES) >= 12
    assert counts.min() > 0
    assert {len(scene.classes) for scene in scenes} == set(range(1, 11))
    overlaps = 0
    for scene in scenes:
        low = np.maximum(scene.boxes[:, None, :2], scene.boxes[None, :, :2])
        high = np.minimum(scene.boxes[:, None, 2:], scene.boxes[None, :, 2:])
        overlaps += int((np.triu((high > low).all(-1), k=1)).any())
    assert overlaps > 50


def test_a_scene_without_objects_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_gaps(split: str, index: int, size: int, objects: tuple[int, int]) -> detection.Scene:
        scene = render(split, index, size, objects)
        if index % 2:
            return scene
        return detection.Scene(scene.image, scene.label, scene.classes[:0], scene.boxes[:0], scene.masks[:0])

    monkeypatch.setattr(detection, "render", with_gaps)
    assert [index for index, _ in detection.detection_scenes("val", 0, 3)] == [1, 3, 5]


def test_packed_scenes_are_the_scenes() -> None:
    packed = detection.pack("train", 5, 6)
    for row in range(6):
        scene = render("train", 5 + row, detection.IMAGE_SIZE, detection.OBJECTS)
        classes, boxes, masks = packed.objects(row)
        assert np.array_equal(packed.images[row], scene.image)
        assert np.array_equal(classes, scene.classes)
        assert np.array_equal(boxes, scene.boxes)
        assert np.array_equal(masks, scene.masks)


def test_command_writes_both_splits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert detection.main([str(tmp_path), "--val-images", "2", "--calibration-images", "3"]) == 0
    assert len(list((tmp_path / "val2017").iterdir())) == 2
    assert len(list((tmp_path / "train2017").iterdir())) == 3
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("arguments", [["--val-images", "0"], ["--calibration-images", "-1"]])
def test_no_images_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str]) -> None:
    assert detection.main([str(tmp_path), *arguments]) == 2
    assert "give 1 or more" in capsys.readouterr().err


def test_unknown_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(IasvitError, match="calibration"):
        detection.write(tmp_path, "val2017", "test", 1)
