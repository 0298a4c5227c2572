"""Images of the COCO task: COCO 2017 in its usual folders, and the embedded mini COCO in the same form."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from iasvit.errors import IasvitError
from iasvit.scratch import Scratch
from tasks.classification.folders import spread
from tasks.classification.image_files import list_images
from tasks.detection.annotations import read_annotations, some
from tasks.detection.image_headers import check_files, read_as_stored
from tasks.detection.mmdet_setup import prepare
from tasks.fingerprint import file_sizes, fingerprint

if TYPE_CHECKING:
    from mmdet.evaluation import CocoMetric
    from mmengine.dataset import BaseDataset

logger = logging.getLogger(__name__)
VAL, TRAIN = "val2017", "train2017"
RULES = 2  # of how annotations and images are read; part of the fingerprint


@dataclass(frozen=True)
class DetectorConfig:
    """The parts of an mmdet configuration that the task needs.

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
        self._annotations = read_annotations(self.annotation_file)
        images = self._annotations.images
        self._images = [images[position] for position in spread(len(images), limit)]
        self.image_ids = [image["id"] for image in self._images]
        self._files = [image["file_name"] for image in self._images]
        check_files(root / VAL, self._files)
        self._as_stored = read_as_stored(root / VAL, self._images, self._annotations)

    def __len__(self) -> int:
        return len(self.image_ids)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digits of the annotations, of names and sizes of the images evaluated and calibrated on, and of RULES."""
        evaluated = file_sizes((self.root / VAL / name for name in self._files), self.root)
        calibrated = file_sizes(self._calibration_files, self.root)
        return fingerprint([RULES, self._annotations.digest, evaluated, calibrated])

    def prepare(self) -> None:
        """Do once what should not count as the first evaluation's time; nothing: images are read as needed."""

    def check_classes(self, classes: Sequence[str]) -> None:
        """Raise IasvitError unless the annotations' categories are a model's classes, by name; any order will do."""
        self._annotations.category_ids(classes)

    def dataset(self, config: DetectorConfig) -> BaseDataset:
        """The evaluation split as a data set of mmengine's, images transformed as the configuration says."""
        prepare()
        from tasks.detection.runner import EvaluatedImages

        images = [
            {
                "img_id": image["id"],
                "img_path": str(self.root / VAL / image["file_name"]),
                "width": image["width"],
                "height": image["height"],
                "as_stored": image["id"] in self._as_stored,
            }
            for image in self._images
        ]
        return EvaluatedImages(images, config.classes, readable(config.pipeline))

    def metric(self, classes: Sequence[str]) -> CocoMetric:
        """mmdet's COCO metric, box and mask AP, of the images evaluated and a model's classes in its order.

        Raises:
            IasvitError: the annotations' categories are not these classes.
        """
        prepare()
        from mmdet.datasets.api_wrappers import COCO
        from mmdet.evaluation import CocoMetric

        metric = CocoMetric(metric=["bbox", "segm"])
        # What mmdet would find by itself: categories in the order of the file, whatever the model's.
        metric.cat_ids = self._annotations.category_ids(classes)
        metric.img_ids = list(self.image_ids)  # else the objects of images left out would count as missed
        with _silent():
            metric._coco_api = COCO()
            metric._coco_api.dataset = {
                "images": self._annotations.images,
                "categories": self._annotations.categories,
                "annotations": [dict(entry) for entry in self._annotations.objects],  # evaluation writes into them
            }
            metric._coco_api.createIndex()
        return metric

    @cached_property
    def _calibration_files(self) -> list[Path]:
        folder = self.root / TRAIN
        if not folder.is_dir():
            logger.warning(
                "%s has no %s/: calibration images are drawn from %s/, the evaluation split", self.root, TRAIN, VAL
            )
            folder = self.root / VAL
        return sorted(Path(path) for path, _ in list_images(folder, {"": 0}))

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
        images = CalibrationImages(self.calibration_files(n, seed), config, as_stored=bool(self._as_stored))
        images.check()
        return images


class MiniCocoImages(CocoImages):
    """The embedded mini COCO, drawn into a temporary folder, which goes with this object.

    Args:
        limit: evaluate so many images, spread evenly over the split; None for all.
    """

    def __init__(self, limit: int | None = None) -> None:
        from tasks.mini import detection

        self._folder = Scratch("mini-coco-")
        root = self._folder.path
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

    Args:
        files: the images.
        config: how they are transformed.
        as_stored: whether an EXIF orientation is ignored.
    """

    def __init__(self, files: Sequence[Path], config: DetectorConfig, *, as_stored: bool = False) -> None:
        prepare()
        from mmdet.registry import MODELS
        from mmengine.dataset import Compose

        self.files = list(files)
        self._config = config
        self._as_stored = as_stored
        self._pipeline = Compose(readable(config.pipeline))
        self._preprocessor = MODELS.build(config.model["data_preprocessor"])

    def check(self) -> None:
        """Raise IasvitError if a file cannot be read, before a method starts."""
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
            return CalibrationImages(self.files[index], self._config, as_stored=self._as_stored)
        packed = self._pipeline({"img_path": str(self.files[index]), "img_id": 0, "as_stored": self._as_stored})
        batch = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
        return self._preprocessor(batch, training=False)["inputs"]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


# ---- pipelines -------------------------------------------------------------------------------------------------------


def readable(pipeline: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pipeline with a loader that names an image it cannot read, and without annotations, which go with the metric.

    Raises:
        IasvitError: the pipeline does not start with LoadImageFromFile.
    """
    from tasks.detection.runner import ReadableImage

    steps = [dict(step) for step in pipeline if step["type"] != "LoadAnnotations"]
    loaders = [step for step in steps if step["type"] in ("LoadImageFromFile", ReadableImage)]
    if not loaders:
        raise IasvitError(f"a test pipeline has no LoadImageFromFile, but {some(_types(steps))}")
    loaders[0]["type"] = ReadableImage
    return steps


def _types(steps: Sequence[dict[str, Any]]) -> list[str]:
    return [str(step["type"]) for step in steps]


def _silent() -> contextlib.AbstractContextManager:
    """Swallows what pycocotools prints on standard output."""
    return contextlib.redirect_stdout(io.StringIO())
