"""Log2 and log-sqrt2: codes worked out by hand, exact powers, the scale's search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from iasvit.errors import IasvitError
from iasvit.quantizers import ACTIVATION_PERCENTILES, Log2Quantizer
from iasvit.quantizers.log2 import power_of_two


def log2(n_bits: int, scale: float, steps_per_octave: int = 1) -> Log2Quantizer:
    quantizer = Log2Quantizer(n_bits, steps_per_octave)
    quantizer.scale = torch.tensor(scale)
    return quantizer


def test_log2_codes_by_hand() -> None:
    # -log2(x):  0    0.737  1    1.737  2     3.32   6     6.64        inf  -0.58
    # rounded:   0    1      1    2      2     3      6     7 (is 0)    7    -1 → 0
    x = torch.tensor([1.0, 0.6, 0.5, 0.3, 0.25, 0.1, 1 / 64, 0.01, 0.0, 1.5])
    quantizer = log2(3, 1.0)
    assert quantizer.encode(x).tolist() == [0, 1, 1, 2, 2, 3, 6, 7, 7, 0]
    assert quantizer(x).tolist() == [1, 0.5, 0.5, 0.25, 0.25, 0.125, 1 / 64, 0, 0, 1]


def test_without_a_code_for_zero_the_last_code_is_a_power_too() -> None:
    """The log2 that I&S-ViT compares SULQ with: its scale is the largest value seen, and 0 becomes 2^-(2^b - 1)."""
    x = torch.tensor([0.75, 0.6, 0.1, 1e-4, 0.0])
    quantizer = Log2Quantizer(2, percentiles=(1.0,), zero_code=False)
    quantizer.calibrate(x)
    assert quantizer.scale.item() == 0.75
    assert quantizer.encode(x).tolist() == [0, 0, 3, 3, 3]
    assert quantizer(x).tolist() == [0.75, 0.75, 0.75 / 8, 0.75 / 8, 0.75 / 8]
    leaf = x.clone().requires_grad_(True)
    quantizer(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.tensor([1.0, 0.75 / 0.6, 0.9375, 0, 0]))  # 0 where x is clamped


def test_log2_scale_by_hand() -> None:
    # s = 0.75, 2 bits: x / s = 1, 0.8, 0.6, 0.4, 0.2, 0.1 → -log2 = 0, 0.32, 0.74, 1.32, 2.32, 3.32 → 0 0 1 1 2 3
    x = 0.75 * torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.1])
    quantizer = log2(2, 0.75)
    assert quantizer.encode(x).tolist() == [0, 0, 1, 1, 2, 3]
    assert quantizer(x).tolist() == [0.75, 0.75, 0.375, 0.375, 0.1875, 0]


def test_log_sqrt2_codes_by_hand() -> None:
    # -2·log2(x):  0    0.644  1.474  2    2.644  6     6.64      → 0 1 1 2 3 6 7
    x = torch.tensor([1.0, 0.8, 0.6, 0.5, 0.4, 0.125, 0.1, 0.0])
    quantizer = log2(3, 1.0, steps_per_octave=2)
    assert quantizer.encode(x).tolist() == [0, 1, 1, 2, 3, 6, 7, 7]
    root = 2**0.5  # odd codes: the next power of two below, with the scale multiplied by sqrt(2)
    torch.testing.assert_close(quantizer(x), torch.tensor([1, root / 2, root / 2, 0.5, root / 4, 0.125, 0, 0]))
    assert quantizer.decode(torch.tensor([0, 2, 4, 6], dtype=torch.uint8)).tolist() == [1, 0.5, 0.25, 0.125]


@pytest.mark.parametrize("steps_per_octave", [1, 2])
@pytest.mark.parametrize("n_bits", range(2, 9))
def test_there_are_no_more_levels_than_codes(n_bits: int, steps_per_octave: int) -> None:
    x = torch.cat([torch.zeros(1), torch.logspace(-40, 0, 5000)])
    quantizer = Log2Quantizer(n_bits, steps_per_octave)
    quantizer.calibrate(x)
    values = quantizer(x).unique()
    assert len(values) <= 2**n_bits
    assert values.min() == 0
    if n_bits < 7:  # beyond, codes are below float32's normal numbers
        assert len(values) == 2**n_bits


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-126, 128)
    expected = torch.tensor([2.0**e for e in exponents.tolist()])
    assert torch.equal(power_of_two(exponents.float()), expected)
    assert power_of_two(torch.tensor([-127.0, -300.0, -1e9])).tolist() == [0, 0, 0]
    assert power_of_two(torch.tensor(-0.0)).item() == 1


@pytest.mark.parametrize("steps_per_octave", [1, 2])
@pytest.mark.parametrize("n_bits", [2, 3, 4])
def test_the_scale_equals_a_plain_loop_over_percentiles(n_bits: int, steps_per_octave: int) -> None:
    generator = torch.Generator().manual_seed(n_bits)
    chosen = set()
    for sharpness in (1.0, 3.0, 8.0):
        x = (sharpness * torch.randn(40, 60, generator=generator)).softmax(dim=-1)
        values = x.double().numpy().ravel()
        errors, scales = [], []
        for p in ACTIVATION_PERCENTILES:
            scale = np.quantile(values, p)
            codes = np.clip(np.round(-steps_per_octave * np.log2(values / scale)), 0, 2**n_bits - 1)
            decoded = np.where(codes == 2**n_bits - 1, 0, scale * 2 ** (-codes / steps_per_octave))
            errors.append(np.mean((decoded - values) ** 2))
            scales.append(scale)
        quantizer = Log2Quantizer(n_bits, steps_per_octave)
        quantizer.calibrate(x)
        assert quantizer.scale.item() == pytest.approx(scales[int(np.argmin(errors))], rel=1e-5)
        chosen.add(int(np.argmin(errors)))
    assert chosen != {2} or n_bits == 2  # the search is not just the largest value


def test_an_attention_map_of_zeros_stays_zeros() -> None:
    quantizer = Log2Quantizer(3)
    quantizer.calibrate(torch.zeros(4, 4))
    assert quantizer(torch.zeros(4, 4)).eq(0).all()
    assert torch.isfinite(quantizer(torch.rand(4, 4))).all()


def test_negative_values_are_refused() -> None:
    with pytest.raises(IasvitError, match=r"-0\.25 was given.*from 0 on"):
        Log2Quantizer(3).calibrate(torch.tensor([0.5, -0.25]))
