"""Small data sets in COCO's form, and a stand-in for a detector that knows what is annotated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="the coco extra is not installed")

from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from tasks.detection.data import CocoImages, DetectorConfig, test_pipeline

pipeline = test_pipeline  # pytest would take the name for a test's
del test_pipeline

CLASSES = ("circle", "box", "line")
PREPROCESSOR = {
    "type": "DetDataPreprocessor",
    "mean": [10.0, 20.0, 30.0],
    "std": [2.0, 4.0, 8.0],
    "bgr_to_rgb": True,
    "pad_size_divisor": 32,
}
CONFIG = DetectorConfig({"data_preprocessor": PREPROCESSOR}, pipeline(1333, 800), CLASSES)


def content(sizes: list[tuple[int, int]], seed: int = 0) -> dict[str, Any]:
    """A COCO data set of images of these widths and heights, with 3 boxes each; ids neither sorted nor contiguous."""
    generator = np.random.default_rng(seed)
    images, annotations = [], []
    for number, (width, height) in enumerate(sizes):
        image_id = 1000 - 7 * number
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": width, "height": height})
        for k in range(3):
            w, h = int(generator.integers(8, width // 2)), int(generator.integers(8, height // 2))
            x, y = int(generator.integers(0, width - w)), int(generator.integers(0, height - h))
            annotations.append(
                {
                    "id": 1 + len(annotations),
                    "image_id": image_id,
                    "category_id": (5, 9, 20)[(number + k) % 3],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    categories = [{"id": number, "name": name} for number, name in zip((5, 9, 20), CLASSES, strict=True)]
    return {"images": images, "categories": categories, "annotations": annotations}


def write(folder: Path, data: dict[str, Any], splits: tuple[str, ...] = ("val2017", "train2017")) -> Path:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(data))
    for split in splits:
        (folder / split).mkdir(exist_ok=True)
        for image in data["images"]:
            noise = np.random.default_rng(image["id"]).integers(0, 255, (image["height"], image["width"], 3))
            Image.fromarray(noise.astype(np.uint8)).save(folder / split / image["file_name"])
    return folder


class Oracle(nn.Module):
    """Stands for a detector: answers what it was given for each image."""

    def __init__(self, answers: dict[int, InstanceData]) -> None:
        super().__init__()
        self.answers = answers

    def test_step(self, batch: dict[str, Any]) -> list[DetDataSample]:
        samples = batch["data_samples"]
        for sample in samples:
            sample.pred_instances = self.answers[sample.img_id]
        return samples


def predictions(
    images: CocoImages, change: Callable[[np.random.Generator, Tensor], Tensor], found: float = 1.0
) -> dict[int, InstanceData]:
    """For each image its annotated boxes, changed, with random scores and masks that fill the boxes."""
    truth, generator = json.loads(images.annotation_file.read_text()), np.random.default_rng(1)
    labels = {category["id"]: CLASSES.index(category["name"]) for category in truth["categories"]}
    answers = {}
    for image in truth["images"]:
        own = [a for a in truth["annotations"] if a["image_id"] == image["id"] and generator.random() < found]
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]).reshape(-1, 4).float()
        boxes = change(generator, boxes)
        masks = torch.zeros(len(own), image["height"], image["width"], dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.round().long().clamp(min=0).tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        answers[image["id"]] = InstanceData(
            bboxes=boxes,
            scores=torch.from_numpy(generator.random(len(own))).float(),
            labels=torch.tensor([labels[a["category_id"]] for a in own], dtype=torch.int64),
            masks=masks,
        )
    return answers


def shifted(generator: np.random.Generator, boxes: Tensor) -> Tensor:
    return boxes + torch.from_numpy(generator.normal(0, 4, boxes.shape)).float()
