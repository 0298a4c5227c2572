"""What the study of `tasks.studies.real_vit` consists of: a network and photographs, whichever their source."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BACKBONE = "vit_small_patch14_dinov2"
SIZE = 224
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CALIBRATION, TEST = 1024, 1200
BATCH = 64  # images that are enlarged at a time


@dataclass(frozen=True)
class Study:
    """What is written.

    Attributes:
        state: of `build`'s network, float32.
        calibration: uint8 n×3×h×w.
        test: uint8 m×3×h×w.
        labels: int64 m, places in CLASSES.
    """

    state: dict[str, Tensor]
    calibration: Tensor
    test: Tensor
    labels: Tensor


def build() -> nn.Module:
    """The network without trained weights, eval mode: images n×3×224×224 → logits n×10."""
    return timm.create_model(BACKBONE, pretrained=False, num_classes=len(CLASSES), img_size=SIZE).eval()


def enlarge(images: Tensor) -> Tensor:
    """uint8 n×3×h×w → uint8 n×224×224×3, bicubic."""
    large = F.interpolate(images.float() / 255, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    return (large.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
