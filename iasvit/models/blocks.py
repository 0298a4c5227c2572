"""What the transformer blocks of timm's ViT and Swin share: attention and MLP, each after a LayerNorm."""

from __future__ import annotations

from typing import Any

import timm.layers
from timm.data import resolve_data_config
from timm.layers import Mlp
from torch import nn

from iasvit.errors import IasvitError
from iasvit.models.attention import explicit_attention
from iasvit.models.base import Inserter, NormLinearPair, class_name
from iasvit.nn import QuantMatMul, RMSNorm


def insert_block(
    model: nn.Module,
    block: nn.Module,
    prefix: str,
    inserter: Inserter,
    block_class: type[nn.Module],
    attention_class: type[nn.Module],
    absent: tuple[str, ...] = (),
) -> None:
    """Quantize one pre-norm transformer block (ViT's or Swin's): attention and two-layer MLP, both after a LayerNorm.

    Raises:
        IasvitError: the block, its attention or its MLP is of another class; the message names the module.
    """
    check_block(block, prefix, block_class, attention_class)
    product_qk = inserter.product(f"{prefix}.attn.matmul_qk", "query", "key")
    product_av = inserter.product(f"{prefix}.attn.matmul_av", "softmax", "value")
    block.attn = explicit_attention(
        block.attn, f"{prefix}.attn", QuantMatMul(*product_qk), QuantMatMul(*product_av), absent
    )
    inserter.layer(model, f"{prefix}.attn.qkv", "norm", groups=3)
    if getattr(block.attn, "gate", None) is not None:
        inserter.layer(model, f"{prefix}.attn.gate", "norm")
    inserter.layer(model, f"{prefix}.attn.proj", "input")
    inserter.layer(model, f"{prefix}.mlp.fc1", "norm")
    inserter.layer(model, f"{prefix}.mlp.fc2", "gelu" if isinstance(block.mlp.act, nn.GELU) else "input")


def check_block(block: nn.Module, prefix: str, block_class: type[nn.Module], attention_class: type[nn.Module]) -> None:
    """Raise IasvitError where a float block, its attention, MLP or a LayerNorm is of a class that is not supported."""
    require(type(block) is block_class, prefix, block, block_class.__name__)
    require(type(block.attn) is attention_class, f"{prefix}.attn", block.attn, attention_class.__name__)
    require(type(block.mlp) is Mlp, f"{prefix}.mlp", block.mlp, Mlp.__name__)
    for name in ("norm1", "norm2"):
        norm = getattr(block, name)
        is_layer_norm = isinstance(norm, nn.LayerNorm) and norm.elementwise_affine and norm.bias is not None
        require(is_layer_norm or type(norm) is RMSNorm, f"{prefix}.{name}", norm, "LayerNorm with weight and bias")


def mlp_ratio(mlp: Mlp, dim: int) -> float:
    """A ratio from which timm's int(dim * ratio) makes the hidden width again, whatever the rounding."""
    return (mlp.fc1.out_features + 0.5) / dim


def block_pairs(block: nn.Module, prefix: str) -> list[NormLinearPair]:
    """norm1→qkv (and gate) and norm2→fc1 of a block that `insert_block` has quantized."""
    gate = getattr(block.attn, "gate", None)
    readers = (block.attn.qkv,) if gate is None else (block.attn.qkv, gate)
    return [
        NormLinearPair(f"{prefix}.norm1", block.norm1, readers),
        NormLinearPair(f"{prefix}.norm2", block.norm2, (block.mlp.fc1,)),
    ]


def set_eps(model: nn.Module, eps: float) -> None:
    """Give every norm of a model this eps."""
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, RMSNorm)):
            module.eps = eps


def data_config(model: nn.Module, description: dict[str, Any]) -> dict[str, Any]:
    """timm's `resolve_data_config` of a model, with the size of images that the model itself has."""
    known = {key: value for key, value in resolve_data_config(model=model).items() if value is not None}
    return {**known, "input_size": (description["in_chans"], *description["img_size"])}


def head_facts(fc: nn.Module) -> dict[str, Any]:
    """What descriptions say of the last layer, a Linear or, where there is none, an Identity."""
    if not isinstance(fc, nn.Linear):
        return {"num_classes": 0}
    return {"num_classes": fc.out_features} | ({} if fc.bias is not None else {"head_bias": False})


ACTIVATIONS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        *(nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Identity),
        *(timm.layers.QuickGELU, timm.layers.GELUTanh),
    )
}


def activation_class(name: str) -> type[nn.Module]:
    """The activation of this class name.

    Raises:
        IasvitError: it is none of ACTIVATIONS; a file must not choose what is called.
    """
    if name not in ACTIVATIONS:
        raise IasvitError(f"activation {name!r} is not supported; the supported ones are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def require(condition: bool, name: str, module: object, expected: str) -> None:
    """Raise IasvitError, naming a module that is not supported, unless the condition holds."""
    if not condition:
        raise IasvitError(f"module {name!r} is a {class_name(module)}, which is not supported; expected {expected}")
