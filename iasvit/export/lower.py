"""From a traced graph, whose quantized layers and products are nodes of their own, to one of integers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from torch import nn

from iasvit.errors import IasvitError
from iasvit.export.fusable import make_fusable
from iasvit.export.graph import Graph
from iasvit.export.operands import Operand, Plane, operand
from iasvit.export.products import Emitter, conv_attributes
from iasvit.export.qkv import HEADS, split_qkv
from iasvit.nn import QuantConv2d, QuantMatMul
from iasvit.nn.layers import QuantLayer
from iasvit.quantizers import AdaLogQuantizer, Quantizer, UniformQuantizer

DOMAIN = "iasvit"  # of the nodes that the trace has and the file has not
INTEGER, FLOAT = "int8", "float"
REARRANGING = ("Reshape", "Transpose")
FAST_ROW = 64  # bytes; OpenVINO 2026.4 takes ten times as long for a row of a head's 32 bytes as for one of 32 floats


@dataclass
class Lowering:
    """What `lower` did.

    Attributes:
        forms: layer or product → INTEGER or FLOAT.
        why: the reason of each that is FLOAT.
        operands: path of a quantizer → what stands for its output in the graph.
    """

    forms: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    operands: dict[str, Operand] = field(default_factory=dict)

    def note(self, path: str, why: str = "") -> None:
        self.forms[path] = FLOAT if why else INTEGER
        if why:
            self.why[path] = why


def lower(traced: onnx.ModelProto, model: nn.Module, target: str, vnni: bool, double: bool = False) -> Lowering:
    """Replace the nodes of domain "iasvit" in a traced graph, in place.

    Args:
        traced: what `trace` returned.
        model: the quantized model that was traced, on the CPU.
        target, vnni: as of `export_onnx`.
        double: whether the model, and so the graph's floats, are float64.

    Raises:
        IasvitError: a quantizer has no form; the message names its layer.
    """
    split_qkv(traced.graph, DOMAIN)
    if target == "openvino":
        make_fusable(traced.graph)
    graph = Graph("q_", centred=target == "openvino", double=double)
    work = _Lower(traced.graph, graph, Emitter(graph, target, vnni), Lowering())
    for node in traced.graph.node:
        if node.domain != DOMAIN:
            graph.nodes.append(node)
            continue
        (path,) = (a.s.decode() for a in node.attribute if a.name == "path")
        try:
            work.replace(node, path, model.get_submodule(path))
        except IasvitError as error:
            raise IasvitError(f"{path!r} cannot be exported: {error}") from error
    traced.graph.ClearField("node")
    traced.graph.node.extend(_used(graph.nodes, [output.name for output in traced.graph.output]))
    traced.graph.initializer.extend(graph.initializers.values())
    needed = {name for node in traced.graph.node for name in node.input}
    kept = [tensor for tensor in traced.graph.initializer if tensor.name in needed]
    traced.graph.ClearField("initializer")
    traced.graph.initializer.extend(kept)
    return work.done


def _used(nodes: list[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """Those nodes that outputs depend on, in order: a softmax whose logarithm alone is read, goes."""
    needed = set(outputs)
    kept = []
    for node in reversed(nodes):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(node.input)
    return kept[::-1]


@dataclass
class _Lower:
    source: onnx.GraphProto
    graph: Graph
    emit: Emitter
    done: Lowering
    _logarithms: dict[str, str] = field(default_factory=dict)
    _inputs: dict[str, tuple[Operand, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.makers = {name: node for node in self.source.node for name in node.output}
        self.heads: dict[str, tuple[int, ...]] = {
            tensor.name: tuple(onnx.numpy_helper.to_array(tensor).tolist())
            for tensor in self.source.initializer
            if tensor.name.endswith(HEADS)
        }

    def replace(self, node: onnx.NodeProto, path: str, module: nn.Module) -> None:
        if isinstance(module, QuantMatMul):
            result = self._product(node.input[0], node.input[1], path, module)
        elif isinstance(module, QuantConv2d):
            result = self._convolution(node.input[0], path, module)
        else:
            part = [attribute.i for attribute in node.attribute if attribute.name == "part"]
            result = self._linear(node.input[0], path, module, *part)
        self.graph.nodes[-1].output[0] = node.output[0]
        assert result  # the last node's

    # ---- layers ------------------------------------------------------------------------------------------------------

    def _linear(self, x: str, path: str, layer: Any, part: int | None = None) -> str:
        """A layer, or one of three equal parts of its outputs."""
        bias, size = _bias(layer), len(layer.weight) // 3
        rows = slice(None) if part is None else slice(part * size, (part + 1) * size)
        bias = None if bias is None else bias[rows]
        left, why = self._input(layer.input_quantizer, x, path)
        right = self.emit.weight(layer, _largest(left), transpose=True, rows=rows)
        if right is None:
            self.done.note(path, "its weight has no integer form")
            total = self.graph.add("MatMul", left.values or x, self.graph.constant(_values(layer)[rows].T))
            return total if bias is None else self.graph.add("Add", total, self.graph.constant(bias))
        self.done.note(path, why)
        if why:
            return self.emit.float_matmul(left.values, right, bias)
        return self.emit.matmul(left, right, bias)

    def _convolution(self, x: str, path: str, layer: QuantConv2d) -> str:
        bias = _bias(layer)
        left, why = self._input(layer.input_quantizer, x, path)
        right = self.emit.weight(layer, _largest(left), transpose=False)
        if not why and right is not None:
            result = self.emit.convolution(layer, left, right, bias)
            if result is not None:
                self.done.note(path)
                return result
            why = "no convolution of integers has its zero-points"
        self.done.note(path, why or "its weight has no integer form")
        if not left.values:
            left = Operand(values=self._values(left))
        weight = self.graph.constant(_values(layer)) if right is None else self.emit.dequantized(right, axis=0)
        inputs = [left.values, weight] + ([] if bias is None else [self.graph.constant(bias)])
        if layer.padding_mode != "zeros":
            raise IasvitError(f"a Conv2d has padding_mode {layer.padding_mode!r}; only 'zeros' is exported")
        return self.graph.add("Conv", *inputs, **conv_attributes(layer))

    def _values(self, left: Operand) -> str:
        """The float values of an operand of one plane."""
        (plane,) = left.planes
        g = self.graph
        counts = g.add("Cast", plane.codes, to=g.float_type)
        return g.add("Mul", g.add("Sub", counts, g.constant(plane.zero_point + plane.rest)), g.constant(plane.scale))

    def _input(self, quantizer: Quantizer | None, x: str, path: str) -> tuple[Operand, str]:
        """The left operand that a layer's input is, and why it stays float ("" where it does not)."""
        if quantizer is None or not quantizer.enabled:
            return Operand(values=x), "its input is not quantized"
        if path not in self._inputs:  # which three parts share
            left = self.done.operands[f"{path}.input_quantizer"] = self._operand(quantizer, x)
            self._inputs[path] = left, left.why
        return self._inputs[path]

    # ---- products ----------------------------------------------------------------------------------------------------

    def _product(self, left: str, right: str, path: str, module: QuantMatMul) -> str:
        g, first, second = self.graph, module.left_quantizer, module.right_quantizer
        if first.enabled != second.enabled:
            raise IasvitError("only one operand of this product is quantized, which cannot be exported; quantize both")
        if not first.enabled:
            self.done.note(path, "its operands are not quantized")
            return g.add("MatMul", left, right)
        a = self.done.operands[f"{path}.left_quantizer"] = self._operand(first, left)
        source, order = self._source(second, right)
        b = self.emit.activation(second, source, _largest(a), lambda plane: self._rearranged(plane, order))
        plane = Plane(b.codes, float(b.scale), int(b.zero_point), int(b.rest), values=b.values)
        self.done.operands[f"{path}.right_quantizer"] = Operand([plane])
        self.done.note(path, a.why or b.why)
        return self.emit.float_matmul(a.values, b) if a.why else self.emit.matmul(a, b)

    # ---- operands ----------------------------------------------------------------------------------------------------

    def _operand(self, quantizer: Quantizer, x: str) -> Operand:
        """What a quantizer makes of x; of one plane it is quantized before it is rearranged."""
        source, order = self._source(quantizer, x)
        log = self._logarithm(x) if isinstance(quantizer, AdaLogQuantizer) else ""
        made = operand(quantizer, self.graph, source, log)
        return replace(made, planes=[self._rearranged(plane, order) for plane in made.planes])

    def _source(self, quantizer: Quantizer, x: str) -> tuple[str, list[onnx.NodeProto]]:
        """The tensor that x is a rearrangement of, and the nodes that rearrange it; x itself where a quantizer is not
        uniform of one scale.

        Bytes move faster than floats, and the product before takes the quantizer in.
        """
        order: list[onnx.NodeProto] = []
        if isinstance(quantizer, UniformQuantizer) and quantizer.channel_dim is None:
            while (maker := self.makers.get(x)) is not None and maker.op_type in REARRANGING:
                order.append(maker)
                x = maker.input[0]
            if self.graph.centred and order:
                return self._as_floats(x, order[::-1])
        return x, order[::-1]

    def _as_floats(self, x: str, order: list[onnx.NodeProto]) -> tuple[str, list[onnx.NodeProto]]:
        """The same for OpenVINO, where rows of a head's channels are short: it is to rearrange them as floats.

        It quantizes before it rearranges wherever it can, but not past a Reshape that joins dimensions.
        """
        maker = self.makers.get(x)
        product = maker is not None and (maker.domain, maker.op_type) == (DOMAIN, "Product")
        shape = self._heads_of(maker.input[1] if product else order[-1].output[0])
        if shape is None or shape[-1] >= FAST_ROW:
            return x, order
        if product:
            return order[-1].output[0], []
        _, tokens, heads, channels = shape
        joined = self.graph.constant([-1, tokens * heads * channels], np.int64)
        parted = self.graph.constant([-1, heads, tokens, channels], np.int64)
        source = self.graph.add("Reshape", order[1].output[0], joined)
        return source, [onnx.helper.make_node("Reshape", ["", parted], [""]), *order[2:]]

    def _heads_of(self, x: str) -> tuple[int, ...] | None:
        """(batch, tokens, heads, channels) of queries, keys or values; None where x is none of these."""
        while (maker := self.makers.get(x)) is not None and maker.op_type in REARRANGING:
            if maker.op_type == "Reshape" and maker.input[1] in self.heads:
                return self.heads[maker.input[1]]
            x = maker.input[0]
        return None

    def _rearranged(self, plane: Plane, order: list[onnx.NodeProto]) -> Plane:
        """A plane whose codes are in the order that nodes make; for OpenVINO its values, beside its QuantizeLinear."""
        if not order:
            return plane
        name = self.emit.values(plane) if self.graph.centred else plane.codes
        for node in order:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            name = self.graph.add(node.op_type, name, *node.input[1:], **attributes)
        return replace(plane, values=name) if self.graph.centred else replace(plane, codes=name)

    def _logarithm(self, x: str) -> str:
        """Name of log(x) where x is a softmax, which computes it as well; "" where it is none."""
        maker = self.makers.get(x)
        if maker is None or maker.op_type != "Softmax":
            return ""
        if x not in self._logarithms:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in maker.attribute}
            self._logarithms[x] = self.graph.add("LogSoftmax", *maker.input, **attributes)
        return self._logarithms[x]


def _bias(layer: QuantLayer) -> np.ndarray | None:
    return None if layer.bias is None else layer.bias.detach().numpy()


def _values(layer: QuantLayer) -> np.ndarray:
    return layer._quantized_weight().detach().numpy()


def _largest(left: Operand) -> int:
    return max((plane.largest for plane in left.planes), default=255)
