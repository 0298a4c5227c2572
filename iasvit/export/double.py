"""A model and its graph in double precision: the same integers, and floats that differ too little to move a code.

In float32 a value next to a tie of rounding falls to either side, by the order in which numbers are added. In float64
both compute it to 1e-12 or so, and a code that differs still is a defect.
"""

from __future__ import annotations

import copy

import numpy as np
import onnx
import torch
from numpy.polynomial import Chebyshev, Polynomial
from onnx import helper, numpy_helper
from torch import fx, nn

from iasvit.errors import IasvitError
from iasvit.export.graph import Graph
from iasvit.nn.layers import quant_layers

DEGREE = 22  # of the polynomial in `_erf`


@torch.no_grad()
def in_double(model: nn.Module) -> nn.Module:
    """A copy in float64 with the same codes of weights, on the CPU.

    Parameters are the float32 values. Weights are the values of their codes, which float32 chose. A norm's eps is the
    float32 that ONNX has.
    """
    model = copy.deepcopy(model).cpu().eval()
    for _, layer in quant_layers(model):
        if layer.weight_quantizer.enabled:
            layer.round_weight()
    for module in model.modules():
        own = vars(module)
        if isinstance(own.get("eps"), float):
            own["eps"] = float(np.float32(own["eps"]))
    return model.double()


def restore_numbers(proto: onnx.ModelProto, model: nn.Module) -> None:
    """Give a traced graph the model's Python numbers, such as 1 / sqrt(channels), which torch's exporter rounds to
    float32; in place."""
    values = [value for module in model.modules() for value in vars(module).values()]
    for module in model.modules():
        if isinstance(module, fx.GraphModule):  # as attention is
            values += [value for node in module.graph.nodes for value in node.args]
    exact = {float(np.float32(value)): value for value in values if isinstance(value, float)}
    for tensor in proto.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float64 and value.size == 1 and value.item() in exact:
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(value, exact[value.item()]), tensor.name))


def plain(proto: onnx.ModelProto) -> None:
    """Replace, in a graph whose floats are float64, operators that ONNX Runtime has in float32 alone; in place.

    Raises:
        IasvitError: a convolution that is no patch embedding.
    """
    source, graph = proto.graph, Graph("d_", double=True)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in source.initializer}
    for node in source.node:
        if node.op_type not in _PLAIN:
            graph.nodes.append(node)
            continue
        _PLAIN[node.op_type](node, graph, constants)
        graph.nodes[-1].output[0] = node.output[0]
    source.ClearField("node")
    source.node.extend(graph.nodes)
    used = {name for node in graph.nodes for name in node.input}
    kept = [tensor for tensor in (*source.initializer, *graph.initializers.values()) if tensor.name in used]
    source.ClearField("initializer")
    source.initializer.extend(kept)


def _quantize(node: onnx.NodeProto, g: Graph, constants: dict[str, np.ndarray]) -> None:
    zero = constants[node.input[2]]
    ends = np.iinfo(zero.dtype)
    steps = g.add("Round", g.add("Div", *node.input[:2]))
    codes = g.add("Add", steps, g.constant(zero)) if zero.any() else steps
    inside = g.add("Clip", codes, g.constant(ends.min), g.constant(ends.max))
    g.add("Cast", inside, to=helper.np_dtype_to_tensor_dtype(zero.dtype))


def _dequantize(node: onnx.NodeProto, g: Graph, constants: dict[str, np.ndarray]) -> None:
    scale, *zeros = (constants[name] for name in node.input[1:])
    if scale.ndim and helper.get_node_attr_value(node, "axis") == 0:  # of a convolution's weight
        scale, *zeros = (value.reshape(-1, 1, 1, 1) for value in (scale, *zeros))
    counts = g.add("Cast", node.input[0], to=g.float_type)
    for zero in zeros:
        counts = g.add("Sub", counts, g.constant(zero))
    g.add("Mul", counts, g.constant(scale))


def _convolution(node: onnx.NodeProto, g: Graph, constants: dict[str, np.ndarray]) -> None:
    """Of patches beside each other: a product of what SpaceToDepth makes of the image with the weight."""
    x, weight, *bias = node.input
    geometry = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    shape = next(value.shape for value in map(constants.get, (weight, *_sources(weight, g))) if value is not None)
    side = shape[-1]
    if geometry != {"strides": [side, side], "pads": [0] * 4, "dilations": [1, 1], "group": 1} or shape[-2] != side:
        raise IasvitError("a convolution other than a patch embedding cannot be computed in float64")
    patches = g.add("SpaceToDepth", x, blocksize=side)
    rows = g.add("Reshape", g.add("Transpose", weight, perm=[0, 2, 3, 1]), g.constant([shape[0], -1], np.int64))
    total = g.add("Einsum", patches, rows, equation="bkhw,ok->bohw")
    if bias:
        g.add("Add", total, g.constant(constants[bias[0]].reshape(-1, 1, 1)))


def _sources(name: str, g: Graph) -> list[str]:
    """The inputs of the nodes that compute a tensor, all the way up."""
    return [up for node in g.nodes if name in node.output for each in node.input for up in (each, *_sources(each, g))]


def _threshold(node: onnx.NodeProto, g: Graph, constants: dict[str, np.ndarray]) -> None:
    (alpha,) = (a.f for a in node.attribute if a.name == "alpha")
    above = g.add("Greater", node.input[0], g.constant(alpha))
    g.add("Mul", node.input[0], g.add("Cast", above, to=g.float_type))


def _erf_node(node: onnx.NodeProto, g: Graph, constants: dict[str, np.ndarray]) -> None:
    _erf(node.input[0], g)


def _gelu(node: onnx.NodeProto, g: Graph, constants: dict[str, np.ndarray]) -> None:
    x = node.input[0]
    half = g.add("Mul", x, g.constant(0.5))
    g.add("Mul", half, g.add("Add", _erf(g.add("Mul", x, g.constant(0.5**0.5)), g), g.constant(1.0)))


def _erf(x: str, g: Graph) -> str:
    """erf(x) = sign(x)·(1 - t·exp(p(2t - 1) - x²)) to 1e-14, where t = 2 / (2 + |x|) and p is a polynomial."""
    t = g.add("Div", g.constant(2.0), g.add("Add", g.add("Abs", x), g.constant(2.0)))
    u = g.add("Sub", g.add("Add", t, t), g.constant(1.0))
    p, *others = (g.constant(c) for c in _coefficients()[::-1])
    for other in others:
        p = g.add("Add", g.add("Mul", p, u), other)
    tail = g.add("Mul", t, g.add("Exp", g.add("Sub", p, g.add("Mul", x, x))))
    return g.add("Mul", g.add("Sign", x), g.add("Sub", g.constant(1.0), tail))


def _coefficients() -> list[float]:
    """Of p in `_erf`, from the lowest power on: log(exp(z²)·erfc(z) / t) at u = 2t - 1, z = 2/t - 2."""

    def wanted(u: np.ndarray) -> np.ndarray:
        t = torch.from_numpy((u + 1) / 2)
        return (torch.special.erfcx(2 / t - 2) / t).log().numpy()

    coefficients: list[float] = Chebyshev.interpolate(wanted, DEGREE).convert(kind=Polynomial).coef.tolist()
    return coefficients


_PLAIN = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Conv": _convolution,
    "ThresholdedRelu": _threshold,
    "Erf": _erf_node,
    "Gelu": _gelu,
}
