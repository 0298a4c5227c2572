"""Images of the ImageNet task: class folders on disk, Imagenette, and the embedded scenes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from iasvit import distributed
from iasvit.errors import IasvitError
from iasvit.scratch import scratch
from tasks.classification.folders import (
    ALL,
    TRAIN_NAMES,
    UNREADABLE,
    VAL_NAMES,
    Batch,
    DataConfig,
    Photographs,
    spread,
)
from tasks.classification.image_files import Samples, entries, examples, list_images
from tasks.fingerprint import fingerprint

logger = logging.getLogger(__name__)

MINI_BATCH = 16  # a mini model's attention maps then stay near a processor's cache
MINI_BATCH_GPU = 250  # fewer launches


class Images(Protocol):
    """A data set's evaluation split and its calibration images."""

    # Classes that a model may have → label of each stored class (None: the same). None: images without labels.
    num_classes: dict[int, Tensor | None] | None

    @property
    def fingerprint(self) -> str:
        """Hex digits that change when the evaluation split or the images to draw calibration images from do."""

    def __len__(self) -> int:
        """Images in the evaluation split, unreadable ones included."""

    def prepare(self) -> None:
        """Do once what should not count as the first evaluation's time."""

    def batches(self, config: DataConfig, which: slice = ALL) -> Iterator[Batch]:
        """The readable images of the evaluation split, in order; `which` selects among its batches."""

    def check_calibration(self, n: int) -> None:
        """Raise IasvitError where there are fewer than n calibration images."""

    def calibration(self, config: DataConfig, n: int, seed: int) -> Tensor:
        """n×3×H×W float32 images, drawn by the seed, from images that are not in `batches` if the data has such."""


def imagenet_classes() -> dict[str, int]:
    """WordNet id → class index, of ImageNet-1k's 1000 classes."""
    return {wnid: index for index, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}


# ---- folders ---------------------------------------------------------------------------------------------------------


def find_splits(root: Path) -> tuple[Path | None, Path]:
    """The train folder, if there is one, and the val folder of an ImageNet in the usual folders.

    Args:
        root: holds train/ and val/, or val/ alone, or class folders themselves (then it is the val folder).

    Raises:
        IasvitError: no such folder, an empty one, or neither val/ nor a class folder in it.
    """
    names, _ = entries(root)
    train = next((root / name for name in TRAIN_NAMES if name in names), None)
    val = next((root / name for name in VAL_NAMES if name in names), None)
    if val is None and not imagenet_classes().keys() & names:
        holds = examples(names) or "no folder"
        raise IasvitError(
            f"data folder {root} holds neither val/ nor class folders named by WordNet id, such as n01440764; "
            f"it holds {holds}"
        )
    return train, val or root


def open_folder(folder: Path) -> Samples:
    """The images in a folder's class folders, labelled by WordNet id; folders of other names are left out, and said so.

    Raises:
        IasvitError: an empty folder, no folder of a known class, or no image in those.
    """
    classes, (names, _) = imagenet_classes(), entries(folder)
    if not classes.keys() & names:
        raise IasvitError(
            f"data folder {folder} holds no class folder named by a WordNet id of ImageNet-1k, such as n01440764; "
            f"it holds {examples(names) or 'no folder'}"
        )
    if unknown := sorted(names - classes.keys()):
        logger.warning("%s: left out folders that are not ImageNet-1k classes: %s", folder, examples(unknown))
    samples = list_images(folder, {name: classes[name] for name in names & classes.keys()})
    if not samples:
        raise IasvitError(f"data folder {folder} has class folders, but no image in them")
    return samples


class FolderImages(Photographs):
    """ImageNet's photographs in folders named by WordNet id.

    Args:
        root: see `find_splits`.
        limit: evaluate so many images, spread evenly over the split; None for all.
        pin_memory: where batches go to a GPU.
    """

    def __init__(self, root: Path, limit: int | None = None, pin_memory: bool = False) -> None:
        self.train, self.val = find_splits(root)
        self.num_classes: dict[int, Tensor | None] = {1000: None}
        self.calibration_source = str(self.train or self.val)
        super().__init__(root, open_folder(self.val), limit, pin_memory)

    @cached_property
    def calibration_samples(self) -> Samples:
        """See `Photographs`."""
        if self.train is not None:
            return open_folder(self.train)
        logger.warning(
            "%s has no train folder beside it: calibration images are drawn from it, the evaluation split", self.val
        )
        return self.evaluated


# ---- Imagenette ------------------------------------------------------------------------------------------------------


class ImagenetteImages(FolderImages):
    """Imagenette: ten ImageNet classes, 3925 images to evaluate, 160 pixels on the short side, fetched when not there.

    A 1000-class model is evaluated 1000-way, all classes allowed, as others report it; a model with ten classes is
    taken to have been trained on Imagenette, its classes in the order of their WordNet ids.
    """

    FOLDER = "imagenette2-160"

    def __init__(self, root: Path, limit: int | None = None, pin_memory: bool = False) -> None:
        distributed.first(lambda: fetch_imagenette(root))
        super().__init__(fetch_imagenette(root), limit, pin_memory)
        ten = sorted({label for _, label in self.evaluated})
        if len(ten) == 10:
            labels = torch.full((1000,), UNREADABLE)
            labels[torch.tensor(ten)] = torch.arange(10)
            self.num_classes[10] = labels


def fetch_imagenette(root: Path) -> Path:
    """The folder of Imagenette's 160-pixel version in `root`, downloaded (99 MB) by torchvision unless it is there.

    Raises:
        IasvitError: it cannot be fetched.
    """
    from torchvision.datasets import Imagenette

    folder = root / ImagenetteImages.FOLDER
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with scratch("imagenette-", root) as partial:
            Imagenette(partial, split="val", size="160px", download=True)
            os.replace(partial / ImagenetteImages.FOLDER, folder)  # only a whole one gets the name
    except (OSError, RuntimeError) as error:
        raise IasvitError(
            f"Imagenette is not in {root} and could not be downloaded there ({error}); with no network, put its folder "
            f"{ImagenetteImages.FOLDER} there, or use --data mini"
        ) from None
    return folder


# ---- the embedded benchmark ------------------------------------------------------------------------------------------


class MiniImages:
    """The embedded benchmark's scenes, drawn when first needed.

    Args:
        limit: evaluate the first so many; None for all 5000.
        batch_size: images a batch.
    """

    VAL_SIZE = 5000
    STRIDE = 100_000  # calibration scenes between one seed's and the next's

    def __init__(self, limit: int | None = None, batch_size: int = MINI_BATCH) -> None:
        from tasks.mini import scenes

        self.num_classes: dict[int, Tensor | None] = {len(scenes.CLASSES): None}
        self._size = len(spread(self.VAL_SIZE, limit))
        self._batch_size = batch_size

    def __len__(self) -> int:
        return self._size

    @property
    def fingerprint(self) -> str:
        """See `Images`; of the scenes' version: they are drawn, the same everywhere."""
        from tasks.mini import scenes

        return fingerprint({"scenes": scenes.VERSION, "val": self._size, "stride": self.STRIDE})

    def prepare(self) -> None:
        """See `Images`; draws the scenes."""
        _ = self._val

    @cached_property
    def _val(self) -> tuple[Tensor, Tensor]:
        return self._draw("val", 0, self._size)

    @staticmethod
    def _draw(split: str, start: int, count: int) -> tuple[Tensor, Tensor]:
        from tasks.mini import scenes

        images, labels = scenes.render_images(split, start, count)
        return torch.from_numpy(images), torch.from_numpy(labels)

    def batches(self, config: DataConfig, which: slice = ALL) -> Iterator[Batch]:
        """See `Images`."""
        images, labels = self._val
        for at in torch.arange(self._size).split(self._batch_size)[which]:
            yield normalise(images[at], config), labels[at], at

    def check_calibration(self, n: int) -> None:
        """See `Images`."""
        if n > self.STRIDE:
            raise IasvitError(
                f"--calib-size is {n}, but the mini benchmark has {self.STRIDE} calibration images a seed"
            )

    def calibration(self, config: DataConfig, n: int, seed: int) -> Tensor:
        """See `Images`; no two seeds share a scene."""
        self.check_calibration(n)
        return normalise(self._draw("calibration", seed * self.STRIDE, n)[0], config)


def normalise(images: Tensor, config: DataConfig) -> Tensor:
    """uint8 B×H×W×3 → float32 B×3×H×W as the model wants it: in [0, 1], minus its mean, over its standard deviation."""
    scaled = images.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return ((scaled - mean) / std).contiguous()
