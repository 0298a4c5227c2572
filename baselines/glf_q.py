"""GLF-Q: weights and scales learnt by straight-through estimation, the features behind the block compared too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import nn

from iasvit.blockwise import BlockRecipe, BlockReconstruction, DetectorSuffix, Loss, MeanSquare, Settings, Teacher
from iasvit.blockwise.heads import learn_neck
from iasvit.blockwise.transforms import rotated
from iasvit.calibration import ActivationStore
from iasvit.options import Range
from iasvit.progress import Progress


@dataclass
class GLFQ(BlockReconstruction):
    """GLF-Q (preprint of 2026; no public code): rotations, ReLU MLPs, and a loss through the frozen suffix.

    The weights themselves and the activation scales are learnt by straight-through estimation, 3000 steps a block from
    2e-5 and 2e-4. Loss: the error of the features (what the head reads) after the frozen full-precision rest of the
    network, and twice the block's own, each over its first value. On a detector, in place of the features: the error of
    the backbone's stages, twice, and of what the RoI heads put out for boxes and for masks, half each. The neck then
    learns by its own error; RPN and heads are calibrated.

    Options: see `BlockReconstruction`.
        rotation: rotate the residual stream (where LayerNorm can become RMSNorm) and the heads.
        relu: replace GELU by ReLU and reconstruct each MLP; the network is another function then.
        relu_iterations: steps of an MLP; the recipe's where not given.
    """

    drop: Annotated[float, Range(0, 1)] = 0.0
    rotation: bool = True
    relu: bool = True
    relu_iterations: Annotated[int | None, Range(0)] = None

    name: ClassVar[str] = "glf_q"
    reference: ClassVar[str] = "preprint of 2026"
    published: ClassVar[str] = "W3A3 and W4A4 on ViT, DeiT and Swin"
    recipes: ClassVar[dict[str, BlockRecipe]] = {
        "paper": BlockRecipe(3000, 2e-5, 2e-4),
        "fast": BlockRecipe(300, 2e-4, 2e-3, 500, 4e-4),
        "mini": BlockRecipe(600, 1e-3, 2e-3, 300, 1e-3),
    }
    adaround: ClassVar[bool] = False
    suffixes: ClassVar[bool] = True
    head_divergence: ClassVar[bool] = False

    def loss(self) -> Loss:
        """See `BlockReconstruction`."""
        return DetectorSuffix(features=1.0, local=2.0, inner=MeanSquare(), stages=2.0, boxes=0.5, masks=0.5)

    def forwards(self, calib_size: int, detector: bool) -> float:
        """See `iasvit.methods.Method`; for a detector also its heads behind each block, and its neck's steps."""
        steps = self.settings().iterations * self.batch_size
        return super().forwards(calib_size, detector) + (12 * steps if detector else 0)

    def transform(self, model: nn.Module, images: ActivationStore, progress: Progress) -> nn.Module:
        """See `BlockReconstruction`."""
        if self.rotation:
            model = rotated(model, self.seed)
        return self.relu_model(model, images, progress, self.relu_iterations) if self.relu else model

    def finish(self, quantized: nn.Module, teacher: Teacher, settings: Settings, progress: Progress) -> None:
        """See `BlockReconstruction`."""
        learn_neck(quantized, teacher, teacher.images, settings, progress, self.seed)
