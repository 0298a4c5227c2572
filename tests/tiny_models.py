"""Tiny timm models with weights that make attention and channels uneven, as training does, and images for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from iasvit.label import KEY
from iasvit.models import Adapter, Inserter, Segment, Site, insert_quantizers
from iasvit.quantizers import Quantizer, SULQuantizer, UniformQuantizer
from iasvit.spec import QuantSpec

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
_SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "num_classes": 10}
_SWIN |= {"depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "drop_path_rate": 0.0}


def stir(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter values that differ from channel to channel, by a seed; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            module = model.get_submodule(name.rpartition(".")[0])
            if isinstance(module, nn.LayerNorm):
                parameter.copy_(torch.exp(0.5 * noise) if name.endswith("weight") else 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.ndim > 1 and parameter.shape[0] > 1:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.5 * noise)
    return model.eval()


def vit(seed: int = 0, **changes: Any) -> VisionTransformer:
    """A ViT of 2 blocks, 32 channels and 17 tokens."""
    return stir(VisionTransformer(**{**_VIT, **changes}), seed)


def deit(seed: int = 0, **changes: Any) -> VisionTransformerDistilled:
    """A distilled DeiT of 2 blocks: two heads and two class tokens."""
    return stir(VisionTransformerDistilled(**{**_VIT, **changes}), seed)


def swin(seed: int = 0, **changes: Any) -> SwinTransformer:
    """A Swin of 2 stages: 8×8 tokens in windows of 4 with and without shift, then one window of 4×4."""
    return stir(SwinTransformer(**{**_SWIN, **changes}), seed)


MODELS: dict[str, Callable[..., nn.Module]] = {"vit": vit, "deit": deit, "swin": swin}


def images(count: int = 12, size: int = 32, seed: int = 0) -> Tensor:
    """Images count×3×size×size with smooth structure, of mean 0."""
    generator = torch.Generator().manual_seed(1000 + seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    fine = torch.randn(count, 3, size, size, generator=generator)
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") + 0.3 * fine


def weight_quantizer(site: Site) -> Quantizer:
    """Uniform per output channel."""
    return UniformQuantizer(site.n_bits, channel_dim=0)


def activation_quantizer(site: Site) -> Quantizer:
    """As I&S-ViT has it: SULQ, per channel, per tensor."""
    if site.role == "softmax":
        return SULQuantizer(site.n_bits)
    return UniformQuantizer(site.n_bits, channel_dim=-1 if site.role == "norm" else None)


def quantizable(model: nn.Module, spec: str = "W3A3") -> nn.Module:
    """The model itself with quantizers in it, uncalibrated."""
    return insert_quantizers(model, QuantSpec.parse(spec), weight_quantizer, activation_quantizer)


def switch(model: nn.Module, enabled: bool) -> nn.Module:
    """The model itself, all its quantizers on or off."""
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.enabled = enabled
    return model


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as it is, to compare to the bit (`same_bits`)."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two state dicts hold the same tensors to the bit; what they say of method and options is left out."""
    names = first.keys() - {KEY}
    return names == second.keys() - {KEY} and all(torch.equal(first[name], second[name]) for name in names)


class ChainAdapter(Adapter):
    """The adapter of a test's own model, whose method `segments` says what it is made of."""

    def insert(self, model: nn.Module, inserter: Inserter) -> None:
        raise AssertionError("not needed")

    def segments(self, model: nn.Module) -> list[Segment]:
        return model.segments()

    def describe(self, model: nn.Module) -> dict[str, object]:
        raise AssertionError("not needed")

    def build(self, description: dict[str, object]) -> nn.Module:
        raise AssertionError("not needed")
