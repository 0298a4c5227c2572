"""Log2 and log-sqrt2 quantizers for post-softmax activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from iasvit.errors import IasvitError
from iasvit.quantizers.base import Quantizer
from iasvit.quantizers.pool import Pool
from iasvit.quantizers.search import ACTIVATION_PERCENTILES, best_candidate, upper_quantiles


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, exactly, for integers held as floats: the exponent bits of an IEEE float, a shift on any device.

    Below 2^-126 the result is 0. The result is float64 for an exponent of float64, and else float32.
    """
    powers = (exponent.to(torch.int32) + 127).clamp_(0, 254).bitwise_left_shift_(23).view(torch.float32)
    return powers.double() if exponent.dtype == torch.float64 else powers


# Adding it to a float32 of absolute value below 2^22 rounds that to an integer (ties to even, as torch.round), which
# then stands in the low bits of the sum.
_ROUNDING = 1.5 * 2.0**23


def rounded_power_of_two_(exponent: Tensor) -> Tensor:
    """2^round(exponent), exactly, exponents being clamped to [-126, 127]; overwrites its argument."""
    if exponent.dtype != torch.float32:
        return exponent.copy_(power_of_two(exponent.clamp(-126, 127).round()))
    bits = exponent.clamp_(-126, 127).add_(_ROUNDING).view(torch.int32).add_(127).bitwise_left_shift_(23)
    return bits.view(torch.float32)


def require_non_negative(least: Tensor) -> None:
    """Raise IasvitError where the least of the values is below 0: it has no logarithm."""
    if least < 0:
        raise IasvitError(f"{least.item():.3g} was given for calibration; a log2 quantizer takes values from 0 on")


class Log2Quantizer(Quantizer):
    """q = clamp(round(-k·log2(x / s)), 0, 2^b - 1), x̂ = s·2^(-q/k), and the last code stands for 0.

    k = 1 is log2, k = 2 log-sqrt2 (RepQ-ViT eq. 9-11): 2^(-q/2) is a shift by ceil(q / 2), with the scale multiplied by
    sqrt(2) for odd codes. The papers' code sets values whose unclamped code is 2^b or more to 0, which together with
    2^b powers makes 2^b + 1 levels; a b-bit code has 2^b, so here the last one is the 0 that they need. The log2 that
    I&S-ViT compares SULQ with (its eq. 5) has neither that 0 nor a search: percentiles (1.0,), zero_code False.

    Args:
        n_bits: b, 2 to 8.
        steps_per_octave: k, 1 or 2.
        percentiles: upper percentiles to try for s; the one of least mean squared error is kept.
        zero_code: whether the last code stands for 0; else for s·2^(-(2^b - 1)/k) as the formula has it.

    Attributes:
        scale: s, a float32 scalar.
    """

    kind: ClassVar[str] = "log2"
    parameters_: ClassVar[tuple[str, ...]] = ("scale",)
    log_domain: ClassVar[bool] = True

    def __init__(
        self,
        n_bits: int,
        steps_per_octave: int = 1,
        percentiles: Sequence[float] = ACTIVATION_PERCENTILES,
        zero_code: bool = True,
    ) -> None:
        super().__init__(n_bits)
        self.steps_per_octave = steps_per_octave
        self.percentiles = tuple(percentiles)
        self.zero_code = zero_code

    def _calibrate(self, pool: Pool) -> None:
        require_non_negative(pool.ends()[0])
        smallest = torch.finfo(torch.float32).tiny
        candidates = [(high.clamp_min(smallest),) for high in upper_quantiles(pool, self.percentiles)]
        (scale,) = best_candidate(pool, candidates, lambda x, s: self._scaled_values(self._scaled_codes(x, s), s))
        self.scale = scale.reshape(())

    def _scaled_codes(self, x: Tensor, scale: Tensor) -> Tensor:
        codes = (x / scale).log2_().mul_(-self.steps_per_octave).round_()
        return codes.clamp_(0, self.n_levels - 1)  # x = 0 is +inf before the clamp: the last code

    def _scaled_values(self, codes: Tensor, scale: Tensor) -> Tensor:
        if self.steps_per_octave == 1:
            values = power_of_two(-codes).mul_(scale)
        else:
            shift = torch.ceil(codes / 2)
            odd = codes != shift * 2
            values = power_of_two(-shift).mul_(torch.where(odd, scale * math.sqrt(2), scale))
        return values.masked_fill_(codes == self.n_levels - 1, 0.0) if self.zero_code else values

    def _codes(self, x: Tensor) -> Tensor:
        return self._scaled_codes(x, self.scale)

    def _values(self, codes: Tensor) -> Tensor:
        return self._scaled_values(codes, self.scale)

    def _ste(self, x: Tensor, values: Tensor) -> Tensor:
        # d/dx of s·2^(log2(x / s)) with the rounding passed through is x̂ / x; 0 where x is clamped and where x̂ = 0.
        low, high = self._ends()
        inside = (x < high) & (values > 0)
        if low is not None:
            inside &= x > low
        return torch.where(inside, values / x, 0.0)

    def _ends(self) -> tuple[Tensor | None, Tensor]:
        """x is not clamped above the first, where there is one, and below the second."""
        low = self.scale * 2 ** ((0.5 - self.n_levels) / self.steps_per_octave)
        return None if self.zero_code else low, self.scale * 2 ** (0.5 / self.steps_per_octave)

    def _log_bounds(self) -> tuple[float, float, float]:
        low, high = self._ends()
        infinity = torch.full_like(high, torch.inf)
        least = -infinity if low is None else torch.nextafter(low, infinity)
        return 0.0, least.item(), torch.nextafter(high, -infinity).item()

    def config(self) -> dict[str, Any]:
        own = {"steps_per_octave": self.steps_per_octave, "percentiles": list(self.percentiles)}
        return {**super().config(), **own, "zero_code": self.zero_code}

    def configure(self, config: dict[str, Any]) -> None:
        super().configure(config)
        self.steps_per_octave, self.percentiles = config["steps_per_octave"], tuple(config["percentiles"])
        self.zero_code = config.get("zero_code", True)  # files of earlier versions do not say
        if self.steps_per_octave not in (1, 2):
            raise IasvitError(f"steps_per_octave is {self.steps_per_octave}, but 1 or 2 is expected")
