"""Quantized layers: they know quantizers and nothing of models."""

from iasvit.nn.layers import QuantConv2d, QuantLayer, QuantLinear, QuantMatMul, quant_layers, quantizers_of

__all__ = ["QuantConv2d", "QuantLayer", "QuantLinear", "QuantMatMul", "quant_layers", "quantizers_of"]
