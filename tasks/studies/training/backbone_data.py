"""The scenes that mini backbones learn from: rendered once into a folder, resident on the device, augmented there."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tasks.mini import scenes, zoo
from tasks.studies.training.recipes import BackboneRecipe


def _render_into(folder: Path, split: str, start: int, count: int) -> None:
    images, labels = scenes.render_images(split, start, count, zoo.IMAGE_SIZE)
    np.load(folder / f"{split}.images.npy", mmap_mode="r+")[start : start + count] = images
    np.load(folder / f"{split}.labels.npy", mmap_mode="r+")[start : start + count] = labels


def render_split(folder: Path, split: str, count: int, workers: int, chunk: int = 500) -> None:
    """Render images 0 … count - 1 of a split into `folder`, as <split>.images.npy (uint8 n×H×W×3) and .labels.npy.

    Files that hold that many images already are kept, so that one folder serves several invocations.
    """
    done = folder / f"{split}.{count}.done"
    if done.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shape = (count, zoo.IMAGE_SIZE, zoo.IMAGE_SIZE, 3)
    np.lib.format.open_memmap(folder / f"{split}.images.npy", mode="w+", dtype=np.uint8, shape=shape)
    np.lib.format.open_memmap(folder / f"{split}.labels.npy", mode="w+", dtype=np.int64, shape=(count,))
    starts = range(0, count, chunk)
    if workers <= 1:
        for start in starts:
            _render_into(folder, split, start, min(chunk, count - start))
    else:
        with ProcessPoolExecutor(workers) as pool:
            jobs = [pool.submit(_render_into, folder, split, start, min(chunk, count - start)) for start in starts]
            for job in jobs:
                job.result()
    done.touch()


def load_split(folder: Path, split: str, device: torch.device, chunk: int = 20_000) -> tuple[Tensor, Tensor]:
    """Images (uint8 n×3×H×W) and labels (int64 n) that `render_split` wrote, on the device."""
    mapped = np.load(folder / f"{split}.images.npy", mmap_mode="r")
    n, height, width, channels = mapped.shape
    images = torch.empty((n, channels, height, width), dtype=torch.uint8, device=device)
    for start in range(0, n, chunk):  # the device's memory holds them once, not twice
        part = torch.from_numpy(np.array(mapped[start : start + chunk])).to(device)
        images[start : start + chunk] = part.permute(0, 3, 1, 2)
    return images, torch.from_numpy(np.load(folder / f"{split}.labels.npy")).to(device)


def permutations(n: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless index batches (int64, CPU), epoch after epoch of shuffled images; what does not fill a batch is left."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=generator)
        yield from order[: n // batch * batch].view(-1, batch)


class Batches(nn.Module):
    """Augments and normalises batches of resident images.

    Args:
        images: uint8 n×3×H×W.
        mean, std: three floats each, for images in [0, 1].
    """

    def __init__(self, images: Tensor, recipe: BackboneRecipe, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.images = images
        self.recipe = recipe
        self.register_buffer("mean", torch.tensor(mean, device=images.device).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, device=images.device).view(1, 3, 1, 1))
        self.register_buffer("channel", torch.arange(3, device=images.device).view(1, 3, 1, 1))
        self.register_buffer("position", torch.arange(images.shape[-1], device=images.device))

    def forward(self, index: Tensor) -> Tensor:
        """Image numbers (int64 b) → augmented, normalised images (float32 b×3×H×W); random state: the global one."""
        recipe, size, b, device = self.recipe, self.images.shape[-1], len(index), index.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, device=device) * 2 - 1

        offset = (uniform(2, b, 1) * (recipe.shift + 0.5)).round().long()
        rows, columns = self.position + offset[0], self.position + offset[1]
        if recipe.flip:
            columns = torch.where(uniform(b, 1) > 0, columns, size - 1 - columns)
        rows, columns = (size - 1 - (size - 1 - axis.abs()).abs() for axis in (rows, columns))  # reflect at the edges
        x = self.images[index.view(b, 1, 1, 1), self.channel, rows.view(b, 1, size, 1), columns.view(b, 1, 1, size)]
        x = x.float() / 255
        contrast = 1 + recipe.jitter * uniform(b, 1, 1, 1)
        gain = 1 + recipe.jitter * (uniform(b, 1, 1, 1) + 0.5 * uniform(b, 3, 1, 1))
        level = x.mean((1, 2, 3), keepdim=True)
        x = (((x - level) * contrast + level) * gain).clamp(0, 1)
        return (x - self.mean) / self.std
