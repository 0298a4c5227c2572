"""GPTQ: weights rounded column by column, the columns left making up for the error (arXiv:2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from iasvit.closed_form import ColumnByColumn


@dataclass
class GPTQ(ColumnByColumn):
    """GPTQ (arXiv:2210.17323), with this suite's static activation quantizers; no gradient.

    Activations are quantized and post-LayerNorm ones reparameterized first (`ClosedForm`); then each weight, in forward
    order, is rounded column by column against the second moments of its quantized inputs (`gptq`).

    Options: see `ColumnByColumn`.
    """

    name: ClassVar[str] = "gptq"
    reference: ClassVar[str] = "arXiv:2210.17323"
    published: ClassVar[str] = "W4A4 on ViT, DeiT, Swin with static activations, by the authors of ERQ"
    version: ClassVar[int] = 1
