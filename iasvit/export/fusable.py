"""Rearrangements of a traced graph that OpenVINO computes faster, with the same numbers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator


def make_fusable(graph: onnx.GraphProto) -> None:
    """Join masks with biases, and give LayerNorms four dimensions, in place."""
    join_masks(graph)
    widen_norms(graph)


def join_masks(graph: onnx.GraphProto) -> None:
    """Add up the two constants of a shifted window's attention, its bias of positions and its mask, before they are
    added to Q·Kᵀ.

    OpenVINO 2026.4 adds them up when it loads the file. It then computes Q·Kᵀ, sum, softmax and A·V in one kernel, as
    in windows that are not shifted. With a bias b, a mask of 0 or -100 and scores s, (s + b) + 0 = s + (b + 0), and
    e^(s + b - 100) is no more than 0 either way.

    Args:
        graph: traced; what it matches is Add → Reshape to (batch, windows, heads, N, N) → Add → Reshape back, as timm
            and mmdet have it. What looks otherwise stays.
    """
    makers = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    joined: dict[str, list[onnx.NodeProto]] = {}
    for back in graph.node:
        chain = [back]  # Reshape, Add, Reshape, Add
        for kind in ("Reshape", "Add", "Reshape"):
            before = makers.get(chain[-1].input[0]) if chain[-1].op_type == kind else None
            if before is None or readers[before.output[0]] != 1:
                break
            chain.append(before)
        if len(chain) < 4 or chain[-1].op_type != "Add":
            continue
        mask, bias, shape = (_constant(graph, makers, chain[place].input[1]) for place in (1, 3, 2))
        if mask is None or bias is None or shape is None or len(shape) != 5:
            continue
        _, windows, _, *tokens = shape.tolist()
        if mask.size != windows * tokens[0] * tokens[1]:  # it differs from head to head
            continue
        name, scores = back.output[0], chain[3].input[0]
        for what, value in (("windows", [windows]), ("by_window", [windows, 1, *tokens]), ("ones", [1, 1, 1])):
            graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), f"{name}_{what}"))
        joined[name] = [
            helper.make_node("Reshape", [chain[1].input[1], f"{name}_by_window"], [f"{name}_mask"]),
            helper.make_node("Add", [f"{name}_mask", chain[3].input[1]], [f"{name}_both"]),
            helper.make_node("Shape", [scores], [f"{name}_batch"], start=0, end=1),
            helper.make_node("Div", [f"{name}_batch", f"{name}_windows"], [f"{name}_images"]),
            helper.make_node("Concat", [f"{name}_images", f"{name}_ones"], [f"{name}_repeats"], axis=0),
            helper.make_node("Tile", [f"{name}_both", f"{name}_repeats"], [f"{name}_tiled"]),
            helper.make_node("Add", [scores, f"{name}_tiled"], [name]),
        ]
    _replace(graph, joined)


def widen_norms(graph: onnx.GraphProto) -> None:
    """Compute each LayerNorm on (batch, 1, tokens, channels).

    OpenVINO 2026.4 takes three kernels for one of four dimensions and one for one of three, which is slower: 0.15 and
    0.27 ms for 3136×96, the quantizer behind it included.
    """
    widened: dict[str, list[onnx.NodeProto]] = {}
    shape = "norms_shape"
    for node in graph.node:
        if node.op_type == "LayerNormalization":
            name = node.output[0]
            inner = onnx.NodeProto.FromString(node.SerializeToString())
            inner.input[0], inner.output[0] = f"{name}_wide", f"{name}_normal"
            widened[name] = [
                helper.make_node("Shape", [node.input[0]], [f"{name}_shape"]),
                helper.make_node("Slice", [f"{name}_shape", f"{shape}_last", f"{shape}_end"], [f"{name}_channels"]),
                helper.make_node("Concat", [shape, f"{name}_channels"], [f"{name}_wide_shape"], axis=0),
                helper.make_node("Reshape", [node.input[0], f"{name}_wide_shape"], [f"{name}_wide"]),
                inner,
                helper.make_node("Reshape", [f"{name}_normal", f"{name}_shape"], [name]),
            ]
    for what, value in (("", [0, 1, -1]), ("_last", [-1]), ("_end", [2**31 - 1])):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), f"{shape}{what}"))
    _replace(graph, widened)


def _constant(graph: onnx.GraphProto, makers: dict[str, onnx.NodeProto], name: str) -> np.ndarray | None:
    """The value of a tensor that depends on initializers alone; None of another."""
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    used: set[str] = set()
    wanted = [name]
    while wanted:
        at = wanted.pop()
        if at in initializers:
            used.add(at)
        elif at not in makers or makers[at].domain:
            return None
        elif makers[at] not in nodes:
            nodes.append(makers[at])
            wanted += [part for part in makers[at].input if part]
    if not nodes:
        return numpy_helper.to_array(initializers[name])
    order = [node for node in graph.node if node in nodes]
    output = helper.make_empty_tensor_value_info(name)
    part = helper.make_graph(order, "constant", [], [output], [initializers[each] for each in used])
    (value,) = ReferenceEvaluator(helper.make_model(part)).run([name], {})
    return np.asarray(value)


def _replace(graph: onnx.GraphProto, made: dict[str, list[onnx.NodeProto]]) -> None:
    """Put nodes in the place of those that make these tensors."""
    nodes = [new for node in graph.node for new in made.get(node.output[0], [node])]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    graph.ClearField("node")
    graph.node.extend(nodes)
