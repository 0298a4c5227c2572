"""Photographs in folders: read through timm's transforms and loaders, from class folders or trees of any names."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_loader
from torch import Tensor
from torch.utils.data import Dataset

from iasvit import distributed
from iasvit.errors import IasvitError
from iasvit.leaderboard.markdown import slug
from tasks.classification.image_files import (
    EXTENSIONS,
    UNREADABLE_ERRORS,
    Samples,
    entries,
    examples,
    list_images,
    read_rgb,
)
from tasks.fingerprint import file_sizes, fingerprint

logger = logging.getLogger(__name__)

DataConfig = dict[str, Any]  # what timm's resolve_data_config says of a model
Batch = tuple[Tensor, Tensor, Tensor]  # images B×3×H×W normalised, labels int64 B, positions in the split int64 B

EVALUATION_BATCH = 64
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation")
ALL = slice(None)  # batches
UNREADABLE = -1  # label of an image that could not be read
CALIBRATION_SHARE = 5  # of so many images of a class one is for calibration, where there is no folder for that
UNLABELLED = "-unlabelled"  # ends the name of a data set that is evaluated without labels
SPLIT_SEED = 0  # of that draw, whatever the cell's seed: all cells are evaluated on the same images


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


class Selection(Dataset):
    """Some images, in the given order. An image that cannot be read comes blank, with the label UNREADABLE.

    timm's own dataset puts the next image in its place, which would count that one twice.
    """

    transform: Callable[[Image.Image], Tensor]  # timm's loader sets it

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        try:
            image = read_rgb(path)
        except UNREADABLE_ERRORS:
            image, label = Image.new("RGB", (8, 8)), UNREADABLE
        return self.transform(image), label


class Photographs:
    """Images from files (see `tasks.classification.data.Images`); a subclass says which files.

    Args:
        root: the folder that holds all files.
        evaluated: the evaluation split.
        limit: evaluate so many of it, spread evenly; None for all.
        pin_memory: where batches go to a GPU.
    """

    num_classes: dict[int, Tensor | None] | None
    calibration_source: str  # where `calibration_samples` come from, for messages

    def __init__(self, root: Path, evaluated: Samples, limit: int | None, pin_memory: bool) -> None:
        self.root = root
        self.evaluated = evaluated
        self._positions = spread(len(evaluated), limit)
        self._pin_memory = pin_memory
        self._named: set[str] = set()

    @property
    def calibration_samples(self) -> Samples:
        """What calibration images are drawn from; their labels are not used."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._positions)

    def prepare(self) -> None:
        """See `Images`; nothing: photographs are read as they are evaluated."""

    @cached_property
    def fingerprint(self) -> str:
        """See `Images`; of paths, sizes and labels of the images evaluated and of those to calibrate on."""
        evaluated = [self.evaluated[position] for position in self._positions]
        return fingerprint([self._described(evaluated), self._described(self.calibration_samples)])

    def _described(self, samples: Samples) -> list[tuple[str, int, int]]:
        """(path relative to the root, bytes, label) of each image."""
        sizes = file_sizes((path for path, _ in samples), self.root)
        return [(path, size, label) for (path, size), (_, label) in zip(sizes, samples, strict=True)]

    def batches(self, config: DataConfig, which: slice = ALL) -> Iterator[Batch]:
        """See `Images`."""
        return self._read(self.evaluated, self._positions, config, which)

    def check_calibration(self, n: int) -> None:
        """See `Images`."""
        available = len(self.calibration_samples)
        if n > available:
            raise IasvitError(
                f"--calib-size is {n}, but {self.calibration_source} has {available} images to calibrate on"
            )

    def calibration(self, config: DataConfig, n: int, seed: int) -> Tensor:
        """See `Images`; the eval transform, and in place of an unreadable image the next one drawn."""
        self.check_calibration(n)
        samples = self.calibration_samples
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
        images: list[Tensor] = []
        found = start = 0
        while found < n and start < len(order):
            stop = start + n - found
            for batch, _, _ in self._read(samples, order[start:stop], config):
                images.append(batch)
                found += len(batch)
            start = stop
        if found < n:
            raise IasvitError(
                f"--calib-size is {n}, but of the {len(order)} images in {self.calibration_source} only {found} can be "
                f"read"
            )
        return torch.cat(images)

    def _read(self, samples: Samples, positions: list[int], config: DataConfig, which: slice = ALL) -> Iterator[Batch]:
        """The readable ones of the images at these positions, in order; a warning names each other one once.

        Of the batches that they make only `which` are read.
        """
        batches = [positions[start : start + EVALUATION_BATCH] for start in range(0, len(positions), EVALUATION_BATCH)]
        positions = [position for batch in batches[which] for position in batch]
        if not positions:  # more processes than batches
            return
        loader = create_loader(
            Selection([samples[position] for position in positions]),
            input_size=config["input_size"],
            batch_size=EVALUATION_BATCH,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
            # Few images are read before worker processes have started.
            num_workers=_workers() if len(positions) > 2 * EVALUATION_BATCH else 0,
            pin_memory=self._pin_memory,
            persistent_workers=False,
            use_prefetcher=False,
        )
        order = torch.tensor(positions)
        for (images, labels), at in zip(loader, order.split(EVALUATION_BATCH), strict=True):
            readable = labels != UNREADABLE
            for position in at[~readable].tolist():
                name = samples[position][0]
                if name not in self._named:
                    self._named.add(name)
                    own = {"own": which != ALL and distributed.rank() > 0}
                    logger.warning("%s cannot be read as an image; left out", name, extra=own)
            if bool(readable.any()):
                yield images[readable], labels[readable], at[readable]


def _workers() -> int:
    """Processes that read images for this one."""
    return min(16, max(1, (os.cpu_count() or 1) // distributed.processes_here()))


# ---- any folder ------------------------------------------------------------------------------------------------------


class AnyFolderImages(Photographs):
    """Any folder of images.

    The folder holds train/ and val/ (TRAIN_NAMES, VAL_NAMES), one of them, or the class folders themselves. With both,
    val/ is evaluated and train/, a tree of any names, is calibrated on. Otherwise the images are split: of each class a
    fifth, at least one and not all, drawn by SPLIT_SEED, is for calibration, the rest is evaluated. A class's only
    image is evaluated. Classes are the folders in the order of their names, numeric where all are whole numbers.

    Args:
        root: the folder.
        limit: evaluate so many images, spread evenly over the split; None for all.
        pin_memory: where batches go to a GPU.
        labels: False takes all images in the folder, whatever folders they lie in, as of one class without a meaning,
            and a model of any number of classes.

    Raises:
        IasvitError: no such folder, or one without images, without two class folders, or with an empty one.
    """

    def __init__(self, root: Path, limit: int | None = None, pin_memory: bool = False, *, labels: bool = True) -> None:
        folders, files = entries(root)
        train, val = (next((name for name in names if name in folders), None) for names in (TRAIN_NAMES, VAL_NAMES))
        if others := (folders | files) - {train, val} if train or val else set():
            logger.warning(
                "%s: left out what is neither %s/ nor %s/: %s", root, TRAIN_NAMES[0], VAL_NAMES[0], examples(others)
            )
        self.num_classes: dict[int, Tensor | None] | None = None
        self._train = root / train if train and val else None
        folder = root / (val or train or "")
        samples = _labelled(folder) if labels else _tree(folder)
        if labels:
            self.num_classes = {1 + samples[-1][1]: None}
        self._rest, evaluated = ([], samples) if self._train else split(samples)
        self.calibration_source = str(self._train or f"the calibration share of {folder}")
        super().__init__(root, evaluated, limit, pin_memory)

    @cached_property
    def calibration_samples(self) -> Samples:
        """See `Photographs`."""
        return _tree(self._train) if self._train else self._rest


def folder_dataset(root: Path, name: str | None, labels: bool, reserved: tuple[str, ...]) -> str:
    """The name in rows of a folder: the one given or else the folder's own, and "-unlabelled" behind without labels.

    Args:
        root: the folder.
        name: small letters, digits, "-" and "_"; None for the folder's own, made so.
        labels: whether the images are evaluated with labels.
        reserved: names of other data sets.

    Raises:
        IasvitError: a name given that is not fit for a file, or one of another data set.
    """
    chosen = slug(root.resolve().name) if name is None else name
    if not chosen or chosen != slug(chosen):
        good = slug(chosen) or "my-images"
        raise IasvitError(
            f"the data set cannot be called {chosen or root.resolve().name!r}: small letters, digits, - and _ make a "
            f"name; give one as --data-name {good}"
        )
    if chosen in reserved or chosen.endswith(UNLABELLED):
        raise IasvitError(
            f"the data set cannot be called {chosen!r}, since {', '.join(reserved)} and names that end in {UNLABELLED} "
            f"are taken; give another as --data-name NAME"
        )
    return chosen if labels else chosen + UNLABELLED


def split(samples: Samples) -> tuple[Samples, Samples]:
    """Calibration and evaluation images: of each label's n images n / 5, rounded, at least 1 and at most n - 1, to the
    first, drawn by SPLIT_SEED; order is kept."""
    chosen: set[int] = set()
    by_label: dict[int, list[int]] = {}
    for position, (_, label) in enumerate(samples):
        by_label.setdefault(label, []).append(position)
    for positions in by_label.values():
        n = len(positions)
        share = min(max(round(n / CALIBRATION_SHARE), 1), n - 1)
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))[:share]
        chosen.update(positions[i] for i in drawn.tolist())
    calibration = [sample for position, sample in enumerate(samples) if position in chosen]
    return calibration, [sample for position, sample in enumerate(samples) if position not in chosen]


def class_order(names: set[str]) -> list[str]:
    """Class names in the order of their labels: as torchvision sorts them, or by value where all are whole numbers."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _tree(folder: Path) -> Samples:
    """All images below a folder, with label 0."""
    entries(folder)
    samples = list_images(folder, {"": 0})
    if not samples:
        raise IasvitError(f"data folder {folder} holds no image ({', '.join(EXTENSIONS)})")
    return samples


def _labelled(folder: Path) -> Samples:
    """The images in a folder's class folders, by class and then by path."""
    folders, files = entries(folder)
    if len(folders) < 2:
        holds = f"one class folder, {min(folders)}/" if folders else "no class folder"
        raise IasvitError(
            f"data folder {folder} holds {holds}, but labels need two or more; --no-labels takes images without labels"
        )
    if files:
        logger.warning("%s: left out files that lie in no class folder (%d): %s", folder, len(files), examples(files))
    names = class_order(folders)
    samples = list_images(folder, {name: label for label, name in enumerate(names)})
    present = {label for _, label in samples}
    if empty := [name for label, name in enumerate(names) if label not in present]:
        raise IasvitError(
            f"data folder {folder} has class folders without an image: {examples(empty)}; fill or remove them"
        )
    return sorted(samples, key=lambda sample: sample[1])  # stable: within a class in the order of paths
