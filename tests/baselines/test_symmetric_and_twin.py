"""Exact codes of the symmetric and the twin uniform quantizers."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iasvit.errors import IasvitError
from iasvit.quantizers import Quantizer, SymmetricQuantizer, TwinGELUQuantizer, TwinSoftmaxQuantizer
from iasvit.quantizers.twin import GELU_MINIMUM


def softmax_quantizer(n_bits: int, shift: int) -> TwinSoftmaxQuantizer:
    quantizer = TwinSoftmaxQuantizer(n_bits)
    quantizer.set_scales(torch.tensor([2.0 ** -(n_bits - 1 + shift)]), torch.ones(1))
    return quantizer


def gelu_quantizer(n_bits: int, scale: float) -> TwinGELUQuantizer:
    quantizer = TwinGELUQuantizer(n_bits)
    quantizer.set_scales(torch.tensor([scale]), torch.ones(1))
    return quantizer


def check(quantizer: Quantizer, x: list[float], codes: list[int], values: list[float]) -> None:
    tensor = torch.tensor(x)
    assert quantizer.encode(tensor).tolist() == codes
    assert quantizer.decode(torch.tensor(codes, dtype=torch.uint8)).tolist() == values
    assert quantizer(tensor).tolist() == values


def test_symmetric_codes_by_hand() -> None:
    quantizer = SymmetricQuantizer(3)
    quantizer.calibrate(torch.tensor([-1.75, 0.3]))  # 1.75 / 3.5
    assert quantizer.scale.item() == 0.5
    assert quantizer.zero_point.item() == 4
    assert quantizer.zero_point.dtype == torch.int32
    check(
        quantizer,
        [-9.0, -2.0, -1.74, -0.26, 0.0, 0.24, 0.26, 1.3, 1.75, 9.0],
        [0, 0, 1, 3, 4, 4, 5, 7, 7, 7],
        [-2.0, -2.0, -1.5, -0.5, 0.0, 0.0, 0.5, 1.5, 1.5, 1.5],
    )


def test_symmetric_groups_of_rows_have_scales_of_their_own() -> None:
    weight = torch.tensor([[1.0, -3.5], [0.5, 0.1], [7.0, 2.0], [1.0, 1.0], [0.35, 0.0], [-0.2, 0.1]])
    quantizer = SymmetricQuantizer(3, groups=3)
    quantizer.calibrate(weight)
    torch.testing.assert_close(quantizer.scale, torch.tensor([1.0, 1.0, 2.0, 2.0, 0.1, 0.1]))
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        alone = SymmetricQuantizer(3)
        alone.calibrate(weight[rows])
        assert torch.equal(quantizer.encode(weight)[rows], alone.encode(weight[rows]))
    with pytest.raises(IasvitError, match="5 rows cannot be cut into 3 groups"):
        SymmetricQuantizer(3, groups=3).calibrate(weight[:5])


def test_twin_softmax_codes_by_hand() -> None:
    # b = 3: Δ₂ = 1/4; m = 3: Δ₁ = 1/32, R1 ends at 4/32 = 1/8. The flag is the bit worth 4.
    check(
        softmax_quantizer(3, shift=3),
        [0.0, 0.015, 0.016, 0.09, 0.124, 0.125, 0.3, 0.6, 0.8, 1.0],
        [0b000, 0b000, 0b001, 0b011, 0b011, 0b100, 0b101, 0b110, 0b111, 0b111],
        [0.0, 0.0, 0.03125, 0.09375, 0.09375, 0.0, 0.25, 0.5, 0.75, 0.75],
    )


def test_twin_gelu_codes_by_hand() -> None:
    # b = 3: four codes below 0, four from 0 on. Δ₂ = 0.5 = 8·Δ₁ up to 4·Δ₁ = 0.25: m = 3 still covers -0.17, m = 4 not.
    quantizer = gelu_quantizer(3, 0.5)
    assert quantizer.shift.item() == 3
    assert quantizer.zero_point == 4
    check(
        quantizer,
        [-0.3, -0.17, -0.1, -0.04, -0.01, 0.0, 0.2, 0.3, 1.1, 1.5, 9.0],
        [0b000, 0b001, 0b010, 0b011, 0b100, 0b100, 0b100, 0b101, 0b110, 0b111, 0b111],
        [-0.25, -0.1875, -0.125, -0.0625, 0.0, 0.0, 0.0, 0.5, 1.0, 1.5, 1.5],
    )


@given(st.integers(2, 8), st.floats(1e-5, 1e3))
def test_twin_gelu_fine_step_is_the_finest_shift_that_covers_the_negative_values(n_bits: int, scale: float) -> None:
    quantizer = gelu_quantizer(n_bits, scale)
    fine = quantizer.scale.double().item() * 2.0 ** -quantizer.shift.item()
    assert fine * quantizer.half >= -GELU_MINIMUM * (1 - 1e-6)
    assert fine / 2 * quantizer.half < -GELU_MINIMUM * (1 + 1e-6)
    assert quantizer.shift.dtype == torch.int32


values = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)


@st.composite
def quantizers(draw: st.DrawFn) -> Quantizer:
    n_bits = draw(st.integers(2, 8))
    kind = draw(st.sampled_from(["symmetric", "softmax", "gelu"]))
    if kind == "softmax":
        return softmax_quantizer(n_bits, draw(st.integers(0, 19)))
    scale = draw(st.floats(2**-13, 10, width=32))
    if kind == "gelu":
        return gelu_quantizer(n_bits, scale)
    quantizer = SymmetricQuantizer(n_bits)
    quantizer.set_scales(torch.tensor([scale]), torch.ones(1))
    return quantizer


@settings(max_examples=300, deadline=None)
@given(quantizers(), values)
def test_codes_fit_in_b_bits_and_forward_is_decode_of_encode(quantizer: Quantizer, x: list[float]) -> None:
    tensor = torch.tensor(x)
    if isinstance(quantizer, TwinSoftmaxQuantizer):
        tensor = tensor.abs() / 20
    codes = quantizer.encode(tensor)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**quantizer.n_bits
    quantized = quantizer(tensor)
    assert torch.equal(quantizer.decode(codes).view(torch.int32), quantized.view(torch.int32))  # to the bit
    # Quantized again, a value stays (not in twin softmax: the fine range may reach above coarse values).
    if not isinstance(quantizer, TwinSoftmaxQuantizer):
        assert torch.equal(quantizer(quantized), quantized)


@settings(max_examples=100, deadline=None)
@given(quantizers())
def test_every_code_of_b_bits_decodes_and_the_flag_tells_the_range(quantizer: Quantizer) -> None:
    codes = torch.arange(2**quantizer.n_bits, dtype=torch.uint8)
    decoded = quantizer.decode(codes)
    low, high = decoded.chunk(2)  # flag 0, flag 1
    steps = decoded.diff()
    if isinstance(quantizer, SymmetricQuantizer):
        assert (steps > 0).all()
        assert decoded[2 ** (quantizer.n_bits - 1)] == 0
        return
    fine = quantizer.scale * 2.0 ** -quantizer.shift.item()
    assert torch.allclose(low.diff(), fine.expand_as(low.diff()), rtol=1e-4)
    assert torch.allclose(high.diff(), quantizer.scale.expand_as(high.diff()), rtol=1e-4)
    assert (low < 0).all() if isinstance(quantizer, TwinGELUQuantizer) else low[0] == 0
    assert high[0] == 0


@settings(max_examples=100, deadline=None)
@given(quantizers(), values)
def test_what_the_search_tries_is_what_forward_gives(quantizer: Quantizer, x: list[float]) -> None:
    tensor = torch.tensor(x).abs() / 20 if isinstance(quantizer, TwinSoftmaxQuantizer) else torch.tensor(x)
    candidates = quantizer.candidate_scales(tensor, torch.tensor([0.3, 0.9, 1.2]))
    tried = quantizer.quantize_with(tensor, candidates)
    assert tried.shape == (len(candidates), *tensor.shape)
    for scales, result in zip(candidates, tried, strict=True):
        quantizer.set_scales(scales, tensor)
        assert torch.equal(result, quantizer(tensor))


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
def test_twin_softmax_calibrates_to_the_shift_of_least_squared_error(n_bits: int) -> None:
    x = torch.randn(4, 3, 50, 50, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    quantizer = TwinSoftmaxQuantizer(n_bits)
    quantizer.calibrate(x)
    errors = [float((softmax_quantizer(n_bits, shift)(x) - x).double().square().mean()) for shift in range(20)]
    assert quantizer.shift.item() == min(range(20), key=errors.__getitem__)


@pytest.mark.parametrize(
    "quantizer", [SymmetricQuantizer(4), softmax_quantizer(4, 3), gelu_quantizer(4, 0.3)], ids=lambda q: q.kind
)
def test_gradient_passes_rounding_and_stops_at_clamping(quantizer: Quantizer) -> None:
    x = torch.linspace(-0.5, 1.5, 401) if quantizer.kind != "twin_softmax" else torch.linspace(0, 1.5, 401)
    if not quantizer.calibrated:
        quantizer.set_scales(torch.tensor([0.1]), x)
    x = x.requires_grad_(True)
    output = quantizer(x)
    output.sum().backward()
    codes, gradient = quantizer.encode(x.detach()).int(), x.grad
    inner = (codes > 0) & (codes < quantizer.n_levels - 1) & (codes != quantizer.n_levels // 2 - 1)
    assert inner.any()
    assert (gradient[inner] == 1).all()
    assert (gradient[x.detach() > float(output.detach().max()) + float(quantizer.scale)] == 0).all()
    assert set(gradient.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("quantizer", [SymmetricQuantizer(5, 2), TwinSoftmaxQuantizer(3), TwinGELUQuantizer(6)])
def test_config_and_buffers_rebuild_a_quantizer(quantizer: Quantizer) -> None:
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(3))
    quantizer.calibrate(x)
    config = json.loads(json.dumps(quantizer.config()))
    other = type(quantizer)(config["n_bits"])
    other.configure(config)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), quantizer(x))
    assert torch.equal(other.encode(x), quantizer.encode(x))


def test_large_tensors_are_quantized_in_pieces_as_whole() -> None:
    x = torch.rand(2**18, generator=torch.Generator().manual_seed(0))
    quantizer = softmax_quantizer(4, 5)
    pieces: Tensor = quantizer(x)
    assert torch.equal(pieces, quantizer.decode(quantizer.encode(x)))
