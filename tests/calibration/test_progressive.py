"""The search from coarse to fine, and the quantizers of AdaLog that it sets."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from iasvit.calibration.progressive import progressive, sample, search_linear, search_product
from iasvit.errors import IasvitError
from iasvit.nn import QuantLinear, QuantMatMul
from iasvit.quantizers import AdaLogQuantizer, ShiftedAdaLogQuantizer, UniformQuantizer
from iasvit.quantizers.twin import GELU_MINIMUM


def test_each_row_comes_near_its_own_minimum() -> None:
    goals = torch.tensor([[0.1, 0.9], [0.52, 0.33], [1.0, 0.0]])
    found = progressive(lambda point: (point - goals).square().sum(1), 3, 8, torch.device("cpu"))
    assert (found - goals).abs().max() < 0.01


def test_it_is_the_plain_search() -> None:
    """One row: the four best so far, their eight neighbours at half the distance, again and again."""

    def error(point: tuple[float, float]) -> float:
        return (point[0] - 0.37) ** 2 + 3 * (point[1] - 0.81) ** 2 + 0.1 * point[0] * point[1]

    line = [0, 1 / 3, 2 / 3, 1]
    tried = {(a, b): error((a, b)) for a, b in itertools.product(line, line)}
    width = 1 / 3
    for _ in range(3):
        width /= 2
        best = sorted(tried, key=tried.get)[:4]
        tried = {point: tried[point] for point in best}
        for a, b in best:
            for i, j in itertools.product((-width, 0, width), repeat=2):
                point = (min(max(a + i, 0.0), 1.0), min(max(b + j, 0.0), 1.0))
                tried.setdefault(point, error(point))
    expected = min(tried, key=tried.get)
    found = progressive(lambda p: torch.tensor([error(tuple(p[0].tolist()))]), 1, 3, torch.device("cpu"))
    torch.testing.assert_close(found[0], torch.tensor(expected))


def layer(outputs: int = 5, inputs: int = 8) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    float_layer = torch.nn.Linear(inputs, outputs)
    float_layer.weight.data = torch.randn(outputs, inputs, generator=generator)
    result = QuantLinear.from_float(float_layer, UniformQuantizer(3, channel_dim=0), UniformQuantizer(3))
    return result.requires_grad_(False)


def test_a_linears_output_errs_less_than_by_percentiles() -> None:
    linear = layer()
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(1)) ** 3  # long tails
    linear.input_quantizer.calibrate(x)
    linear.calibrate_weight()
    expected = x @ linear.weight.T + linear.bias
    before = (linear(x) - expected).square().mean()
    search_linear(linear, x, rounds=2, steps=3)
    assert (linear(x) - expected).square().mean() < 0.9 * before


def test_a_product_with_a_searched_base_errs_less() -> None:
    generator = torch.Generator().manual_seed(2)
    attention = (4 * torch.randn(2, 2, 16, 16, generator=generator)).softmax(-1)
    value = torch.randn(2, 2, 16, 8, generator=generator)
    product = QuantMatMul(AdaLogQuantizer(3), UniformQuantizer(3))
    product.left_quantizer.calibrate(attention)
    product.right_quantizer.calibrate(value)
    before = (product(attention, value) - attention @ value).square().mean()
    search_product(product, attention, value, rounds=2, steps=3)
    assert (product(attention, value) - attention @ value).square().mean() <= before
    assert product.left_quantizer.problem() == ""


@pytest.mark.parametrize("n_bits", [3, 4])
def test_shifted_adalog_covers_gelu_with_two_to_the_b_values(n_bits: int) -> None:
    x = torch.nn.functional.gelu(torch.linspace(-6, 4, 5001))
    quantizer = ShiftedAdaLogQuantizer(n_bits)
    quantizer.calibrate(x)
    codes = quantizer.encode(x)
    assert int(codes.max()) < 2**n_bits
    assert torch.equal(quantizer.decode(codes), quantizer(x))
    values = quantizer.decode(torch.arange(2**n_bits))
    assert values.min() == pytest.approx(GELU_MINIMUM)
    assert len(quantizer(torch.linspace(-5, 9, 9001)).unique()) <= 2**n_bits
    uniform = UniformQuantizer(n_bits)
    uniform.calibrate(x)
    assert (quantizer(x) - x).square().mean() < 4 * (uniform(x) - x).square().mean()
    assert quantizer.config()["kind"] == "adalog_gelu"


def test_shifted_adalog_has_the_codes_of_its_formula() -> None:
    quantizer = ShiftedAdaLogQuantizer(4)
    quantizer.scale, quantizer.exponent = torch.tensor(2.0), torch.tensor(50, dtype=torch.int32)
    x = torch.tensor([GELU_MINIMUM, -0.1, 0.0, 0.3, 1.5, 9.0])
    plain = [-(37 / 50) * torch.log2((v - GELU_MINIMUM) / 2.0) for v in x]
    expected = [15 if torch.isinf(p) else int(p.round().clamp(0, 15)) for p in plain]
    assert quantizer.encode(x).tolist() == expected


def test_samples_are_even_and_bounded() -> None:
    parts: list[Tensor] = [torch.arange(20.0).view(2, 5, 2), torch.arange(20.0, 30).view(1, 5, 2)]
    assert sample(parts, 100).shape == (15, 2)
    assert sample(parts, 5)[:, 0].tolist() == [0, 6, 12, 18, 24]


def test_adalog_without_a_shift_takes_no_negative_values() -> None:
    with pytest.raises(IasvitError, match="takes values from 0 on"):
        AdaLogQuantizer(3).calibrate(torch.tensor([-1.0, 1.0]))
