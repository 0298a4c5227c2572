"""QDrop: AdaRound and activation scales learnt block by block, elements of activations left out at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from iasvit.blockwise import BlockReconstruction


@dataclass
class QDrop(BlockReconstruction):
    """QDrop (arXiv:2203.05740) with every layer at the spec's bits, as it is compared with on vision transformers.

    Rounding and activation scales are learnt together by the squared error of the block's output. While they are, each
    element of an activation is quantized, and each of the block's input comes from the quantized prefix, with
    probability 1/2. A classifier's answers are compared by their divergence. (The original leaves the first and last
    layer at 8 bits.)

    Options: see `BlockReconstruction`.
    """

    name: ClassVar[str] = "qdrop"
