"""APHQ-ViT: QDrop with a loss weighted by the average perturbation Hessian, after ReLU has taken GELU's place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from iasvit.blockwise import BlockReconstruction, Loss, PerturbationHessian
from iasvit.calibration import ActivationStore
from iasvit.progress import Progress


@dataclass
class APHQViT(BlockReconstruction):
    """APHQ-ViT (arXiv:2504.02508): as `qdrop`, with the loss of `iasvit.blockwise.PerturbationHessian`.

    Before, with `relu`, GELU gives way to ReLU and each MLP is reconstructed in full precision, which makes the network
    another function.

    Options: see `BlockReconstruction`.
        relu: whether GELU is replaced.
    """

    relu: bool = True

    name: ClassVar[str] = "aphq_vit"

    def loss(self) -> Loss:
        """See `BlockReconstruction`."""
        return PerturbationHessian()

    def transform(self, model: nn.Module, images: ActivationStore, progress: Progress) -> nn.Module:
        """See `BlockReconstruction`."""
        return self.relu_model(model, images, progress) if self.relu else model
