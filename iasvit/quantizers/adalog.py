"""The adaptive-base logarithmic quantizer of AdaLog, for post-softmax activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from iasvit.quantizers.base import Quantizer
from iasvit.quantizers.log2 import power_of_two, require_non_negative
from iasvit.quantizers.pool import Pool
from iasvit.quantizers.search import ACTIVATION_PERCENTILES, upper_quantiles
from iasvit.quantizers.twin import GELU_MINIMUM

STEPS = 37  # r: the base is 2^(Q/r)
EXPONENTS = range(10, 139)  # Q: bases from 1.2 to 13


class AdaLogQuantizer(Quantizer):
    """q = clamp(round(-(r/Q)·log2(x / s)), 0, 2^b - 1), x̂ = s·2^(-qQ/r), r = 37; the last code stands for 0.

    The base 2^(Q/r) is searched (AdaLog, arXiv:2407.12951, section 3.2). Integers decode it by a shift of
    ⌊qQ / r⌋ and a table of 2^(-((qQ) mod r)/r), rounded to multiples of 1 / (2^(b+1) - 2). Its public code sets values
    beyond the last code to 0, which makes 2^b + 1 levels; a b-bit code has 2^b, so here the last one is that 0.

    Args:
        n_bits: b, 2 to 8.
        percentiles: upper percentiles to try for s; with each, every Q is tried, and the pair of least mean squared
            error is kept.

    Attributes:
        scale: s, a float32 scalar.
        exponent: Q, an int32 scalar.
    """

    kind: ClassVar[str] = "adalog"
    parameters_: ClassVar[tuple[str, ...]] = ("scale", "exponent")
    log_domain: ClassVar[bool] = True
    shift: ClassVar[float] = 0.0  # added to a value before, taken away from what its code stands for

    def __init__(self, n_bits: int, percentiles: Sequence[float] = ACTIVATION_PERCENTILES) -> None:
        super().__init__(n_bits)
        self.percentiles = tuple(percentiles)

    def _calibrate(self, pool: Pool) -> None:
        require_non_negative(pool.ends()[0] + self.shift)
        scales = (upper_quantiles(pool, self.percentiles)[:, 0] + self.shift).clamp_min(torch.finfo(torch.float32).tiny)
        exponents = torch.tensor(EXPONENTS, dtype=torch.float32, device=pool.device)
        s, q = (grid.reshape(-1, 1) for grid in torch.meshgrid(scales, exponents, indexing="ij"))
        best = torch.stack([self._errors(values[0] + self.shift, s, q) for values in pool.slices()]).sum(dim=0).argmin()
        self.scale, self.exponent = s[best, 0].clone(), q[best, 0].to(torch.int32)

    def _errors(self, x: Tensor, scales: Tensor, exponents: Tensor) -> Tensor:
        """Squared error of x summed, for each of the candidates (n×1 each): n entries.

        The codes cut the sorted values into runs, so that sums over runs, which prefix sums give, are all that is
        needed of the values: Σ (x̂ - x)² = Σ over codes of count·x̂² - 2·x̂·Σx, + Σx².
        """
        x = x.sort().values
        codes = torch.arange(self.n_levels, device=x.device)
        levels = self._values_with(codes[None], scales, exponents).double()
        ends = scales * torch.exp2(-(codes[:-1] + 0.5) * exponents / STEPS)  # values above have a smaller code
        below = torch.searchsorted(x, ends.contiguous())
        edges = torch.cat([torch.full_like(below[:, :1], len(x)), below, torch.zeros_like(below[:, :1])], dim=1)
        sums = torch.cat([x.new_zeros(1, dtype=torch.float64), x.cumsum(0, dtype=torch.float64)])[edges]
        counts, totals = -edges.diff(dim=1), -sums.diff(dim=1)
        return (counts * levels.square() - 2 * levels * totals).sum(dim=1)

    def _values_with(self, codes: Tensor, scale: Tensor, exponent: Tensor) -> Tensor:
        steps = codes.to(torch.int32) * exponent.to(torch.int32)
        shift = torch.div(steps, STEPS, rounding_mode="floor")
        multiples = 2 ** (self.n_bits + 1) - 2
        fraction = torch.exp2((shift * STEPS - steps).to(scale.dtype) / STEPS).mul_(multiples).round_().div_(multiples)
        return (fraction.mul_(power_of_two(-shift)) * scale).masked_fill_(codes == self.n_levels - 1, 0.0)

    def _codes(self, x: Tensor) -> Tensor:
        codes = (x / self.scale).log2_().mul_(-STEPS / self.exponent.to(x.dtype)).round_()
        return codes.clamp_(0, self.n_levels - 1)  # x = 0 is +inf before the clamp: the last code

    def _values(self, codes: Tensor) -> Tensor:
        table = self._values_with(torch.arange(self.n_levels, device=codes.device), self.scale, self.exponent)
        table = torch.nn.functional.pad(table, (0, 1), value=torch.nan)  # NaN stays NaN
        return table[codes.nan_to_num(self.n_levels).to(torch.int64)]

    def _log_shift(self) -> float:
        return self.shift

    def _ste(self, x: Tensor, values: Tensor) -> Tensor:
        # As log2: x̂ / x with the rounding passed through; 0 where x is clamped and where x̂ = 0.
        inside = (x < self.scale * torch.exp2(0.5 / STEPS * self.exponent)) & (values > 0)
        return torch.where(inside, values / x, 0.0)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "percentiles": list(self.percentiles)}

    def configure(self, config: dict[str, Any]) -> None:
        super().configure(config)
        self.percentiles = tuple(config["percentiles"])


class ShiftedAdaLogQuantizer(AdaLogQuantizer):
    """AdaLog for post-GELU activations: x + 0.16997… ≥ 0 is quantized, and the shift taken away again (section 3.2).

    On integers the shift goes into the bias of the layer that reads it. The last code stands for GELU's minimum.
    """

    kind: ClassVar[str] = "adalog_gelu"
    shift: ClassVar[float] = -GELU_MINIMUM

    def _calibrate(self, pool: Pool) -> None:
        super()._calibrate(Pool([part.clamp_min(GELU_MINIMUM) for part in pool.parts]))

    def _codes(self, x: Tensor) -> Tensor:
        return super()._codes((x + self.shift).clamp_min_(0.0))

    def _values(self, codes: Tensor) -> Tensor:
        return super()._values(codes) - self.shift

    def _ste(self, x: Tensor, values: Tensor) -> Tensor:
        return super()._ste((x + self.shift).clamp_min_(torch.finfo(x.dtype).tiny), values + self.shift)
