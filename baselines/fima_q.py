"""FIMA-Q: QDrop with a loss of a diagonal and a low-rank Fisher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import nn

from iasvit.blockwise import BlockReconstruction, Loss, LowRankFisher, per_token
from iasvit.calibration import ActivationStore
from iasvit.options import Range


@dataclass
class FIMAQ(BlockReconstruction):
    """FIMA-Q (arXiv:2506.11543): as `qdrop`, with the loss of `iasvit.blockwise.LowRankFisher`.

    One scale per tensor, the suite's common rule. `fima_q[per_token=true]` is by the rule of the public configurations,
    which learn one for each token's position; its rows say so, and its images are of one size.

    Options: see `BlockReconstruction`.
        rank: refreshes of the Fisher, each of which adds to its rank.
        damping: of the inverse of D Dᵀ, as a part of its mean diagonal element.
        per_token: one scale for each token's position; see `iasvit.blockwise.per_token`.
    """

    rank: Annotated[int, Range(1, 64)] = 5
    damping: Annotated[float, Range(above=0)] = 1e-6
    per_token: bool = False

    name: ClassVar[str] = "fima_q"
    reference: ClassVar[str] = "arXiv:2506.11543"
    published: ClassVar[str] = "W3A3, W4A4 and W6A6 on ViT, DeiT and Swin"

    def loss(self) -> Loss:
        """See `BlockReconstruction`."""
        return LowRankFisher(self.rank, damping=self.damping)

    def initialise(self, quantized: nn.Module, images: ActivationStore, share: int | None) -> None:
        """See `BlockReconstruction`."""
        super().initialise(quantized, images, share)
        if self.per_token:
            per_token(quantized, images.gather([0]))
