"""SULQ, the shift-uniform-log2 quantizer of I&S-ViT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from iasvit.quantizers.base import Quantizer
from iasvit.quantizers.log2 import require_non_negative, rounded_power_of_two_
from iasvit.quantizers.pool import Pool
from iasvit.quantizers.search import best_candidate
from iasvit.quantizers.uniform import range_to_uniform

SHIFTS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)


class SULQuantizer(Quantizer):
    """Shift-uniform-log2 quantizer for post-softmax activations (I&S-ViT, arXiv:2311.10126, section 3.2).

    1. y = -log2(x + η), with the shift η > 0.
    2. q = clamp(round(y / s) + z, 0, 2^b - 1): uniform over [min y, max y] as seen in calibration.
    3. ŷ = round((q - z)·s), an integer, so that 2^-ŷ is a bit shift.
    4. x̂ = 2^-ŷ - η.

    Plain log2 at 3 bits sends all values below about 2^-7 to one code, which is most of an attention map; the shift
    bends the curve so that the codes cover the whole domain, dense near 0 and sparse near 1.

    Args:
        n_bits: b, 2 to 8.
        shifts: η to try; the one of least mean squared error is kept.

    Attributes:
        shift: η, a float32 scalar.
        scale: s, float32 scalar, in the log domain.
        zero_point: z, int32 scalar, in the log domain.
    """

    kind: ClassVar[str] = "sulq"
    parameters_: ClassVar[tuple[str, ...]] = ("shift", "scale", "zero_point")
    positive: ClassVar[tuple[str, ...]] = ("shift", "scale")
    log_domain: ClassVar[bool] = True

    def __init__(self, n_bits: int, shifts: Sequence[float] = SHIFTS) -> None:
        super().__init__(n_bits)
        self.shifts = tuple(shifts)

    def _calibrate(self, pool: Pool) -> None:
        smallest, largest = pool.ends()[:, None]
        require_non_negative(smallest)
        candidates = []
        for each in self.shifts:
            scale, zero_point = range_to_uniform(-(largest + each).log2(), -(smallest + each).log2(), self.n_bits)
            candidates.append((torch.full_like(scale, each), scale, zero_point))
        shift, scale, zero_point = best_candidate(pool, candidates, self._fake_quantize_with)
        self.shift, self.scale = shift.reshape(()), scale.reshape(())
        self.zero_point = zero_point.reshape(()).to(torch.int32)

    def _steps(self, x: Tensor, shift: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor | None = None) -> Tensor:
        """q - z, of step 2."""
        steps = torch.add(x, shift, out=out).log2_().div_(-scale).round_()
        return steps.clamp_min_(-zero_point).clamp_max_(self.n_levels - 1 - zero_point)

    def _powers(self, steps: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x̂ of q - z, which is overwritten: steps 3 and 4."""
        return rounded_power_of_two_(steps.mul_(-scale)).sub_(shift)

    def _fake_quantize_with(
        self, x: Tensor, shift: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor | None = None
    ) -> Tensor:
        return self._powers(self._steps(x, shift, scale, zero_point, out), shift, scale)

    def _codes(self, x: Tensor) -> Tensor:
        return self._steps(x, self.shift, self.scale, self.zero_point).add_(self.zero_point)

    def _values(self, codes: Tensor) -> Tensor:
        return self._powers(codes - self.zero_point, self.shift, self.scale)

    def _fake_quantize(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self._fake_quantize_with(x, self.shift, self.scale, self.zero_point, out)

    def _log_shift(self) -> float:
        return self.shift.item()

    def _ste(self, x: Tensor, values: Tensor) -> Tensor:
        # With both roundings passed through, dx̂/dx = 2^-ŷ / (x + η). A value beyond the range seen in calibration is
        # clamped and gets no gradient; the range's ends are where y rounds to a code below 0 or above 2^b - 1.
        shifted = x + self.shift
        low, high = self._ends()
        return ((values + self.shift) / shifted).mul_((shifted <= high) & (shifted >= low))

    def _ends(self) -> tuple[Tensor, Tensor]:
        """The least and the largest x + η that are not clamped."""
        y_low = (-0.5 - self.zero_point) * self.scale
        y_high = (self.n_levels - 0.5 - self.zero_point) * self.scale
        return torch.exp2(-y_high), torch.exp2(-y_low)

    def _log_bounds(self) -> tuple[float, float, float]:
        low, high = self._ends()
        return self.shift.item(), low.item(), high.item()

    def config(self) -> dict[str, Any]:
        return {**super().config(), "shifts": list(self.shifts)}

    def configure(self, config: dict[str, Any]) -> None:
        super().configure(config)
        self.shifts = tuple(config["shifts"])
