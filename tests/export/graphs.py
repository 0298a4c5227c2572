"""Small ONNX graphs of what the exporter emits, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from iasvit.export.graph import RUNTIME_DOMAIN, Graph
from iasvit.export.runtime import OPENVINO


def skip_without_convolutions() -> None:
    """Skip a test where ONNX Runtime has no convolution of uint8 by int8: before 1.24, which needs Python 3.11."""
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24):
        pytest.skip("onnxruntime is older than 1.24, and has no convolution of uint8 by int8")


def model_of(graph: Graph, outputs: Sequence[str], shapes: dict[str, list[int | str] | None]) -> bytes:
    """A graph of float32 inputs of these shapes, serialized."""
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    results = [helper.make_empty_tensor_value_info(name) for name in outputs]
    proto = helper.make_graph(graph.nodes, "g", given, results, list(graph.initializers.values()))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(RUNTIME_DOMAIN, 1)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=10).SerializeToString()


def run(graph: Graph, outputs: Sequence[str], **inputs: np.ndarray) -> list[np.ndarray]:
    """Outputs of a graph for float32 inputs."""
    model = model_of(graph, outputs, dict.fromkeys(inputs))
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(list(outputs), inputs)


def run_by_openvino(graph: Graph, output: str, x: np.ndarray, fixed: bool) -> np.ndarray:
    """The output for the one input "x", whose first dimension OpenVINO knows before it compiles, or not."""
    openvino = pytest.importorskip("openvino", reason="the extra openvino is not installed")
    first: list[int | str] = [x.shape[0] if fixed else "batch"]
    model = openvino.Core().read_model(model_of(graph, [output], {"x": [*first, *x.shape[1:]]}))
    (result,) = openvino.Core().compile_model(model, "CPU", OPENVINO)(x).values()
    return result
