"""SULQ against worked examples and a plain loop over its shifts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from iasvit.errors import IasvitError
from iasvit.quantizers import SULQuantizer
from iasvit.quantizers.sulq import SHIFTS


def test_worked_example_of_unit_steps() -> None:
    # b = 3, η = 2^-7, x from 0 to 1 - 2^-7: y = -log2(x + η) runs from 0 to 7, so s = 1, z = 0 and q = round(y).
    #   x         x + η       y        q   x̂ = 2^-q - η
    #   1 - 2^-7  1           0        0   0.9921875
    #   0.5       0.5078125   0.9776   1   0.4921875
    #   0.1       0.1078125   3.2134   3   0.1171875
    #   0.01      0.0178125   5.8110   6   0.0078125
    #   0         0.0078125   7        7   0
    x = torch.tensor([1 - 2**-7, 0.5, 0.1, 0.01, 0.0])
    quantizer = SULQuantizer(3, shifts=(2**-7,))
    quantizer.calibrate(x)
    assert (quantizer.scale.item(), quantizer.zero_point.item(), quantizer.shift.item()) == (1, 0, 2**-7)
    assert quantizer.encode(x).tolist() == [0, 1, 3, 6, 7]
    assert quantizer(x).tolist() == [0.9921875, 0.4921875, 0.1171875, 0.0078125, 0]
    # Beyond the range seen: x = 1 has y = -0.0112, which rounds to code 0 as well.
    assert quantizer.encode(torch.tensor([1.0])).tolist() == [0]


def test_worked_example_with_both_roundings_and_a_zero_point() -> None:
    # b = 3, η = 1/4, x from 0 to 1: y = -log2(x + η) runs from -log2(1.25) = -0.3219 to 2, so
    # s = 2.3219 / 7 = 0.33170, z = round(0.3219 / 0.33170) = round(0.9705) = 1.
    #   x     x + η   y        y / s    q   (q - z)·s   ŷ   x̂ = 2^-ŷ - 1/4
    #   1     1.25   -0.3219   -0.971   0   -0.3317     0   0.75
    #   0.7   0.95    0.0740    0.223   1    0          0   0.75
    #   0.5   0.75    0.4150    1.251   2    0.3317     0   0.75
    #   0.3   0.55    0.8625    2.600   4    0.9951     1   0.25
    #   0.2   0.45    1.1520    3.473   4    0.9951     1   0.25
    #   0.1   0.35    1.5146    4.566   6    1.6585     2   0
    #   0     0.25    2         6.030   7    1.9902     2   0
    x = torch.tensor([1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.0])
    quantizer = SULQuantizer(3, shifts=(0.25,))
    quantizer.calibrate(x)
    assert quantizer.scale.item() == pytest.approx(0.33170, abs=1e-5)
    assert quantizer.zero_point.item() == 1
    assert quantizer.zero_point.dtype == torch.int32
    assert quantizer.encode(x).tolist() == [0, 1, 2, 4, 4, 6, 7]
    assert quantizer(x).tolist() == [0.75, 0.75, 0.75, 0.25, 0.25, 0, 0]
    # Without rounding (q - z)·s to an integer code 2 would stand for 2^-0.3317 - 0.25 = 0.5446: no bit shift.
    assert quantizer.decode(torch.tensor([2], dtype=torch.uint8)).item() == 0.75


def test_shifts_are_those_of_the_paper() -> None:
    assert SHIFTS == (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)


@pytest.mark.parametrize("n_bits", [2, 3, 4, 6])
def test_the_shift_equals_a_plain_loop_over_shifts(n_bits: int) -> None:
    generator = torch.Generator().manual_seed(n_bits)
    chosen = set()
    for sharpness in (0.5, 2.0, 6.0):
        x = (sharpness * torch.randn(50, 50, generator=generator)).softmax(dim=-1)
        values = x.double().numpy().ravel()
        best = None
        for shift in SHIFTS:
            y = -np.log2(values + shift)
            scale = (y.max() - y.min()) / (2**n_bits - 1)
            zero_point = np.round(-y.min() / scale)
            codes = np.clip(np.round(y / scale) + zero_point, 0, 2**n_bits - 1)
            decoded = 2.0 ** -np.round((codes - zero_point) * scale) - shift
            error = np.mean((decoded - values) ** 2)
            if best is None or error < best[0]:
                best = error, shift, scale, int(zero_point)
        quantizer = SULQuantizer(n_bits)
        quantizer.calibrate(x)
        assert quantizer.shift.item() == pytest.approx(best[1])
        assert quantizer.scale.item() == pytest.approx(best[2], rel=1e-4)
        assert quantizer.zero_point.item() == best[3]
        chosen.add(best[1])
    assert len(chosen) > 1  # else the test would not see which one is taken


@pytest.mark.parametrize("n_bits", range(2, 9))
def test_every_value_is_a_bit_shift_less_eta(n_bits: int) -> None:
    quantizer = SULQuantizer(n_bits)
    quantizer.calibrate((6 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).softmax(dim=-1))
    codes = torch.arange(2**n_bits, dtype=torch.uint8)
    exponents = torch.log2(quantizer.decode(codes).double() + quantizer.shift.double())
    assert (exponents - exponents.round()).abs().max() < 1e-3  # x̂ + η is rounded to float32 in between


@pytest.mark.parametrize("value", [0.0, 0.2, 1.0])
def test_a_constant_attention_map(value: float) -> None:
    quantizer = SULQuantizer(3)
    quantizer.calibrate(torch.full((4, 4), value))
    assert quantizer(torch.tensor([value])).item() == pytest.approx(value, abs=0.01)
    assert torch.isfinite(quantizer(torch.linspace(0, 1, 50))).all()


def test_negative_values_are_refused() -> None:
    with pytest.raises(IasvitError, match="from 0 on"):
        SULQuantizer(3).calibrate(torch.tensor([0.5, -1e-3]))
