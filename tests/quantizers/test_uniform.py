"""The uniform quantizer: codes worked out by hand, the percentile search against a plain loop, degenerate channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from iasvit.quantizers import ACTIVATION_PERCENTILES, WEIGHT_PERCENTILES, UniformQuantizer


def uniform(n_bits: int, scale: list[float] | float, zero_point: list[int] | int, channel_dim: int | None = None):  # noqa: ANN201
    quantizer = UniformQuantizer(n_bits, channel_dim)
    quantizer.set_parameters(torch.tensor(scale), torch.tensor(zero_point))
    return quantizer


def test_codes_by_hand_per_tensor() -> None:
    # s = 0.5, z = 2, codes 0 … 7 stand for -1 … 2.5 in steps of 0.5.
    # x / s:             -2.4  -2.0  -0.6  0.0  0.52  1.48  2.0  4.8  18
    # rounded, plus 2:      0     0     1    2     3     3    4    7  20 → 7
    x = torch.tensor([-1.2, -1.0, -0.3, 0.0, 0.26, 0.74, 1.0, 2.4, 9.0])
    quantizer = uniform(3, 0.5, 2)
    assert quantizer.encode(x).tolist() == [0, 0, 1, 2, 3, 3, 4, 7, 7]
    assert quantizer(x).tolist() == [-1.0, -1.0, -0.5, 0.0, 0.5, 0.5, 1.0, 2.5, 2.5]


def test_ties_round_to_even_and_a_zero_point_may_lie_outside_the_codes() -> None:
    # x / s = 0.5, 1.5, 2.5, -0.5 → 0, 2, 2, 0 (half to even), plus 1.
    assert uniform(3, 0.5, 1).encode(torch.tensor([0.25, 0.75, 1.25, -0.25])).tolist() == [1, 3, 3, 1]
    # Range [5, 6.5] at 2 bits: s = 0.5, z = -10; 5.6 / 0.5 = 11.2 → 11 - 10 = 1; 0 and 20 are clamped.
    assert uniform(2, 0.5, -10).encode(torch.tensor([5.0, 5.6, 6.5, 0.0, 20.0])).tolist() == [0, 1, 3, 0, 3]


@pytest.mark.parametrize("channel_dim", [0, 1, -2])
def test_codes_by_hand_per_channel(channel_dim: int) -> None:
    # Channel 0: s = 1, z = 0, codes of 2 bits stand for 0 … 3. Channel 1: s = 0.25, z = 2, they stand for -0.5 … 0.25.
    x = torch.tensor([[-1.0, 0.4, 1.6, 7.0], [-1.0, -0.3, 0.1, 7.0]])
    codes = torch.tensor([[0, 0, 2, 3], [0, 1, 2, 3]], dtype=torch.uint8)
    values = torch.tensor([[0.0, 0.0, 2.0, 3.0], [-0.5, -0.25, 0.0, 0.25]])
    if channel_dim == 1:
        x, codes, values = x.T, codes.T, values.T
    quantizer = uniform(2, [1.0, 0.25], [0, 2], channel_dim)
    assert torch.equal(quantizer.encode(x), codes)
    assert torch.equal(quantizer.decode(codes), values)
    assert torch.equal(quantizer(x), values)


def test_range_by_hand() -> None:
    # min -1, max 2.5: s = 3.5 / 7 = 0.5, z = round(1 / 0.5) = 2.
    quantizer = UniformQuantizer(3, percentiles=(1.0,))
    quantizer.calibrate(torch.tensor([0.3, -1.0, 2.5, 0.1]))
    assert (quantizer.scale.item(), quantizer.zero_point.item()) == (0.5, 2)
    assert quantizer.scale.dtype == torch.float32
    assert quantizer.zero_point.dtype == torch.int32


def test_percentiles_are_those_of_the_paper() -> None:
    assert ACTIVATION_PERCENTILES == (0.999, 0.9999, 0.99999)
    assert WEIGHT_PERCENTILES == (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999)


def plain_search(values: np.ndarray, n_bits: int, percentiles: tuple[float, ...]) -> tuple[float, int, int]:
    """Scale, zero-point and the index of the percentile chosen, one channel at a time in float64."""
    best = None
    for index, p in enumerate(percentiles):
        low, high = np.quantile(values, 1 - p), np.quantile(values, p)
        scale = (high - low) / (2**n_bits - 1)
        zero_point = np.round(-low / scale)
        codes = np.clip(np.round(values / scale) + zero_point, 0, 2**n_bits - 1)
        error = np.mean(((codes - zero_point) * scale - values) ** 2)
        if best is None or error < best[0]:
            best = error, scale, int(zero_point), index
    return best[1:]


def uneven(channels: int, count: int, seed: int) -> Tensor:
    """Channels of unlike location, scale and tails, so that unlike percentiles suit them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(channels, count, generator=generator)
    x = x.sign() * x.abs() ** torch.linspace(0.7, 5, channels)[:, None]
    return x * torch.linspace(0.1, 3, channels)[:, None] + torch.linspace(-2, 2, channels)[:, None]


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("percentiles", [ACTIVATION_PERCENTILES, WEIGHT_PERCENTILES])
def test_the_search_equals_a_plain_loop_over_channels_and_percentiles(
    n_bits: int, percentiles: tuple[float, ...]
) -> None:
    x = uneven(24, 3000, seed=n_bits)
    expected = [plain_search(row, n_bits, percentiles) for row in x.double().numpy()]
    if n_bits < 8:
        assert len({index for _, _, index in expected}) > 1  # else the test would not see which one is taken
    quantizer = UniformQuantizer(n_bits, channel_dim=0, percentiles=percentiles)
    quantizer.calibrate(x)
    np.testing.assert_allclose(quantizer.scale.numpy(), [scale for scale, _, _ in expected], rtol=2e-5)
    assert quantizer.zero_point.tolist() == [zero_point for _, zero_point, _ in expected]


def test_per_tensor_search_is_the_loop_with_all_values_in_one_channel() -> None:
    x = uneven(6, 500, seed=0).view(3, 2, 500)
    scale, zero_point, _ = plain_search(x.double().numpy().ravel(), 3, ACTIVATION_PERCENTILES)
    quantizer = UniformQuantizer(3)
    quantizer.calibrate(x)
    assert quantizer.scale.shape == quantizer.zero_point.shape == ()
    assert quantizer.scale.item() == pytest.approx(scale, rel=1e-5)
    assert quantizer.zero_point.item() == zero_point


@pytest.mark.parametrize("channel_dim", [0, 1, 2, -1])
def test_channels_are_searched_apart_wherever_they_are(channel_dim: int) -> None:
    x = uneven(5, 200, seed=1).view(5, 10, 20).movedim(0, channel_dim)
    quantizer = UniformQuantizer(4, channel_dim=channel_dim)
    quantizer.calibrate(x)
    alone = UniformQuantizer(4)
    for channel, values in enumerate(x.movedim(channel_dim, 0)):
        alone.calibrate(values)
        assert torch.equal(quantizer.scale[channel], alone.scale)
        assert torch.equal(quantizer.zero_point[channel], alone.zero_point)
        assert torch.equal(quantizer(x).movedim(channel_dim, 0)[channel], alone(values))


@pytest.mark.parametrize("constant", [0.0, 5.0, -0.1, 100.0, -30.0, 1e30])
@pytest.mark.parametrize("n_bits", [2, 8])
def test_a_constant_channel_is_kept_exactly(constant: float, n_bits: int) -> None:
    x = torch.stack([torch.full((9,), constant), torch.arange(9.0)])
    quantizer = UniformQuantizer(n_bits, channel_dim=0)
    quantizer.calibrate(x)
    assert torch.equal(quantizer(x)[0], x[0])
    assert quantizer.zero_point.abs().max() <= 2**n_bits  # reparameterization averages it with the other channels'


@pytest.mark.parametrize("spread", [1e-7, 1e-5, 1e-3, 1e-1])
def test_a_channel_far_from_zero_is_as_near_as_its_spread(spread: float) -> None:
    x = 50 + spread * torch.linspace(-1, 1, 101)
    quantizer = UniformQuantizer(8)
    quantizer.calibrate(x)
    assert (quantizer(x) - x).abs().max() <= 2.1 * spread + 1e-5
    assert quantizer.zero_point.abs() <= 2**16


def test_one_value_is_enough() -> None:
    quantizer = UniformQuantizer(3)
    quantizer.calibrate(torch.tensor([0.7]))
    assert quantizer(torch.tensor([0.7])).item() == pytest.approx(0.7)


def test_gradient_passes_rounding_and_stops_at_the_clamp() -> None:
    quantizer = uniform(3, 0.5, 2)
    # Unclamped codes: -2, -1 (from -0.6 below 0: clamped), 0, 0 (rounded up to it), 7, 7 (rounded down), 8, 20.
    x = torch.tensor([-2.0, -1.3, -1.0, -1.2, 2.5, 2.7, 2.8, 9.0], requires_grad=True)
    weights = torch.arange(1.0, 9.0)
    (quantizer(x) * weights).sum().backward()
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 6, 0, 0]


def test_per_channel_gradient_uses_each_channels_range() -> None:
    quantizer = uniform(2, [1.0, 0.25], [0, 2], channel_dim=-1)
    x = torch.tensor([[2.0, 2.0], [0.2, 0.2], [-0.3, -0.3]], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [[1, 0], [1, 1], [1, 1]]
    assert not any(parameter.requires_grad for parameter in quantizer.parameters())


def test_quantizers_given_the_same_tensors_do_not_share_them() -> None:
    scale, zero_point = torch.tensor(1.0), torch.tensor(0.0)
    first, second = UniformQuantizer(3), UniformQuantizer(3)
    first.set_parameters(scale, zero_point)
    second.set_parameters(scale, zero_point)
    first.scale.fill_(9)
    assert second.scale.item() == scale.item() == 1
