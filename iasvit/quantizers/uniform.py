"""Uniform asymmetric quantizer, per tensor or per channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from iasvit.quantizers import kernels
from iasvit.quantizers.base import Quantizer
from iasvit.quantizers.evaluation import pieces
from iasvit.quantizers.pool import Pool
from iasvit.quantizers.search import ACTIVATION_PERCENTILES, best_candidate, percentile_ranges

SMALLEST_SCALE = 1e-8  # of a channel that is 0 throughout
LARGEST_ZERO_POINT = 2.0**16


def range_to_uniform(low: Tensor, high: Tensor, n_bits: int) -> tuple[Tensor, Tensor]:
    """Scale s = (high - low) / (2^b - 1) and zero-point z = round(-low / s), an integer held as float.

    A channel that is constant, or so nearly that |z| would exceed 2^16, gets s = max(|low|, |high|) and z = ∓1, which
    stand for the constant exactly: a huge z would overflow, and reparameterization averages z over the channels.
    """
    scale = (high - low) / (2**n_bits - 1)
    magnitude = torch.maximum(low.abs(), high.abs())
    scale = torch.where(scale * LARGEST_ZERO_POINT < magnitude, magnitude, scale).clamp_min(SMALLEST_SCALE)
    return scale, torch.round(-low / scale)


class UniformQuantizer(Quantizer):
    """q = clamp(round(x / s) + z, 0, 2^b - 1), x̂ = (q - z)·s (METHODS: Uniform quantizer).

    The initial range is, for each channel, the percentile pair (p, 1 - p) of least mean squared error; all channels
    are searched in one batched computation.

    Args:
        n_bits: b, 2 to 8.
        channel_dim: dimension with a scale and zero-point for each index, or None for one of each per tensor.
        percentiles: p to try.

    Attributes:
        scale: float32, scalar or one entry a channel.
        zero_point: int32, of scale's shape. It may lie outside [0, 2^b - 1] where a range does not hold 0.
    """

    kind: ClassVar[str] = "uniform"
    parameters_: ClassVar[tuple[str, ...]] = ("scale", "zero_point")

    def __init__(
        self, n_bits: int, channel_dim: int | None = None, percentiles: Sequence[float] = ACTIVATION_PERCENTILES
    ) -> None:
        super().__init__(n_bits)
        self.channel_dim = channel_dim
        self.percentiles = tuple(percentiles)

    def _calibrate(self, pool: Pool) -> None:
        found = [self._search(block) for block in pool.blocks()]
        scale, zero_point = (torch.cat(parts) for parts in zip(*found, strict=True))
        self.set_parameters(scale, zero_point)

    def _search(self, pool: Pool) -> tuple[Tensor, ...]:
        lows, highs = percentile_ranges(pool, self.percentiles)
        candidates = [range_to_uniform(low, high, self.n_bits) for low, high in zip(lows, highs, strict=True)]
        return best_candidate(pool, candidates, self._fake_quantize_with)

    def _fake_quantize_with(self, x: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor | None = None) -> Tensor:
        codes = torch.div(x, scale, out=out).round_().add_(zero_point).clamp_(0, self.n_levels - 1)
        return codes.sub_(zero_point).mul_(scale)

    def set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and (integer-valued) zero-point: one entry a channel, or one entry in all when per tensor."""
        if self.channel_dim is None:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        self.scale = scale.detach().to(torch.float32, copy=True)  # quantizers never share storage: files refuse it
        self.zero_point = zero_point.detach().round().to(torch.int32, copy=True)

    def _shaped(self, ndim: int) -> tuple[Tensor, Tensor]:
        """Scale and zero-point as float tensors that broadcast against an ndim-dimensional x."""
        scale, zero_point = self.scale, self.zero_point.to(self.scale.dtype)
        if self.channel_dim is None:
            return scale, zero_point
        shape = [1] * ndim
        shape[self.channel_dim] = -1
        return scale.view(shape), zero_point.view(shape)

    def _codes(self, x: Tensor) -> Tensor:
        scale, zero_point = self._shaped(x.ndim)
        return (x / scale).round_().add_(zero_point).clamp_(0, self.n_levels - 1)

    def _values(self, codes: Tensor) -> Tensor:
        scale, zero_point = self._shaped(codes.ndim)
        return (codes - zero_point).mul_(scale)

    def _fake_quantize(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self._fake_quantize_with(x, *self._shaped(x.ndim), out=out)

    def _fused(self, x: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None] | None:
        buffers: dict[str, Any] = self._buffers
        scale, zero_point = buffers["scale"], buffers["zero_point"]
        return kernels.uniform(x, scale, zero_point, self.n_levels - 1, self.channel_dim, gradient)

    def _evaluate_in_order(self, x: Tensor) -> Tensor:
        if kernels.serve(x):
            fused = self._fused(x.contiguous() if self.channel_dim is None else x, gradient=False)
            if fused is not None:
                return fused[0]
        # Two passes less than _fake_quantize. Sums of round(x / s) and z are exact, or beyond the range either way;
        # 0 is added, for -0 would come of a small negative x.
        if (
            self.channel_dim is not None
            or x.dtype != torch.float32
            or abs(zero_point := self.zero_point.item()) > 2**22
        ):
            return self._fake_quantize(x)
        scale, low, zero = self.scale.item(), -zero_point, torch.zeros(())
        values = torch.empty(x.shape)
        for source, target in pieces(x, values):
            target = torch.div(source, scale, out=target).round_().clamp_(low, low + self.n_levels - 1)
            torch.add(zero, target, alpha=scale, out=target)
        return values

    def _ste(self, x: Tensor, values: Tensor) -> Tensor:
        # The gradient is 1 where rounding is all that happened, 0 where x was clamped.
        scale, _ = self._shaped(x.ndim)
        return (x - values).abs_() <= scale / 2 * (1 + 1e-5)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "channel_dim": self.channel_dim, "percentiles": list(self.percentiles)}

    def configure(self, config: dict[str, Any]) -> None:
        super().configure(config)
        self.channel_dim, self.percentiles = config["channel_dim"], tuple(config["percentiles"])
