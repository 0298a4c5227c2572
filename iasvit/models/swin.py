"""Adapter for timm's SwinTransformer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.layers import ClassifierHead
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from iasvit.models.base import Adapter, Inserter, NormLinearPair, Segment
from iasvit.models.blocks import (
    activation_class,
    block_pairs,
    check_block,
    data_config,
    head_facts,
    insert_block,
    mlp_ratio,
    require,
    set_eps,
)
from iasvit.models.parts import MLP, Heads, heads_of, mlp_of


class SwinAdapter(Adapter):
    """Swin Transformer of timm: shifted-window attention, patch merging between stages."""

    model_class = SwinTransformer

    def insert(self, model: SwinTransformer, inserter: Inserter) -> None:
        """See `insert_quantizers`."""
        inserter.layer(model, "patch_embed.proj", None)
        for prefix, module in _links(model):
            if prefix.endswith("downsample"):
                inserter.layer(model, f"{prefix}.reduction", "norm")
            else:
                # Windows that are not shifted have no mask, and the block passes None each time.
                dynamic = getattr(module, "dynamic_mask", False)
                masked = module.attn_mask is not None or (dynamic and any(module.shift_size))
                absent = () if masked else ("mask",)
                insert_block(model, module, prefix, inserter, SwinTransformerBlock, WindowAttention, absent)
                sizes = zip(module.input_resolution, module.window_size, strict=True)
                if dynamic or any(side % window for side, window in sizes):
                    module.__class__ = _FilledWindows
                    module.register_buffer("padding", torch.zeros_like(module.norm1.bias))
        head, fc = _head(model)
        if isinstance(fc, nn.Linear):
            inserter.layer(model, head, "input")

    def pairs(self, model: SwinTransformer) -> list[NormLinearPair]:
        """norm1→qkv and norm2→fc1 of every block, and norm→reduction of every patch merging."""
        result = []
        for prefix, module in _links(model):
            if prefix.endswith("downsample"):
                result.append(NormLinearPair(f"{prefix}.norm", module.norm, (module.reduction,)))
            else:
                attention, mlp = block_pairs(module, prefix)
                result += [replace(attention, padding=getattr(module, "padding", None)), mlp]
        return result

    def segments(self, model: SwinTransformer) -> list[Segment]:
        """Patch embedding; each patch merging and block; norm, pooling and head."""
        return [
            Segment("patch_embed", model.patch_embed, (("patch_embed", model.patch_embed),)),
            *(Segment(name, module, ((name, module),)) for name, module in _links(model)),
            Segment("head", lambda x: model.forward_head(model.norm(x)), (("head", model.head),)),
        ]

    def describe(self, model: SwinTransformer) -> dict[str, Any]:
        """Constructor arguments of an equal model; head_bias False where its head has none, and bare_head True where
        a Linear stands in place of timm's head: without pooling, as it is then.
        """
        for prefix, module in _links(model):
            if prefix.endswith("downsample"):
                require(type(module) is PatchMerging, prefix, module, PatchMerging.__name__)
            else:
                check_block(module, prefix, SwinTransformerBlock, WindowAttention)
        head, fc = _head(model)
        blocks = [stage.blocks[0] for stage in model.layers]
        act = type(blocks[0].mlp.act).__name__
        return {
            "class": "SwinTransformer",
            "img_size": list(model.patch_embed.img_size),
            "patch_size": model.patch_embed.patch_size[0],
            "in_chans": model.patch_embed.proj.in_channels,
            **head_facts(fc),
            "global_pool": "" if head == "head" else model.head.global_pool.pool_type,
            **({"bare_head": True} if head == "head" and isinstance(fc, nn.Linear) else {}),
            "embed_dim": model.patch_embed.proj.out_channels,
            "depths": [len(stage.blocks) for stage in model.layers],
            "num_heads": [block.attn.num_heads for block in blocks],
            "head_dim": [block.attn.proj.in_features // block.attn.num_heads for block in blocks],
            "strict_img_size": not model.dynamic_img_size,
            "stages": [
                {
                    "feat_size": list(stage.input_resolution),
                    "window_size": list(block.window_size),
                    "always_partition": block.always_partition,
                }
                for stage, block in zip(model.layers, blocks, strict=True)
            ],
            "mlp_ratio": [mlp_ratio(block.mlp, block.dim) for block in blocks],
            "qkv_bias": blocks[0].attn.qkv.bias is not None,
            "drop_path_rate": 0.0,
            "eps": blocks[0].norm1.eps,
            **({} if act == "GELU" else {"act": act}),
        }

    def build(self, description: dict[str, Any]) -> SwinTransformer:
        """A model of random weights from what `describe` returned."""
        arguments = dict(description)
        arguments.pop("class")
        eps, stages = arguments.pop("eps"), arguments.pop("stages")
        act = activation_class(arguments.pop("act", "GELU"))
        for name in ("img_size", "depths", "num_heads", "head_dim", "mlp_ratio"):
            arguments[name] = tuple(arguments[name])
        head_bias, bare_head = arguments.pop("head_bias", True), arguments.pop("bare_head", False)
        window_size = tuple(stages[0]["window_size"])
        model = SwinTransformer(**arguments, window_size=window_size, weight_init="skip")
        for stage, sizes in zip(model.layers, stages, strict=True):  # windows may differ from stage to stage
            stage.set_input_size(tuple(sizes["feat_size"]), tuple(sizes["window_size"]), sizes["always_partition"])
        if not head_bias:
            model.head.fc.bias = None
        if bare_head:
            model.head = model.head.fc
        set_eps(model, eps)
        for mlp in self.mlps(model) if act is not nn.GELU else ():
            mlp.act[0].act = act()
        return model

    def heads(self, model: SwinTransformer) -> list[Heads]:
        """The attention of every block."""
        return [heads_of(block, name) for name, block in _blocks(model)]

    def mlps(self, model: SwinTransformer) -> list[MLP]:
        """The MLP of every block."""
        return [mlp_of(block, name) for name, block in _blocks(model)]

    def data(self, model: SwinTransformer) -> dict[str, Any]:
        """See `Adapter`."""
        return data_config(model, self.describe(model))


class _FilledWindows(SwinTransformerBlock):
    """timm's block with `padding` (C,), not 0, where it fills up windows at the right and the bottom.

    What it fills up stands beside the outputs of a LayerNorm, and reparameterization changes both.
    """

    def _attn(self, x: Tensor) -> Tensor:
        (height, width), shift = x.shape[1:3], self.shift_size
        bottom, right = -height % self.window_size[0], -width % self.window_size[1]
        if not bottom and not right:
            return super()._attn(x)
        # timm shifts and then fills up, so what is filled here has to be where it will be after the shift.
        filled = self.padding.expand(x.shape[0], height + bottom, width + right, -1).clone()
        filled[:, :height, :width] = x.roll((-shift[0], -shift[1]), dims=(1, 2))
        output = super()._attn(filled.roll(shift, dims=(1, 2))).roll((-shift[0], -shift[1]), dims=(1, 2))
        return output[:, :height, :width].roll(shift, dims=(1, 2))


def _head(model: SwinTransformer) -> tuple[str, nn.Module]:
    """Path and module of the last layer: in timm's head, or what a user has put in its place."""
    return ("head.fc", model.head.fc) if isinstance(model.head, ClassifierHead) else ("head", model.head)


def _blocks(model: SwinTransformer) -> list[tuple[str, nn.Module]]:
    """(path, module) of each block."""
    return [(name, module) for name, module in _links(model) if not name.endswith("downsample")]


def _links(model: SwinTransformer) -> list[tuple[str, nn.Module]]:
    """(path, module) of each patch merging and each block, in the order in which they run."""
    result = []
    for i, stage in enumerate(model.layers):
        if not isinstance(stage.downsample, nn.Identity):
            result.append((f"layers.{i}.downsample", stage.downsample))
        result += [(f"layers.{i}.blocks.{j}", block) for j, block in enumerate(stage.blocks)]
    return result
