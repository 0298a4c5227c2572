"""Adapter for timm's VisionTransformer: ViT, DeiT and distilled DeiT."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from iasvit.errors import IasvitError
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
from iasvit.models.parts import MLP, Heads, Reader, ResidualStream, Writer, heads_of, mlp_of, use_rms_norms
from iasvit.nn import RMSNorm


class ViTAdapter(Adapter):
    """ViT, DeiT (VisionTransformer) and distilled DeiT (VisionTransformerDistilled) of timm."""

    model_class = VisionTransformer

    def insert(self, model: VisionTransformer, inserter: Inserter) -> None:
        """See `insert_quantizers`."""
        require(model.attn_pool is None, "attn_pool", model.attn_pool, "pooling by token or average")
        inserter.layer(model, "patch_embed.proj", None)
        for index, block in enumerate(model.blocks):
            prefix = f"blocks.{index}"
            insert_block(model, block, prefix, inserter, Block, Attention)
        for head in _heads(model):
            inserter.layer(model, head, "input")

    def pairs(self, model: VisionTransformer) -> list[NormLinearPair]:
        """norm1→qkv (and gate, where there is one) and norm2→fc1 of every block."""
        return [pair for index, block in enumerate(model.blocks) for pair in block_pairs(block, f"blocks.{index}")]

    def segments(self, model: VisionTransformer) -> list[Segment]:
        """Patch embedding; tokens and position embedding; each block; norm, pooling and head."""
        heads = tuple((name, model.get_submodule(name)) for name in _heads(model))
        return [
            Segment("patch_embed", model.patch_embed, (("patch_embed", model.patch_embed),)),
            Segment("pos_embed", lambda x: model.norm_pre(model.patch_drop(model._pos_embed(x))), ()),
            *(Segment(f"blocks.{i}", block, ((f"blocks.{i}", block),)) for i, block in enumerate(model.blocks)),
            Segment("head", lambda x: model.forward_head(model.norm(x)), heads),
        ]

    def describe(self, model: VisionTransformer) -> dict[str, Any]:
        """Constructor arguments of an equal model, and head_bias False where its head has none."""
        require(len(model.blocks) > 0, "blocks", model.blocks, "at least one block")
        for index, block in enumerate(model.blocks):
            check_block(block, f"blocks.{index}", Block, Attention)
        block = model.blocks[0]
        distilled = isinstance(model, VisionTransformerDistilled)
        embed = model.patch_embed
        pre_norm = not isinstance(model.norm_pre, nn.Identity)
        norm = block.norm1
        return {
            "class": "VisionTransformerDistilled" if distilled else "VisionTransformer",
            "img_size": list(embed.img_size),
            "patch_size": list(embed.patch_size),
            "in_chans": embed.proj.in_channels,
            **head_facts(model.head),
            "global_pool": model.global_pool,
            "embed_dim": embed.proj.out_channels,
            "depth": len(model.blocks),
            "num_heads": block.attn.num_heads,
            "mlp_ratio": mlp_ratio(block.mlp, embed.proj.out_channels),
            "qkv_bias": block.attn.qkv.bias is not None,
            "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
            "scale_attn_norm": not isinstance(block.attn.norm, nn.Identity),
            "scale_mlp_norm": not isinstance(block.mlp.norm, nn.Identity),
            "proj_bias": block.attn.proj.bias is not None,
            "init_values": None if isinstance(block.ls1, nn.Identity) else 1.0,
            "class_token": model.has_class_token,
            "pos_embed": "none" if model.pos_embed is None else "learn",
            "no_embed_class": model.no_embed_class,
            "reg_tokens": model.num_reg_tokens,
            "pre_norm": pre_norm,
            "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
            "fc_norm": not isinstance(model.fc_norm, nn.Identity),
            "pool_include_prefix": model.pool_include_prefix,
            "dynamic_img_size": model.dynamic_img_size,
            "eps": norm.eps,
            "act": type(block.mlp.act).__name__,
            **({"norm": "rms"} if isinstance(norm, RMSNorm) else {}),
        }

    def build(self, description: dict[str, Any]) -> VisionTransformer:
        """A model of random weights from what `describe` returned."""
        arguments = dict(description)
        classes = {cls.__name__: cls for cls in (VisionTransformer, VisionTransformerDistilled)}
        model_class = classes[arguments.pop("class")]
        eps, act = arguments.pop("eps"), arguments.pop("act")
        head_bias, norm = arguments.pop("head_bias", True), arguments.pop("norm", "layer")
        if norm not in ("layer", "rms"):
            raise IasvitError(f"norm {norm!r} is not supported; the supported ones are layer, rms")
        for name in ("img_size", "patch_size"):
            arguments[name] = tuple(arguments[name])
        if model_class is VisionTransformerDistilled:
            arguments["reg_tokens"] = 0
        model = model_class(**arguments, act_layer=activation_class(act), weight_init="skip")
        for name in _heads(model) if not head_bias else ():
            model.get_submodule(name).bias = None
        set_eps(model, eps)
        if norm == "rms":
            use_rms_norms(self.residual_stream(model))
        return model

    def residual_stream(self, model: VisionTransformer) -> ResidualStream:
        """From patch embedding and tokens through the blocks to the last norm and the head.

        Raises:
            IasvitError: something on the way is not the same for a rotated stream; the message names it.
        """
        require(isinstance(model.patch_embed.norm, nn.Identity), "patch_embed.norm", model.patch_embed.norm, "none")
        require(isinstance(model.norm_pre, nn.Identity), "norm_pre", model.norm_pre, "none")
        if model.global_pool not in ("token", "avg"):
            raise IasvitError(f"pooling {model.global_pool!r} of the model cannot be rotated; it must be token or avg")
        heads = tuple(model.get_submodule(name) for name in _heads(model))
        last = [name for name in ("norm", "fc_norm") if not isinstance(getattr(model, name), nn.Identity)]
        if not heads or len(last) != 1:
            raise IasvitError("a model can be rotated that ends in one norm and a Linear head; the one given does not")
        blocks = list(model.blocks)
        writers = [Writer(model.patch_embed.proj)]
        readers = []
        for block in blocks:
            for layer, scale in ((block.attn.proj, "ls1"), (block.mlp.fc2, "ls2")):
                scaled = not isinstance(getattr(block, scale), nn.Identity)
                writers.append(Writer(layer, (block, scale) if scaled else None))
            gate = getattr(block.attn, "gate", None)
            readers.append(Reader((block, "norm1"), (block.attn.qkv,) if gate is None else (block.attn.qkv, gate)))
            readers.append(Reader((block, "norm2"), (block.mlp.fc1,)))
        tokens = (getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token", "pos_embed"))
        return ResidualStream(
            model.patch_embed.proj.out_channels,
            tuple(token for token in tokens if token is not None),
            tuple(writers),
            (*readers, Reader((model, last[0]), heads)),
        )

    def heads(self, model: VisionTransformer) -> list[Heads]:
        """The attention of every block."""
        return [heads_of(block, f"blocks.{index}") for index, block in enumerate(model.blocks)]

    def mlps(self, model: VisionTransformer) -> list[MLP]:
        """The MLP of every block."""
        return [mlp_of(block, f"blocks.{index}") for index, block in enumerate(model.blocks)]

    def data(self, model: VisionTransformer) -> dict[str, Any]:
        """See `Adapter`."""
        return data_config(model, self.describe(model))


def _heads(model: VisionTransformer) -> list[str]:
    return [name for name in ("head", "head_dist") if isinstance(getattr(model, name, None), nn.Linear)]
