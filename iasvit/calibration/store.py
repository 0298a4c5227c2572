"""Activations of the calibration images: a store with a memory budget. What exceeds the budget goes to files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from iasvit import distributed
from iasvit.errors import IasvitError
from iasvit.methods import Calibration
from iasvit.models import Activation
from iasvit.scratch import Scratch

BUDGET_VARIABLE = "IASVIT_STORE_MIB"
# Pixels of images that share a pass, however much memory there is: 64 of 256 × 256 without gradients, 16 with.
PASS_PIXELS, GRADIENT_PASS_PIXELS = 2**22, 2**20


def default_memory_budget(device: torch.device | None = None) -> int:
    """Bytes that one store may take: an eighth of the device's memory that is free (None: the host's).

    A reconstruction keeps four stores at most. Processes on one host share its memory.

    The environment variable IASVIT_STORE_MIB, where it is set, says how many MiB instead.

    Raises:
        IasvitError: the variable holds no whole number of MiB.
    """
    text = os.environ.get(BUDGET_VARIABLE, "")
    if not text and device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 8
    if not text:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8 // distributed.processes_here()
    if not text.isdecimal():
        raise IasvitError(f"{BUDGET_VARIABLE} is {text!r}, but must be a whole number of MiB")
    return int(text) * 2**20


class _FileBatch:
    """A batch in a file, of which rows are read when they are asked for.

    The file is mapped only meanwhile: pages of a map that stays count as memory of the process.
    """

    def __init__(self, file: Path, batch: Tensor) -> None:
        self.file, self.shape, self.dtype = file, batch.shape, batch.dtype
        if hasattr(os, "posix_fallocate"):  # a disk too full is an OSError here; in the map it would end the process
            with open(file, "wb") as handle:
                os.posix_fallocate(handle.fileno(), 0, batch.numel() * batch.element_size())
        self._map().copy_(batch)

    def _map(self) -> Tensor:
        flat = torch.from_file(str(self.file), shared=True, size=self.shape.numel(), dtype=self.dtype)
        return flat.view(self.shape)

    def __getitem__(self, row: int) -> Tensor:
        return self._map()[row].clone()


class ActivationStore:
    """The activations of all calibration images at one place of a model, in order, in the dtype they came in.

    Batches stay on their device until the budget is spent; later ones go to files, and are mapped when they are read.
    Images may differ in shape.

    Args:
        memory_budget: bytes to hold before spilling; None for `default_memory_budget`.
        folder: where spilled batches go; None for the system's temporary folder. The files vanish with the store.
    """

    def __init__(self, memory_budget: int | None = None, folder: Path | None = None) -> None:
        self.memory_budget = default_memory_budget() if memory_budget is None else memory_budget
        self.folder = folder
        self.device: torch.device | None = None
        self._batches: list[Tensor | _FileBatch] = []
        self._locations: list[tuple[int, int]] = []  # image → (batch, row)
        self._held = self._borrowed = 0
        self._spill: Scratch | None = None

    def __len__(self) -> int:
        return len(self._locations)

    def append(self, batch: Tensor, borrowed: bool = False) -> None:
        """Add the activations (B, ...) of B images; OSError where they have to be spilled and the disk is full.

        A batch that is borrowed is in memory whether it is here or not, and stays there.
        """
        batch = batch.detach()
        self.device = batch.device
        size = batch.numel() * batch.element_size()
        spilled = not borrowed and self._held + size > self.memory_budget
        if borrowed:
            self._borrowed += size
        elif not spilled:
            self._held += size
        self._locations += [(len(self._batches), row) for row in range(batch.shape[0])]
        self._batches.append(self._spilled(batch) if spilled else batch)

    def _spilled(self, batch: Tensor) -> _FileBatch:
        if self._spill is None:
            self._spill = Scratch("activations-", self.folder)
        return _FileBatch(self._spill.path / f"{len(self._batches)}.bin", batch)

    @property
    def held(self) -> int:
        """Bytes that are not spilled."""
        return self._held

    @property
    def leading(self) -> ActivationStore:
        """The store of what the segment before computed: of tuples, the first tensor of each."""
        return self

    @property
    def spilled(self) -> bool:
        """Whether any batch went to a file."""
        return self._spill is not None

    @property
    def resident(self) -> bool:
        """Whether all activations are one tensor on the device, so that `gather` is a single indexing."""
        self._merge()
        return len(self._batches) == 1 and not self.spilled

    def gather(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The activations (len(indices), ...) of these images, on the device they came from.

        Raises:
            IasvitError: the images' activations differ in shape.
        """
        if self.resident:
            return self._batches[0][torch.as_tensor(indices, device=self.device)]
        rows = [self._batches[b][r] for b, r in (self._locations[int(i)] for i in indices)]
        if any(row.shape != rows[0].shape for row in rows):
            raise IasvitError("calibration images of different sizes cannot share a batch; use a batch size of 1")
        return torch.stack([row.to(self.device) for row in rows])  # files are read on the CPU

    def _merge(self) -> None:
        """Join batches of one shape, so that a random batch is one indexing and not one for each image."""
        if len(self._batches) < 2 or self.spilled or len({batch.shape[1:] for batch in self._batches}) > 1:
            return
        if self._borrowed and self._held + self._borrowed > self.memory_budget:
            return
        self._batches = [torch.cat(self._batches)]
        self._locations = [(0, row) for row in range(len(self._locations))]

    def batches(self, size: int, limit: int | None = None) -> Iterator[Tensor]:
        """All activations in order (or the first `limit`), in batches of at most `size` images of one shape."""
        return (self.gather(images) for images in self.ranges(size, limit))

    def ranges(self, size: int, limit: int | None = None) -> Iterator[range]:
        """The images that each of these batches holds."""
        count = len(self) if limit is None else min(limit, len(self))
        start = 0
        while start < count:
            stop = start + 1
            while stop < min(start + size, count) and self.shape_of(stop) == self.shape_of(start):
                stop += 1
            yield range(start, stop)
            start = stop

    def shape_of(self, image: int) -> torch.Size:
        """The shape of one image's activation."""
        return self._batches[self._locations[image][0]].shape[1:]

    @property
    def largest(self) -> int:
        """The image of the most values; of equals the first."""
        return max(range(len(self)), key=lambda image: self.shape_of(image).numel())

    def passes(self, size: int, gradients: bool = False) -> int:
        """Images that share a pass: `size`, less where images are so large that those would have more pixels."""
        pixels = GRADIENT_PASS_PIXELS if gradients else PASS_PIXELS
        return max(1, min(size, pixels // max(1, self.shape_of(self.largest)[1:].numel())))

    def map(self, run: Callable[[Tensor], Activation], batch_size: int, producer: str) -> Store:
        """A store of run(activations) for all images.

        Raises:
            IasvitError: an output holds NaN or Inf; the message says that it left `producer`.
        """
        return _map(self, run, batch_size, producer)


class TupleStore:
    """Activations that are tuples of tensors, a store for each place in the tuple.

    What a segment hands on as it came shares its store with the segment's input, so that it is in memory once.

    Args:
        parts: stores of the same images.
        memory_budget: bytes for all parts together.
        folder: see `ActivationStore`.
    """

    def __init__(self, parts: Sequence[ActivationStore], memory_budget: int, folder: Path | None = None) -> None:
        self.parts = tuple(parts)
        self.memory_budget = memory_budget
        self.folder = folder

    def __len__(self) -> int:
        return len(self.leading)

    @property
    def device(self) -> torch.device | None:
        """Where the activations came from."""
        return self.leading.device

    @property
    def leading(self) -> ActivationStore:
        """See `ActivationStore`."""
        return self.parts[0]

    @property
    def spilled(self) -> bool:
        """Whether any batch went to a file."""
        return any(part.spilled for part in self.parts)

    @property
    def resident(self) -> bool:
        """Whether each part is one tensor on the device."""
        return all(part.resident for part in self.parts)

    def gather(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, ...]:
        """See `ActivationStore`; one tensor for each part."""
        return tuple(part.gather(indices) for part in self.parts)

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[Tensor, ...]]:
        """All activations in order (or the first `limit`), in batches of at most `size` images of one shape."""
        return (self.gather(images) for images in self.ranges(size, limit))

    def ranges(self, size: int, limit: int | None = None) -> Iterator[range]:
        """The images that each of these batches holds."""
        return self.leading.ranges(size, limit)

    def map(self, run: Callable[[tuple[Tensor, ...]], Activation], batch_size: int, producer: str) -> Store:
        """See `ActivationStore`."""
        return _map(self, run, batch_size, producer)


Store = ActivationStore | TupleStore


def tensors(activation: Activation) -> tuple[Tensor, ...]:
    """The tensors of an activation, one or a tuple."""
    return activation if isinstance(activation, tuple) else (activation,)


class Collector:
    """Makes a store of activations that come batch by batch.

    Args:
        source: the store whose batches the activations are made from.
    """

    def __init__(self, source: Store) -> None:
        self.source = source
        self._parts: list[ActivationStore] | None = None
        self._made: list[int] = []  # places in the tuple that are not the source's
        self._is_tuple = False

    def append(self, output: Activation, given: Activation = ()) -> None:
        """Add the activations of a batch.

        Args:
            output: what was computed.
            given: what of the source it was computed from; tensors of `output` that are these very objects are taken
                from the source's store.
        """
        self.add(self.made(output, given))

    def made(self, output: Activation, given: Activation = ()) -> list[Tensor]:
        """Of the tensors of `output` those that have to be added; the same places for each batch."""
        if self._parts is None:
            self._start(output, given)
        values = tensors(output)
        return [values[place] for place in self._made]

    def add(self, made: Sequence[Tensor]) -> None:
        """Add a batch of which these tensors were made, here or in another process."""
        for place, value in zip(self._made, made, strict=True):
            self._parts[place].append(value)

    def _start(self, output: Activation, given: Activation) -> None:
        source = self.source
        self._is_tuple = isinstance(output, tuple)
        sources = source.parts if isinstance(source, TupleStore) else (source,)
        shared = {id(tensor): store for tensor, store in zip(tensors(given), sources, strict=False)}
        kept = [shared.get(id(tensor)) for tensor in tensors(output)]
        self._made = [place for place, store in enumerate(kept) if store is None]
        budget = source.memory_budget - sum(store.held for store in kept if store is not None)
        each = max(0, budget) // max(1, len(self._made))
        self._parts = [ActivationStore(each, source.folder) if store is None else store for store in kept]

    def store(self) -> Store:
        """The store of all that was added."""
        parts = self._parts or [ActivationStore(self.source.memory_budget, self.source.folder)]
        if self._is_tuple:
            return TupleStore(parts, self.source.memory_budget, self.source.folder)
        return parts[0]


@torch.no_grad()
def _map(store: Store, run: Callable[[Any], Activation], batch_size: int, producer: str) -> Store:
    """Each process runs its share of the batches and gets the outputs of the others: the same bit for bit."""
    result, ranges = Collector(store), list(store.ranges(batch_size))

    def made(number: int) -> list[Tensor]:
        batch = store.gather(ranges[number])
        found = result.made(run(batch), batch)
        if not all(torch.isfinite(tensor).all() for tensor in found):
            raise IasvitError(f"layer {producer!r} outputs NaN or Inf for the calibration images; check the model")
        return found

    several = distributed.world_size() if len(ranges) >= distributed.world_size() else 1
    for start in range(0, len(ranges), several):
        number = start + (distributed.rank() if several > 1 else 0)
        if several == 1:
            result.add(made(number))
            continue
        batches = distributed.exchanged(lambda n=number: made(n) if n < len(ranges) else [], store.device)
        for found in batches[: len(ranges) - start]:
            result.add(found)
    return result.store()


def calibration_store(
    calibration: Calibration, device: torch.device, memory_budget: int | None = None, limit: int | None = None
) -> ActivationStore:
    """The calibration images, N×3×H×W or batches of them, as a store of float32 on the model's device.

    Of more than `limit` images, where it is given, the first are taken.

    Raises:
        IasvitError: there is no image, a batch is no 4-dimensional float tensor, or it holds NaN or Inf.
    """
    if not isinstance(calibration, Iterable):
        raise IasvitError(f"calibration is a {type(calibration).__name__}; give images as a tensor or batches of them")
    batches: Iterable[Tensor] = [calibration] if isinstance(calibration, Tensor) else calibration
    kept = isinstance(calibration, (Tensor, list, tuple))  # by the caller
    store = ActivationStore(default_memory_budget(device) if memory_budget is None else memory_budget)
    for batch in batches:
        check_batch(batch)
        batch = batch[: None if limit is None else limit - len(store)]
        if not all(torch.isfinite(part).all() for part in batch.split(64)):
            raise IasvitError("calibration images hold NaN or Inf; give normalised, finite images")
        for part in [batch] if batch.device == device and batch.dtype == torch.float32 else batch.split(64):
            ours = part.to(device, torch.float32)
            store.append(ours, borrowed=kept and ours is part)
        if limit is not None and len(store) >= limit:
            break
    if not len(store):
        raise IasvitError("calibration holds no image; give at least one")
    return store


def check_batch(batch: object) -> None:
    """Raise IasvitError unless a batch of calibration images is a float tensor of four dimensions."""
    if not isinstance(batch, Tensor) or batch.ndim != 4 or not batch.is_floating_point():
        raise IasvitError("calibration is not made of float tensors N×3×H×W; give images as the model takes them")


def looked_at(calibration: Calibration, check: Callable[[Tensor], None]) -> tuple[Tensor, Calibration]:
    """The first calibration image, 1×3×H×W, and all of them, whose sizes are checked when they are read.

    Args:
        calibration: see `iasvit.quantize`.
        check: called with one image of each size beyond the first.

    Returns:
        The image; and a tensor as it was given, else an iterator of the same batches.

    Raises:
        IasvitError: there is no image, or a batch is no 4-dimensional float tensor.
    """
    if not isinstance(calibration, Iterable):
        raise IasvitError(f"calibration is a {type(calibration).__name__}; give images as a tensor or batches of them")
    sizes: set[tuple[int, ...]] = set()

    def checked(batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            check_batch(batch)
            if len(batch) and batch.shape[1:] not in sizes:
                if sizes:
                    check(batch[:1])
                sizes.add(batch.shape[1:])
            yield batch

    batches = checked([calibration] if isinstance(calibration, Tensor) else calibration)
    read: list[Tensor] = []
    for batch in batches:
        read.append(batch)
        if len(batch):
            return batch[:1], calibration if isinstance(calibration, Tensor) else chain(read, batches)
    raise IasvitError("calibration holds no image; give at least one")


def first_images(
    calibration: Calibration, count: int, device: torch.device, memory_budget: int | None = None
) -> Tensor:
    """The first `count` calibration images, or all where there are fewer, in one batch on the device.

    Images that differ in size are filled up with zeros at the right and the bottom, as a detector's batches are.

    Raises:
        IasvitError: as `calibration_store`.
    """
    store = calibration_store(calibration, device, memory_budget, limit=count)
    batches = list(store.batches(len(store)))
    if len(batches) == 1:
        return batches[0]
    height, width = (max(batch.shape[axis] for batch in batches) for axis in (2, 3))
    return torch.cat([F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2])) for x in batches])
