"""Base PTQ: the baseline of the PTQ4ViT paper, uniform quantizers and a search of scales by cosine distance."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from iasvit.calibration.scale_search import CosineDistance, search_scales
from iasvit.errors import IasvitError
from iasvit.methods import Calibration
from iasvit.models import Site, insert_quantizers
from iasvit.progress import Progress
from iasvit.quantizers import Quantizer, SymmetricQuantizer
from iasvit.spec import QuantSpec


@dataclass
class BasePTQ:
    """Base PTQ (arXiv:2111.12293, section 4.2): PTQ4ViT without its ideas. The floor of every table.

    All quantizers are uniform with symmetric scales, those of post-softmax and post-GELU activations too. A layer's two
    scales are searched once each among `candidates` multiples of the max-abs scale, by the cosine distance of the
    layer's output to the full-precision one. A weight has one scale, the weight of Q, K and V one for each; an
    activation has one. While scales are searched nothing else is quantized: all layers read the full-precision model's
    activations of `init_size` images ("parallel" calibration, as in the public code).

    Options:
        candidates: scales to try.
        low, high: the first and the last, as multiples of the max-abs scale.
        rounds: how often the two operands are searched in turn.
        seed: every method has one; nothing is drawn here.
        init_size: calibration images used.
    """

    candidates: int = 100
    low: float = 0.5
    high: float = 1.2
    rounds: int = 1
    seed: int = 0
    init_size: int = 32

    name: ClassVar[str] = "base_ptq"

    def __post_init__(self) -> None:
        for option in ("candidates", "rounds", "init_size"):
            if getattr(self, option) < 1:
                raise IasvitError(f"{option} is {getattr(self, option)}, but it must be 1 or more")
        if not 0 < self.low <= self.high:
            raise IasvitError(f"low and high are {self.low} and {self.high}, but must be above 0 and in this order")

    def quantize(self, model: nn.Module, calibration: Calibration, spec: QuantSpec, progress: Progress) -> nn.Module:
        """See `iasvit.methods.Method`."""
        quantized = insert_quantizers(copy.deepcopy(model), spec, self.weight_quantizer, self.activation_quantizer)
        search_scales(
            quantized.requires_grad_(False),
            calibration,
            factors=torch.linspace(self.low, self.high, self.candidates),
            rounds=self.rounds,
            metric=CosineDistance(),
            labels=None,
            init_size=self.init_size,
            progress=progress,
        )
        return quantized

    def weight_quantizer(self, site: Site) -> Quantizer:
        """Symmetric, one scale for each projection in the weight."""
        return SymmetricQuantizer(site.n_bits, site.groups)

    def activation_quantizer(self, site: Site) -> Quantizer:
        """Symmetric, per tensor."""
        return SymmetricQuantizer(site.n_bits)
