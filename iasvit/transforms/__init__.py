"""Changes of a network before it is quantized. Each takes a model in full precision and returns a changed copy.

Rotations and channel smoothing compute what the model did, to rounding; ReLU in place of GELU makes another function,
whose own full-precision value belongs in a table. What was done stands in the copy's `transforms`. They compose, with
each other and with any method: quantize what they return, or call them in a method's own `quantize`.
"""

from iasvit.transforms.record import Step, Transforms, transforms_of
from iasvit.transforms.relu import relu_mlps
from iasvit.transforms.rotation import hadamard, rotate_heads, rotate_residual
from iasvit.transforms.smoothing import smooth_channels

__all__ = [
    "Step",
    "Transforms",
    "hadamard",
    "relu_mlps",
    "rotate_heads",
    "rotate_residual",
    "smooth_channels",
    "transforms_of",
]
