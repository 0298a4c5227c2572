"""GLF-Q's loss on a detector: the backbone's stages and the RoI heads behind the block, and the block's own error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iasvit.blockwise.losses import Block, FrozenSuffix
from iasvit.models import is_detector


@dataclass
class DetectorSuffix(FrozenSuffix):
    """`FrozenSuffix`, which on a detector compares what GLF-Q's text names.

    There it is e(stages) / c₁ · `stages` + e(boxes) / c₂ · `boxes` + e(masks) / c₃ · `masks` + e(block) / c₄ · `local`,
    c what each is on the first batch, and `features` counts for nothing. The first three are
    `Teacher.detector_errors`; regions are those of the full-precision detector.

    Attributes:
        stages: weight of the error of what the backbone's stages put out.
        boxes: weight of the error of what the RoI heads put out for boxes, classes and offsets.
        masks: weight of the error of what they put out for masks.
    """

    stages: float = 2.0
    boxes: float = 0.5
    masks: float = 0.5

    def begin(self, block: Block) -> None:
        """See `Loss`."""
        super().begin(block)
        self.on_detector = is_detector(block.teacher.model)
        if self.on_detector:
            self.units = torch.ones(4, device=self.units.device)

    @property
    def resident(self) -> bool:
        """See `Loss`; how many regions a detector has differs from step to step."""
        return super().resident and not self.on_detector

    def _parts(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        if not self.on_detector:
            return super()._parts(output, target, images)
        behind = self.teacher.detector_errors(self.index, *self._whole(output, target, images))
        return torch.cat([behind, self.inner(output, target, images)[None]])

    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        """See `Loss`."""
        if not self.on_detector:
            return super().__call__(output, target, images)
        stages, boxes, masks, own = (self._parts(output, target, images) / self.units).unbind()
        return self.stages * stages + self.boxes * boxes + self.masks * masks + self.local * own
