"""BRECQ: AdaRound block by block, the output's error weighted by the squared gradient of the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from iasvit.blockwise import BlockReconstruction, Fisher, Loss
from iasvit.options import Range


@dataclass
class BRECQ(BlockReconstruction):
    """BRECQ (arXiv:2102.05426) with every layer at the spec's bits, as it is compared with on vision transformers.

    As `qdrop` without the drops, and with a loss weighted by the squared task gradient, image by image; see
    `iasvit.blockwise.Fisher`. (The original learns activation scales after the rounding, and leaves the first and last
    layer at 8 bits.)

    Options: see `BlockReconstruction`.
    """

    drop: Annotated[float, Range(0, 1)] = 0.0

    name: ClassVar[str] = "brecq"

    def loss(self) -> Loss:
        """See `BlockReconstruction`."""
        return Fisher()
