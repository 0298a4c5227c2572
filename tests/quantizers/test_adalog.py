"""AdaLog: codes and the decoding table worked out by hand, and the search of base and scale against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from iasvit.quantizers import ACTIVATION_PERCENTILES, AdaLogQuantizer
from iasvit.quantizers.adalog import EXPONENTS, STEPS


def adalog(n_bits: int, scale: float, exponent: int) -> AdaLogQuantizer:
    quantizer = AdaLogQuantizer(n_bits)
    quantizer.scale, quantizer.exponent = torch.tensor(scale), torch.tensor(exponent, dtype=torch.int32)
    return quantizer


def test_codes_by_hand() -> None:
    # Base 2^(74/37) = 4: -log2(x) / 2 = 0, 0.37, 0.5 (to even: 0), 0.87, 1, 1.66, inf; the last of four codes is 0.
    x = torch.tensor([1.0, 0.6, 0.5, 0.3, 0.25, 0.1, 0.0, 1.5])
    quantizer = adalog(2, 1.0, 74)
    assert quantizer.encode(x).tolist() == [0, 0, 0, 1, 1, 2, 3, 0]
    assert quantizer(x).tolist() == [1, 1, 1, 0.25, 0.25, 1 / 16, 0, 1]


def test_the_table_holds_multiples_of_what_its_bits_can_tell() -> None:
    # Base 2^(20/37), 3 bits: 2^-(20q/37) is a shift by ⌊20q / 37⌋ of a fraction in multiples of 1/14.
    steps = [20 * q for q in range(7)]
    expected = [0.8 * 2.0 ** -(s // 37) * round(14 * 2 ** -(s % 37 / 37)) / 14 for s in steps] + [0.0]
    np.testing.assert_allclose(adalog(3, 0.8, 20).decode(torch.arange(8)).tolist(), expected, rtol=1e-6)


@pytest.mark.parametrize("n_bits", [2, 3, 4])
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_base_and_scale_equal_a_plain_loop(n_bits: int, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(n_bits)
    x = (sharpness * torch.randn(20, 30, generator=generator)).softmax(dim=-1)
    values = x.double().numpy().ravel()
    errors = {}
    for p in ACTIVATION_PERCENTILES:
        scale = np.quantile(values, p)
        for exponent in EXPONENTS:
            quantizer = adalog(n_bits, float(np.float32(scale)), exponent)
            errors[float(np.float32(scale)), exponent] = float((quantizer(x).double() - x.double()).square().mean())
    quantizer = AdaLogQuantizer(n_bits)
    quantizer.calibrate(x)
    chosen = float((quantizer(x).double() - x.double()).square().mean())
    assert chosen == pytest.approx(min(errors.values()), rel=1e-4)
    assert quantizer.exponent.item() / STEPS != 1  # another base than log2's is better here
