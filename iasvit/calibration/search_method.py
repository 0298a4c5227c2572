"""What the methods have in common that search scales by a layer's output and do nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from iasvit.calibration.scale_search import CosineDistance, HessianGuided, Metric, search_scales
from iasvit.errors import IasvitError
from iasvit.methods import Calibration
from iasvit.models import Site, prepare
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

    candidates: int = 100
    low: float = 0.01
    high: float = 1.2
    rounds: int = 1
    seed: int = 0
    init_size: int = 32

    metric: ClassVar[type[Metric]]

    def __post_init__(self) -> None:
        for option in ("candidates", "rounds", "init_size"):
            if getattr(self, option) < 1:
                raise IasvitError(f"{option} is {getattr(self, option)}, but it must be 1 or more")
        if not 0 < self.low <= self.high:
            raise IasvitError(f"low and high are {self.low} and {self.high}, but must be above 0 and in this order")

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
