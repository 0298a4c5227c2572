"""Rotations of a network that cancel in full precision and spread outliers over channels before quantization.

QuaRot (arXiv:2404.00456) for vision transformers: LayerNorm's mean subtraction moves into what writes the residual
stream, so that an RMSNorm is left, which commutes with a rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iasvit.errors import IasvitError
from iasvit.models import Heads, ResidualStream, adapter_for, use_rms_norms
from iasvit.nn import RMSNorm
from iasvit.transforms.record import Step, changeable, recorded


def hadamard(width: int) -> Tensor:
    """An orthogonal Hadamard matrix, H12 ⊗ H2 ⊗ … ⊗ H2 or H2 ⊗ … ⊗ H2, over sqrt(width): float64 (width, width).

    Raises:
        IasvitError: the width is neither 2^k nor 12·2^k.
    """
    core = 12 if width % 12 == 0 else 1
    powers = width // core
    if width < 1 or powers & (powers - 1):
        raise IasvitError(f"a width of {width} has no Hadamard rotation here; it must be 2^k or 12·2^k")
    matrix = _paley12() if core == 12 else torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.kron(matrix, two)
    return matrix / width**0.5


def _paley12() -> Tensor:
    """H12 by Paley's first construction: I + S, S skew, from the quadratic residues modulo 11."""
    residues = {i * i % 11 for i in range(1, 11)}
    skew = torch.zeros(12, 12, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    for row in range(11):
        for column in range(11):
            if row != column:
                skew[row + 1, column + 1] = 1 if (row - column) % 11 in residues else -1
    return skew + torch.eye(12, dtype=torch.float64)


def _randomized(width: int, generator: torch.Generator) -> Tensor:
    """H·D, D a diagonal of random signs: orthogonal, float64 (width, width)."""
    signs = torch.randint(0, 2, (width,), generator=generator, dtype=torch.int64) * 2 - 1
    return hadamard(width) * signs


@torch.no_grad()
def rotate_residual(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy with RMSNorms, whose residual stream is rotated by a randomized orthogonal Hadamard matrix R = H·D.

    Everything that writes the stream (patch embedding, tokens and position embedding, proj and fc2 with LayerScale
    folded into them) gets R·(I - 11ᵀ/C): it is centred, which LayerNorm did, and rotated. Everything that reads it
    (qkv, fc1, head) gets diag(γ)·Rᵀ, and its bias W·β. Exact: RMSNorm of a centred x is LayerNorm without γ and β, and
    rotating commutes with it. Nothing is computed at run time.

    Args:
        model: a timm ViT or DeiT in full precision; left as it is.
        seed: of the signs D.

    Raises:
        IasvitError: the width is neither 2^k nor 12·2^k, or the stream does not keep one width or passes something that
            a rotation does not commute with (Swin, detectors, a norm before the blocks, max pooling).
    """
    result = changeable(model)
    stream = adapter_for(result).residual_stream(result)
    if any(isinstance(getattr(*reader.norm), RMSNorm) for reader in stream.readers):
        raise IasvitError("the model given is rotated already; give it as it was trained")
    matrix = _randomized(stream.width, torch.Generator().manual_seed(seed))
    device = next(result.parameters()).device
    _rotate(stream, matrix.to(device))
    return recorded(result, Step("rotate_residual", {"seed": seed}, exact=True))


def _rotate(stream: ResidualStream, rotation: Tensor) -> None:
    centred = rotation - rotation.mean(dim=1, keepdim=True)  # R·(I - 11ᵀ/C)
    for token in stream.tokens:
        token.copy_(token.double() @ centred.T)
    for writer in stream.writers:
        layer = writer.layer
        weight, bias = layer.weight.double().flatten(1), None if layer.bias is None else layer.bias.double()
        if writer.scale is not None:
            owner, attribute = writer.scale
            gamma = getattr(owner, attribute).gamma.double()
            weight, bias = weight * gamma[:, None], None if bias is None else bias * gamma
            setattr(owner, attribute, nn.Identity())
        layer.weight.copy_((centred @ weight).view_as(layer.weight))
        if bias is not None:
            layer.bias.copy_(centred @ bias)
    for reader in stream.readers:
        norm = getattr(*reader.norm)
        gamma, beta = norm.weight.double(), norm.bias.double()
        for linear in reader.linears:
            weight = linear.weight.double()
            if linear.bias is None:
                linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
            linear.bias.copy_(linear.bias.double() + weight @ beta)
            linear.weight.copy_((weight * gamma) @ rotation.T)
    use_rms_norms(stream)


@torch.no_grad()
def rotate_heads(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy whose attention heads are rotated by randomized orthogonal Hadamard matrices, two for each head.

    One turns Q and K alike, so that Q·Kᵀ stays; the other turns V and, back again, the head's columns of proj. Both go
    into qkv and proj, so that nothing is computed at run time. Where a norm of Q and K or a gate stands in between,
    that half of the rotation is left out.

    Args:
        model: a timm ViT, DeiT or Swin, or a detector with such a backbone, in full precision; left as it is.
        seed: of the signs.

    Raises:
        IasvitError: a head's width is neither 2^k nor 12·2^k, or nothing can be rotated; the message names the module.
    """
    result = changeable(model)
    generator = torch.Generator().manual_seed(seed)
    attentions = adapter_for(result).heads(result)
    if attentions and all(heads.product_fixed and heads.value_fixed for heads in attentions):
        first = attentions[0]
        raise IasvitError(
            f"module {first.name!r} has {first.product_fixed} and {first.value_fixed}, so its heads cannot be rotated"
        )
    for heads in attentions:
        try:
            _rotate_heads(heads, generator)
        except IasvitError as error:
            raise IasvitError(f"module {heads.name!r}: {error}") from error
    return recorded(result, Step("rotate_heads", {"seed": seed}, exact=True))


def _rotate_heads(heads: Heads, generator: torch.Generator) -> None:
    qkv, proj = heads.qkv, heads.proj
    width = proj.in_features // heads.count
    device = qkv.weight.device
    turns = [_randomized(width, generator).to(device) for _ in range(2 * heads.count)]
    product, value = torch.stack(turns[::2]), torch.stack(turns[1::2])  # (heads, width, width) each
    same = torch.eye(width, dtype=torch.float64, device=device).expand(heads.count, -1, -1)
    product = same if heads.product_fixed else product
    value = same if heads.value_fixed else value
    turn = torch.stack([product, product, value])  # (3, heads, width, width)
    weight = qkv.weight.double().view(3, heads.count, width, -1)
    qkv.weight.copy_((turn @ weight).view_as(qkv.weight))
    if qkv.bias is not None:
        bias = qkv.bias.double().view(3, heads.count, width, 1)
        qkv.bias.copy_((turn @ bias).view_as(qkv.bias))
    columns = proj.weight.double().view(-1, heads.count, width).transpose(0, 1)  # (heads, out, width)
    proj.weight.copy_((columns @ value.mT).transpose(0, 1).reshape(proj.weight.shape))
