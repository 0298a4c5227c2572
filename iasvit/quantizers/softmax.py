"""The quantizers that a post-softmax attention map may get, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from iasvit.quantizers.adalog import AdaLogQuantizer
from iasvit.quantizers.base import Quantizer
from iasvit.quantizers.log2 import Log2Quantizer
from iasvit.quantizers.sulq import SULQuantizer
from iasvit.quantizers.twin import TwinSoftmaxQuantizer
from iasvit.quantizers.uniform import UniformQuantizer

# name → n_bits → quantizer. "log2" is the one that I&S-ViT's ablation replaces SULQ by.
SOFTMAX_QUANTIZERS: dict[str, Callable[[int], Quantizer]] = {
    "sulq": SULQuantizer,
    "log2": partial(Log2Quantizer, percentiles=(1.0,), zero_code=False),
    "log2_searched": Log2Quantizer,
    "log_sqrt2": partial(Log2Quantizer, steps_per_octave=2),
    "adalog": AdaLogQuantizer,
    "uniform": UniformQuantizer,
    "twin_uniform": TwinSoftmaxQuantizer,
}
