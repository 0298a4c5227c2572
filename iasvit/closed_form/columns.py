"""What GPTQ and GPTAQ have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from iasvit.closed_form.layers import ClosedForm, LayerJob, set_weight
from iasvit.closed_form.solver import gptq
from iasvit.options import Range


@dataclass
class ColumnByColumn(ClosedForm):
    """Each layer's weight is rounded column by column (`gptq`), on its quantized inputs in the quantized network.

    Ranges are chosen before, on the weight alone. Patch embedding and head are quantized so too.

    Options, beside `ClosedForm`'s:
        damping: λ as a part of the Hessian's mean diagonal.
        act_order: take columns in the order of falling Hessian diagonal.
    """

    damping: Annotated[float, Range(0)] = 0.01
    act_order: bool = True

    asymmetric: ClassVar[bool] = False  # whether what the input should have been counts

    @property
    def strength(self) -> float:
        """α of the asymmetric term."""
        return 0.0

    def fit(self, job: LayerJob) -> None:
        """See `ClosedForm`."""
        moments = job.moments(mixed=self.asymmetric, propagated=True)
        if moments is None:
            return
        layer = job.layer
        layer.calibrate_weight()
        quantizer = layer.weight_quantizer
        values = gptq(
            layer.weight.flatten(1),
            moments.quantized,
            quantizer.scale,
            quantizer.zero_point,
            quantizer.n_bits,
            damping=self.damping,
            act_order=self.act_order,
            asymmetry=None if moments.mixed is None else moments.mixed.T - moments.quantized,
            alpha=self.strength,
        )
        set_weight(layer, values)
