"""What the methods have in common that search scales by a layer's output and do nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import nn

from iasvit.calibration.scale_search import CosineDistance, HessianGuided, Metric, search_scales
from iasvit.errors import IasvitError
from iasvit.methods import Calibration
from iasvit.models import Site, prepare
from iasvit.options import Range, check_fields
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
    """

    candidates: Annotated[int, Range(1, 100_000)] = 100
    low: Annotated[float, Range(above=0)] = 0.01
    high: Annotated[float, Range(above=0)] = 1.2
    rounds: Annotated[int, Range(1)] = 1
    seed: int = 0
    init_size: Annotated[int, Range(1)] = 32

    metric: ClassVar[type[Metric]]

    def __post_init__(self) -> None:
        check_fields(self)
        if self.low > self.high:
            raise IasvitError(f"low is {self.low} and high {self.high}, but low must not be the larger")

    def images_used(self, calib_size: int) -> int:
        """See `iasvit.methods.Method`; the first `init_size`."""
        return min(self.init_size, calib_size)

    def forwards(self, calib_size: int) -> float:
        """See `iasvit.methods.Method`; a search of every operand, measured."""
        return 1.5 * self.rounds * self.candidates * self.images_used(calib_size)

    def quantize(self, model: nn.Module, calibration: Calibration, spec: QuantSpec, progress: Progress) -> nn.Module:
        """See `iasvit.methods.Method`."""
        quantized = prepare(model, spec, self.weight_quantizer, self.activation_quantizer)
        search_scales(
            quantized,
            calibration,
            factors=torch.linspace(self.low, self.high, self.candidates),
            rounds=self.rounds,
            metric=self.metric(),
            labels=torch.Generator().manual_seed(self.seed) if self.metric is HessianGuided else None,
            init_size=self.init_size,
            progress=progress,
        )
        return quantized

    @abstractmethod
    def weight_quantizer(self, site: Site) -> Quantizer:
        """The quantizer of a weight."""

    @abstractmethod
    def activation_quantizer(self, site: Site) -> Quantizer:
        """The quantizer of a layer's or a product's input."""


__all__ = ["CosineDistance", "HessianGuided", "ScaleSearch"]
