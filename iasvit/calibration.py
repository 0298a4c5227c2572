"""Calibration: data through the model once, a store of activations, and quantizers set from what passes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from iasvit.errors import IasvitError
from iasvit.methods import Calibration
from iasvit.nn import QuantLayer
from iasvit.quantizers import Quantizer


def default_memory_budget() -> int:
    """Bytes that one store may take: an eighth of the memory that is free, for a reconstruction keeps four at most."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8


class ActivationStore:
    """The activations of all calibration images at one place of a model, in order, in the dtype they came in.

    Batches stay on their device until the budget is spent; later ones go to file maps in host memory's stead, which
    behave as tensors and are read back by the operating system when they are touched. Images may differ in shape.

    Args:
        memory_budget: bytes to hold before spilling; None for `default_memory_budget`.
        folder: where spilled batches go; None for the system's temporary folder. The files vanish with the store.
    """

    def __init__(self, memory_budget: int | None = None, folder: Path | None = None) -> None:
        self.memory_budget = default_memory_budget() if memory_budget is None else memory_budget
        self.folder = folder
        self.device: torch.device | None = None
        self._batches: list[Tensor] = []
        self._where: list[tuple[int, int]] = []  # image → (batch, row)
        self._held = 0
        self._spill: tempfile.TemporaryDirectory[str] | None = None

    def __len__(self) -> int:
        return len(self._where)

    def append(self, batch: Tensor) -> None:
        """Add the activations (B, ...) of B images; OSError where they have to be spilled and the disk is full."""
        batch = batch.detach()
        self.device = batch.device
        size = batch.numel() * batch.element_size()
        if self._held + size > self.memory_budget:
            batch = self._spilled(batch)
        else:
            self._held += size
        self._where += [(len(self._batches), row) for row in range(batch.shape[0])]
        self._batches.append(batch)

    def _spilled(self, batch: Tensor) -> Tensor:
        if self._spill is None:
            self._spill = tempfile.TemporaryDirectory(prefix="iasvit-", dir=self.folder)
        file = Path(self._spill.name) / f"{len(self._batches)}.bin"
        if hasattr(os, "posix_fallocate"):  # a disk too full is an OSError here; in the map it would end the process
            with open(file, "wb") as handle:
                os.posix_fallocate(handle.fileno(), 0, batch.numel() * batch.element_size())
        mapped = torch.from_file(str(file), shared=True, size=batch.numel(), dtype=batch.dtype).view(batch.shape)
        return mapped.copy_(batch)

    @property
    def spilled(self) -> bool:
        """Whether any batch went to a file map."""
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
        rows = [self._batches[b][r] for b, r in (self._where[int(i)] for i in indices)]
        if any(row.shape != rows[0].shape for row in rows):
            raise IasvitError("calibration images of different sizes cannot share a batch; use a batch size of 1")
        return torch.stack(rows).to(self.device)

    def _merge(self) -> None:
        """Join batches of one shape, so that a random batch is one indexing and not one for each image."""
        if len(self._batches) < 2 or self.spilled or len({batch.shape[1:] for batch in self._batches}) > 1:
            return
        self._batches = [torch.cat(self._batches)]
        self._where = [(0, row) for row in range(len(self._where))]

    def batches(self, size: int, limit: int | None = None) -> Iterator[Tensor]:
        """All activations in order (or the first `limit`), in batches of at most `size` images of one shape."""
        count = len(self) if limit is None else min(limit, len(self))
        start = 0
        while start < count:
            stop = start + 1
            while stop < min(start + size, count) and self._shape(stop) == self._shape(start):
                stop += 1
            yield self.gather(range(start, stop))
            start = stop

    def _shape(self, image: int) -> torch.Size:
        return self._batches[self._where[image][0]].shape[1:]

    @torch.no_grad()
    def map(self, run: Callable[[Tensor], Tensor], batch_size: int, where: str) -> ActivationStore:
        """A store of run(activations) for all images.

        Raises:
            IasvitError: an output holds NaN or Inf; the message says that it left `where`.
        """
        result = ActivationStore(self.memory_budget, self.folder)
        for batch in self.batches(batch_size):
            output = run(batch)
            if not torch.isfinite(output).all():
                raise IasvitError(f"layer {where!r} puts out NaN or Inf for the calibration images; check the model")
            result.append(output)
        return result


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
    batches: Iterable[Tensor] = calibration.split(64) if isinstance(calibration, Tensor) else calibration
    store = ActivationStore(memory_budget)
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.ndim != 4 or not batch.is_floating_point():
            raise IasvitError("calibration is not made of float tensors N×3×H×W; give images as the model takes them")
        if not torch.isfinite(batch).all():
            raise IasvitError("calibration images hold NaN or Inf; give normalised, finite images")
        store.append(batch[: None if limit is None else limit - len(store)].to(device, torch.float32))
        if limit is not None and len(store) >= limit:
            break
    if not len(store):
        raise IasvitError("calibration holds no image; give at least one")
    return store


def first_images(calibration: Calibration, count: int, device: torch.device) -> Tensor:
    """The first `count` calibration images, or all where there are fewer, in one batch on the device.

    Raises:
        IasvitError: as `calibration_store`; or the images differ in size.
    """
    store = calibration_store(calibration, device, limit=count)
    return store.gather(range(len(store)))


@contextmanager
def enabled(quantizers: Iterable[tuple[str, Quantizer]], value: bool) -> Iterator[None]:
    """Switch these quantizers on or off for a while."""
    before = [(quantizer, quantizer.enabled) for _, quantizer in quantizers]
    try:
        for quantizer, _ in before:
            quantizer.enabled = value
        yield
    finally:
        for quantizer, state in before:
            quantizer.enabled = state


def calibrate_weights(layers: Iterable[tuple[str, QuantLayer]]) -> None:
    """Calibrate and enable the weight quantizers of these (path in the model, layer).

    Raises:
        IasvitError: a weight holds NaN or Inf; the message names its layer.
    """
    for name, layer in layers:
        try:
            layer.calibrate_weight()
        except IasvitError as error:
            raise IasvitError(f"weight of layer {name!r}: {error}") from error


@torch.no_grad()
def calibrate_inputs(quantizers: Sequence[tuple[str, Quantizer]], run: Callable[[], object]) -> None:
    """Calibrate activation quantizers on what reaches them while `run()` runs the model, or a part of it.

    They are off meanwhile, so that each sees full-precision values; inputs of several batches are pooled. Afterwards
    they are enabled.

    Args:
        quantizers: (path in the model, quantizer).
        run: runs calibration batches through whatever holds the quantizers.

    Raises:
        IasvitError: a quantizer saw NaN, Inf or nothing; the message names its layer.
    """
    seen: dict[int, list[Tensor]] = {id(quantizer): [] for _, quantizer in quantizers}

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[id(module)].append(args[0])

    hooks = [quantizer.register_forward_pre_hook(record) for _, quantizer in quantizers]
    try:
        with enabled(quantizers, False):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for name, quantizer in quantizers:
        inputs = seen.pop(id(quantizer))
        if not inputs:
            raise IasvitError(f"layer {name!r} was not reached by the calibration images; is it part of the forward?")
        channel_dim = getattr(quantizer, "channel_dim", None)
        if len(inputs) > 1:  # images may differ in size, so only channels, which are last, are kept apart
            inputs = [torch.cat([x.reshape(-1) if channel_dim is None else x.flatten(0, -2) for x in inputs])]
        try:
            quantizer.calibrate(inputs[0])
        except IasvitError as error:
            raise IasvitError(f"layer {name!r}: {error}") from error
        quantizer.enabled = True


@torch.no_grad()
def calibrate_in_sequence(quantizers: Sequence[tuple[str, Quantizer]], run: Callable[[], object]) -> None:
    """Calibrate activation quantizers in the order in which `run()` reaches them, each on what those before it left.

    So every quantizer sees the activations of the quantized model, in one forward pass.

    Args:
        quantizers: (path in the model, quantizer); enabled afterwards.
        run: runs one calibration batch through the model.

    Raises:
        IasvitError: a quantizer saw NaN, Inf or nothing; the message names its layer.
    """
    waiting = {id(quantizer): name for name, quantizer in quantizers}

    def calibrate(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
        name = waiting.pop(id(quantizer), None)
        if name is None:
            return
        try:
            quantizer.calibrate(args[0])
        except IasvitError as error:
            raise IasvitError(f"layer {name!r}: {error}") from error
        quantizer.enabled = True

    hooks = [quantizer.register_forward_pre_hook(calibrate) for _, quantizer in quantizers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for name in waiting.values():
        raise IasvitError(f"layer {name!r} was not reached by the calibration images; is it part of the forward?")
