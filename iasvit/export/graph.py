"""Nodes and constants of an ONNX graph, as the lowering adds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

RUNTIME_DOMAIN = "com.microsoft"  # of operators that ONNX Runtime alone has
UINT8, INT8, INT32, INT64 = (
    TensorProto.UINT8,
    TensorProto.INT8,
    TensorProto.INT32,
    TensorProto.INT64,
)


class Graph:
    """Nodes in order and initializers; names are made unique by a counter.

    Args:
        prefix: of all names.
        centred: whether activations are to be counted from their zero-point on, so that none stands in the file.
        double: whether floats are float64.

    Attributes:
        floats: dtype of float constants.
        float_type: the same as ONNX has it.
    """

    def __init__(self, prefix: str, centred: bool = False, double: bool = False) -> None:
        self.centred = centred
        self.floats: Any = np.float64 if double else np.float32
        self.float_type = TensorProto.DOUBLE if double else TensorProto.FLOAT
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._prefix = prefix
        self._count = 0

    def _name(self, text: str) -> str:
        self._count += 1
        return f"{self._prefix}{text}_{self._count}"

    def add(self, op: str, *inputs: str, domain: str = "", output: str = "", **attributes: Any) -> str:
        """Append a node of one output; the output's name. An input "" is left out."""
        output = output or self._name(op.lower())
        self.nodes.append(helper.make_node(op, inputs, [output], name=self._name(op), domain=domain, **attributes))
        return output

    def constant(self, value: Any, dtype: Any = None) -> str:
        """The name of a constant, a float unless a dtype is given; equal ones share one."""
        array = np.ascontiguousarray(value, dtype=dtype or self.floats).reshape(np.shape(value))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._constants[key] = self._name("constant")
            self.initializers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]
