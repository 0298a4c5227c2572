"""Queries, keys and values as three layers: what is split, and what must stay."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra export is not installed")

from onnx import GraphProto, helper, numpy_helper

from iasvit.export.qkv import split_qkv


def traced(factor: np.ndarray, pick: str = "Slice", perm: tuple[int, ...] = (2, 0, 3, 1, 4)) -> GraphProto:
    """Linear → Reshape → Transpose → three parts, the first times a factor, as a traced graph has it."""
    constants = {"shape": np.array([-1, 5, 3, 2, 4]), "factor": factor, "axis": np.array([0])}
    nodes = [
        helper.make_node("Linear", ["x"], ["y"], domain="iasvit", path="attn.qkv"),
        helper.make_node("Reshape", ["y", "shape"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=perm),
    ]
    for index, name in enumerate("qkv"):
        constants |= {
            f"{index}": np.array([index]),
            f"{index + 1}": np.array([index + 1]),
            f"i{index}": np.array(index),
        }
        if pick == "Gather":
            nodes.append(helper.make_node("Gather", ["t", f"i{index}"], [name], axis=0))
        else:
            nodes.append(helper.make_node("Slice", ["t", f"{index}", f"{index + 1}", "axis"], [f"{name}1"]))
            nodes.append(helper.make_node("Squeeze", [f"{name}1", "axis"], [name]))
    nodes.append(helper.make_node("Mul", ["q", "factor"], ["scaled"]))
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    return helper.make_graph(nodes, "g", [], [], tensors)


@pytest.mark.parametrize("pick", ["Slice", "Gather"])
def test_a_scalar_factor_moves_before_the_rearrangement(pick: str) -> None:
    graph = traced(np.array(0.5, np.float32), pick)
    split_qkv(graph, "iasvit")
    assert [node.op_type for node in graph.node] == [
        *("Linear", "Mul", "Reshape", "Transpose"),
        *("Linear", "Reshape", "Transpose") * 2,
    ]
    assert {"scaled", "k", "v"} <= {node.output[0] for node in graph.node}


def test_a_factor_for_each_head_stays_behind_it() -> None:
    graph = traced(np.ones((2, 1, 1), np.float32))
    split_qkv(graph, "iasvit")
    assert [node.op_type for node in graph.node] == [*("Linear", "Reshape", "Transpose") * 3, "Mul"]
    assert list(graph.node[-1].input) == ["q", "factor"]


def test_another_order_is_left_alone() -> None:
    graph = traced(np.array(0.5, np.float32), perm=(0, 2, 3, 1, 4))
    before = graph.SerializeToString()
    split_qkv(graph, "iasvit")
    assert graph.SerializeToString() == before
