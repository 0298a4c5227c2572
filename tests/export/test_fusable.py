"""Masks that join biases and LayerNorms of four dimensions: the same numbers, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models

pytest.importorskip("onnxruntime", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")

import onnx
import onnxruntime
from onnx import GraphProto, TensorProto, helper, numpy_helper

import iasvit
from iasvit.export.fusable import join_masks, widen_norms

WINDOWS, HEADS, TOKENS = 4, 2, 3


def graph_of(nodes: list[onnx.NodeProto], output: str, **constants: np.ndarray) -> GraphProto:
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    return helper.make_graph(nodes, "g", [given], [helper.make_empty_tensor_value_info(output)], tensors)


def run(graph: GraphProto, x: np.ndarray) -> np.ndarray:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def windows(mask: str = "mask", read_twice: bool = False, heads: int = 1) -> GraphProto:
    """Scores plus a bias, plus a mask for each window, then a softmax, as a traced Swin has it."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Unsqueeze", ["bias", "first"], ["biases"]),
        helper.make_node("Add", ["x", "biases"], ["biased"]),
        helper.make_node("Reshape", ["biased", "parted"], ["by_window"]),
        helper.make_node("Unsqueeze", [mask, "outer"], ["masks"]),
        helper.make_node("Add", ["by_window", "masks"], ["masked"]),
        helper.make_node("Reshape", ["masked", "joined"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["y"], axis=-1),
    ]
    if read_twice:
        nodes.append(helper.make_node("Neg", ["biased"], ["other"]))
    return graph_of(
        nodes,
        "y",
        bias=random.standard_normal((HEADS, TOKENS, TOKENS)).astype(np.float32),
        mask=np.where(random.random((WINDOWS, heads, TOKENS, TOKENS)) < 0.4, -100.0, 0.0).astype(np.float32),
        first=np.array([0]),
        outer=np.array([0]),
        parted=np.array([-1, WINDOWS, HEADS, TOKENS, TOKENS]),
        joined=np.array([-1, HEADS, TOKENS, TOKENS]),
    )


@pytest.mark.parametrize("images", [1, 3])
def test_a_mask_joins_the_bias_and_the_softmax_stays_the_same(images: int) -> None:
    x = np.random.default_rng(1).standard_normal((images * WINDOWS, HEADS, TOKENS, TOKENS)).astype(np.float32)
    graph = windows()
    expected = run(graph, x)
    join_masks(graph)
    kinds = [node.op_type for node in graph.node]
    assert kinds[-8:] == ["Reshape", "Add", "Shape", "Div", "Concat", "Tile", "Add", "Softmax"]
    assert np.array_equal(run(graph, x), expected)


@pytest.mark.parametrize("graph", [windows(mask="x"), windows(read_twice=True), windows(heads=HEADS)])
def test_a_mask_of_the_input_or_of_each_head_or_a_sum_that_is_read_elsewhere_stays(graph: GraphProto) -> None:
    before = graph.SerializeToString()
    join_masks(graph)
    assert graph.SerializeToString() == before


@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 5, 8), (3, 2, 4, 8)])
def test_a_widened_norm_gives_the_same_in_the_same_shape(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal(shape).astype(np.float32)
    node = helper.make_node("LayerNormalization", ["x", "weight", "bias"], ["y"], axis=-1, epsilon=1e-6)
    graph = graph_of([node], "y", **{name: random.standard_normal(8).astype(np.float32) for name in ("weight", "bias")})
    expected = run(graph, x)
    widen_norms(graph)
    assert [n.op_type for n in graph.node].count("Reshape") == 2
    found = run(graph, x)
    assert found.shape == shape
    assert np.array_equal(found, expected)


def test_a_swins_file_for_openvino_has_one_addition_behind_each_product_of_queries_and_keys(tmp_path: Path) -> None:
    model = iasvit.quantize(tiny_models.swin(depths=(2, 1)), tiny_models.images(), "W4A4", "minmax")
    operators = {}
    for target in ("openvino", "onnx"):
        iasvit.export_onnx(model, tmp_path / target, target=target)
        operators[target] = [node.op_type for node in onnx.load(tmp_path / target).graph.node]
    assert operators["openvino"].count("Tile") == 1  # the shifted block's
    assert "Tile" not in operators["onnx"]
