"""Products of integers are exact, whatever the zero-points, on CPUs that saturate sums of 16 bits too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="the extra export is not installed")

from graphs import run, skip_without_convolutions
from torch import nn

from iasvit.export.graph import Graph
from iasvit.export.operands import operand
from iasvit.export.products import Emitter
from iasvit.nn import QuantConv2d, QuantLinear
from iasvit.quantizers import Quantizer, SULQuantizer, UniformQuantizer


def uniform(n_bits: int, scale: float, zero_point: int) -> UniformQuantizer:
    quantizer = UniformQuantizer(n_bits)
    quantizer.set_parameters(torch.tensor(scale), torch.tensor(zero_point))
    return quantizer


def linear(weight_quantizer: UniformQuantizer, weight: torch.Tensor, input_quantizer: Quantizer) -> QuantLinear:
    layer = QuantLinear.from_float(nn.Linear(*weight.shape[::-1]), weight_quantizer, input_quantizer)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer.requires_grad_(False)


def through_graph(layer: QuantLinear, x: torch.Tensor, target: str, vnni: bool = False) -> tuple[np.ndarray, set[str]]:
    graph = Graph("q_", target == "openvino")
    emit = Emitter(graph, target, vnni)
    left = operand(layer.input_quantizer, graph, "x")
    right = emit.weight(layer, max(plane.largest for plane in left.planes), transpose=True)
    result = emit.matmul(left, right, layer.bias.numpy())
    return run(graph, [result], x=x.numpy())[0], {node.op_type for node in graph.nodes} | {np.dtype(right.dtype).name}


@pytest.mark.parametrize("target", ["onnxruntime", "onnx", "openvino"])
@pytest.mark.parametrize("weight_zero", [7, -20, 200, 40000])
@pytest.mark.parametrize("zero_point", [7, 200, 300, -9])
def test_zero_points(target: str, weight_zero: int, zero_point: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * (torch.randint(0, 16, (8, 40), generator=generator) - weight_zero).float()
    layer = linear(uniform(4, 0.05, weight_zero), weight, uniform(4, 0.5, zero_point))
    x = 0.5 * (torch.randint(0, 16, (3, 40), generator=generator) - zero_point).float()
    mine = layer(x).double().numpy()
    theirs, _ = through_graph(layer, x, target)
    exact = x.double().numpy() @ weight.double().numpy().T + layer.bias.double().numpy()
    assert np.allclose(theirs, exact, rtol=1e-5, atol=1e-6 * np.abs(mine).max())


@pytest.mark.parametrize("n_bits", [3, 4, 6, 7, 8])
@pytest.mark.parametrize("target", ["onnxruntime", "onnx"])
def test_the_largest_codes_do_not_saturate(n_bits: int, target: str) -> None:
    """Two products of uint8 and int8 that a CPU without VNNI adds in 16 bits: 255·64·2 fits, 255·127·2 does not."""
    n = 2**n_bits - 1
    zero = 2 ** (n_bits - 1)
    weight = torch.full((4, 64), float(n - zero))
    weight[1] = -zero
    layer = linear(uniform(n_bits, 1.0, zero), weight, uniform(8, 1.0, 0))
    x = torch.full((2, 64), 255.0)
    theirs, used = through_graph(layer, x, target)
    exact = x.double().numpy() @ weight.double().numpy().T + layer.bias.double().numpy()
    assert np.allclose(theirs, exact, rtol=1e-6)
    assert ("int8" in used) == (n_bits <= 7)
    assert "int8" in through_graph(layer, x, target, vnni=True)[1]


@pytest.mark.parametrize("vnni", [False, True])
@pytest.mark.parametrize("target", ["onnxruntime", "onnx", "openvino"])
def test_eight_bits_with_zero_points(target: str, vnni: bool) -> None:
    """Counts that no int8 holds: uint8 with zero-points, or, where int8 is needed, moved by 128."""
    generator = torch.Generator().manual_seed(0)
    zero = torch.tensor([0, 20, 128, 255])
    scale = torch.tensor([0.1, 0.2, 0.3, 0.4])
    weight = scale[:, None] * (torch.randint(0, 256, (4, 40), generator=generator) - zero[:, None])
    quantizer = UniformQuantizer(8, channel_dim=0)
    quantizer.set_parameters(scale, zero)
    layer = linear(quantizer, weight, uniform(4, 0.5, 3))
    x = 0.5 * (torch.randint(0, 16, (3, 40), generator=generator) - 3).float()
    theirs, used = through_graph(layer, x, target, vnni)
    exact = x.double().numpy() @ weight.double().numpy().T + layer.bias.double().numpy()
    assert np.allclose(theirs, exact, rtol=1e-5, atol=1e-4)
    assert ("int8" in used) == (vnni or target == "openvino")


def test_the_constant_of_sulq_is_a_column_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.softmax(2 * torch.randn(6, 40, generator=generator), dim=-1)
    values = torch.randn(40, 16, generator=generator)
    quantizer, right = SULQuantizer(3), UniformQuantizer(4)
    quantizer.calibrate(x)
    right.calibrate(values)
    mine = quantizer(x) @ right(values)
    for target in ("onnxruntime", "onnx", "openvino"):
        graph = Graph("q_", target == "openvino")
        emit = Emitter(graph, target, vnni=False)
        left = operand(quantizer, graph, "x")
        assert left.constant == pytest.approx(-quantizer.shift.item())
        result = emit.matmul(left, emit.activation(right, "y", 255))
        assert np.allclose(run(graph, [result], x=x.numpy(), y=values.numpy())[0], mine.numpy(), atol=1e-5)


@pytest.mark.parametrize("geometry", [{"padding": 1}, {"stride": 2}, {"padding": 1, "groups": 2}])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_convolutions(geometry: dict, target: str) -> None:
    if target == "onnxruntime":
        skip_without_convolutions()
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, **geometry).requires_grad_(False)
    layer = QuantConv2d.from_float(conv, UniformQuantizer(4, channel_dim=0), uniform(4, 0.3, 6))
    layer.calibrate_weight()
    layer.requires_grad_(False)
    x = torch.randn(2, 4, 9, 9)
    graph = Graph("q_", target == "openvino")
    emit = Emitter(graph, target, vnni=False)
    left = operand(layer.input_quantizer, graph, "x")
    result = emit.convolution(layer, left, emit.weight(layer, 15, transpose=False), layer.bias.numpy())
    assert result is not None
    assert np.allclose(run(graph, [result], x=x.numpy())[0], layer(x).numpy(), atol=1e-5)
    layer.input_quantizer.set_parameters(torch.tensor(0.3), torch.tensor(300))  # no code stands for the padding's 0
    graph = Graph("q_")
    left = operand(layer.input_quantizer, graph, "x")
    emit = Emitter(graph, "onnxruntime", vnni=False)
    assert emit.convolution(layer, left, emit.weight(layer, 15, transpose=False), layer.bias.numpy()) is None
