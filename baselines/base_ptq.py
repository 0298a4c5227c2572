"""Base PTQ: the baseline of the PTQ4ViT paper, uniform quantizers and a search of scales by cosine distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from iasvit.calibration.search_method import CosineDistance, ScaleSearch
from iasvit.models import Site
from iasvit.options import Range
from iasvit.quantizers import Quantizer, SymmetricQuantizer


@dataclass
class BasePTQ(ScaleSearch):
    """Base PTQ (arXiv:2111.12293, section 4.2): PTQ4ViT without twin ranges and Hessian guidance. The floor of every
    table.

    All quantizers are uniform with symmetric scales, those of post-softmax and post-GELU activations too. A layer's two
    scales are searched once each among `candidates` multiples of the max-abs scale, by the cosine distance of the
    layer's output to the full-precision one. A weight has one scale, the weight of Q, K and V one for each; an
    activation has one. While scales are searched nothing else is quantized: all layers read the full-precision model's
    activations of `init_size` images ("parallel" calibration, as in the public code).

    Options: see `ScaleSearch`.
    """

    low: Annotated[float, Range(above=0)] = 0.5

    name: ClassVar[str] = "base_ptq"
    reference: ClassVar[str] = "arXiv:2111.12293, section 4.2"
    published: ClassVar[str] = "W6A6, W8A8 on ViT, DeiT, Swin"
    metric: ClassVar[type[CosineDistance]] = CosineDistance
    candidate_forwards: ClassVar[float] = 4.0

    def weight_quantizer(self, site: Site) -> Quantizer:
        """Symmetric, one scale for each projection in the weight."""
        return SymmetricQuantizer(site.n_bits, site.groups)

    def activation_quantizer(self, site: Site) -> Quantizer:
        """Symmetric, per tensor."""
        return SymmetricQuantizer(site.n_bits)
