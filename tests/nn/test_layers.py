"""Quantized Linear, Conv2d and matrix product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from iasvit.nn import QuantConv2d, QuantLinear, QuantMatMul, quantizers_of
from iasvit.quantizers import WEIGHT_PERCENTILES, SULQuantizer, UniformQuantizer


def weight_quantizer(n_bits: int = 3) -> UniformQuantizer:
    return UniformQuantizer(n_bits, channel_dim=0, percentiles=WEIGHT_PERCENTILES)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_multiplies_fake_quantized_operands(bias: bool) -> None:
    linear, x = nn.Linear(7, 5, bias=bias), random(2, 4, 7)
    layer = QuantLinear.from_float(linear, weight_quantizer(), UniformQuantizer(4))
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    layer.input_quantizer.calibrate(x)
    layer.calibrate_weight()
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    w_hat, x_hat = weights.decode(weights.encode(linear.weight)), inputs.decode(inputs.encode(x))
    assert not torch.equal(w_hat, linear.weight)
    assert torch.equal(layer(x), F.linear(x_hat, w_hat, linear.bias))
    assert weights.scale.shape == (5,)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "padding": 1, "groups": 2, "bias": False},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": (3, 1), "padding": (1, 0), "padding_mode": "reflect"},
    ],
)
def test_conv_takes_over_every_setting(arguments: dict[str, object]) -> None:
    conv, x = nn.Conv2d(4, 6, **arguments), random(2, 4, 9, 8)
    layer = QuantConv2d.from_float(conv, weight_quantizer(), None)
    layer.weight_quantizer.enabled = False
    assert torch.equal(layer(x), conv(x))
    layer.calibrate_weight()
    w_hat = layer.weight_quantizer.decode(layer.weight_quantizer.encode(conv.weight))
    expected = conv(x)
    with torch.no_grad():
        conv.weight.copy_(w_hat)
    assert not torch.equal(layer(x), expected)
    assert torch.equal(layer(x), conv(x))


def test_matmul_quantizes_both_operands() -> None:
    left, right = random(2, 3, 4).softmax(-1), random(2, 4, 5)
    product = QuantMatMul(SULQuantizer(3), UniformQuantizer(3))
    product.left_quantizer.calibrate(left)
    product.right_quantizer.calibrate(right)
    assert torch.equal(product(left, right), product.left_quantizer(left) @ product.right_quantizer(right))
    assert not torch.equal(product(left, right), left @ right)


def test_a_matmul_learns_the_same_from_operands_in_any_layout() -> None:
    left, right = random(2, 40, 3, 16), random(2, 40, 3, 16, seed=1)  # as a projection writes them, heads inside
    product = QuantMatMul(UniformQuantizer(3), UniformQuantizer(3))
    product.left_quantizer.calibrate(left)
    product.right_quantizer.calibrate(right)

    def learn(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        outputs = product(q.requires_grad_(True), k.requires_grad_(True))
        return outputs, *torch.autograd.grad(outputs.square().sum(), (q, k))

    q, k = left.transpose(1, 2), right.permute(0, 2, 3, 1)
    views, copies = learn(q.detach(), k.detach()), learn(q.contiguous(), k.contiguous())
    assert all(torch.equal(view, copy) for view, copy in zip(views, copies, strict=True))
    quantizers = product.left_quantizer, product.right_quantizer
    q_hat, k_hat = (quantizer.decode(quantizer.encode(x)) for quantizer, x in zip(quantizers, (q, k), strict=True))
    assert torch.equal(views[0], q_hat @ k_hat)


def test_the_mode_of_the_float_layer_is_kept() -> None:
    assert not QuantLinear.from_float(nn.Linear(2, 2).eval(), weight_quantizer(), None).training
    assert QuantConv2d.from_float(nn.Conv2d(1, 1, 1), weight_quantizer(), None).training


@given(st.integers(2, 8), st.integers(0, 10**6), st.sampled_from([1e-6, 0.02, 1.0, 300.0]), st.sampled_from([0, 1, 40]))
def test_rounding_the_weight_changes_nothing(n_bits: int, seed: int, size: float, offset: float) -> None:
    linear, x = nn.Linear(12, 4), random(3, 12, seed=seed)
    with torch.no_grad():
        linear.weight.copy_(size * (random(4, 12, seed=seed) + offset))
        linear.weight[0] = size * offset  # a constant channel
    layer = QuantLinear.from_float(linear, weight_quantizer(n_bits), None)
    layer.calibrate_weight()
    codes, output = layer.weight_quantizer.encode(layer.weight), layer(x)
    layer.round_weight()
    assert torch.equal(layer.weight_quantizer.encode(layer.weight), codes)
    assert torch.equal(layer.weight_quantizer.decode(codes), layer.weight)
    assert torch.equal(layer(x), output)


def test_gradients_reach_weight_bias_and_input_through_the_rounding() -> None:
    x = random(5, 6).requires_grad_(True)
    layer = QuantLinear.from_float(nn.Linear(6, 4), weight_quantizer(8), UniformQuantizer(8))
    layer.input_quantizer.calibrate(x.detach())
    layer.calibrate_weight()
    layer(x).sum().backward()
    x_hat, w_hat = layer.input_quantizer(x.detach()), layer.weight_quantizer(layer.weight.detach())
    inside = layer.weight.grad != 0
    assert inside.float().mean() > 0.8
    torch.testing.assert_close(layer.weight.grad[inside], x_hat.sum(0).expand(4, 6)[inside])
    assert layer.bias.grad.tolist() == [5, 5, 5, 5]
    passed = x.grad != 0
    assert passed.float().mean() > 0.8
    torch.testing.assert_close(x.grad[passed], w_hat.sum(0).expand(5, 6)[passed])


def test_a_bias_gained_since_is_loaded() -> None:
    layer = QuantLinear.from_float(nn.Linear(3, 2, bias=False), weight_quantizer(), None)
    layer.calibrate_weight()
    layer.bias = nn.Parameter(torch.tensor([1.0, -2.0]), requires_grad=False)
    other = QuantLinear.from_float(nn.Linear(3, 2, bias=False), weight_quantizer(), None)
    other.load_state_dict(layer.state_dict())
    assert other.bias.tolist() == [1, -2]
    assert torch.equal(other(torch.ones(1, 3)), layer(torch.ones(1, 3)))


def test_quantizers_are_listed_by_what_they_quantize() -> None:
    model = nn.Sequential(
        QuantLinear.from_float(nn.Linear(2, 2), weight_quantizer(), UniformQuantizer(3)),
        QuantConv2d.from_float(nn.Conv2d(1, 1, 1), weight_quantizer(), None),
        QuantMatMul(SULQuantizer(3), UniformQuantizer(3)),
    )
    assert [name for name, _ in quantizers_of(model, weights=True)] == ["0.weight_quantizer", "1.weight_quantizer"]
    expected = ["0.input_quantizer", "2.left_quantizer", "2.right_quantizer"]
    assert [name for name, _ in quantizers_of(model, weights=False)] == expected
