"""The data sets of the COCO task, the parts of a run on each, and which detectors and layers are quantized."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch

from iasvit.benchmark.task import EMBEDDED, DataSet
from iasvit.errors import IasvitError
from iasvit.spec import QuantSpec
from tasks.command import Profile, unique
from tasks.detection.checkpoints import PUBLISHED
from tasks.detection.data import CocoImages, MiniCocoImages
from tasks.detection.mmdet_setup import prepare
from tasks.detection.models import (
    DETECTORS,
    ConfigDetector,
    Detectors,
    MiniDetectors,
    PublishedDetectors,
    coco_classes,
)
from tasks.mini.scenes import CLASSES

DATA_ROOT = "IASVIT_COCO"
HEADS = ("neck", "rpn_head", "roi_head")

# Activations of one photograph at 800×1333 are hundreds of megabytes a layer: quantizers start from few of them.
PAPER = Profile(
    calib_size=256,
    init_size=4,
    batch_size=1,
    iterations=1000,
    iterations_6_bits=200,
    lr=4e-5,
)
MINI = Profile(
    calib_size=64,
    init_size=8,
    batch_size=4,
    iterations=100,
    iterations_6_bits=100,
    lr=1e-3,
    recipe="mini",
    fast={"iterations": 20, "iterations_6_bits": 20},
)

DATA_SETS = {
    data.name: data
    for data in (
        DataSet("mini", EMBEDDED, "the embedded mini benchmark (drawn scenes, small models), not on real data"),
        DataSet("coco"),
    )
}


class Data(str, Enum):
    """The data sets by the name that the command line gives them."""

    mini = "mini"
    coco = "coco"

    @property
    def profile(self) -> Profile:
        """The defaults of a run on it."""
        return MINI if self is Data.mini else PAPER


class Backbone(str, Enum):
    """The backbones."""

    swin_t = "swin_t"
    swin_s = "swin_s"
    swin_b = "swin_b"


class Scope(str, Enum):
    """Which part of a detector is quantized."""

    detector = "detector"
    backbone = "backbone"


@dataclass(frozen=True)
class Setup:
    """What the task runs on.

    Attributes:
        data: the data set as tables name it.
        images: what is evaluated and calibrated on.
        models: where full-precision detectors come from.
        device: where they run.
    """

    data: DataSet
    images: CocoImages
    models: Detectors
    device: torch.device


def make_setup(
    data: Data,
    data_root: Path | None = None,
    *,
    config: Path | None = None,
    checkpoint: Path | None = None,
    pretrained: bool = True,
    device: torch.device | None = None,
    limit: int | None = None,
) -> Setup:
    """A run's images and detectors.

    Args:
        data: which.
        data_root: folder of coco; IASVIT_COCO by default.
        config: the detector of this mmdet configuration, instead of the known ones.
        checkpoint: weights from this file.
        pretrained: otherwise trained weights, or random ones.
        device: None for the CPU.
        limit: evaluate only so many images.

    Raises:
        IasvitError: the coco extra is not installed; data that is not there or is no COCO; a configuration that cannot
            be used.
    """
    prepare()
    if data is Data.mini:
        if data_root is not None:
            raise IasvitError("--data-root does not go with --data mini; --data coco reads a folder")
        images: CocoImages = MiniCocoImages(limit)
    else:
        root = data_root or (Path(os.environ[DATA_ROOT]) if os.environ.get(DATA_ROOT) else None)
        if root is None:
            raise IasvitError(
                f"--data coco needs a folder: give --data-root FOLDER or set {DATA_ROOT} to one that holds "
                f"annotations/ and val2017/"
            )
        images = CocoImages(root, limit)
    models: Detectors
    if config is not None:
        classes = CLASSES if data is Data.mini else coco_classes()
        models = ConfigDetector(config, classes, pretrained, checkpoint)
    else:
        models = (MiniDetectors if data is Data.mini else PublishedDetectors)(pretrained, checkpoint)
    return Setup(DATA_SETS[data.value], images, models, device or torch.device("cpu"))


def model_names(detectors: Sequence[str] | None, backbones: Sequence[Backbone] | None, data: Data) -> list[str]:
    """Detectors on backbones, as "mask_rcnn_swin_t"; a published detector's full name stands for itself.

    Raises:
        IasvitError: an unknown detector, or backbones for detectors that have theirs.
    """
    published = [] if data is Data.mini else [name for name in PUBLISHED if "-" in name]
    names = []
    for kind in unique(detectors or DETECTORS):
        if kind in published:
            names.append(kind)
        elif kind in DETECTORS:
            names += [f"{kind}_{backbone.value}" for backbone in unique(backbones or [Backbone.swin_t])]
        else:
            raise IasvitError(f"detector {kind!r} does not exist; there are {', '.join([*DETECTORS, *published])}")
    if backbones and all(name in published for name in names):
        raise IasvitError(f"--backbone does not go with --detector {names[0]}, which has its own")
    return names


def scoped(bits: str, scope: Scope) -> QuantSpec:
    """The bits as a spec that says what of the detector is quantized; the bits' own overrides come last, and win."""
    first, *overrides = bits.split(",")
    left = [f"{head}.*=W32A32" for head in HEADS] if scope is Scope.backbone else []
    return QuantSpec.parse(",".join([first, *left, *overrides]))
