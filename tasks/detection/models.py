"""Detectors of the COCO task by name: the mini ones, the published ones, and those of a configuration file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from iasvit.errors import IasvitError
from tasks.checkpoints import describe_file, describe_weights
from tasks.detection.checkpoints import PUBLISHED, download, load_checkpoint, model_config
from tasks.detection.data import DetectorConfig, readable, test_pipeline
from tasks.detection.mmdet_setup import build_detector, prepare

DETECTORS = ("mask_rcnn", "cascade_mask_rcnn")
RANDOM_SEED = 0  # of --no-pretrained's weights


class Detectors(Protocol):
    """Full-precision detectors by name."""

    def check(self, name: str) -> None:
        """Raise IasvitError where there is no detector of that name, or no weights file (the message says why)."""

    def architecture(self, name: str) -> nn.Module:
        """The detector with arbitrary weights, on the CPU."""

    def load(self, name: str) -> nn.Module:
        """The detector, eval(), on the CPU."""

    def config(self, name: str) -> DetectorConfig:
        """Its configuration."""

    def weights(self, name: str) -> str:
        """Which weights `load` gives it, in words that change when they do."""


class _Configured:
    """What detectors have in common, given `config` and `_published`.

    Args:
        pretrained: trained weights; else random ones of RANDOM_SEED.
        checkpoint: weights from this file instead.
    """

    def __init__(self, pretrained: bool = True, checkpoint: Path | None = None) -> None:
        self._pretrained = pretrained
        self._checkpoint = checkpoint
        self._fitting: set[str] = set()  # detectors that the checkpoint is known to fit

    def config(self, name: str) -> DetectorConfig:
        """See `Detectors`."""
        raise NotImplementedError

    def _trained(self, name: str) -> Path:
        """The file of the trained weights."""
        raise NotImplementedError

    def _trained_weights(self, name: str) -> str:
        """See `Detectors.weights`."""
        raise NotImplementedError

    def check(self, name: str) -> None:
        """See `Detectors`."""
        self.config(name)
        if self._checkpoint is not None and name not in self._fitting:
            try:
                load_checkpoint(self.architecture(name), self._checkpoint)
            except IasvitError as error:
                raise IasvitError(f"{error}; weights of {name} are expected") from None
            self._fitting.add(name)

    def architecture(self, name: str) -> nn.Module:
        """See `Detectors`."""
        return build_detector(self.config(name).model, initialise=False)

    def load(self, name: str) -> nn.Module:
        """See `Detectors`.

        Raises:
            IasvitError: no such detector, weights that cannot be had, or weights of another detector.
        """
        from mmengine.config import Config

        self.check(name)
        config = self.config(name)
        if self._checkpoint is None and not self._pretrained:
            model = build_detector(config.model, RANDOM_SEED)
        else:
            model = build_detector(config.model, initialise=False)
            load_checkpoint(model, self._checkpoint or self._trained(name))
        model.cfg = Config({"model": config.model})  # what mmdet's own init_detector leaves there
        return model.eval()

    def weights(self, name: str) -> str:
        """See `Detectors`."""
        if self._checkpoint is not None:
            return describe_weights(self._checkpoint)
        return self._trained_weights(name) if self._pretrained else f"random, seed {RANDOM_SEED}"


class MiniDetectors(_Configured):
    """The mini detectors."""

    def config(self, name: str) -> DetectorConfig:
        """See `Detectors`."""
        from tasks.mini import detectors

        if name not in detectors.names():
            raise IasvitError(
                f"detector {name!r} does not exist in the mini benchmark; there are {', '.join(detectors.names())}; "
                f"others go with --data coco"
            )
        return detectors.detector_config(name)

    def check(self, name: str) -> None:
        """See `Detectors`."""
        super().check(name)
        if self._checkpoint is None and self._pretrained:
            self._trained(name)

    def _trained(self, name: str) -> Path:
        from tasks.mini import detectors

        return detectors.trained_path(name)

    def _trained_weights(self, name: str) -> str:
        return describe_file(self._trained(name))


class PublishedDetectors(_Configured):
    """mmdet's and the Swin authors' detectors for COCO, at full size."""

    def config(self, name: str) -> DetectorConfig:
        """See `Detectors`."""
        prepare()
        return DetectorConfig(model_config(name), test_pipeline(1333, 800), coco_classes())

    def check(self, name: str) -> None:
        """See `Detectors`."""
        super().check(name)
        if self._checkpoint is None and self._pretrained and name not in PUBLISHED:
            raise IasvitError(
                f"no weights are published for {name}; there are of {', '.join(PUBLISHED)}; give others as "
                f"--checkpoint FILE, or take random ones with --no-pretrained"
            )

    def _trained(self, name: str) -> Path:
        return download(name)

    def _trained_weights(self, name: str) -> str:
        return PUBLISHED[name].url.rpartition("/")[2]


class ConfigDetector(_Configured):
    """The detector of an mmdet configuration file, under the file's name without its ending.

    Args:
        path: the file.
        classes: the data's, for a configuration that names none.
        pretrained: see `_Configured`; there are no trained weights but the checkpoint's.
        checkpoint: see `_Configured`.

    Raises:
        IasvitError: the file cannot be read, has no Swin backbone, or classes of another number than its heads.
    """

    def __init__(
        self, path: Path, classes: tuple[str, ...], pretrained: bool = True, checkpoint: Path | None = None
    ) -> None:
        super().__init__(pretrained, checkpoint)
        self.name = path.stem
        self._path = path
        self._config = read_config(path, classes)

    def config(self, name: str) -> DetectorConfig:
        """See `Detectors`."""
        if name != self.name:
            raise IasvitError(f"detector {name!r} is not the one of --config {self._path}, which is {self.name!r}")
        return self._config

    def architecture(self, name: str) -> nn.Module:
        """See `Detectors`.

        Raises:
            IasvitError: mmdet builds no detector from the configuration.
        """
        try:
            return super().architecture(name)
        except Exception as error:  # whatever the constructors named there raise
            raise IasvitError(f"configuration {self._path} builds no detector: {_reason(error)}") from None

    def check(self, name: str) -> None:
        """See `Detectors`."""
        super().check(name)
        if self._checkpoint is None and self._pretrained:
            raise IasvitError(
                f"--config {self._path} needs weights: give --checkpoint FILE, or take random ones with --no-pretrained"
            )


def predict_images(network: nn.Module, images: Tensor) -> Any:
    """Boxes, labels, scores and masks of a detector for normalised images (B, 3, H, W), as mmdet's data samples."""
    from mmdet.structures import DetDataSample

    shape = tuple(images.shape[-2:])
    meta = {"img_shape": shape, "ori_shape": shape, "batch_input_shape": shape, "scale_factor": (1.0, 1.0)}
    return network(images, [DetDataSample(metainfo=meta) for _ in images], mode="predict")


@cache
def coco_classes() -> tuple[str, ...]:
    """Names of COCO's 80 classes, in mmdet's order."""
    prepare()
    from mmdet.datasets import CocoDataset

    return tuple(CocoDataset.METAINFO["classes"])


def read_config(path: Path, classes: tuple[str, ...]) -> DetectorConfig:
    """An mmdet configuration file as the task needs it; see `ConfigDetector`.

    Raises:
        IasvitError: see `ConfigDetector`.
    """
    prepare()
    from mmengine.config import Config
    from mmengine.dataset import Compose

    if not path.is_file():
        raise IasvitError(f"configuration {path} does not exist; --config names an mmdet configuration file")
    try:
        config = Config.fromfile(str(path))
    except Exception as error:  # the file is Python: it may raise anything
        raise IasvitError(f"configuration {path} cannot be read: {_reason(error)}") from None
    model = config.get("model")
    if not isinstance(model, dict):
        raise IasvitError(f"configuration {path} has no model")
    backbone = (model.get("backbone") or {}).get("type")
    if str(backbone).rpartition(".")[2] != "SwinTransformer":
        raise IasvitError(
            f"configuration {path} has the backbone {backbone}, but a Swin backbone is expected: mmdet's "
            f"SwinTransformer"
        )
    dataset: dict[str, Any] = (config.get("test_dataloader") or {}).get("dataset") or {}
    named = (dataset.get("metainfo") or config.get("metainfo") or {}).get("classes")
    classes = tuple(named) if named else classes
    head = (model.get("roi_head") or {}).get("bbox_head") or {}
    head = head[0] if isinstance(head, (list, tuple)) and head else head
    count = head.get("num_classes") if isinstance(head, dict) else None
    if count is not None and count != len(classes):
        raise IasvitError(
            f"configuration {path} has heads for {count} classes, but {len(classes)} classes are named; its metainfo "
            f"or the data set's names must fit"
        )
    if "data_preprocessor" not in model:
        raise IasvitError(f"configuration {path}: its model has no data_preprocessor, which says how images are scaled")
    pipeline = [dict(step) for step in dataset.get("pipeline") or test_pipeline(1333, 800)]
    try:
        Compose(readable(pipeline))
    except Exception as error:  # whatever the transforms named there raise
        raise IasvitError(f"configuration {path} has a test pipeline that cannot be used: {_reason(error)}") from None
    resolved = DetectorConfig(model.to_dict(), pipeline, classes)
    try:
        _ = resolved.fingerprint
    except TypeError as error:
        raise IasvitError(
            f"configuration {path} has a value that cannot identify a result: {error}; numbers, texts, lists, "
            f"dictionaries, classes and functions can"
        ) from None
    return resolved


def _reason(error: Exception) -> str:
    """The first sentence of an error's message, in one line."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    return text.splitlines()[0].partition(". ")[0] if text else type(error).__name__
