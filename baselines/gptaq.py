"""GPTAQ: GPTQ that also makes up for what quantized layers before have done to the input (arXiv:2504.02692)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from iasvit.closed_form import ColumnByColumn
from iasvit.options import Range


@dataclass
class GPTAQ(ColumnByColumn):
    """GPTAQ (arXiv:2504.02692), with this suite's static activation quantizers; no gradient.

    As GPTQ, and the columns left also make up for the difference of the input from the full-precision network's.

    Options, beside `ColumnByColumn`'s:
        alpha: strength of that; 0 is GPTQ. The paper's code has 0.25.
    """

    alpha: Annotated[float, Range(0)] = 0.25

    name: ClassVar[str] = "gptaq"
    reference: ClassVar[str] = "arXiv:2504.02692"
    published: ClassVar[str] = "with dynamic activations per token and products in float: not comparable"
    version: ClassVar[int] = 1
    asymmetric: ClassVar[bool] = True

    @property
    def strength(self) -> float:
        """See `ColumnByColumn`."""
        return self.alpha
