"""Symmetric uniform quantizer: one scale, and a zero-point that is the same for every tensor."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from iasvit.errors import IasvitError
from iasvit.quantizers.pool import Pool
from iasvit.quantizers.uniform import SMALLEST_SCALE, UniformQuantizer


class SymmetricQuantizer(UniformQuantizer):
    """q = clamp(round(x / s), -2^(b-1), 2^(b-1) - 1), x̂ = q·s; the code is q + 2^(b-1).

    A uniform quantizer whose zero-point is always 2^(b-1): a code, in [0, 2^b - 1], is the two's complement integer q
    with its sign bit flipped, and 0 has the code 2^(b-1). There is one level more below 0 than above. The max-abs scale
    max|x| / (2^(b-1) - 1/2) splits that difference: at neither end is a value moved by more than half a step.

    Args:
        n_bits: b, 2 to 8.
        groups: scales; rows (entries of dimension 0) are cut into as many groups of equal size. 1 for one per tensor,
            3 for Q, K and V in one weight, the number of rows for one per output channel.

    Attributes:
        scale: float32; a scalar for one group, else one entry a row, equal within a group.
        zero_point: int32 of scale's shape, 2^(b-1).
    """

    kind: ClassVar[str] = "symmetric"

    def __init__(self, n_bits: int, groups: int = 1) -> None:
        super().__init__(n_bits, channel_dim=None if groups == 1 else 0, percentiles=())
        self.groups = groups

    def _calibrate(self, pool: Pool) -> None:
        x = pool.parts[0]
        self.set_scales(self.max_abs_scales(pool.ends() if self.groups == 1 else x), x)

    def max_abs_scales(self, x: Tensor) -> Tensor:
        """max|x| / (2^(b-1) - 1/2) of each group: float32, one entry a group."""
        if x.shape[0] % self.groups and self.groups > 1:
            raise IasvitError(f"{x.shape[0]} rows cannot be cut into {self.groups} groups of equal size")
        largest = x.float().reshape(self.groups, -1).abs().amax(dim=1)
        return (largest / (self.n_levels / 2 - 0.5)).clamp_min(SMALLEST_SCALE)

    def candidate_scales(self, x: Tensor, factors: Tensor) -> Tensor:
        """Scales to try for x: each of the factors times the max-abs scales; candidates × groups."""
        return factors.to(x.device, torch.float32)[:, None] * self.max_abs_scales(x)

    def quantize_with(self, x: Tensor, scales: Tensor) -> Tensor:
        """What `forward` would give with each of these scales: candidates × groups → candidates × x's shape."""
        if self.groups > 1:
            scales = scales.repeat_interleave(x.shape[0] // self.groups, dim=1)
        scales = scales.reshape(*scales.shape, *[1] * (x.ndim - 1))
        return (x / scales).round_().clamp_(-self.n_levels // 2, self.n_levels // 2 - 1).mul_(scales)

    def set_scales(self, scales: Tensor, x: Tensor) -> None:
        """Take these scales, one entry a group, for tensors with as many rows as x."""
        if self.groups > 1:
            scales = scales.repeat_interleave(x.shape[0] // self.groups)
        self.set_parameters(scales, torch.full_like(scales, self.n_levels // 2))

    def config(self) -> dict[str, Any]:
        return {**super().config(), "groups": self.groups}

    def configure(self, config: dict[str, Any]) -> None:
        super().configure(config)
        self.groups = config["groups"]
