"""Small ONNX graphs of what the exporter emits, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from iasvit.export.graph import RUNTIME_DOMAIN, Graph


def run(graph: Graph, outputs: Sequence[str], **inputs: np.ndarray) -> list[np.ndarray]:
    """Outputs of a graph for float32 inputs."""
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs]
    results = [helper.make_empty_tensor_value_info(name) for name in outputs]
    proto = helper.make_graph(graph.nodes, "g", given, results, list(graph.initializers.values()))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(RUNTIME_DOMAIN, 1)]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(list(outputs), inputs)
