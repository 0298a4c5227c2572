"""Scale reparameterization: a per-channel activation quantizer becomes per tensor, exactly (RepQ-ViT, section 3.2)."""

from __future__ import annotations

import torch
from torch import nn

from iasvit.errors import IasvitError
from iasvit.models import NormLinearPair
from iasvit.quantizers import UniformQuantizer


@torch.no_grad()
def reparameterize(pair: NormLinearPair) -> None:
    """Fold the per-channel scales s and zero-points z of a LayerNorm's output into the LayerNorm and its Linears.

    With s̃ = mean(s), z̃ = round(mean(z)), r = s / s̃ and d = s ⊙ (z - z̃) the LayerNorm outputs (x + d) / r:

        γ' = γ / r,  β' = (β + d) / r,  W' = W·diag(r),  c' = c - W·d,

    so that the pair computes what it did, and because z̃ is an integer the per-tensor quantizer (s̃, z̃) gives each
    channel the very codes that its own quantizer gave: x' / s̃ + z̃ = x / s + z. A Linear without bias gains one. Where
    zeros fill up Swin's windows after the LayerNorm, they become (0 + d) / r too.

    Args:
        pair: its Linears' input quantizers are UniformQuantizers per channel, calibrated on the same activations. They
            become per tensor.

    Raises:
        IasvitError: an input quantizer is of another kind, per tensor already, or not calibrated.
    """
    first = pair.linears[0].input_quantizer
    for linear in pair.linears:
        quantizer = linear.input_quantizer
        if not isinstance(quantizer, UniformQuantizer) or quantizer.channel_dim is None or not quantizer.calibrated:
            raise IasvitError(f"the input of {pair.name!r}'s Linear has no calibrated per-channel uniform quantizer")
        if not (torch.equal(quantizer.scale, first.scale) and torch.equal(quantizer.zero_point, first.zero_point)):
            raise IasvitError(
                f"the Linears that read {pair.name!r} have different input quantizers; calibrate them alike"
            )
    scale, zero_point = first.scale, first.zero_point.to(first.scale.dtype)
    new_scale, new_zero_point = scale.mean(), zero_point.mean().round()
    ratio = scale / new_scale
    shift = scale * (zero_point - new_zero_point)
    dtype = pair.norm.weight.dtype
    pair.norm.weight.copy_(pair.norm.weight / ratio.to(dtype))
    pair.norm.bias.copy_((pair.norm.bias + shift.to(dtype)) / ratio.to(dtype))
    if pair.padding is not None:
        pair.padding.copy_((pair.padding + shift.to(dtype)) / ratio.to(dtype))
    for linear in pair.linears:
        if linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
        linear.bias.copy_(linear.bias - linear.weight @ shift.to(dtype))
        linear.weight.copy_(linear.weight * ratio.to(dtype))
        linear.input_quantizer.channel_dim = None
        linear.input_quantizer.set_parameters(new_scale, new_zero_point)
