"""Second moments of a layer's inputs, as they are and as the quantized network has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iasvit import distributed
from iasvit.calibration import Store
from iasvit.models import Activation, Segment
from iasvit.nn import QuantConv2d, QuantLayer


@dataclass
class Moments:
    """Sums over all calibration tokens, x̂ being a layer's quantized input and x the input that it should have had.

    Attributes:
        quantized: Σ x̂ x̂ᵀ, float64 (C, C), C the columns of the weight as a matrix.
        mixed: Σ x̂ xᵀ, float64 (C, C); None where it was not asked for.
        sums: Σ x̂ and Σ x, float64 (2, C).
        tokens: how many.
        flat: whether the input has a row for each image and no more, as a head's has.
    """

    quantized: Tensor
    mixed: Tensor | None
    sums: Tensor
    tokens: int
    flat: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether no sum is NaN or Inf."""
        return all(bool(torch.isfinite(x).all()) for x in (self.quantized, self.mixed, self.sums) if x is not None)


def as_matrix(layer: QuantLayer, x: Tensor) -> Tensor | None:
    """The rows that the weight as a matrix multiplies: (tokens, C). None for a Conv2d that is no matrix product."""
    if not isinstance(layer, QuantConv2d):
        return x.reshape(-1, x.shape[-1])
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT.flatten(0, 1)


@torch.no_grad()
def moments_of(
    layer: QuantLayer,
    segment: Segment,
    inputs: Store,
    *,
    reference: tuple[QuantLayer, Segment, Store] | None,
    batch_size: int,
) -> Moments | None:
    """Moments of a layer's inputs.

    Args:
        layer: of the quantized model.
        segment: that runs it.
        inputs: of the segment.
        reference: the same of the network that says what the input should be; None without `mixed`.
        batch_size: images a pass.

    Returns:
        The sums over all images, which processes share; None for a layer that is no matrix product.
    """
    total: Moments | None = None
    size = layer.weight[0].numel()
    ranges = list(inputs.ranges(batch_size))
    several = distributed.world_size() > 1
    for images in ranges[distributed.own()] if several else ranges:
        ours = _input_of(layer, segment.run, inputs.gather(images))
        flat = ours.ndim == 2
        quantizer = layer.input_quantizer
        quantized = as_matrix(layer, ours if quantizer is None else quantizer(ours))
        if quantized is None:
            return None
        if total is None:
            square = quantized.new_zeros(size, size, dtype=torch.float64)
            total = Moments(square, None if reference is None else square.clone(), square.new_zeros(2, size), 0, flat)
        total.quantized += quantized.T @ quantized
        total.sums[0] += quantized.sum(dim=0, dtype=torch.float64)
        total.tokens += len(quantized)
        if reference is not None:
            other, full, store = reference
            theirs = ours if other is layer else _input_of(other, full.run, store.gather(images))
            wanted = as_matrix(other, theirs)
            assert wanted is not None
            total.mixed += quantized.T @ wanted
            total.sums[1] += wanted.sum(dim=0, dtype=torch.float64)
    return _over_processes(total, layer, size, reference is not None) if several else total


def _over_processes(total: Moments | None, layer: QuantLayer, size: int, mixed: bool) -> Moments:
    if total is None:  # fewer batches than processes
        square = layer.weight.new_zeros(size, size, dtype=torch.float64)
        total = Moments(square, square.clone() if mixed else None, square.new_zeros(2, size), 0)
    counts = torch.tensor([total.tokens, total.flat], dtype=torch.float64, device=layer.weight.device)
    for tensor in (total.quantized, total.mixed, total.sums, counts):
        if tensor is not None:
            distributed.add_up(tensor)
    total.tokens, total.flat = int(counts[0]), bool(counts[1])
    return total


class _Reached(BaseException):  # no Exception: torch.fx prints those that pass through its modules
    pass


def _input_of(layer: nn.Module, run: Callable[[Any], Activation], x: Activation) -> Tensor:
    """What reaches a layer while `run(x)` runs, which ends there."""
    seen: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    handle = layer.register_forward_pre_hook(stop)
    try:
        run(x)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def in_order(layers: list[QuantLayer], run: Callable[[Any], Activation], x: Activation) -> list[QuantLayer]:
    """Those of the layers that `run(x)` calls exactly once, in the order of their calls."""
    calls: list[QuantLayer] = []
    with _watched(layers, lambda layer, _args: calls.append(layer)):
        run(x)
    return [layer for layer in calls if calls.count(layer) == 1]


@contextmanager
def _watched(layers: list[QuantLayer], hook: Callable[..., None]) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
