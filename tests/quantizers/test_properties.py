"""What holds for every quantizer and all values: range, monotonicity, decode(encode(x)) == forward(x), gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from iasvit.errors import IasvitError
from iasvit.quantizers import (
    AdaLogQuantizer,
    Log2Quantizer,
    Quantizer,
    SULQuantizer,
    UniformQuantizer,
)
from iasvit.quantizers.adalog import STEPS

KINDS: dict[str, Callable[[int], Quantizer]] = {
    "uniform": UniformQuantizer,
    "uniform per channel": lambda n_bits: UniformQuantizer(n_bits, channel_dim=-1),
    "log2": Log2Quantizer,
    "log-sqrt2": lambda n_bits: Log2Quantizer(n_bits, steps_per_octave=2),
    "log2 without a zero": lambda n_bits: Log2Quantizer(n_bits, percentiles=(1.0,), zero_code=False),
    "adalog": AdaLogQuantizer,
    "sulq": SULQuantizer,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
bit_widths = st.integers(2, 8)


def values_of(kind: str, wide: bool = False) -> st.SearchStrategy[Tensor]:
    """Matrices of 3 columns; `wide` reaches beyond what calibration sees."""
    reach = 10.0 if wide else 1.0
    low, high = (-100 * reach, 100 * reach) if kind.startswith("uniform") else (0, reach)
    shapes = st.tuples(st.integers(1, 30), st.just(3))
    elements = st.floats(low, high, width=32)
    return hnp.arrays(np.float32, shapes, elements=elements).map(torch.from_numpy)


def fitted(kind: str, n_bits: int, x: Tensor) -> Quantizer:
    quantizer = KINDS[kind](n_bits)
    quantizer.calibrate(x)
    return quantizer


@every_kind
@given(st.data(), bit_widths)
def test_codes_are_integers_in_range_and_decode_to_what_forward_gives(kind: str, data: st.DataObject, n: int) -> None:
    quantizer = fitted(kind, n, data.draw(values_of(kind)))
    x = data.draw(values_of(kind, wide=True))
    codes = quantizer.encode(x)
    assert codes.dtype == torch.uint8
    assert codes.shape == x.shape
    assert codes.max() <= 2**n - 1
    # As integers too: a code of 256 would have become 0 above.
    unclamped = quantizer._codes(x)
    assert torch.equal(unclamped, codes.float())
    values = quantizer(x)
    assert values.dtype == torch.float32
    assert torch.isfinite(values).all()
    assert torch.equal(quantizer.decode(codes), values)
    assert torch.equal(quantizer(x.clone().requires_grad_(True)), values)


@every_kind
@given(st.data(), bit_widths)
def test_codes_and_values_are_monotone(kind: str, data: st.DataObject, n: int) -> None:
    quantizer = fitted(kind, n, data.draw(values_of(kind)))
    x = data.draw(values_of(kind, wide=True)).sort(dim=0).values
    rising = quantizer.encode(x).int().diff(dim=0)
    falling_codes = not kind.startswith("uniform")  # a logarithm's codes count from the largest value down
    assert (rising * (-1 if falling_codes else 1) >= 0).all()
    every_code = torch.arange(2**n, dtype=torch.uint8)[:, None].expand(-1, 3)
    steps = quantizer.decode(every_code).diff(dim=0)
    assert (steps * (-1 if falling_codes else 1) >= 0).all()


@given(st.data(), bit_widths)
def test_uniform_error_is_at_most_half_a_step_inside_the_range(data: st.DataObject, n: int) -> None:
    quantizer = fitted("uniform", n, data.draw(values_of("uniform")))
    scale, zero_point = quantizer.scale.item(), quantizer.zero_point.item()
    assume(scale > 1e-4)
    x = data.draw(values_of("uniform"))
    inside = (x >= -zero_point * scale) & (x <= (2**n - 1 - zero_point) * scale)
    assert ((quantizer(x) - x).abs()[inside] <= scale / 2 + 1e-5 * x.abs()[inside] + 1e-6).all()


@given(st.data(), bit_widths)
def test_uniform_values_are_their_own_fixed_points(data: st.DataObject, n: int) -> None:
    quantizer = fitted("uniform per channel", n, data.draw(values_of("uniform")))
    codes = torch.arange(2**n, dtype=torch.uint8)[:, None].expand(-1, 3)
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)  # a weight that is rounded stays where it is


@every_kind
def test_layout_and_size_of_a_tensor_change_nothing(kind: str) -> None:
    # Large tensors are worked in pieces; transposed ones are not contiguous. Codes and gradients must not notice.
    x = torch.rand(3, 60_000, generator=torch.Generator().manual_seed(0)).T
    quantizer = fitted(kind, 4, x[:100].contiguous())
    parts = [part.clone().contiguous().requires_grad_(True) for part in x.split(1_000)]
    whole = x.detach().requires_grad_(True)
    values = quantizer(whole)
    assert torch.equal(values, torch.cat([quantizer(part) for part in parts]))
    assert torch.equal(values, quantizer.decode(quantizer.encode(x)))
    assert torch.equal(quantizer(x.contiguous()), values)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    values.backward(gradient)
    for part, piece in zip(parts, gradient.split(1_000), strict=True):
        quantizer(part).backward(piece)
    assert torch.equal(whole.grad, torch.cat([part.grad for part in parts]))


def continuous(quantizer: Quantizer) -> tuple[Callable[[float], float], Callable[[float], float], float, float]:
    """The quantizer without its roundings in float64: code of x, value of code, and the codes' range."""
    top = quantizer.n_levels - 1
    scale = quantizer.scale.item()
    if isinstance(quantizer, Log2Quantizer):
        k = quantizer.steps_per_octave
        return lambda x: -k * math.log2(x / scale), lambda q: scale * 2 ** (-q / k), 0, top
    if isinstance(quantizer, AdaLogQuantizer):
        k = STEPS / quantizer.exponent.item()
        return lambda x: -k * math.log2(x / scale), lambda q: scale * 2 ** (-q / k), 0, top
    zero_point = quantizer.zero_point.item()
    if isinstance(quantizer, SULQuantizer):
        shift = quantizer.shift.item()
        # From code to value by way of ŷ, whose rounding passes the gradient as well: the derivative is taken at ŷ.
        return (
            lambda x: -math.log2(x + shift) / scale + zero_point,
            lambda q: 2 ** -((q - zero_point) * scale) - shift,
            0,
            top,
        )
    return lambda x: x / scale + zero_point, lambda q: (q - zero_point) * scale, 0, top


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "uniform per channel"])
@pytest.mark.parametrize("n_bits", [2, 3, 4])
def test_gradient_is_that_of_the_surrogate_with_rounding_passed_through(kind: str, n_bits: int) -> None:
    generator = torch.Generator().manual_seed(n_bits)
    seen = torch.rand(4000, generator=generator) ** 3 * 0.9
    quantizer = fitted(kind, n_bits, seen)
    x = torch.cat([seen[:300], torch.linspace(1e-4, 2.0, 300)])
    if kind == "uniform":
        x = torch.cat([x, torch.linspace(-1, 0, 100)])
    x = x.clone().requires_grad_(True)
    quantizer(x).sum().backward()
    code, value, low, high = continuous(quantizer)
    h, clamped = 1e-6, 0
    for at, gradient in zip(x.tolist(), x.grad.tolist(), strict=True):
        unrounded = code(at)
        if abs(unrounded - math.floor(unrounded) - 0.5) < 1e-3:
            continue  # a tie in rounding may go either way in float32
        q = round(unrounded)
        if isinstance(quantizer, SULQuantizer):
            y = (min(max(q, low), high) - quantizer.zero_point.item()) * quantizer.scale.item()
            at_code = round(y) / quantizer.scale.item() + quantizer.zero_point.item()
            if abs(y - math.floor(y) - 0.5) < 1e-3:
                continue
        else:
            at_code = q
        if not low <= q <= high or (quantizer.decode(torch.tensor(high)) == 0 and q == high):
            assert gradient == 0  # clamped, or the log quantizers' last code, which stands for 0
            clamped += 1
            continue
        surrogate = (value(at_code + h) - value(at_code - h)) / (2 * h) * (code(at + h) - code(at - h)) / (2 * h)
        coarse = 0.51 / quantizer.n_levels if kind == "adalog" else 1e-3  # its table is rounded
        assert gradient == pytest.approx(surrogate, rel=coarse), at
    assert 50 < clamped < len(x) - 100


@every_kind
def test_every_parameter_that_a_file_could_hold_wrong_is_a_problem(kind: str) -> None:
    quantizer = fitted(kind, 3, torch.rand(50, 3))
    assert quantizer.problem() == ""
    for name in quantizer.parameters_:
        value = getattr(quantizer, name).clone()
        wrong = [value.double(), value[..., None, None], value[..., None][..., :0], torch.full_like(value, 2**31 - 1)]
        if name in quantizer.positive:
            wrong += [torch.zeros_like(value), -value]
        if value.is_floating_point():
            wrong += [torch.full_like(value, bad) for bad in (math.nan, math.inf, -math.inf)]
        for each in wrong:
            setattr(quantizer, name, each)
            assert quantizer.problem().startswith(f"a {name} of "), each
        setattr(quantizer, name, value)
    assert quantizer.problem() == ""


@every_kind
def test_a_quantizer_that_is_off_returns_its_input(kind: str) -> None:
    quantizer = KINDS[kind](3)
    quantizer.enabled = False
    x = torch.rand(4, 3)
    assert quantizer(x) is x


@every_kind
def test_before_calibration_there_is_a_clear_error(kind: str) -> None:
    quantizer = KINDS[kind](3)
    assert not quantizer.calibrated
    with pytest.raises(IasvitError, match="before it was calibrated"):
        quantizer(torch.rand(4, 3))
    quantizer.calibrate(torch.rand(4, 3))
    assert quantizer.calibrated


@every_kind
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_values_are_refused(kind: str, bad: float) -> None:
    x = torch.rand(4, 3)
    x[2, 1] = bad
    with pytest.raises(IasvitError, match="NaN or Inf"):
        KINDS[kind](3).calibrate(x)
    with pytest.raises(IasvitError, match="empty"):
        KINDS[kind](3).calibrate(torch.empty(0, 3))


@every_kind
@pytest.mark.parametrize("n_bits", [-1, 0, 1, 9, 32])
def test_bits_outside_2_to_8_are_refused(kind: str, n_bits: int) -> None:
    with pytest.raises(IasvitError, match=f"{n_bits}, but quantizers have 2 to 8 bits"):
        KINDS[kind](n_bits)


@every_kind
def test_a_state_dict_restores_a_quantizer_made_otherwise(kind: str) -> None:
    x = torch.rand(50, 3)
    quantizer = fitted(kind, 5, x)
    quantizer.enabled = False
    other = type(quantizer)(2)  # other bits, per tensor where this is per channel, not calibrated
    other.load_state_dict(quantizer.state_dict())
    assert other.config() == quantizer.config()
    assert (other.n_bits, other.enabled) == (5, False)
    assert torch.equal(other.encode(x), quantizer.encode(x))
    assert all(a.dtype == b.dtype for a, b in zip(other.buffers(), quantizer.buffers(), strict=True))


@every_kind
def test_calibration_follows_the_tensor_and_leaves_it_alone(kind: str) -> None:
    x = torch.rand(50, 3)
    before = x.clone()
    quantizer = fitted(kind, 3, x)
    quantizer(x)
    quantizer.encode(x)
    assert torch.equal(x, before)
    again = fitted(kind, 3, x.clone())
    assert all(torch.equal(a, b) for a, b in zip(quantizer.buffers(), again.buffers(), strict=True))
    quantizer.calibrate(10 * x if kind.startswith("uniform") else x / 10)  # a second time replaces the first
    assert not torch.equal(quantizer.scale, again.scale)


def test_a_trace_by_torchscript_is_refused_with_one_sentence() -> None:
    quantizer = UniformQuantizer(4)
    x = torch.linspace(-1, 1, 10)
    quantizer.calibrate(x)
    with pytest.raises(IasvitError, match=r"use iasvit\.export_onnx, or torch\.export"):
        torch.jit.trace(quantizer, x)
    exported = torch.export.export(quantizer, (x,)).module()
    assert torch.equal(exported(x), quantizer(x))
