"""What passes through a backbone on mini scenes: attention maps, and the channel ranges of LayerNorms' outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tasks.mini import zoo

BATCH = 20
STRIDE = 17
SCENES = 60


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """All transformer blocks of a timm ViT or Swin, in the order in which they run."""
    if hasattr(model, "layers"):
        return [block for stage in model.layers for block in stage.blocks]
    return list(model.blocks)


def norm_linear_sites(model: nn.Module) -> Iterator[tuple[int, str, nn.LayerNorm, nn.Linear]]:
    """(block, site, LayerNorm, the Linear that alone reads it) of a timm ViT or Swin, in running order."""
    numbers = {block: i for i, block in enumerate(blocks_of(model))}
    for stage in getattr(model, "layers", [None]):
        downsample = getattr(stage, "downsample", None)
        if isinstance(getattr(downsample, "reduction", None), nn.Linear):
            yield numbers[stage.blocks[0]], "downsample.norm->reduction", downsample.norm, downsample.reduction
        for block in model.blocks if stage is None else stage.blocks:
            yield numbers[block], "norm1->qkv", block.norm1, block.attn.qkv
            yield numbers[block], "norm2->fc1", block.norm2, block.mlp.fc1


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Attention in steps, so that its dropout module (idle in eval()) sees the softmax; restored afterwards."""
    fused = [(module, module.fused_attn) for module in model.modules() if hasattr(module, "fused_attn")]
    try:
        for module, _ in fused:
            module.fused_attn = False
        yield
    finally:
        for module, was in fused:
            module.fused_attn = was


@torch.inference_mode()
def observe(model: nn.Module, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Run the images through the model and watch it.

    Args:
        model: a timm ViT or Swin in eval().
        images: float32 n×3×H×W, normalised.

    Returns:
        For each block, every 17th value of a batch's attention map (float32, one dimension); and for each of
        `norm_linear_sites`, max - min of each channel of the LayerNorm's output (float32, one dimension).
    """
    blocks, sites = blocks_of(model), list(norm_linear_sites(model))
    attention: list[list[Tensor]] = [[] for _ in blocks]
    low: list[Tensor | None] = [None] * len(sites)
    high: list[Tensor | None] = [None] * len(sites)

    def watch_attention(i: int):  # noqa: ANN202
        return lambda _module, _inputs, output: attention[i].append(output.flatten()[::STRIDE].clone())

    def watch_norm(i: int):  # noqa: ANN202
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            least, most = output.flatten(0, -2).aminmax(dim=0)
            low[i] = least if low[i] is None else torch.minimum(low[i], least)
            high[i] = most if high[i] is None else torch.maximum(high[i], most)

        return hook

    handles = [block.attn.attn_drop.register_forward_hook(watch_attention(i)) for i, block in enumerate(blocks)]
    handles += [norm.register_forward_hook(watch_norm(i)) for i, (_, _, norm, _) in enumerate(sites)]
    try:
        with unfused(model):
            for batch in images.split(BATCH):
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in attention], [most - least for least, most in zip(low, high, strict=True)]


def scene_images(model: nn.Module, split: str, count: int) -> Tensor:
    """The first `count` scenes of a split, normalised for the model: float32 n×3×H×W."""
    from tasks.mini import scenes

    images, _ = scenes.render_images(split, 0, count, zoo.IMAGE_SIZE)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
