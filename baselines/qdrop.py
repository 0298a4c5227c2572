"""QDrop: AdaRound and activation scales learnt block by block, elements of activations left out at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from iasvit.blockwise import BlockReconstruction


@dataclass
class QDrop(BlockReconstruction):
    """QDrop (arXiv:2203.05740): block reconstruction in which elements stay in full precision at random.

    Rounding and activation scales are learnt together by the squared error of the block's output. Meanwhile each
    element of an activation is quantized with probability 1/2, and each element of the block's input comes from the
    quantized prefix with probability 1/2. Every layer has the spec's bits, as in comparisons on vision transformers. A
    classifier's answers are compared by their divergence. (The original leaves the first and last layer at 8 bits.)

    Options: see `BlockReconstruction`.
    """

    name: ClassVar[str] = "qdrop"
    reference: ClassVar[str] = "arXiv:2203.05740"
    published: ClassVar[str] = "W3A3, W4A4 and W6A6 on ViT, DeiT and Swin, by authors of later methods"
