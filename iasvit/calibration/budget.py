"""A memory budget: the least that a method needs, found on a few images, and what that leaves for activations."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iasvit.calibration.fisher import captures
from iasvit.calibration.observe import enabled, watching
from iasvit.calibration.store import ActivationStore, calibration_store, tensors
from iasvit.errors import IasvitError
from iasvit.models import Activation, Segment, segments
from iasvit.nn import quant_layers, quantizers_of
from iasvit.options import bytes_of, size_text
from iasvit.quantizers import Quantizer

IMAGES_SHARE = 16  # this part of a budget holds images that nobody else holds
STORES = 8  # stores of activations that may be full at once, with one that is being joined and one being read
MARGIN = 1.4  # what allocators and kernels take besides tensors
BASE = 160 * 2**20  # bytes of what does not grow: slices of searches, code that is loaded late
PROBE_PIXELS = 2**19  # of the images that a need is found out on
LEARNING = 40  # bytes a parameter: weight in integers and its mask, gradient, Adam's two moments and what it computes


class PeakBytes(TorchDispatchMode):
    """The most bytes alive at once of tensors that were made under it.

    Attributes:
        peak: in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            self._see(tensor, new=False)
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            self._see(tensor, new=True)
        return result

    def _see(self, tensor: object, new: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if new else 0
        self._known.add(key)
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._alive -= size


def nbytes(value: nn.Module | Activation) -> int:
    """Bytes of the tensors of an activation, or of a module's parameters and buffers."""
    found = (*value.parameters(), *value.buffers()) if isinstance(value, nn.Module) else tensors(value)
    return sum(x.numel() * x.element_size() for x in found)


def share_of(
    memory_budget: int | str | None,
    of: str,
    quantizable: Callable[[], nn.Module],
    images: ActivationStore,
    need: Callable[[nn.Module, Tensor], int],
    stores: int = STORES,
) -> int | None:
    """Bytes for each store of activations, so that all work stays within a memory budget.

    Args:
        memory_budget: bytes of all that the work allocates, the model's quantized copy included; None for no limit.
        of: who works, for the message: "ias_vit".
        quantizable: a copy of the model with new quantizers; it is thrown away.
        images: all calibration images; their store's budget becomes what is returned.
        need: (that copy, a few images) → bytes that the work has alive at once besides stores and the model.
        stores: that may be full at once.

    Returns:
        Bytes; None without a budget.

    Raises:
        IasvitError: the budget is below what is needed at least.
    """
    if memory_budget is None:
        return None
    budget = bytes_of(memory_budget)
    largest = images.largest
    count = max(1, PROBE_PIXELS // images.gather([largest])[0, 0].numel())
    same = [i for i in range(len(images)) if images.shape_of(i) == images.shape_of(largest)][:count]
    model = quantizable()
    fixed = 2 * nbytes(model) + BASE
    least = fixed + math.ceil(MARGIN * (need(model, images.gather(same)) + _weight_need(model)))
    del model
    gc.collect()  # quantizable models refer to themselves
    least = math.ceil(least * IMAGES_SHARE / (IMAGES_SHARE - 1) / 2**20) * 2**20
    if budget < least:
        size, minimum = "×".join(map(str, images.shape_of(largest)[1:])), size_text(least)
        raise IasvitError(
            f"memory_budget is {size_text(budget)}, but {of} needs at least {minimum} for this model on images of "
            f"{size}; give {minimum.replace(' ', '')} or more"
        )
    images.memory_budget = (budget - least) // stores
    return images.memory_budget


def images_share(memory_budget: int | str | None) -> int | None:
    """Bytes of the calibration images that are held, where nobody else holds them; None without a budget."""
    return None if memory_budget is None else bytes_of(memory_budget) // IMAGES_SHARE


@torch.no_grad()
def forward_need(model: nn.Module, images: Tensor, count: int) -> int:
    """Bytes that a pass of `count` images, segment by segment, has alive at once, weights in full precision."""
    images = images[:count]
    return _largest(model, images, lambda segment, x: _scaled(_forward(segment, x), count, images))


@torch.no_grad()
def learning_need(
    model: nn.Module,
    images: Tensor,
    count: int,
    learning: Callable[[Segment], AbstractContextManager[Any]] = nullcontext,
    learnt: int = LEARNING,
    inputs: int = 1,
) -> int:
    """The same of a step of reconstruction, of the segments that are learnt.

    Args:
        model, images, count: as for `forward_need`.
        learning: puts what is learnt of activation quantizers in their place.
        learnt: bytes a parameter.
        inputs: tensors of the input's size that a step makes before the segment runs.
    """
    images = images[:count]
    seen: set[tuple] = set()

    def need(segment: Segment, x: Activation) -> int:
        key = (*(p.shape for layer in segment.layers() for p in layer.parameters()), *(t.shape for t in tensors(x)))
        if not segment.reconstruct or not segment.layers() or key in seen:
            return 0
        seen.add(key)
        parameters = [p for layer in segment.layers() for p in (layer.weight, layer.bias) if p is not None]
        segment.run(x)  # sets the quantizers
        with PeakBytes() as memory, torch.enable_grad(), learning(segment):
            for parameter in parameters:
                parameter.requires_grad_(True)
            output = tensors(segment.run(x))[0]
            target = torch.zeros_like(output)
            (output - target).square().flatten(1).sum(dim=1).mean().backward()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        held = learnt * sum(p.numel() for p in parameters)
        return _scaled(memory.peak + inputs * nbytes(x), count, images) + held

    return _largest(model, images, need)


def network_need(model: nn.Module, images: Tensor, count: int, learn: bool) -> int:
    """Bytes that `count` images' pass and gradient through all segments have alive at once, and a pass of another such
    model whose outputs are kept to compare with; of a step that learns all layers, where `learn` says so."""
    images = images[:count]
    _largest(model, images, lambda segment, x: 0)  # sets the quantizers
    layers = [layer for _, layer in quant_layers(model)] if learn else []
    parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]

    def outputs(x: Activation) -> list[Tensor]:
        found = []
        for segment in segments(model):
            x = segment.run(x)
            found.append(tensors(x)[0])
        return found

    with PeakBytes() as memory, enabled(list(quantizers_of(model, weights=True)), False):
        with torch.no_grad():
            full = outputs(images)
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
            x = images.clone().requires_grad_(not learn)
            pairs = zip(outputs(x), full, strict=True)
            torch.stack([(ours - theirs).square().mean() for ours, theirs in pairs]).sum().backward()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    held = sum(p.numel() for p in parameters)
    return _scaled(max(0, memory.peak - 4 * held), count, images) + LEARNING * held


def _scaled(size: int, count: int, images: Tensor) -> int:
    """The bytes of `count` images from those of these."""
    return math.ceil(size * count / len(images))


def _forward(segment: Segment, x: Activation) -> int:
    with PeakBytes() as memory:
        output = segment.run(x)
    return memory.peak + 2 * nbytes(x) + nbytes(output)


def _largest(model: nn.Module, images: Tensor, need: Callable[[Segment, Activation], int]) -> int:
    """The largest need of a segment, on the outputs of those before it, with quantizers set to anything."""
    activations = [quantizer for _, quantizer in quantizers_of(model, weights=False)]

    def set_to_anything(quantizer: Quantizer, args: tuple[Tensor, ...]) -> None:
        if not quantizer.calibrated:
            x = args[0].detach()
            quantizer.calibrate(x.reshape(-1)[:256] if quantizer.elementwise else x.reshape(-1, x.shape[-1])[:2])

    largest = 0
    with watching(activations, set_to_anything), enabled(list(quantizers_of(model, weights=True)), False):
        x: Activation = images
        for segment in segments(model):
            largest = max(largest, need(segment, x))
            x = segment.run(x)
    return largest


def capture_need(model: nn.Module, images: Tensor, count: int, labels: torch.Generator | None) -> int:
    """The same of captures of `count` images a pass, which go to files."""
    images = images[:count]
    store = calibration_store(images, images.device, 0)
    with PeakBytes() as memory:
        for _ in captures(model, store, labels, len(images), memory_budget=0):
            pass
    return _scaled(memory.peak, count, images)


def _weight_need(model: nn.Module) -> int:
    """Bytes that quantizing the largest weight has alive at once."""
    return max((10 * nbytes(layer.weight) for _, layer in quant_layers(model)), default=0)
