"""Scale reparameterization: nothing changes, neither in floating point nor in codes."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from iasvit.errors import IasvitError
from iasvit.models import NormLinearPair
from iasvit.nn import QuantLinear
from iasvit.quantizers import Log2Quantizer, Quantizer, UniformQuantizer
from iasvit.reparam import reparameterize

CHANNELS = 24


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    """Residual-stream values 64×10×24 with a few large channels."""
    x = torch.randn(64, 10, CHANNELS, generator=torch.Generator().manual_seed(0))
    x[..., ::7] *= 12
    return x.to(dtype)


def make_pair(
    n_bits: int = 3, bias: bool = True, readers: int = 1, dtype: torch.dtype = torch.float32, dead: bool = False
) -> NormLinearPair:
    norm = tiny_models.stir(nn.LayerNorm(CHANNELS))
    if dead:
        with torch.no_grad():
            norm.weight[3], norm.bias[3] = 0.0, 0.7
            norm.weight[5], norm.bias[5] = 0.0, 0.0
            norm.weight[8], norm.bias[8] = 1e-9, -40.0
    x = norm(inputs())
    linears = []
    for index in range(readers):
        linear = tiny_models.stir(nn.Linear(CHANNELS, 7 + index, bias=bias), seed=index)
        quantizer = UniformQuantizer(n_bits, channel_dim=-1)
        quantizer.calibrate(x)
        layer = QuantLinear.from_float(linear, UniformQuantizer(n_bits, channel_dim=0), quantizer)
        layer.weight_quantizer.enabled = False
        linears.append(layer.requires_grad_(False))
    return NormLinearPair("blocks.0.norm1", norm.to(dtype).requires_grad_(False), tuple(m.to(dtype) for m in linears))


def switch(pair: NormLinearPair, enabled: bool) -> None:
    for linear in pair.linears:
        linear.input_quantizer.enabled = enabled


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("bias", "readers"), [(True, 1), (False, 1), (True, 2), (False, 2)])
def test_exact_in_floating_point(dtype: torch.dtype, tolerance: float, bias: bool, readers: int) -> None:
    pair, x = make_pair(bias=bias, readers=readers, dtype=dtype), inputs(dtype)
    switch(pair, False)
    before = [linear(pair.norm(x)) for linear in pair.linears]
    weight, gamma = pair.linears[0].weight.clone(), pair.norm.weight.clone()
    reparameterize(pair)
    assert not torch.allclose(pair.linears[0].weight, weight, atol=1e-2)
    assert not torch.allclose(pair.norm.weight, gamma, atol=1e-2)
    for linear, expected in zip(pair.linears, before, strict=True):
        size = expected.abs().max().item()
        torch.testing.assert_close(linear(pair.norm(x)), expected, atol=tolerance * size, rtol=tolerance)


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dead", [False, True])
def test_code_for_code(n_bits: int, dead: bool) -> None:
    pair, x = make_pair(n_bits, dtype=torch.float64, dead=dead), inputs(torch.float64)
    quantizer = pair.linears[0].input_quantizer
    before = pair.norm(x)
    unrounded = before / quantizer.scale.double() + quantizer.zero_point
    tie = (unrounded - unrounded.floor() - 0.5).abs() < 1e-4  # scales are float32: there either code is right
    codes = quantizer.encode(before)
    reparameterize(pair)
    new_codes = quantizer.encode(pair.norm(x))
    assert tie.float().mean() < 1e-2
    assert torch.equal(codes[~tie], new_codes[~tie])
    assert (codes.int() - new_codes.int()).abs().max() <= 1
    assert len(codes.unique()) == 2**n_bits


@pytest.mark.parametrize("n_bits", [3, 8])
def test_the_quantized_linear_computes_the_same(n_bits: int) -> None:
    # With the same codes and W' = W·diag(r), c' = c - W·d the quantized product is the same too, in float64.
    pair, x = make_pair(n_bits, readers=2, dtype=torch.float64), inputs(torch.float64)[:1]
    before = [linear(pair.norm(x)) for linear in pair.linears]
    reparameterize(pair)
    for linear, expected in zip(pair.linears, before, strict=True):
        torch.testing.assert_close(linear(pair.norm(x)), expected, atol=1e-5, rtol=1e-5)


def test_the_new_parameters_by_hand() -> None:
    # s = (1, 3), z = (1, 4): s̃ = 2, z̃ = round(2.5) = 2, r = (0.5, 1.5), d = s·(z - z̃) = (-1, 6).
    norm = nn.LayerNorm(2)
    quantizer = UniformQuantizer(3, channel_dim=-1)
    quantizer.set_parameters(torch.tensor([1.0, 3.0]), torch.tensor([1, 4]))
    linear = QuantLinear.from_float(nn.Linear(2, 1, bias=False), UniformQuantizer(3, channel_dim=0), quantizer)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 6.0]))
        norm.bias.copy_(torch.tensor([0.5, -3.0]))
        linear.weight.copy_(torch.tensor([[4.0, 10.0]]))
    reparameterize(NormLinearPair("norm", norm, (linear,)))
    assert norm.weight.tolist() == [4, 4]  # γ / r
    assert norm.bias.tolist() == [-1, 2]  # (β + d) / r
    assert linear.weight.tolist() == [[2, 15]]  # W·diag(r)
    assert linear.bias.tolist() == [-56]  # 0 - (4·-1 + 10·6)
    assert not linear.bias.requires_grad
    assert quantizer.channel_dim is None
    assert (quantizer.scale.item(), quantizer.zero_point.item()) == (2, 2)
    assert quantizer.scale.shape == quantizer.zero_point.shape == ()
    assert quantizer.zero_point.dtype == torch.int32


def test_dead_channels_spoil_nothing() -> None:
    # A LayerNorm channel with γ = 0 is constant; its scale must not draw the mean zero-point away from the others.
    pair, x = make_pair(dead=True), inputs()
    switch(pair, False)
    before = pair.linears[0](pair.norm(x))
    reparameterize(pair)
    quantizer = pair.linears[0].input_quantizer
    assert quantizer.zero_point.abs() < 8
    size = before.abs().max().item()
    torch.testing.assert_close(pair.linears[0](pair.norm(x)), before, atol=1e-5 * size, rtol=1e-5)


def test_readers_do_not_share_their_quantizers_tensors() -> None:
    pair = make_pair(readers=2)
    reparameterize(pair)
    first, second = (linear.input_quantizer for linear in pair.linears)
    assert torch.equal(first.scale, second.scale)
    assert first.scale.data_ptr() != second.scale.data_ptr()  # a safetensors file refuses shared storage
    assert first.zero_point.data_ptr() != second.zero_point.data_ptr()


def replaced(pair: NormLinearPair, quantizer: Quantizer) -> NormLinearPair:
    pair.linears[-1].input_quantizer = quantizer
    return pair


def calibrated(quantizer: Quantizer, x: Tensor) -> Quantizer:
    quantizer.calibrate(x)
    return quantizer


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (UniformQuantizer(3, channel_dim=-1), "no calibrated per-channel uniform quantizer"),
        (calibrated(UniformQuantizer(3), inputs()), "no calibrated per-channel uniform quantizer"),
        (calibrated(Log2Quantizer(3), inputs().abs()), "no calibrated per-channel uniform quantizer"),
        (calibrated(UniformQuantizer(3, channel_dim=-1), 2 * inputs()), "different input quantizers"),
    ],
)
def test_what_cannot_be_reparameterized_is_named_and_left(quantizer: Quantizer, message: str) -> None:
    pair = replaced(make_pair(readers=2), quantizer)
    before = tiny_models.bits_of(pair.norm), tiny_models.bits_of(pair.linears[0])
    with pytest.raises(IasvitError, match=message) as error:
        reparameterize(pair)
    assert "blocks.0.norm1" in str(error.value)
    assert tiny_models.same_bits(before[0], pair.norm.state_dict())
    assert tiny_models.same_bits(before[1], pair.linears[0].state_dict())


def test_twice_is_refused() -> None:
    pair = make_pair()
    reparameterize(pair)
    with pytest.raises(IasvitError, match="per-channel"):
        reparameterize(pair)
