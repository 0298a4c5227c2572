"""PTQ4ViT: twin uniform quantizers and a search of scales by a Hessian-guided metric (arXiv:2111.12293)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import nn

from iasvit.calibration.search_method import HessianGuided, ScaleSearch
from iasvit.models import Site
from iasvit.options import Range
from iasvit.quantizers import Quantizer, SymmetricQuantizer, TwinGELUQuantizer, TwinSoftmaxQuantizer


@dataclass
class PTQ4ViT(ScaleSearch):
    """PTQ4ViT (arXiv:2111.12293): twin uniform ranges, and scales searched by the layer's output. Scales are symmetric;
    nothing is trained.

    - Post-softmax and post-GELU activations have twin uniform quantizers: two ranges, a step for each, a shift apart.
    - All scales are searched, in the order of algorithm 1: a layer's two operands in turn, among `candidates` multiples
      of the max-abs scale, by the error of the layer's output weighted with its Fisher, every layer at the
      full-precision model ("parallel", as in the public code: nothing else is quantized meanwhile).
    - A weight has one scale, the weight of Q, K and V one for each, that of a Conv2d one per output channel; an
      activation has one. (The public code gives each head its own scale of Q, K and V in the products.)

    Options: see `ScaleSearch`.
    """

    rounds: Annotated[int, Range(1)] = 3

    name: ClassVar[str] = "ptq4vit"
    reference: ClassVar[str] = "arXiv:2111.12293"
    published: ClassVar[str] = "W6A6, W8A8 by its authors; W3A3, W4A4 by others"
    metric: ClassVar[type[HessianGuided]] = HessianGuided
    candidate_forwards: ClassVar[float] = 0.45

    def weight_quantizer(self, site: Site) -> Quantizer:
        """One scale for each projection of a Linear, one per output channel of a Conv2d."""
        groups = site.layer.out_channels if isinstance(site.layer, nn.Conv2d) else site.groups
        return SymmetricQuantizer(site.n_bits, groups)

    def activation_quantizer(self, site: Site) -> Quantizer:
        """Twin after softmax and after GELU, else symmetric; per tensor."""
        kinds = {"softmax": TwinSoftmaxQuantizer, "gelu": TwinGELUQuantizer}
        return kinds.get(site.role, SymmetricQuantizer)(site.n_bits)
