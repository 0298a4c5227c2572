"""The data sets of the ImageNet task, and what a run on each of them consists of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch

from iasvit.benchmark.task import EMBEDDED, DataSet
from iasvit.errors import IasvitError
from tasks.classification.data import (
    MINI_BATCH,
    MINI_BATCH_GPU,
    FolderImages,
    ImagenetteImages,
    Images,
    MiniImages,
)
from tasks.classification.folders import AnyFolderImages, folder_dataset
from tasks.classification.models import MiniModels, Models, TimmModels
from tasks.command import Profile

DATA_ROOT = "IASVIT_IMAGENET"


class Data(str, Enum):
    """The data sets by the name that the command line gives them."""

    mini = "mini"
    mini_hard = "mini-hard"
    imagenette = "imagenette"
    imagenet = "imagenet"
    folder = "folder"

    @property
    def embedded(self) -> bool:
        """Whether it needs nothing but this repository."""
        return self in (Data.mini, Data.mini_hard)

    @property
    def profile(self) -> Profile:
        """What a run on it does unless told otherwise."""
        return MINI if self.embedded else PAPER


# A folder's name is its own, so that it is not among them.
DATA_SETS = {
    data.name: data
    for data in (
        DataSet("mini", EMBEDDED, "the embedded mini benchmark (drawn scenes, small models), not on real data"),
        DataSet(
            "mini-hard",
            EMBEDDED,
            "mini-hard, the embedded benchmark's stress variant (a real ViT's channel spread transplanted)",
        ),
        DataSet("imagenette"),
        DataSet("imagenet"),
    )
}
# Names that a folder cannot have: of the other data sets, and of the tables of published values.
RESERVED = (*DATA_SETS, "published")

PAPER = Profile(("deit_s",), calib_size=1024, batch_size=64, iterations=1000, iterations_6_bits=200, lr=4e-5)
MINI = Profile(("deit_t", "swin_t"), calib_size=256, batch_size=16, iterations=200, iterations_6_bits=200, lr=1e-3)


@dataclass(frozen=True)
class Setup:
    """What the task runs on.

    Attributes:
        data: the data set as tables name it.
        images: what is evaluated and calibrated on.
        models: where full-precision models come from.
        device: where they run.
    """

    data: DataSet
    images: Images
    models: Models
    device: torch.device


def make_setup(
    data: Data,
    data_root: Path | None = None,
    *,
    checkpoint: Path | None = None,
    pretrained: bool = True,
    device: torch.device | None = None,
    limit: int | None = None,
    data_name: str | None = None,
    labels: bool = True,
    img_size: int | None = None,
) -> Setup:
    """A run's images and models.

    Args:
        data: which.
        data_root: folder of imagenet (IASVIT_IMAGENET by default) or folder, or where imagenette lies or is downloaded
            to.
        checkpoint: weights from this file.
        pretrained: otherwise trained weights, or random ones.
        device: None for the CPU.
        limit: evaluate only so many images.
        data_name: the data set's name in rows, of a folder; None for the folder's own.
        labels: of a folder; without, only what needs none is measured.
        img_size: see `TimmModels`.

    Raises:
        IasvitError: data that is not there, or holds nothing that can be evaluated; an argument of other data.
    """
    device = device or torch.device("cpu")
    if data is not Data.folder and (data_name is not None or not labels):
        option = "--no-labels" if data_name is None else "--data-name"
        raise IasvitError(f"{option} does not go with --data {data.value}; --data folder takes it")
    if data.embedded:
        if data_root is not None:
            raise IasvitError(
                f"--data-root does not go with --data {data.value}; --data imagenet and --data folder read a folder"
            )
        if img_size is not None:
            raise IasvitError(f"--img-size does not go with --data {data.value}, whose images are of one size")
        scenes = MiniImages(limit, MINI_BATCH_GPU if device.type == "cuda" else MINI_BATCH)
        models = MiniModels(data is Data.mini_hard, pretrained, checkpoint)
        return Setup(DATA_SETS[data.value], scenes, models, device)
    pin_memory = device.type == "cuda"
    timm_models = TimmModels(pretrained, checkpoint, img_size)
    if data is Data.folder:
        if data_root is None:
            raise IasvitError("--data folder needs a folder of images: give --data-root FOLDER")
        name = folder_dataset(data_root, data_name, labels, RESERVED)
        images = AnyFolderImages(data_root, limit, pin_memory, labels=labels)
        return Setup(DataSet(name), images, timm_models, device)
    if data is Data.imagenette:
        root = data_root or Path(torch.hub.get_dir()) / "iasvit"
        return Setup(DATA_SETS[data.value], ImagenetteImages(root, limit, pin_memory), timm_models, device)
    root = data_root or (Path(os.environ[DATA_ROOT]) if os.environ.get(DATA_ROOT) else None)
    if root is None:
        raise IasvitError(
            f"--data imagenet needs a folder: give --data-root FOLDER or set {DATA_ROOT} to one that holds "
            f"train/ and val/"
        )
    return Setup(DATA_SETS[data.value], FolderImages(root, limit, pin_memory), timm_models, device)
