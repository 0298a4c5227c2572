"""In float64 a model and its graph have the same codes, all of them, each going on with its own."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch

pytest.importorskip("onnxruntime", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")

import onnx
import onnxruntime
from onnx import TensorProto, helper
from test_operands import KINDS, values_of

import iasvit
from iasvit.errors import IasvitError
from iasvit.export.compare import Comparison
from iasvit.export.double import in_double, plain
from iasvit.export.graph import Graph
from iasvit.export.operands import operand
from iasvit.nn.layers import quant_layers

METHODS = {  # which have all kinds of quantizers among them
    "minmax": {},
    "base_ptq": {},
    "ptq4vit": {},
    "repq_vit": {},
    "ias_vit": {"iterations": 1, "batch_size": 4},
    "adalog": {"rounds": 1, "steps": 2},
}
HEADS = {"vit": 4, "swin": (2, 4)}  # of 8 channels


def run(graph: Graph, outputs: list[str], **inputs: np.ndarray) -> list[np.ndarray]:
    """A graph of float64 inputs, after what is done to a model's."""
    given = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in inputs]
    results = [helper.make_empty_tensor_value_info(name) for name in outputs]
    proto = helper.make_graph(graph.nodes, "g", given, results, list(graph.initializers.values()))
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    plain(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(outputs, inputs)


@pytest.mark.parametrize("n_bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantizer_has_the_same_values(kind: str, n_bits: int) -> None:
    quantizer = KINDS[kind](n_bits)
    quantizer.calibrate(values_of(kind))
    quantizer.double()
    x = values_of(kind, seed=1).double()
    x = x + 1e-9 * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    graph = Graph("q_", double=True)
    made = operand(quantizer, graph, "x")
    if made.values:
        (theirs,) = run(graph, [made.values], x=x.numpy())
    else:
        codes = run(graph, [plane.codes for plane in made.planes], x=x.numpy())
        parts = [
            plane.scale * (array.astype(np.float64) - plane.zero_point - plane.rest)
            for array, plane in zip(codes, made.planes, strict=True)
        ]
        theirs = np.sum(parts, axis=0) + made.constant
    mine = quantizer(x)
    assert mine.dtype == torch.float64
    assert torch.equal(mine, quantizer.decode(quantizer.encode(x)))
    np.testing.assert_allclose(theirs, mine.numpy(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_has_the_same_codes(method: str, family: str) -> None:
    changes = {"vit": {"depth": 1}, "swin": {"depths": (2, 1)}}[family]
    model = tiny_models.MODELS[family](**changes)
    quantized = iasvit.quantize(model, tiny_models.images(), "W4A4", method, **METHODS[method])
    comparison = Comparison(quantized, double=True)
    images = tiny_models.images(24, seed=1)
    (mine,), (theirs,) = comparison.run(images)
    assert all(each.codes for each in comparison.differences.values())
    assert [each.path for each in comparison.differences.values() if each.ties or each.others] == []
    assert mine.dtype == theirs.dtype == torch.float64
    assert (mine - theirs).abs().max() < 1e-12
    with torch.no_grad():
        assert (quantized(images) - mine).abs().max() > 1e-12  # which float32 is not


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_no_number_is_rounded_to_float32(family: str) -> None:
    """Not 1 / sqrt(channels of a head) either, which is no power of two here; without codes it shows."""
    quantized = iasvit.quantize(
        tiny_models.MODELS[family](num_heads=HEADS[family]), tiny_models.images(), "W4A4", "rtn"
    )
    (mine,), (theirs,) = Comparison(quantized, double=True).run(tiny_models.images(4, seed=1))
    assert (mine - theirs).abs().max() < 1e-12


def test_each_side_goes_on_with_its_own_codes() -> None:
    """So a defect shows in all that comes after it."""
    quantized = iasvit.quantize(tiny_models.vit(), tiny_models.images(), "W4A4", "minmax")
    comparison = Comparison(quantized, double=True)
    comparison.model.blocks[0].mlp.fc1.input_quantizer.scale *= 1.03
    comparison.run(tiny_models.images(4, seed=1))
    wrong = [each.path for each in comparison.differences.values() if each.others]
    assert wrong[0] == "blocks.0.mlp.fc1.input_quantizer"
    assert wrong[-1] == "head.input_quantizer"


def test_codes_of_weights_are_those_of_float32() -> None:
    quantized = iasvit.quantize(tiny_models.vit(depth=1), tiny_models.images(), "W3A3", "minmax")
    layer = quantized.blocks[0].mlp.fc1
    scale = layer.weight_quantizer.scale[:, None]
    with torch.no_grad():  # ties of rounding, in float32 exactly and in float64 nearly
        layer.weight.copy_((torch.arange(layer.weight.shape[1]) % 3 - 0.5) * scale)
    before = [layer.weight_quantizer.encode(layer.weight) for _, layer in quant_layers(quantized)]
    after = [layer.weight_quantizer.encode(layer.weight) for _, layer in quant_layers(in_double(quantized))]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_operators_in_double() -> None:
    """GELU, its erf, and a convolution of patches, as torch has them."""
    x = torch.cat([torch.linspace(-9, 9, 20001, dtype=torch.float64), torch.tensor([0.0, 1e-9, -40.0, 40.0])])
    graph = Graph("q_", double=True)
    erf, gelu = run(graph, [graph.add("Erf", "x"), graph.add("Gelu", "x")], x=x.numpy())
    np.testing.assert_allclose(erf, torch.erf(x), rtol=0, atol=1e-14)
    np.testing.assert_allclose(gelu, torch.nn.functional.gelu(x), rtol=1e-14, atol=1e-14)
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    conv = torch.nn.Conv2d(3, 5, 4, 4).double()
    geometry = {"strides": [4, 4], "pads": [0] * 4, "dilations": [1, 1], "group": 1}
    graph = Graph("q_", double=True)
    weight, bias = graph.constant(conv.weight.detach()), graph.constant(conv.bias.detach())
    (patches,) = run(graph, [graph.add("Conv", "x", weight, bias, **geometry)], x=images.numpy())
    np.testing.assert_allclose(patches, conv(images).detach(), atol=1e-14)
    graph.add("Conv", "x", weight, bias, **{**geometry, "strides": [2, 2]})
    with pytest.raises(IasvitError, match="a convolution other than a patch embedding cannot be computed in float64"):
        plain(onnx.helper.make_model(helper.make_graph(graph.nodes, "g", [], [], list(graph.initializers.values()))))
