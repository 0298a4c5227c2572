"""Quantizers: tensors in, integer codes or fake-quantized tensors out. They know nothing of layers or models."""

from iasvit.quantizers.adalog import AdaLogQuantizer, ShiftedAdaLogQuantizer
from iasvit.quantizers.base import Quantizer
from iasvit.quantizers.log2 import Log2Quantizer
from iasvit.quantizers.search import ACTIVATION_PERCENTILES, WEIGHT_PERCENTILES
from iasvit.quantizers.softmax import SOFTMAX_QUANTIZERS
from iasvit.quantizers.sulq import SULQuantizer
from iasvit.quantizers.symmetric import SymmetricQuantizer
from iasvit.quantizers.twin import TwinGELUQuantizer, TwinSoftmaxQuantizer
from iasvit.quantizers.uniform import UniformQuantizer

__all__ = [
    "ACTIVATION_PERCENTILES",
    "SOFTMAX_QUANTIZERS",
    "WEIGHT_PERCENTILES",
    "AdaLogQuantizer",
    "Log2Quantizer",
    "Quantizer",
    "SULQuantizer",
    "ShiftedAdaLogQuantizer",
    "SymmetricQuantizer",
    "TwinGELUQuantizer",
    "TwinSoftmaxQuantizer",
    "UniformQuantizer",
]
