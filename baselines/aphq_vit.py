"""APHQ-ViT: QDrop with a loss weighted by the average perturbation Hessian, after ReLU has taken GELU's place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import nn

from iasvit.blockwise import BlockReconstruction, Loss, PerturbationHessian, Teacher, mlp_weights
from iasvit.calibration import ActivationStore
from iasvit.options import Range
from iasvit.progress import Progress


@dataclass
class APHQViT(BlockReconstruction):
    """APHQ-ViT (arXiv:2504.02508): ReLU MLPs, then `qdrop` weighted by the average perturbation Hessian.

    The loss is `iasvit.blockwise.PerturbationHessian`. With `relu`, ReLU first replaces GELU, and each MLP is
    reconstructed in full precision, its error weighted by the same Hessian. The network is then another function.

    Options: see `BlockReconstruction`.
        relu: whether GELU is replaced.
        relu_iterations: steps of an MLP; the recipe's where not given.
    """

    relu: bool = True
    relu_iterations: Annotated[int | None, Range(0)] = None

    name: ClassVar[str] = "aphq_vit"
    reference: ClassVar[str] = "arXiv:2504.02508"
    published: ClassVar[str] = "W3A3, W4A4 and W6A6 on ViT, DeiT and Swin"

    def loss(self) -> Loss:
        """See `BlockReconstruction`."""
        return PerturbationHessian()

    def transform(self, model: nn.Module, images: ActivationStore, progress: Progress) -> nn.Module:
        """See `BlockReconstruction`."""
        if not self.relu:
            return model
        with progress.phase("calibration"):
            weights = mlp_weights(Teacher(model, images, self.name, self.compile), images, self.seed)
        return self.relu_model(model, images, progress, self.relu_iterations, weights)
