"""Mini COCO: the embedded benchmark's detection scenes as a COCO data set, `python -m tasks.mini.detection FOLDER`.

128×128 images of 1 to 10 overlapping objects of 16 classes, with COCO's annotations: box, area and mask as run lengths.
Written to a folder they lie as COCO 2017 does, so that whatever reads COCO reads them. A data set is a pure function of
its split and size: the same bytes of pixels and annotations on every machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from iasvit.errors import IasvitError
from iasvit.files import atomic_write
from tasks.mini.scenes import CLASSES, Scene, render

IMAGE_SIZE = 128
OBJECTS = (1, 10)  # drawn in a scene; those hidden but for a small rest are not annotated
VAL_IMAGES = 500
CALIBRATION_STRIDE = 100_000  # calibration scenes between one seed's and the next's

# Category i + 1 is class i: COCO's ids start at 1.
CATEGORIES: tuple[dict[str, Any], ...] = tuple(
    {"id": number, "name": name, "supercategory": "shape"} for number, name in enumerate(CLASSES, start=1)
)


def detection_scenes(split: str, start: int, count: int, size: int = IMAGE_SIZE) -> Iterator[tuple[int, Scene]]:
    """`count` detection scenes of a split that show an object, from scene `start` on, each with its index.

    Raises:
        IasvitError: as `scenes.render`.
    """
    found, index = 0, start
    while found < count:
        scene = render(split, index, size, OBJECTS)
        if len(scene.classes):
            yield index, scene
            found += 1
        index += 1


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """A mask (bool H×W) as COCO's uncompressed RLE: lengths of runs down the columns, the first one of zeros."""
    flat = mask.flatten(order="F")
    starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], starts, [flat.size]])
    lengths = np.diff(edges).tolist()
    return {"size": list(mask.shape), "counts": [0, *lengths] if flat[0] else lengths}


def file_name(index: int) -> str:
    """Name of a scene's image file, in COCO's manner."""
    return f"{index:012d}.png"


def image_entry(index: int, scene: Scene) -> dict[str, Any]:
    """A scene's entry in "images"; its id is its index."""
    height, width = scene.image.shape[:2]
    return {"id": index, "file_name": file_name(index), "width": width, "height": height}


def object_entries(index: int, scene: Scene, first_id: int) -> list[dict[str, Any]]:
    """A scene's entries in "annotations", one an object, numbered from `first_id`; boxes are x, y, width, height."""
    entries = []
    for number, (label, box, mask) in enumerate(zip(scene.classes, scene.boxes, scene.masks, strict=True)):
        x0, y0, x1, y1 = box.tolist()
        entries.append(
            {
                "id": first_id + number,
                "image_id": index,
                "category_id": int(label) + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(np.count_nonzero(mask)),
                "iscrowd": 0,
                "segmentation": run_lengths(mask),
            }
        )
    return entries


def write(folder: Path, name: str, split: str, count: int, start: int = 0) -> Path:
    """Write scenes as COCO does: `folder`/`name`/*.png and `folder`/annotations/instances_`name`.json.

    Args:
        folder: made where it is missing.
        name: of the image folder, "val2017" for example.
        split: "train", "calibration" or "val".
        count: images, each with at least one object.
        start: index of the first scene.

    Returns:
        The annotation file, which is written last and whole.

    Raises:
        IasvitError: unknown split, or a count below 1.
    """
    if count < 1:
        raise IasvitError(f"mini COCO cannot be made of {count} images; give 1 or more")
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    content: dict[str, list] = {"categories": list(CATEGORIES), "images": [], "annotations": []}
    for index, scene in detection_scenes(split, start, count):
        image = Image.fromarray(scene.image)
        image.save(folder / name / file_name(index), compress_level=1)  # noise hardly compresses: do not try hard
        content["images"].append(image_entry(index, scene))
        content["annotations"] += object_entries(index, scene, first_id=len(content["annotations"]) + 1)
    path = folder / "annotations" / f"instances_{name}.json"
    atomic_write(path, json.dumps(content))
    return path


# ---- compact arrays, for training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedScenes:
    """n scenes in four arrays; no pixel belongs to two objects, so that one map of owners holds all masks.

    Attributes:
        images: uint8 n×H×W×3, RGB.
        owners: uint8 n×H×W, 0 for the background, i + 1 for object i.
        classes: uint8 n×10, padded with NO_CLASS.
        boxes: float32 n×10×4, x0, y0, x1, y1 in pixels, padded with zeros.
    """

    images: np.ndarray
    owners: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray

    NO_CLASS = 255

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def empty(cls, count: int, size: int = IMAGE_SIZE) -> PackedScenes:
        """Room for `count` scenes."""
        return cls(
            np.zeros((count, size, size, 3), dtype=np.uint8),
            np.zeros((count, size, size), dtype=np.uint8),
            np.full((count, OBJECTS[1]), cls.NO_CLASS, dtype=np.uint8),
            np.zeros((count, OBJECTS[1], 4), dtype=np.float32),
        )

    def put(self, row: int, scene: Scene) -> None:
        """Store a scene in a row that is empty."""
        self.images[row] = scene.image
        for number, mask in enumerate(scene.masks, start=1):
            self.owners[row][mask] = number
        k = len(scene.classes)
        self.classes[row, :k], self.boxes[row, :k] = scene.classes, scene.boxes

    def objects(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Classes (int64 [k]), boxes (float32 [k, 4]) and masks (bool [k, H, W]) of a row."""
        k = int(np.count_nonzero(self.classes[row] != self.NO_CLASS))
        numbers = np.arange(1, k + 1, dtype=np.uint8)[:, None, None]
        return self.classes[row, :k].astype(np.int64), self.boxes[row, :k], self.owners[row] == numbers


def pack(split: str, start: int, count: int, size: int = IMAGE_SIZE) -> PackedScenes:
    """`count` scenes with objects, from scene `start` on, in arrays."""
    packed = PackedScenes.empty(count, size)
    for row, (_, scene) in enumerate(detection_scenes(split, start, count, size)):
        packed.put(row, scene)
    return packed


# ---- command line ----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Write val2017 and, of the calibration scenes, train2017; exit status 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m tasks.mini.detection", description="Write mini COCO to a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--val-images", type=int, default=VAL_IMAGES)
    parser.add_argument("--calibration-images", type=int, default=256)
    options = parser.parse_args(arguments)
    try:
        print(write(options.folder, "val2017", "val", options.val_images))
        print(write(options.folder, "train2017", "calibration", options.calibration_images))
    except (IasvitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
