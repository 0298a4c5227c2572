"""Images of the ImageNet task: class folders on disk, Imagenette, and the embedded scenes."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from timm.data import ImageDataset, ImageNetInfo, create_dataset, create_loader
from torch import Tensor

from iasvit.errors import IasvitError
from iasvit.results import warn

DataConfig = dict[str, Any]  # what timm's resolve_data_config says of a model
Batch = tuple[Tensor, Tensor, Tensor]  # images B×3×H×W normalised, labels int64 B, positions in the split int64 B

EVALUATION_BATCH = 64
MINI_BATCH = 16  # a mini model's attention maps then stay near a processor's cache
MINI_BATCH_GPU = 250  # fewer launches
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation")
# What Pillow raises on a file that is no image, or a damaged one.
UNREADABLE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
UNREADABLE = -1  # label of an image that could not be read


class Images(Protocol):
    """A data set's evaluation split and its calibration images."""

    num_classes: dict[int, Tensor | None]  # classes that a model may have → label of each stored class (None: the same)

    def __len__(self) -> int:
        """Images in the evaluation split, unreadable ones included."""

    def prepare(self) -> None:
        """Do once what should not count as the first evaluation's time."""

    def batches(self, config: DataConfig) -> Iterator[Batch]:
        """The readable images of the evaluation split, in order."""

    def check_calibration(self, n: int) -> None:
        """Raise IasvitError where there are fewer than n calibration images."""

    def calibration(self, config: DataConfig, n: int, seed: int) -> Tensor:
        """n×3×H×W float32 images, drawn by the seed, from other images than `batches` where the data has others."""


def imagenet_classes() -> dict[str, int]:
    """WordNet id → class index, of ImageNet-1k's 1000 classes."""
    return {wnid: index for index, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def spread(total: int, limit: int | None) -> list[int]:
    """Positions of `limit` of `total` images, evenly spaced: folders are sorted by class, so the first are one class.

    Raises:
        IasvitError: limit is out of [1, total].
    """
    if limit is None:
        return list(range(total))
    if not 1 <= limit <= total:
        raise IasvitError(f"--limit is {limit}, but the evaluation split has {total} images; give 1 to {total}")
    return [i * total // limit for i in range(limit)]


# ---- folders ---------------------------------------------------------------------------------------------------------


def find_splits(root: Path) -> tuple[Path | None, Path]:
    """The train folder, if there is one, and the val folder of an ImageNet in the usual folders.

    Args:
        root: holds train/ and val/, or val/ alone, or class folders themselves (then it is the val folder).

    Raises:
        IasvitError: no such folder, an empty one, or neither val/ nor a class folder in it.
    """
    names = _folder_names(root)
    train = next((root / name for name in TRAIN_NAMES if name in names), None)
    val = next((root / name for name in VAL_NAMES if name in names), None)
    if val is None and not imagenet_classes().keys() & names:
        holds = ", ".join(sorted(names)[:3]) or "no folder"
        raise IasvitError(
            f"data folder {root} holds neither val/ nor class folders named by WordNet id, such as n01440764; "
            f"it holds {holds}"
        )
    return train, val or root


def _folder_names(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise IasvitError(
            f"data folder {folder} does not exist; --data-root names the folder that holds train/ and val/"
        )
    try:
        names = {entry.name for entry in os.scandir(folder) if entry.is_dir()}
        if not names and not any(os.scandir(folder)):
            raise IasvitError(f"data folder {folder} is empty; class folders named by WordNet id are expected in it")
    except OSError as error:
        raise IasvitError(f"data folder {folder} cannot be read: {error.strerror or error}") from None
    return names


def open_folder(folder: Path) -> ImageDataset:
    """The images in a folder's class folders, labelled by WordNet id; folders of other names are left out, and said so.

    Raises:
        IasvitError: an empty folder, no folder of a known class, or no image in those.
    """
    classes, names = imagenet_classes(), _folder_names(folder)
    if not classes.keys() & names:
        holds = f"it holds {', '.join(sorted(names)[:3])}" if names else "it holds no folder"
        raise IasvitError(
            f"data folder {folder} holds no class folder named by a WordNet id of ImageNet-1k, such as n01440764; "
            f"{holds}"
        )
    if unknown := sorted(names - classes.keys()):
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        warn(f"{folder}: left out folders that are no ImageNet-1k class: {', '.join(unknown[:3])}{more}")
    try:
        return create_dataset("", root=str(folder), search_split=False, class_map=classes)
    except RuntimeError:
        raise IasvitError(f"data folder {folder} has class folders, but no image in them") from None


class Selection(ImageDataset):
    """Some images of a folder, in the order given; one that cannot be read comes blank, with the label UNREADABLE.

    timm's own dataset puts the next image in its place, which would count that one twice.
    """

    def __init__(self, dataset: ImageDataset, positions: list[int]) -> None:
        super().__init__(root="", reader=dataset.reader)
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            file, label = self.reader[self.positions[index]]
            with file:
                image = Image.open(file).convert("RGB")
        except UNREADABLE_ERRORS:
            image, label = Image.new("RGB", (8, 8)), UNREADABLE
        return self.transform(image), label


class FolderImages:
    """Photographs in class folders, through timm's transforms and loaders.

    Args:
        root: see `find_splits`.
        limit: evaluate so many images, spread evenly over the split; None for all.
        pin_memory: where batches go to a GPU.
    """

    def __init__(self, root: Path, limit: int | None = None, pin_memory: bool = False) -> None:
        self.train, self.val = find_splits(root)
        self.num_classes: dict[int, Tensor | None] = {1000: None}
        self._dataset = open_folder(self.val)
        self._positions = spread(len(self._dataset), limit)
        self._pin_memory = pin_memory
        self._named: set[str] = set()

    def __len__(self) -> int:
        return len(self._positions)

    def prepare(self) -> None:
        """See `Images`; nothing: photographs are read as they are evaluated."""

    def batches(self, config: DataConfig) -> Iterator[Batch]:
        """See `Images`."""
        return self._read(self._dataset, self._positions, config)

    @cached_property
    def _calibration_dataset(self) -> ImageDataset:
        if self.train is not None:
            return open_folder(self.train)
        warn(f"{self.val} has no train folder beside it: calibration images are drawn from it, the evaluation split")
        return self._dataset

    def check_calibration(self, n: int) -> None:
        """See `Images`."""
        there = len(self._calibration_dataset)
        if n > there:
            raise IasvitError(f"--calib-size is {n}, but {self.train or self.val} has {there} images to calibrate on")

    def calibration(self, config: DataConfig, n: int, seed: int) -> Tensor:
        """See `Images`; the eval transform, and in place of an unreadable image the next one drawn."""
        self.check_calibration(n)
        dataset = self._calibration_dataset
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        images: list[Tensor] = []
        found = start = 0
        while found < n and start < len(order):
            stop = start + n - found
            for batch, _, _ in self._read(dataset, order[start:stop], config):
                images.append(batch)
                found += len(batch)
            start = stop
        if found < n:
            raise IasvitError(
                f"--calib-size is {n}, but of the {len(order)} images in {self.train or self.val} only {found} can be "
                f"read"
            )
        return torch.cat(images)

    def _read(self, dataset: ImageDataset, positions: list[int], config: DataConfig) -> Iterator[Batch]:
        """The readable ones of the images at these positions, in order; a warning names each other one once."""
        loader = create_loader(
            Selection(dataset, positions),
            input_size=config["input_size"],
            batch_size=EVALUATION_BATCH,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
            # Few images are read before worker processes have started.
            num_workers=min(16, os.cpu_count() or 1) if len(positions) > 2 * EVALUATION_BATCH else 0,
            pin_memory=self._pin_memory,
            persistent_workers=False,
            use_prefetcher=False,
        )
        order = torch.tensor(positions)
        for (images, labels), at in zip(loader, order.split(EVALUATION_BATCH), strict=True):
            readable = labels != UNREADABLE
            for position in at[~readable].tolist():
                name = dataset.filename(position, absolute=True)
                if name not in self._named:
                    self._named.add(name)
                    warn(f"{name} cannot be read as an image; left out")
            if bool(readable.any()):
                yield images[readable], labels[readable], at[readable]


# ---- Imagenette ------------------------------------------------------------------------------------------------------


class ImagenetteImages(FolderImages):
    """Imagenette: ten ImageNet classes, 3925 images to evaluate, 160 pixels on the short side, fetched when not there.

    A 1000-class model is evaluated 1000-way, all classes allowed, as others report it; a model with ten classes is
    taken to have been trained on Imagenette, its classes in the order of their WordNet ids.
    """

    FOLDER = "imagenette2-160"

    def __init__(self, root: Path, limit: int | None = None, pin_memory: bool = False) -> None:
        super().__init__(fetch_imagenette(root), limit, pin_memory)
        ten = sorted({label for _, label in self._dataset.reader.samples})
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
    beside = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".imagenette-", dir=root))
        Imagenette(beside, split="val", size="160px", download=True)
        os.replace(beside / ImagenetteImages.FOLDER, folder)  # only a whole one gets the name
    except (OSError, RuntimeError) as error:
        raise IasvitError(
            f"Imagenette is not in {root} and could not be downloaded there ({error}); with no network, put its folder "
            f"{ImagenetteImages.FOLDER} there, or use --data mini"
        ) from None
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
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

    def batches(self, config: DataConfig) -> Iterator[Batch]:
        """See `Images`."""
        images, labels = self._val
        for at in torch.arange(self._size).split(self._batch_size):
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
