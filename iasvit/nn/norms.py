"""The norm of a residual stream whose mean is zero: what LayerNorm is after its mean subtraction moved elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps)·γ + β: x (..., C) → (..., C), float32.

    For x of mean zero over its C channels this is LayerNorm. Unlike torch's it has β, as scale reparameterization
    shifts what a norm outputs.

    Args:
        width: C.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight + self.bias

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"
