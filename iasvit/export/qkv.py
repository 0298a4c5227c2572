"""The layer that computes queries, keys and values, as three: each is quantized where it leaves its product."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx
from onnx import helper, numpy_helper

HEADS = "_heads_shape"  # how the name of a shape (batch, tokens, heads, channels) ends
PERM = [2, 0, 3, 1, 4]  # (B, N, 3, heads, channels) → (3, B, heads, N, channels)


def split_qkv(graph: onnx.GraphProto, domain: str) -> None:
    """Replace each such layer in a traced graph, in place, by three nodes of the same path, with attribute `part`.

    What it matches is Linear → Reshape → Transpose → one slice for each of the three, as timm and mmdet have it; what
    looks otherwise stays. A scalar factor on the queries moves before the rearrangement, which changes no bit.
    """
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    replaced: dict[str, list[onnx.NodeProto]] = {}
    gone: set[str] = set()
    for node in graph.node:
        if node.domain != domain or node.op_type != "Linear":
            continue
        match = _match(node, readers, constants)
        if match is None:
            continue
        shape, parts, inner = match
        (path,) = (attribute.s.decode() for attribute in node.attribute if attribute.name == "path")
        name = f"{node.output[0]}{HEADS}"
        graph.initializer.append(numpy_helper.from_array(np.array([*shape[:-3], *shape[-2:]], np.int64), name))
        made = []
        for part, output in enumerate(parts):
            own = f"{node.output[0]}_{part}"
            made.append(helper.make_node("Linear", node.input, [own], domain=domain, path=path, part=part))
            factor = _factor(readers[output], constants)
            if factor is not None:
                made.append(helper.make_node("Mul", [own, factor.input[1]], [f"{own}_scaled"]))
                own, output = f"{own}_scaled", factor.output[0]
                inner.append(factor)
            made.append(helper.make_node("Reshape", [own, name], [f"{own}_heads"], allowzero=1))
            made.append(helper.make_node("Transpose", [f"{own}_heads"], [output], perm=[0, 2, 1, 3]))
        replaced[node.output[0]] = made
        gone.update(n.output[0] for n in inner)
    nodes = []
    for node in graph.node:
        if node.output[0] in replaced:
            nodes += replaced[node.output[0]]
        elif node.output[0] not in gone:
            nodes.append(node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    graph.ClearField("node")
    graph.node.extend(nodes)


def _factor(readers: list[onnx.NodeProto], constants: dict[str, onnx.TensorProto]) -> onnx.NodeProto | None:
    """The only reader, where it multiplies by one number; a factor for each head must stay behind the rearrangement."""
    if len(readers) != 1 or readers[0].op_type != "Mul" or readers[0].input[1] not in constants:
        return None
    return None if constants[readers[0].input[1]].dims else readers[0]


def _match(
    node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]], constants: dict[str, onnx.TensorProto]
) -> tuple[list[int], list[str], list[onnx.NodeProto]] | None:
    """The shape (…, 3, heads, channels), the names of queries, keys and values, and the nodes between; else None."""
    inner: list[onnx.NodeProto] = []
    name = node.output[0]
    for kind in ("Reshape", "Transpose"):
        if len(readers[name]) != 1 or readers[name][0].op_type != kind:
            return None
        inner.append(readers[name][0])
        name = inner[-1].output[0]
    reshape, transpose = inner
    if list(transpose.attribute[0].ints) != PERM or reshape.input[1] not in constants:
        return None
    shape = numpy_helper.to_array(constants[reshape.input[1]]).tolist()
    parts: dict[int, str] = {}
    for reader in readers[name]:
        values = [numpy_helper.to_array(constants[n]).ravel().tolist() for n in reader.input[1:] if n in constants]
        if reader.op_type == "Gather" and helper.get_node_attr_value(reader, "axis") == 0 and len(values) == 1:
            parts[values[0][0]] = reader.output[0]
        elif reader.op_type == "Slice" and len(values) == 3 and values[2] == [0]:
            squeezed = readers[reader.output[0]]
            if len(squeezed) != 1 or squeezed[0].op_type != "Squeeze" or values[1] != [values[0][0] + 1]:
                return None
            parts[values[0][0]] = squeezed[0].output[0]
            inner.append(squeezed[0])
        else:
            return None
        inner.append(reader)
    if len(shape) != 5 or shape[2] != 3 or sorted(parts) != [0, 1, 2]:
        return None
    return shape, [parts[index] for index in range(3)], inner
