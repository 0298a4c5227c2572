"""BRECQ: AdaRound block by block, the output's error weighted by the squared gradient of the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from iasvit.blockwise import BlockReconstruction, Fisher, Loss
from iasvit.options import Range


@dataclass
class BRECQ(BlockReconstruction):
    """BRECQ (arXiv:2102.05426): block reconstruction weighted by the squared task gradient.

    As `qdrop`, without the drops and with the loss of `iasvit.blockwise.Fisher`, image by image. Every layer has the
    spec's bits, as in comparisons on vision transformers. (The original learns activation scales after the rounding,
    and leaves the first and last layer at 8 bits.)

    Options: see `BlockReconstruction`.
    """

    drop: Annotated[float, Range(0, 1)] = 0.0

    name: ClassVar[str] = "brecq"
    reference: ClassVar[str] = "arXiv:2102.05426"
    published: ClassVar[str] = "W4A4 and W6A6 on ViT, DeiT and Swin, by authors of later methods"

    def loss(self) -> Loss:
        """See `BlockReconstruction`."""
        return Fisher()
