"""Images of the COCO task: COCO 2017 in its usual folders, and the embedded mini COCO in the same form."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from iasvit.errors import IasvitError
from tasks.classification.folders import spread
from tasks.detection.mmdet_setup import prepare
from tasks.fingerprint import file_sizes, fingerprint

if TYPE_CHECKING:
    from mmdet.datasets import CocoDataset
    from mmdet.evaluation import CocoMetric

logger = logging.getLogger(__name__)
VAL, TRAIN = "val2017", "train2017"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


@dataclass(frozen=True)
class DetectorConfig:
    """What of an mmdet configuration the task needs.

    Attributes:
        model: as `MODELS.build` takes it.
        pipeline: transforms of a test image, from the file to the packed input.
        classes: names of the model's classes, in the order of its outputs.
    """

    model: dict[str, Any]
    pipeline: list[dict[str, Any]]
    classes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Hex digits that change when anything here does, but for where weights to start from lie.

        Raises:
            TypeError: it holds a value that is neither data nor a name.
        """
        return fingerprint([without_pretrained(self.model), self.pipeline, self.classes])


def without_pretrained(config: Any) -> Any:
    """A configuration without the weights files that its parts name: what is loaded comes from the task."""
    if isinstance(config, dict):
        return {
            key: without_pretrained(value)
            for key, value in config.items()
            if not (key == "init_cfg" and isinstance(value, dict) and value.get("type") == "Pretrained")
        }
    return [without_pretrained(value) for value in config] if isinstance(config, (list, tuple)) else config


def test_pipeline(width: int, height: int) -> list[dict[str, Any]]:
    """mmdet's test transforms for COCO: the image as large as fits into these pixels, its proportions kept."""
    return [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": (width, height), "keep_ratio": True},
        {"type": "PackDetInputs", "meta_keys": ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")},
    ]


class CocoImages:
    """COCO in its usual folders: annotations/instances_val2017.json, val2017/, and train2017/ to calibrate on.

    Args:
        root: the folder that holds these.
        limit: evaluate so many images, spread evenly over the split; None for all.
        workers: processes that read images.

    Raises:
        IasvitError: a file or folder is missing, or the annotations are no such (the message says what is wrong).
    """

    def __init__(self, root: Path, limit: int | None = None, workers: int = 2) -> None:
        self.root = root
        self.workers = workers
        if not root.is_dir():
            raise IasvitError(
                f"data folder {root} does not exist; --data-root names the folder that holds annotations/ and {VAL}/"
            )
        self.annotation_file = root / "annotations" / f"instances_{VAL}.json"
        content = read_annotations(self.annotation_file)
        self._categories = {category["id"]: category["name"] for category in content["categories"]}
        self._used = {annotation["category_id"] for annotation in content["annotations"]}
        images = sorted(content["images"], key=lambda image: image["id"])
        self._positions = spread(len(images), limit)
        self.image_ids = [images[position]["id"] for position in self._positions]
        self._files = [images[position]["file_name"] for position in self._positions]
        check_files(root / VAL, self._files)
        # mmdet takes images in the order of the file, which need not be that of their ids.
        order = {image["id"]: position for position, image in enumerate(content["images"])}
        self._positions = [order[image_id] for image_id in self.image_ids]

    def __len__(self) -> int:
        return len(self.image_ids)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digits of the annotations' content, and of names and sizes of the images evaluated and calibrated on."""
        annotations = hashlib.sha256(self.annotation_file.read_bytes()).hexdigest()
        evaluated = file_sizes((self.root / VAL / name for name in self._files), self.root)
        return fingerprint([annotations, evaluated, file_sizes(self._calibration_files, self.root)])

    def prepare(self) -> None:
        """Do once what should not count as the first evaluation's time; nothing: images are read as needed."""

    def check_classes(self, classes: Sequence[str]) -> None:
        """Raise IasvitError unless the annotations' categories are a model's classes, by name."""
        names = set(self._categories.values())
        if missing := [name for name in classes if name not in names]:
            raise IasvitError(
                f"annotation file {self.annotation_file} has no category {missing[0]!r}, which the model knows as one "
                f"of its {len(classes)} classes; categories there: {_some(sorted(names))}"
            )
        unknown = sorted(self._categories[number] for number in self._used if self._categories[number] not in classes)
        if unknown:
            raise IasvitError(
                f"annotation file {self.annotation_file} has objects of category {unknown[0]!r}, which is none of the "
                f"model's {len(classes)} classes: {_some(classes)}"
            )

    def dataset(self, config: DetectorConfig) -> CocoDataset:
        """The evaluation split as mmdet's data set, images transformed as the configuration says."""
        prepare()
        from mmdet.registry import DATASETS

        with _silent():
            return DATASETS.build(
                {
                    "type": "CocoDataset",
                    "ann_file": str(self.annotation_file),
                    "data_prefix": {"img": str(self.root / VAL)},
                    "metainfo": {"classes": tuple(config.classes)},
                    "pipeline": readable(config.pipeline),
                    "test_mode": True,
                    "indices": self._positions,
                }
            )

    def metric(self) -> CocoMetric:
        """mmdet's COCO metric, box and mask AP, of the images evaluated."""
        prepare()
        from mmdet.evaluation import CocoMetric

        with _silent():
            metric = CocoMetric(ann_file=str(self.annotation_file), metric=["bbox", "segm"])
        metric.img_ids = list(self.image_ids)  # else the objects of images left out would count as missed
        return metric

    @cached_property
    def _calibration_files(self) -> list[Path]:
        folder = self.root / TRAIN
        if not folder.is_dir():
            logger.warning(
                "%s has no %s/: calibration images are drawn from %s/, the evaluation split", self.root, TRAIN, VAL
            )
            folder = self.root / VAL
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)

    def check_calibration(self, n: int) -> None:
        """Raise IasvitError where there are fewer than n calibration images."""
        available = len(self._calibration_files)
        if n > available:
            raise IasvitError(f"--calib-size is {n}, but {self.root} has {available} images to calibrate on")

    def calibration_files(self, n: int, seed: int) -> list[Path]:
        """n image files, drawn by the seed, from the training images where there are some.

        Raises:
            IasvitError: there are fewer.
        """
        self.check_calibration(n)
        order = torch.randperm(len(self._calibration_files), generator=torch.Generator().manual_seed(seed))
        return [self._calibration_files[position] for position in order[:n].tolist()]

    def calibration(self, config: DetectorConfig, n: int, seed: int) -> Sequence[Tensor]:
        """n images 1×3×H×W float32 of their own sizes, normalised and padded as the model wants, read when asked for.

        Raises:
            IasvitError: there are fewer, or one cannot be read.
        """
        images = CalibrationImages(self.calibration_files(n, seed), config)
        images.check()
        return images


class MiniCocoImages(CocoImages):
    """The embedded mini COCO, drawn into a temporary folder, which goes with this object.

    Args:
        limit: evaluate so many images, spread evenly over the split; None for all.
    """

    def __init__(self, limit: int | None = None) -> None:
        from tasks.mini import detection

        root = Path(tempfile.mkdtemp(prefix="iasvit-mini-coco-"))
        self._finalizer = weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)
        detection.write(root, VAL, "val", detection.VAL_IMAGES)
        super().__init__(root, limit, workers=0)

    @cached_property
    def fingerprint(self) -> str:
        """See `CocoImages`; of the scenes' version: the sizes of PNG files depend on the library that writes them."""
        from tasks.mini import detection, scenes

        drawn = {"size": detection.IMAGE_SIZE, "objects": detection.OBJECTS, "stride": detection.CALIBRATION_STRIDE}
        return fingerprint({"scenes": scenes.VERSION, "val": self.image_ids, **drawn})

    def check_calibration(self, n: int) -> None:
        """See `CocoImages`."""
        from tasks.mini.detection import CALIBRATION_STRIDE

        if n > CALIBRATION_STRIDE // 2:  # scenes without objects are left out
            raise IasvitError(
                f"--calib-size is {n}, but the mini benchmark has {CALIBRATION_STRIDE // 2} calibration images a seed"
            )

    def calibration_files(self, n: int, seed: int) -> list[Path]:
        """See `CocoImages`; no two seeds share a scene."""
        from tasks.mini import detection

        self.check_calibration(n)
        name = f"calibration-{seed}-{n}"
        if not (self.root / name).is_dir():
            detection.write(self.root, name, "calibration", n, start=seed * detection.CALIBRATION_STRIDE)
        return sorted((self.root / name).iterdir())

    def calibration(self, config: DetectorConfig, n: int, seed: int) -> Tensor:
        """See `CocoImages`; of equal size, as one tensor n×3×H×W."""
        return torch.cat(list(super().calibration(config, n, seed)))


class CalibrationImages(Sequence[Tensor]):
    """Image files as a detector takes them, 1×3×H×W float32, normalised and padded; read at each access.

    A few hundred photographs at 800×1333 are gigabytes in float32, so none is kept.
    """

    def __init__(self, files: Sequence[Path], config: DetectorConfig) -> None:
        prepare()
        from mmdet.registry import MODELS
        from mmengine.dataset import Compose

        self.files = list(files)
        self._config = config
        self._pipeline = Compose(readable(config.pipeline))
        self._preprocessor = MODELS.build(config.model["data_preprocessor"])

    def check(self) -> None:
        """Raise IasvitError where a file cannot be read; in the middle of a method it would be too late."""
        from tasks.detection.runner import ReadableImage

        loader = ReadableImage()
        for file in self.files:
            loader.transform({"img_path": str(file)})

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> CalibrationImages: ...
    def __getitem__(self, index: int | slice) -> Tensor | CalibrationImages:
        if isinstance(index, slice):
            return CalibrationImages(self.files[index], self._config)
        packed = self._pipeline({"img_path": str(self.files[index]), "img_id": 0})
        batch = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
        return self._preprocessor(batch, training=False)["inputs"]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


# ---- annotation files ------------------------------------------------------------------------------------------------


def read_annotations(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The content of a COCO annotation file, checked as far as evaluation needs it.

    Raises:
        IasvitError: no such file, not COCO's JSON, no image, or an annotation of an unknown category or image.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise IasvitError(
            f"annotation file {path} cannot be read ({error.strerror or error}); COCO's instances_{VAL}.json is "
            f"expected there"
        ) from None
    except ValueError as error:
        raise IasvitError(f"annotation file {path} is not JSON ({error})") from None
    for part, keys in (
        ("images", ("id", "file_name", "width", "height")),
        ("categories", ("id", "name")),
        ("annotations", ("id", "image_id", "category_id", "bbox", "area", "segmentation")),
    ):
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise IasvitError(f"annotation file {path} is not COCO's: it has no list {part!r}")
        for entry in entries:
            if missing := [key for key in keys if key not in entry]:
                raise IasvitError(
                    f"annotation file {path}: an entry of {part!r} has no {missing[0]!r} (id {entry.get('id')})"
                )
    if not content["images"]:
        raise IasvitError(f"annotation file {path} lists no image")
    categories = {category["id"] for category in content["categories"]}
    images = {image["id"] for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["category_id"] not in categories:
            raise IasvitError(
                f"annotation file {path}: annotation {annotation['id']} is of the unknown category "
                f"{annotation['category_id']}; its categories are {_some(sorted(categories))}"
            )
        if annotation["image_id"] not in images:
            raise IasvitError(
                f"annotation file {path}: annotation {annotation['id']} is of image {annotation['image_id']}, which is "
                f"not among its images"
            )
    return content


def check_files(folder: Path, names: Sequence[str]) -> None:
    """Raise IasvitError unless the folder holds files of all these names."""
    try:
        found = set(os.listdir(folder))
    except OSError as error:
        raise IasvitError(
            f"image folder {folder} cannot be read ({error.strerror or error}); the annotated images are expected there"
        ) from None
    # A name may hold a folder, as in data sets merged from several.
    missing = [name for name in names if name not in found and not (folder / name).is_file()]
    if missing:
        raise IasvitError(
            f"image folder {folder} lacks {len(missing)} of the {len(names)} images that the annotations list, such as "
            f"{missing[0]}"
        )


def readable(pipeline: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pipeline with a loader that names an image it cannot read, and without annotations, which go with the metric.

    Raises:
        IasvitError: the pipeline does not start with LoadImageFromFile.
    """
    from tasks.detection.runner import ReadableImage

    steps = [dict(step) for step in pipeline if step["type"] != "LoadAnnotations"]
    loaders = [step for step in steps if step["type"] in ("LoadImageFromFile", ReadableImage)]
    if not loaders:
        raise IasvitError(f"a test pipeline has no LoadImageFromFile, but {_some(_types(steps))}")
    loaders[0]["type"] = ReadableImage
    return steps


def _types(steps: Sequence[dict[str, Any]]) -> list[str]:
    return [str(step["type"]) for step in steps]


def _some(values: Sequence[Any], count: int = 4) -> str:
    """The first few values, and how many more there are."""
    more = f" and {len(values) - count} more" if len(values) > count else ""
    return ", ".join(str(value) for value in values[:count]) + more


def _silent() -> contextlib.AbstractContextManager:
    """Swallows what pycocotools prints on standard output."""
    return contextlib.redirect_stdout(io.StringIO())
