"""What the methods have in common that search scales by a layer's output and do nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from iasvit.calibration.budget import STORES, capture_need, images_share, share_of
from iasvit.calibration.fisher import BATCH_SIZE
from iasvit.calibration.scale_search import CosineDistance, HessianGuided, Metric, search_scales
from iasvit.calibration.store import calibration_store
from iasvit.errors import IasvitError
from iasvit.methods import Calibration
from iasvit.models import Site, prepare, segments
from iasvit.options import MemoryBudget, Range, check_fields
from iasvit.progress import Progress
from iasvit.quantizers import Quantizer
from iasvit.spec import QuantSpec


@dataclass
class ScaleSearch(ABC):
    """A method that searches the scales of all quantizers among multiples of the max-abs scale (see `search_scales`).

    A subclass names its metric and chooses the quantizers, which must be SymmetricQuantizers or TwinQuantizers.

    Options:
        candidates: scales to try.
        low, high: the first and the last, as multiples of the max-abs scale.
        rounds: how often the two operands of a layer are searched in turn.
        seed: of the labels drawn for the Fisher, where the metric has one.
        init_size: calibration images used.
        memory_budget: see `iasvit.options.MemoryBudget`.
    """

    candidates: Annotated[int, Range(1, 100_000)] = 100
    low: Annotated[float, Range(above=0)] = 0.01
    high: Annotated[float, Range(above=0)] = 1.2
    rounds: Annotated[int, Range(1)] = 1
    seed: int = 0
    init_size: Annotated[int, Range(1)] = 32
    memory_budget: MemoryBudget = None

    metric: ClassVar[type[Metric]]
    candidate_forwards: ClassVar[float] = 1.5  # passes of an image that trying one scale for all takes, measured

    def __post_init__(self) -> None:
        check_fields(self)
        if self.low > self.high:
            raise IasvitError(f"low is {self.low} and high {self.high}, but low must not be the larger")

    def images_used(self, calib_size: int) -> int:
        """See `iasvit.methods.Method`; the first `init_size`."""
        return min(self.init_size, calib_size)

    def forwards(self, calib_size: int, detector: bool) -> float:
        """See `iasvit.methods.Method`; a search of every operand."""
        return self.candidate_forwards * self.rounds * self.candidates * self.images_used(calib_size)

    def quantize(self, model: nn.Module, calibration: Calibration, spec: QuantSpec, progress: Progress) -> nn.Module:
        """See `iasvit.methods.Method`."""
        device = next(model.parameters()).device
        images = calibration_store(calibration, device, images_share(self.memory_budget), limit=self.init_size)

        def quantizable() -> nn.Module:
            return prepare(model, spec, self.weight_quantizer, self.activation_quantizer)

        def need(copy: nn.Module, few: Tensor) -> int:
            return capture_need(copy, few, images.passes(BATCH_SIZE, gradients=True), self._labels())

        stores = STORES + len(segments(model))
        share = share_of(self.memory_budget, self.name, quantizable, images, need, stores)
        quantized = quantizable()
        search_scales(
            quantized,
            images,
            factors=torch.linspace(self.low, self.high, self.candidates),
            rounds=self.rounds,
            metric=self.metric(),
            labels=self._labels(),
            memory_budget=share,
            progress=progress,
        )
        return quantized

    def _labels(self) -> torch.Generator | None:
        return torch.Generator().manual_seed(self.seed) if self.metric is HessianGuided else None

    @abstractmethod
    def weight_quantizer(self, site: Site) -> Quantizer:
        """The quantizer of a weight."""

    @abstractmethod
    def activation_quantizer(self, site: Site) -> Quantizer:
        """The quantizer of a layer's or a product's input."""


__all__ = ["CosineDistance", "HessianGuided", "ScaleSearch"]
