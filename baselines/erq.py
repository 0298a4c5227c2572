"""ERQ: ridge regression against activation error, and rounding with ridge correction (ICML 2024, IEEE TPAMI 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from iasvit.closed_form import ClosedForm, LayerJob, correct, round_with_correction, set_weight
from iasvit.options import OneOf, Range
from iasvit.quantizers import SOFTMAX_QUANTIZERS


@dataclass
class ERQ(ClosedForm):
    """ERQ (doi 10.1109/TPAMI.2025.3528042) by the common rule, one integer grid per row; no gradient.

    Activations are quantized and post-LayerNorm ones reparameterized first (`ClosedForm`). Then for each layer, on its
    full-precision inputs and what its own quantizer makes of them:

    1. Weight and bias get the ridge solution that makes up for the activations' error (`correct`).
    2. The weight is rounded by halves; roundings are refined by a proxy of the output's error, and the columns that are
       left make up for those that are rounded, by ridge regression again (`round_with_correction`).

    The authors' dual-uniform weights, a second grid for 5 % of the columns, are left out: that is a finer granularity.

    Options, beside `ClosedForm`'s:
        ridge: λ of both regressions, in sums over all tokens.
        head_ridge: λ of a layer that reads one token an image.
        flips: roundings of a row that are turned, in each half, at most.
        propagated: inputs from the quantized layers before, and not from full precision.
    """

    init_size: Annotated[int, Range(1)] = 32
    softmax: Annotated[str, OneOf(SOFTMAX_QUANTIZERS)] = "log_sqrt2"
    ridge: Annotated[float, Range(above=0)] = 1e3
    head_ridge: Annotated[float, Range(above=0)] = 0.1
    flips: Annotated[int, Range(0)] = 100
    propagated: bool = False

    name: ClassVar[str] = "erq"
    reference: ClassVar[str] = "ICML 2024; doi 10.1109/TPAMI.2025.3528042"
    published: ClassVar[str] = "W3A4, W4A4 and others, with a second grid for 5 % of the columns"
    version: ClassVar[int] = 1

    def fit(self, job: LayerJob) -> None:
        """See `ClosedForm`."""
        moments = job.moments(mixed=True, propagated=self.propagated)
        if moments is None:
            return
        layer, ridge = job.layer, self.head_ridge if moments.flat else self.ridge
        weight, bias = correct(layer.weight.flatten(1), layer.bias, moments, ridge)
        set_weight(layer, weight)
        if bias is not None:
            layer.bias.copy_(bias)
        layer.calibrate_weight()
        quantizer = layer.weight_quantizer
        grid = (quantizer.scale, quantizer.zero_point, quantizer.n_bits)
        values = round_with_correction(weight, moments.quantized, *grid, ridge=ridge, flips=self.flips)
        set_weight(layer, values)
