"""LS-ViT: QDrop with a loss of a Hessian fitted by least squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from iasvit.blockwise import BlockReconstruction, LeastSquaresHessian, Loss


@dataclass
class LSViT(BlockReconstruction):
    """LS-ViT (CVPR 2026): `qdrop` weighted by a Hessian fitted by least squares.

    Options: see `BlockReconstruction`.
    """

    name: ClassVar[str] = "ls_vit"
    reference: ClassVar[str] = "CVPR 2026"
    published: ClassVar[str] = "W3A3, W4A4 and W6A6 on ViT, DeiT and Swin"

    def loss(self) -> Loss:
        """See `BlockReconstruction`."""
        return LeastSquaresHessian()
