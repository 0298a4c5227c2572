"""FIMA-Q: QDrop with a loss of a diagonal and a low-rank Fisher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from iasvit.blockwise import BlockReconstruction, Loss, LowRankFisher
from iasvit.options import Range


@dataclass
class FIMAQ(BlockReconstruction):
    """FIMA-Q (arXiv:2506.11543): as `qdrop`, with the loss of `iasvit.blockwise.LowRankFisher`.

    One scale per tensor, the suite's common rule; the public configurations learn one for each token's position.

    Options: see `BlockReconstruction`.
        rank: refreshes of the Fisher, each of which adds to its rank.
    """

    rank: Annotated[int, Range(1, 64)] = 5

    name: ClassVar[str] = "fima_q"

    def loss(self) -> Loss:
        """See `BlockReconstruction`."""
        return LowRankFisher(self.rank)
