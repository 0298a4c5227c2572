"""Products of integers: weights and activations as 8-bit codes, accumulated in int32, scaled once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from iasvit.errors import IasvitError
from iasvit.export.graph import INT32, INT64, RUNTIME_DOMAIN, Graph
from iasvit.export.operands import Operand, Plane, centred_type, counts_of, uniform_plane
from iasvit.nn.layers import QuantLayer
from iasvit.quantizers import Quantizer, UniformQuantizer

# A CPU without VNNI adds two products of uint8 and int8 in 16 bits and saturates: 255·64·2 still fits, 255·127·2 not.
PAIR = 2**15 - 1


@dataclass(frozen=True)
class Right:
    """The right operand of a product: codes c that stand for scale·(c - zero_point - rest).

    Attributes:
        codes: name of the tensor, K×N in its last dimensions.
        dtype: np.int8 or np.uint8.
        scale, zero_point, rest: scalars, or one entry a column.
        sums: for weights the sum of (c - zero_point - rest) of each column; None for activations.
        values: name of the float tensor that stands for it, where there is one already.
        why: the reason why that is all there is; "" elsewhere.
    """

    codes: str
    dtype: Any
    scale: np.ndarray
    zero_point: np.ndarray
    rest: np.ndarray
    sums: np.ndarray | None = None
    values: str = ""
    why: str = ""


@dataclass(frozen=True)
class Emitter:
    """Adds products to a graph in the form that a target takes.

    Attributes:
        graph: where nodes go.
        target: as of `export_onnx`.
        vnni: whether the CPU meant adds u8 × s8 without saturation, so that 8-bit weights may be int8 beside 8-bit
            activations.
    """

    graph: Graph
    target: str
    vnni: bool

    def fits_signed(self, left_largest: int, right_largest: int) -> bool:
        """Whether products of codes of at most these sizes, as uint8 × int8, are exact on the CPU meant."""
        return self.vnni or 2 * left_largest * right_largest <= PAIR

    # ---- right operands ----------------------------------------------------------------------------------------------

    def weight(
        self, layer: QuantLayer, left_largest: int, *, transpose: bool, rows: slice = slice(None)
    ) -> Right | None:
        """The weight of a layer, (out, in) or transposed, or some of its rows; None where there is no integer form."""
        quantizer = layer.weight_quantizer
        uniform = isinstance(quantizer, UniformQuantizer) and quantizer.channel_dim in (None, 0)
        if not uniform or not quantizer.enabled:
            return None
        codes = quantizer.encode(layer.weight.detach()).numpy().astype(np.int64)[rows]
        column = (-1, *[1] * (codes.ndim - 1))
        zero_point = quantizer.zero_point.numpy().astype(np.int64)
        zero_point = zero_point[rows] if zero_point.ndim else zero_point
        counts = codes - zero_point.reshape(column if zero_point.ndim else ())
        scale = quantizer.scale.numpy()[rows] if quantizer.scale.ndim else quantizer.scale.numpy()
        dtype: Any
        if counts.min() >= -128 and counts.max() <= 127 and self.fits_signed(left_largest, int(np.abs(counts).max())):
            stored, dtype, zero, rest = counts, np.int8, np.zeros((), np.int64), np.zeros((), np.int64)
        elif self.target == "openvino" and isinstance(layer, torch.nn.Linear):  # it takes no zero-points of weights
            stored, dtype, zero, rest = codes - 128, np.int8, np.zeros((), np.int64), zero_point - 128
        elif self.vnni and zero_point.min() >= 0 and zero_point.max() <= 255:  # VNNI multiplies uint8 by int8 alone
            stored, dtype, zero, rest = codes - 128, np.int8, zero_point - 128, np.zeros((), np.int64)
        elif zero_point.min() >= 0 and zero_point.max() <= 255:
            stored, dtype, zero, rest = codes, np.uint8, zero_point, np.zeros((), np.int64)
        else:
            stored, dtype, zero, rest = codes, np.uint8, np.zeros((), np.int64), zero_point
        stored = stored.T if transpose else stored
        name = self.graph.constant(stored, dtype)
        return Right(name, dtype, scale, zero, rest, counts.reshape(len(counts), -1).sum(axis=1))

    def activation(
        self,
        quantizer: Quantizer,
        x: str,
        left_largest: int,
        rearranged: Callable[[Plane], Plane] = lambda plane: plane,
    ) -> Right:
        """A quantized activation as right operand, which `rearranged` makes of the codes of x."""
        if not isinstance(quantizer, UniformQuantizer) or quantizer.channel_dim is not None:
            raise IasvitError(
                f"its right operand has a quantizer of kind {quantizer.kind!r}; exported are uniform ones of one scale"
            )
        largest = quantizer.n_levels - 1
        signed = largest <= 127 and self.fits_signed(left_largest, largest)
        if self.target == "openvino" and centred_type(*counts_of(quantizer)) is None:
            return self._float_activation(quantizer, x, rearranged)
        plane = rearranged(uniform_plane(quantizer, self.graph, x, signed=signed))
        dtype = np.int8 if plane.signed else np.uint8
        zero_point, rest = np.asarray(plane.zero_point), np.asarray(plane.rest)
        return Right(plane.codes, dtype, self.graph.floats(plane.scale), zero_point, rest, values=plane.values)

    def _float_activation(self, quantizer: UniformQuantizer, x: str, rearranged: Callable[[Plane], Plane]) -> Right:
        """One with a zero-point, which OpenVINO 2026.4 computes wrongly in products that follow one another."""
        g, (low, high) = self.graph, counts_of(quantizer)
        scale = g.floats(float(quantizer.scale))
        steps = g.add("Round", g.add("Div", x, g.constant(scale)))
        values = g.add("Mul", g.add("Clip", steps, g.constant(low), g.constant(high)), g.constant(scale))
        plane = rearranged(Plane("", float(scale), values=values))
        zero = np.zeros((), np.int64)
        return Right("", np.uint8, scale, zero, zero, values=plane.values, why="OpenVINO takes no zero-points there")

    # ---- products ----------------------------------------------------------------------------------------------------

    def matmul(self, left: Operand, right: Right, bias: np.ndarray | None = None) -> str:
        """left @ right + bias, in float32: every product of a plane exact, scaled once, then added."""
        g = self.graph
        if self.target == "openvino":
            left = _without_rests(left)
        if left.constant and right.sums is not None:
            sums = left.constant * right.scale.astype(np.float64) * right.sums
            bias = (sums if bias is None else bias + sums).astype(g.floats)
        first, *others = left.planes
        total = self._plane(first, right, bias)
        for plane in others:
            total = g.add("Add", total, self._plane(plane, right, None))
        if left.constant and right.sums is None:
            factor = g.floats(left.constant * right.scale)
            if self.target == "openvino":  # whose codes are read by DequantizeLinear alone
                factor, values = g.floats(left.constant), self.dequantized(right)
                sums = g.add("ReduceSum", values, g.constant([-2], np.int64), keepdims=1)
            else:
                sums = self._column_sums(right, g.float_type)
            total = g.add("Add", total, g.add("Mul", sums, g.constant(factor)))
        return total

    def float_matmul(self, values: str, right: Right, bias: np.ndarray | None = None) -> str:
        """The same of a left operand that is float."""
        g = self.graph
        total = g.add("MatMul", values, self.dequantized(right))
        return total if bias is None else g.add("Add", total, g.constant(bias))

    def dequantized(self, right: Right, axis: int = -1) -> str:
        """The float values of a right operand, exactly."""
        g = self.graph
        if right.values:
            return right.values
        if not right.rest.any():
            scale, zero = np.broadcast_arrays(right.scale, right.zero_point)
            zeros = [zero]
            if right.sums is not None:
                # ONNX Runtime rounds to 8 bits what is multiplied by a weight of one scale, and behind zero-points of
                # weights, though all are 0, OpenVINO computes in float where the batch is fixed.
                scale = np.broadcast_to(scale, len(right.sums))
                zeros = [np.broadcast_to(zero, len(right.sums))] if zero.any() else []
            axes = {"axis": axis} if scale.ndim else {}
            inputs = [g.constant(scale), *(g.constant(each, right.dtype) for each in zeros)]
            return g.add("DequantizeLinear", right.codes, *inputs, **axes)
        shape = (-1, *[1] * (-1 - axis)) if axis < 0 else (-1, 1, 1, 1)
        zero, scale = (
            np.asarray(v).reshape(shape) if np.ndim(v) else v for v in (right.zero_point + right.rest, right.scale)
        )
        return g.add(
            "Mul", g.add("Sub", g.add("Cast", right.codes, to=g.float_type), g.constant(zero)), g.constant(scale)
        )

    def _plane(self, left: Plane, right: Right, bias: np.ndarray | None) -> str:
        g = self.graph
        if self.target == "openvino":
            return self._of_values(left, right, bias)
        if left.rest or right.rest.any():
            return self._with_rests(left, right, bias)
        if self.target == "onnxruntime":
            scale, zero = np.broadcast_arrays(right.scale, right.zero_point)
            inputs = [left.codes, right.codes, g.constant(left.scale), g.constant(scale)]
            inputs += [g.constant(left.zero_point, np.uint8), g.constant(zero, right.dtype)]
            inputs += [] if bias is None else [g.constant(bias)]
            return g.add("MatMulIntegerToFloat", *inputs, domain=RUNTIME_DOMAIN)
        return self._scaled(self._integers(left, right), left, right, bias)

    def _of_values(self, left: Plane, right: Right, bias: np.ndarray | None) -> str:
        """A product of dequantized operands. A rest of a weight, which is a row's sum in the end, is added apart."""
        g, a, rest = self.graph, self.values(left), right.rest
        if right.sums is not None and rest.any():
            right = replace(right, rest=np.zeros((), np.int64))
            sums = g.add("ReduceSum", a, g.constant([-1], np.int64), keepdims=1)
            moved = g.add("Mul", sums, g.constant(-right.scale * rest))
            moved = moved if bias is None else g.add("Add", moved, g.constant(bias))
            return g.add("Add", g.add("MatMul", a, self.dequantized(right)), moved)
        total = g.add("MatMul", a, self.dequantized(right))
        return total if bias is None else g.add("Add", total, g.constant(bias))

    def values(self, plane: Plane) -> str:
        """The float values of a plane of the target "openvino", exactly."""
        dtype = np.int8 if plane.signed else np.uint8
        zero_point, rest = np.asarray(plane.zero_point), np.asarray(plane.rest)
        scale = np.asarray(plane.scale, self.graph.floats)
        return self.dequantized(Right(plane.codes, dtype, scale, zero_point, rest, values=plane.values))

    def _integers(self, left: Plane, right: Right) -> str:
        g = self.graph
        zeros = [g.constant(left.zero_point, np.int8 if left.signed else np.uint8)]
        zeros += [g.constant(right.zero_point, right.dtype)] if right.zero_point.any() else []
        return g.add("MatMulInteger", left.codes, right.codes, *zeros)

    def _scaled(self, integers: str, left: Plane, right: Right, bias: np.ndarray | None) -> str:
        g = self.graph
        scale = (g.floats(left.scale) * right.scale).astype(g.floats)
        total = g.add("Mul", g.add("Cast", integers, to=g.float_type), g.constant(scale))
        return total if bias is None else g.add("Add", total, g.constant(bias))

    def _with_rests(self, left: Plane, right: Right, bias: np.ndarray | None) -> str:
        """Σ(a - r)(b - t) = Σab - t·Σa - r·Σ(b - t), in int64: zero-points that no 8-bit type holds."""
        g = self.graph
        total = g.add("Cast", self._integers(left, right), to=INT64)
        if right.rest.any():
            a = g.add("Sub", g.add("Cast", left.codes, to=INT64), g.constant(left.zero_point, np.int64))
            sums = g.add("ReduceSum", a, g.constant([-1], np.int64), keepdims=1)
            total = g.add("Sub", total, g.add("Mul", sums, g.constant(right.rest, np.int64)))
        if left.rest:
            sums = self._column_sums(right, INT64)
            total = g.add("Sub", total, g.add("Mul", sums, g.constant(left.rest, np.int64)))
        return self._scaled(total, left, right, bias)

    def _column_sums(self, right: Right, dtype: int) -> str:
        """Σ(b - t) over the rows of a right operand, exact in integers, then as `dtype`; (…, 1, N)."""
        g = self.graph
        if right.sums is not None:
            return g.constant(right.sums, g.floats if dtype == g.float_type else np.int64)
        kind, of = (INT64, np.int64) if dtype == INT64 else (INT32, np.int32)
        b = g.add("Cast", right.codes, to=kind)
        if (zero := right.zero_point + right.rest).any():
            b = g.add("Sub", b, g.constant(zero, of))
        sums = g.add("ReduceSum", b, g.constant([-2], np.int64), keepdims=1)
        return sums if dtype == kind else g.add("Cast", sums, to=dtype)

    # ---- convolution -------------------------------------------------------------------------------------------------

    def convolution(self, layer: torch.nn.Conv2d, left: Operand, right: Right, bias: np.ndarray | None) -> str | None:
        """A convolution of integers; None where no code stands for the padding's 0 or for the weight's zero-points."""
        g = self.graph
        (plane, *others) = left.planes or [Plane("", 0.0, rest=1)]
        if others or plane.rest or right.rest.any() or right.zero_point.ndim or layer.padding_mode != "zeros":
            return None
        geometry = conv_attributes(layer)
        column = (1, -1, 1, 1)
        if self.target == "openvino":
            a = self.values(plane)
            inputs = [a, self.dequantized(right, axis=0)] + ([] if bias is None else [g.constant(bias)])
            return g.add("Conv", *inputs, **geometry)
        zeros = [g.constant(plane.zero_point, np.uint8), g.constant(right.zero_point, right.dtype)]
        integers = g.add("ConvInteger", plane.codes, right.codes, *zeros, **geometry)
        scales = replace(right, scale=right.scale.reshape(column) if right.scale.ndim else right.scale)
        return self._scaled(integers, plane, scales, None if bias is None else bias.reshape(column))


def _without_rests(left: Operand) -> Operand:
    """The same operand with rests of zero-points as part of its constant, so that codes are all that is multiplied."""
    constant = left.constant - sum(plane.scale * plane.rest for plane in left.planes if not plane.values)
    planes = [plane if plane.values else replace(plane, rest=0) for plane in left.planes]
    return replace(left, planes=planes, constant=constant)


def conv_attributes(layer: torch.nn.Conv2d) -> dict[str, Any]:
    """A Conv2d's geometry as ONNX has it."""
    top, left = layer.padding if isinstance(layer.padding, tuple) else (0, 0)
    if isinstance(layer.padding, str) and layer.padding != "valid":
        raise IasvitError(f"a Conv2d has padding {layer.padding!r}, which is not exported; give it in pixels")
    return {
        "strides": list(layer.stride),
        "pads": [top, left, top, left],
        "dilations": list(layer.dilation),
        "group": layer.groups,
    }
