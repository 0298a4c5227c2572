"""Tiny models, quick to quantize, and the methods under test by name."""

from __future__ import annotations

from pathlib import Path

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from baselines.adalog import AdaLog
from baselines.base_ptq import BasePTQ
from baselines.erq import ERQ
from baselines.gptaq import GPTAQ
from baselines.gptq import GPTQ
from baselines.minmax import MinMax
from baselines.ptq4vit import PTQ4ViT
from baselines.repq_vit import RepQViT
from baselines.rtn import RTN
from iasvit.progress import Progress

METHODS = {cls.name: cls for cls in (BasePTQ, MinMax, PTQ4ViT, RepQViT, RTN, GPTQ, GPTAQ, ERQ, AdaLog)}
FAMILIES = ("vit", "swin")


def tiny_model(family: str, seed: int = 0) -> nn.Module:
    """A ViT of 2 blocks, or a Swin of 2 stages with shifted windows, whose weights are large enough to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "vit":
            model: nn.Module = VisionTransformer(
                img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=10
            )
        else:
            model = SwinTransformer(
                img_size=32, patch_size=4, embed_dim=12, depths=(2, 1), num_heads=(2, 3), window_size=4, num_classes=10
            )
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.25)
            elif "norm" in name:
                parameter.data.uniform_(0.3, 2.0) if name.endswith("weight") else parameter.data.normal_()
            else:
                parameter.data.normal_(std=0.1)
    return model.requires_grad_(False).eval()


def tiny_images(model: nn.Module, count: int, seed: int = 1) -> Tensor:
    """Noise images of the model's size."""
    size = model.patch_embed.img_size
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


class Stopped(Exception):
    """Raised by `StopAfter`."""


class StopAfter(Progress):
    """Stops the work when so many segments are recorded."""

    def __init__(self, checkpoint: Path, segments: int) -> None:
        super().__init__(checkpoint=checkpoint)
        self.left = segments

    def save(self, step: int, state: dict[str, Tensor]) -> None:
        super().save(step, state)
        self.left -= 1
        if not self.left:
            raise Stopped
