"""The data sets of the ImageNet task, and the parts of a run on each of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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

PAPER = Profile(
    ("deit_s",),
    calib_size=1024,
    batch_size=64,
    iterations=1000,
    iterations_6_bits=200,
    lr=4e-5,
)
MINI = Profile(
    ("deit_t", "swin_t"),
    calib_size=256,
    batch_size=16,
    iterations=200,
    iterations_6_bits=200,
    lr=1e-3,
    recipe="mini",
    fast={"iterations": 52, "iterations_6_bits": 52, "stage1_share": 0.25, "batch_size": 8},
)


@dataclass(frozen=True)
class Source:
    """A data set that `--data` names.

    Attributes:
        data: how tables name it; of the embedded kind, it takes neither --data-root nor --img-size.
        images: makes them, of --data-root, --limit, the device, and whether labels are read.
        models: makes them, of --pretrained and --checkpoint, and on real data of --img-size.
        profile: what a run does unless told otherwise.
        own_name: whether every folder is a data set of its own name, with labels or without.
    """

    data: DataSet
    images: Callable[[Path | None, int | None, torch.device, bool], Images]
    models: Callable[..., Models] = TimmModels
    profile: Profile = PAPER
    own_name: bool = False


def _mini(root: Path | None, limit: int | None, device: torch.device, labels: bool) -> Images:
    return MiniImages(limit, MINI_BATCH_GPU if device.type == "cuda" else MINI_BATCH)


def _imagenette(root: Path | None, limit: int | None, device: torch.device, labels: bool) -> Images:
    return ImagenetteImages(root or Path(torch.hub.get_dir()) / "iasvit", limit, device.type == "cuda")


def _imagenet(root: Path | None, limit: int | None, device: torch.device, labels: bool) -> Images:
    root = root or (Path(os.environ[DATA_ROOT]) if os.environ.get(DATA_ROOT) else None)
    if root is None:
        raise IasvitError(
            f"--data imagenet needs a folder: give --data-root FOLDER or set {DATA_ROOT} to one that holds "
            f"train/ and val/"
        )
    return FolderImages(root, limit, device.type == "cuda")


def _folder(root: Path | None, limit: int | None, device: torch.device, labels: bool) -> Images:
    return AnyFolderImages(root, limit, device.type == "cuda", labels=labels)


_MINI = "the embedded mini benchmark (drawn scenes, small models), not on real data"
_HARD = "mini-hard, the embedded benchmark's stress variant (a real ViT's channel spread transplanted)"
SOURCES = {
    source.data.name: source
    for source in (
        Source(DataSet("mini", EMBEDDED, _MINI), _mini, MiniModels, MINI),
        Source(DataSet("mini-hard", EMBEDDED, _HARD), _mini, partial(MiniModels, hard=True), MINI),
        Source(DataSet("imagenette"), _imagenette),
        Source(DataSet("imagenet"), _imagenet),
        Source(DataSet("folder"), _folder, own_name=True),
    )
}


def find_source(name: str) -> Source:
    """The source that `--data` names.

    Raises:
        IasvitError: there is none of that name.
    """
    if name not in SOURCES:
        raise IasvitError(f"--data {name} is not known; there are {', '.join(SOURCES)}")
    return SOURCES[name]


def known_data_sets() -> dict[str, DataSet]:
    """The data sets that are known by name: all but folders."""
    return {name: source.data for name, source in SOURCES.items() if not source.own_name}


def reserved_names() -> tuple[str, ...]:
    """Names that a folder cannot have: of the other data sets, and of the tables of published values."""
    return (*known_data_sets(), "published")


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
    data: str,
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
        data: a name of SOURCES.
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
    source, device = find_source(data), device or torch.device("cpu")
    if not source.own_name and (data_name is not None or not labels):
        option = "--no-labels" if data_name is None else "--data-name"
        raise IasvitError(f"{option} does not go with --data {data}; --data folder takes it")
    options: dict[str, int | None] = {"img_size": img_size}
    if source.data.kind == EMBEDDED:
        if data_root is not None:
            raise IasvitError(
                f"--data-root does not go with --data {data}; --data imagenet and --data folder read a folder"
            )
        if img_size is not None:
            raise IasvitError(f"--img-size does not go with --data {data}, whose images are of one size")
        options = {}
    described = source.data
    if source.own_name:
        if data_root is None:
            raise IasvitError(f"--data {data} needs a folder of images: give --data-root FOLDER")
        described = DataSet(folder_dataset(data_root, data_name, labels, reserved_names()))
    images = source.images(data_root, limit, device, labels)
    return Setup(described, images, source.models(pretrained, checkpoint, **options), device)
