"""Parts of a model in full precision that transforms work on: the residual stream, attention heads, MLPs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from iasvit.errors import IasvitError
from iasvit.models.base import class_name
from iasvit.nn import RMSNorm

Place = tuple[nn.Module, str]  # a module, and the name of its attribute that is meant


@dataclass(frozen=True)
class Writer:
    """What adds to a residual stream.

    Attributes:
        layer: Linear or Conv2d whose output channels are the stream's.
        scale: where the LayerScale behind it stands; None where nothing does.
    """

    layer: nn.Module
    scale: Place | None = None


@dataclass(frozen=True)
class Reader:
    """What reads a residual stream: Linears behind a norm, with nothing but linear maps over tokens between.

    Attributes:
        norm: where the LayerNorm stands.
        linears: all that reads what it outputs.
    """

    norm: Place
    linears: tuple[nn.Linear, ...]


@dataclass(frozen=True)
class ResidualStream:
    """A residual stream of one width from the patch embedding to the head.

    Attributes:
        width: its channels, C.
        tokens: parameters (..., C) that are added to it or put beside it: position embedding, class token.
        writers, readers: all that writes to it and reads it.
    """

    width: int
    tokens: tuple[nn.Parameter, ...]
    writers: tuple[Writer, ...]
    readers: tuple[Reader, ...]


@dataclass(frozen=True)
class Heads:
    """An attention whose heads may be rotated.

    Attributes:
        name: path of the attention.
        qkv: Linear whose output rows are Q, K and V, each of them the heads in turn.
        proj: Linear whose input columns are the heads in turn.
        count: of heads.
        product_fixed: what stands between Q or K and their product and is no rotation's matter; "" for nothing.
        value_fixed: the same between V and proj.
    """

    name: str
    qkv: nn.Linear
    proj: nn.Linear
    count: int
    product_fixed: str = ""
    value_fixed: str = ""


@dataclass(frozen=True)
class MLP:
    """fc2(act(fc1(x))).

    Attributes:
        name: path of the MLP.
        segment: name of the segment that it is part of.
        fc1, fc2: its Linears.
        act: where its activation stands.
    """

    name: str
    segment: str
    fc1: nn.Linear
    fc2: nn.Linear
    act: Place


def heads_of(block: nn.Module, prefix: str) -> Heads:
    """The heads of a transformer block of timm's ViT or Swin."""
    attention = block.attn
    gated = getattr(attention, "gate", None) is not None
    normed = not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity)
    q_normed = not isinstance(getattr(attention, "q_norm", nn.Identity()), nn.Identity)
    return Heads(
        f"{prefix}.attn",
        attention.qkv,
        attention.proj,
        attention.num_heads,
        "a norm of queries and keys" if q_normed else "",
        "a gate" if gated else "a norm" if normed else "",
    )


def mlp_of(block: nn.Module, prefix: str) -> MLP:
    """The MLP of a transformer block of timm's ViT or Swin.

    Raises:
        IasvitError: a norm stands between activation and fc2.
    """
    mlp = block.mlp
    if not isinstance(mlp.norm, nn.Identity):
        raise IasvitError(f"module '{prefix}.mlp.norm' is a {class_name(mlp.norm)}; an MLP without a norm is expected")
    return MLP(f"{prefix}.mlp", prefix, mlp.fc1, mlp.fc2, (mlp, "act"))


def use_rms_norms(stream: ResidualStream) -> None:
    """Put a fresh RMSNorm, of the same eps and device, in place of each LayerNorm that reads the stream."""
    for reader in stream.readers:
        owner, attribute = reader.norm
        norm = getattr(owner, attribute)
        new = RMSNorm(stream.width, norm.eps).to(norm.weight.device).train(norm.training)
        setattr(owner, attribute, new.requires_grad_(norm.weight.requires_grad))
