"""Quantized layers: they know quantizers and nothing of models."""

from iasvit.nn.layers import QuantConv2d, QuantLayer, QuantLinear, QuantMatMul, quant_layers, quantizers_of
from iasvit.nn.norms import RMSNorm

__all__ = ["QuantConv2d", "QuantLayer", "QuantLinear", "QuantMatMul", "RMSNorm", "quant_layers", "quantizers_of"]
