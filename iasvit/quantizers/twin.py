"""Twin uniform quantizers of PTQ4ViT (arXiv:2111.12293, section 3.1): two ranges, a step for each, a shift apart.

The top bit of a code is the flag that names the range (0: the fine one), the other b - 1 bits count steps in it.
Because Δ₂ = Δ₁·2^m, an integer machine adds products of both ranges after one shift by m.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from iasvit.quantizers import kernels
from iasvit.quantizers.base import Quantizer
from iasvit.quantizers.log2 import power_of_two
from iasvit.quantizers.pool import Pool
from iasvit.quantizers.search import best_candidate
from iasvit.quantizers.uniform import SMALLEST_SCALE

GELU_MINIMUM = -0.16997124
SOFTMAX_SHIFTS = 20  # m = 0 … 19: the fine range ends at 1, 1/2, … 2^-19


class TwinQuantizer(Quantizer):
    """What both twin quantizers have in common.

    Attributes:
        scale: Δ₂, the coarse step, float32 scalar.
        shift: m, int32 scalar; the fine step is Δ₁ = Δ₂·2^-m.
    """

    parameters_: ClassVar[tuple[str, ...]] = ("scale", "shift")
    integers: ClassVar[tuple[str, ...]] = ("shift",)

    @property
    def half(self) -> int:
        """Codes of each range, 2^(b-1)."""
        return self.n_levels // 2

    def candidate_scales(self, x: Tensor, factors: Tensor) -> Tensor:
        """Values to try of the one step that is searched; candidates × 1."""
        raise NotImplementedError

    def quantize_with(self, x: Tensor, scales: Tensor) -> Tensor:
        """What `forward` would give with each of these steps: candidates × 1 → candidates × x's shape."""
        coarse, shift = self._coarse_and_shift(scales.view(-1, *[1] * x.ndim))
        steps = self._steps(x, coarse * power_of_two(-shift), coarse)
        return (x / steps).round_().clamp_(self._lowest, self.half - 1).mul_(steps)

    def set_scales(self, scales: Tensor, x: Tensor) -> None:
        """Take this step (one entry)."""
        self.scale, self.shift = self._coarse_and_shift(scales.detach().float().reshape(()))

    # What a subclass writes.
    _lowest: int

    def _coarse_and_shift(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Δ₂ and m (int32) that go with a value of the step that is searched."""
        raise NotImplementedError

    def _limit(self, fine: float) -> float:
        """Where the coarse range starts, given the fine step Δ₁."""
        raise NotImplementedError

    def _steps(self, x: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
        """The step of the range that each x lies in."""
        raise NotImplementedError

    @property
    def _fine(self) -> Tensor:
        return self.scale * power_of_two(-self.shift)

    def _fused(self, x: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None] | None:
        if self.scale.dtype != torch.float32:
            return None
        coarse, exponent = self.scale.item(), -self.shift.item()
        fine = coarse * 2.0 ** min(exponent, 127) if exponent >= -126 else 0.0  # as `_fine`, in a tenth of the time
        return kernels.twin(x, (fine, coarse), self._limit(fine), -self._lowest, self.half - 1 - self._lowest, gradient)

    def _evaluate_in_order(self, x: Tensor) -> Tensor:
        fused = self._fused(x.contiguous(), gradient=False) if kernels.serve(x) else None
        return super()._evaluate_in_order(x) if fused is None else fused[0]

    def _ste(self, x: Tensor, values: Tensor) -> Tensor:
        # 1 where rounding is all that happened, 0 where x was clamped.
        return (x - values).abs_() <= self._steps(x, self._fine, self.scale) / 2 * (1 + 1e-5)


class TwinSoftmaxQuantizer(TwinQuantizer):
    """R1 = [0, 2^(b-1)·Δ₁) in steps of Δ₁ (flag 0), R2 = [0, 1] in steps of Δ₂ = 2^-(b-1) (flag 1).

    A value below the end of R1 is coded in R1, any other in R2 (eq. 7 and 8): code = flag·2^(b-1) + min(round(x / Δ),
    2^(b-1) - 1). Searched is Δ₁ = Δ₂·2^-m over m = 0, 1, … 19. The public code instead adds what the value has in both
    ranges, which no single code stands for.
    """

    kind: ClassVar[str] = "twin_softmax"
    _lowest = 0

    def _calibrate(self, pool: Pool) -> None:
        """Δ₁ of least mean squared error; the scale search chooses by the layer's output instead."""
        ends = pool.ends()
        candidates = [(scale,) for scale in self.candidate_scales(ends, ends)]
        (scale,) = best_candidate(pool, candidates, lambda x, s: self.quantize_with(x, s)[0])
        self.set_scales(scale, ends)

    def candidate_scales(self, x: Tensor, factors: Tensor) -> Tensor:
        """Δ₂·2^-m for m = 0 … 19; the factors and x play no part."""
        return power_of_two(-torch.arange(SOFTMAX_SHIFTS, device=x.device)).div_(self.half)[:, None]

    def _coarse_and_shift(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        coarse = torch.full_like(scales, 1 / self.half)
        return coarse, (coarse / scales).log2().round().to(torch.int32)

    def _steps(self, x: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
        return torch.where(x < fine * self.half, fine, coarse)

    def _limit(self, fine: float) -> float:
        return fine * self.half

    def _codes(self, x: Tensor) -> Tensor:
        low = x < self._fine * self.half
        counts = (x / torch.where(low, self._fine, self.scale)).round_().clamp_(0, self.half - 1)
        return torch.where(low, counts, counts + self.half)

    def _values(self, codes: Tensor) -> Tensor:
        low = codes < self.half
        return torch.where(low, codes * self._fine, (codes - self.half) * self.scale)


class TwinGELUQuantizer(TwinQuantizer):
    """R1 = [-2^(b-1)·Δ₁, 0) in steps of Δ₁ (flag 0), R2 = [0, (2^(b-1) - 1)·Δ₂] in steps of Δ₂ (flag 1).

    The code is q + 2^(b-1) with q = round(x / Δ) in [-2^(b-1), 2^(b-1) - 1], Δ being Δ₁ below 0 and Δ₂ above: its top
    bit, the flag, tells the sign. Searched is Δ₂; Δ₁ = Δ₂·2^-m is the finest that still covers GELU's minimum -0.17
    (m may be negative where the positive values reach less far). The public code takes Δ₁ = 0.17 / 2^(b-1), which is no
    shift away from Δ₂.

    Attributes:
        zero_point: int, 2^(b-1), the code of 0.
    """

    kind: ClassVar[str] = "twin_gelu"

    @property
    def zero_point(self) -> int:
        return self.half

    @property
    def _lowest(self) -> int:
        return -self.half

    def _calibrate(self, pool: Pool) -> None:
        ends = pool.ends()
        self.set_scales(self.candidate_scales(ends, torch.ones(1))[0], ends)

    def candidate_scales(self, x: Tensor, factors: Tensor) -> Tensor:
        """Each of the factors times max(x) / (2^(b-1) - 1/2); candidates × 1."""
        largest = (x.float().amax() / (self.half - 0.5)).clamp_min(SMALLEST_SCALE)
        return factors.to(x.device, torch.float32)[:, None] * largest

    def _coarse_and_shift(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        return scales, (scales * (self.half / -GELU_MINIMUM)).log2().floor().to(torch.int32)

    def _steps(self, x: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
        return torch.where(x < 0, fine, coarse)

    def _limit(self, fine: float) -> float:
        return 0.0

    def _codes(self, x: Tensor) -> Tensor:
        counts = (x / self._steps(x, self._fine, self.scale)).round_()
        return counts.add_(self.half).clamp_(0, self.n_levels - 1)

    def _values(self, codes: Tensor) -> Tensor:
        counts = codes - self.half
        return counts * self._steps(counts, self._fine, self.scale)
