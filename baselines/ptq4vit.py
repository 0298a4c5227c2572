"""PTQ4ViT: twin uniform quantizers and a search of scales by a Hessian-guided metric (arXiv:2111.12293)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from iasvit.calibration.scale_search import HessianGuided, search_scales
from iasvit.errors import IasvitError
from iasvit.methods import Calibration
from iasvit.models import Site, insert_quantizers
from iasvit.progress import Progress
from iasvit.quantizers import Quantizer, SymmetricQuantizer, TwinGELUQuantizer, TwinSoftmaxQuantizer
from iasvit.spec import QuantSpec


@dataclass
class PTQ4ViT:
    """PTQ4ViT (arXiv:2111.12293). Scales are symmetric; nothing is trained.

    - Post-softmax and post-GELU activations have twin uniform quantizers: two ranges, a step for each, a shift apart.
    - All scales are searched, in the order of algorithm 1: a layer's two operands in turn, among `candidates` multiples
      of the max-abs scale, by the error of the layer's output weighted with its Fisher, every layer at the
      full-precision model ("parallel", as in the public code: nothing else is quantized meanwhile).
    - A weight has one scale, the weight of Q, K and V one for each, that of a Conv2d one per output channel; an
      activation has one. (The public code gives each head its own scale of Q, K and V in the products.)

    Options:
        candidates: scales to try.
        low, high: the first and the last, as multiples of the max-abs scale.
        rounds: how often the two operands are searched in turn.
        seed: of the labels drawn for the Fisher.
        init_size: calibration images used.
    """

    candidates: int = 100
    low: float = 0.01
    high: float = 1.2
    rounds: int = 3
    seed: int = 0
    init_size: int = 32

    name: ClassVar[str] = "ptq4vit"

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
            metric=HessianGuided(),
            labels=torch.Generator().manual_seed(self.seed),
            init_size=self.init_size,
            progress=progress,
        )
        return quantized

    def weight_quantizer(self, site: Site) -> Quantizer:
        """One scale for each projection of a Linear, one per output channel of a Conv2d."""
        groups = site.layer.out_channels if isinstance(site.layer, nn.Conv2d) else site.groups
        return SymmetricQuantizer(site.n_bits, groups)

    def activation_quantizer(self, site: Site) -> Quantizer:
        """Twin after softmax and after GELU, else symmetric; per tensor."""
        kinds = {"softmax": TwinSoftmaxQuantizer, "gelu": TwinGELUQuantizer}
        return kinds.get(site.role, SymmetricQuantizer)(site.n_bits)
