"""LS-ViT: QDrop with a loss of a Hessian fitted by least squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from iasvit.blockwise import BlockReconstruction, LeastSquaresHessian, Loss


@dataclass
class LSViT(BlockReconstruction):
    """LS-ViT (CVPR 2026): as `qdrop`, with the loss of `iasvit.blockwise.LeastSquaresHessian`.

    Options: see `BlockReconstruction`.
    """

    name: ClassVar[str] = "ls_vit"

    def loss(self) -> Loss:
        """See `BlockReconstruction`."""
        return LeastSquaresHessian()
