"""Weights in closed form: no gradient, one layer after the other, from second moments of its inputs.

`solver` and `ridge` are linear algebra on a weight; `moments` collects what they need; `layers` is the method's frame.
"""

from iasvit.closed_form.columns import ColumnByColumn
from iasvit.closed_form.layers import ClosedForm, LayerJob, set_weight
from iasvit.closed_form.moments import Moments
from iasvit.closed_form.ridge import correct, round_with_correction
from iasvit.closed_form.solver import gptq

__all__ = [
    "ClosedForm",
    "ColumnByColumn",
    "LayerJob",
    "Moments",
    "correct",
    "gptq",
    "round_with_correction",
    "set_weight",
]
