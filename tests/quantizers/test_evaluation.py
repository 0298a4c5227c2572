"""Evaluation on a CPU takes short cuts; values stay those of decode(encode(x)), to the bit, next to every threshold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from iasvit.quantizers import (
    AdaLogQuantizer,
    Log2Quantizer,
    Quantizer,
    ShiftedAdaLogQuantizer,
    SULQuantizer,
    SymmetricQuantizer,
    TwinGELUQuantizer,
    TwinSoftmaxQuantizer,
    UniformQuantizer,
    evaluation,
    kernels,
)

SOFTMAX: dict[str, Callable[[int], Quantizer]] = {
    "log2": Log2Quantizer,
    "log-sqrt2": lambda n_bits: Log2Quantizer(n_bits, steps_per_octave=2),
    "log2 without a zero": lambda n_bits: Log2Quantizer(n_bits, percentiles=(1.0,), zero_code=False),
    "adalog": AdaLogQuantizer,
    "sulq": SULQuantizer,
    "twin softmax": TwinSoftmaxQuantizer,
}
SIGNED: dict[str, Callable[[int], Quantizer]] = {
    "uniform": UniformQuantizer,
    "symmetric": SymmetricQuantizer,
    "twin gelu": TwinGELUQuantizer,
    "adalog gelu": ShiftedAdaLogQuantizer,
}
NON_NEGATIVE = list(SOFTMAX)
KINDS = {**SOFTMAX, **SIGNED}


def seen_by(kind: str, seed: int = 0) -> Tensor:
    """Values for calibration: an attention map, or activations after GELU or before it."""
    x = torch.randn(20, 50, generator=torch.Generator().manual_seed(seed))
    if kind in SOFTMAX:
        return (3 * x).softmax(dim=-1)
    return torch.nn.functional.gelu(x) if "gelu" in kind else x


def ordered(numbers: Tensor) -> Tensor:
    """The floats that integers count, int64 → float32: 0 is 0, n + 1 the next above n."""
    bits = torch.where(numbers >= 0, numbers, -(2**31) - numbers)
    return bits.to(torch.int32).view(torch.float32)


FINITE = 0x7F7FFFFF  # number of the largest


def thresholds(quantizer: Quantizer, low: int) -> Tensor:
    """Numbers of floats above `low` whose code is another than that of the float before: one for each code left."""
    direction = 1 if quantizer.encode(ordered(torch.tensor([FINITE]))) > quantizer.encode(torch.zeros(1)) else -1
    wanted = torch.arange(1, quantizer.n_levels) - (direction < 0) * 1.0

    def passed(numbers: Tensor) -> Tensor:
        codes = quantizer.encode(ordered(numbers)).float()
        return codes >= wanted if direction > 0 else codes <= wanted

    below, above = torch.full((len(wanted),), low), torch.full((len(wanted),), FINITE)
    while (above - below).max() > 1:
        middle = (below + above) // 2
        below, above = torch.where(passed(middle), below, middle), torch.where(passed(middle), middle, above)
    return above


def hard_values(kind: str, quantizer: Quantizer) -> Tensor:
    """Floats around every threshold, the least and the largest, and many others."""
    low = 0 if kind in NON_NEGATIVE else -FINITE
    cuts = thresholds(quantizer, low)
    assert len(cuts.unique()) >= quantizer.n_levels // (4 if kind == "adalog gelu" else 2)  # the search has found them
    near = (cuts[:, None] + torch.arange(-3, 4)).flatten()
    special = torch.tensor([0, 1, 2, 0x7FFFFF, 0x800000, 0x800001, 0x3F800000, 0x7E000000, FINITE - 1, FINITE])
    drawn = torch.randint(0, FINITE, (50_000,), generator=torch.Generator().manual_seed(1))
    numbers = torch.cat([near, special, drawn, drawn[:20_000] % 0x3F800000])
    numbers = numbers.clamp(min=0) if kind in NON_NEGATIVE else torch.cat([numbers, -numbers])
    return ordered(numbers) if kind in NON_NEGATIVE else torch.cat([ordered(numbers), torch.tensor([-0.0])])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("n_bits", range(2, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_next_to_every_threshold_values_are_those_of_the_codes(kind: str, n_bits: int) -> None:
    quantizer = KINDS[kind](n_bits)
    quantizer.calibrate(seen_by(kind))
    x = hard_values(kind, quantizer)
    expected = quantizer.decode(quantizer.encode(x))
    with torch.no_grad():
        assert same_bits(quantizer(x), expected)
        few = torch.cat([quantizer(part) for part in x.split(evaluation.LEAST // 3)])  # not worth a table
    assert same_bits(few, expected)
    assert torch.equal(quantizer(x.clone().requires_grad_(True)), expected)


@pytest.mark.parametrize("n_bits", [2, 3, 8])
@pytest.mark.parametrize("dim", [0, -1])
def test_a_channel_is_as_a_tensor_of_its_own(dim: int, n_bits: int) -> None:
    channels = torch.stack([seen_by("uniform", seed) * 10.0**seed - seed for seed in range(3)], dim=dim)
    quantizer = UniformQuantizer(n_bits, channel_dim=dim)
    quantizer.calibrate(channels)
    alone = UniformQuantizer(n_bits)
    for seed in range(3):
        alone.set_parameters(quantizer.scale[seed], quantizer.zero_point[seed])
        x = hard_values("uniform", alone)
        expected = alone.decode(alone.encode(x))
        whole = torch.stack([x] * 3, dim=dim)
        with torch.no_grad():
            values = quantizer(whole)
        assert same_bits(values.select(dim, seed).contiguous(), expected)
        assert same_bits(values, quantizer.decode(quantizer.encode(whole)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_the_parameters_is_seen(kind: str) -> None:
    x = seen_by(kind, seed=1).repeat(40, 1)
    quantizer = KINDS[kind](3)
    quantizer.calibrate(seen_by(kind))

    def check() -> Tensor:
        with torch.no_grad():
            values = quantizer(x)
        assert same_bits(values, quantizer.decode(quantizer.encode(x)))
        return values

    before = check()
    quantizer.calibrate(seen_by(kind) / 3)
    calibrated = check()
    quantizer.scale.mul_(1.7)
    scaled = check()
    other = KINDS[kind](4)
    other.calibrate(seen_by(kind))
    quantizer.load_state_dict(other.state_dict())
    loaded = check()
    if kind != "twin softmax":  # whose scale is a constant, and whose range may have stayed
        assert not torch.equal(before, calibrated)
    assert not torch.equal(calibrated, scaled)
    assert not torch.equal(scaled, loaded)


@pytest.mark.parametrize("kind", KINDS)
def test_layout_type_and_threads_change_nothing(kind: str) -> None:
    x = seen_by(kind, seed=1).repeat(400, 1)  # more than a piece
    assert x.numel() > 2 * evaluation.PIECE
    quantizer = KINDS[kind](4)
    quantizer.calibrate(seen_by(kind))
    threads = torch.get_num_threads()
    with torch.inference_mode():
        expected = quantizer.decode(quantizer.encode(x))
        try:
            for number in (1, kernels.THREADS + 1):
                torch.set_num_threads(number)
                assert same_bits(quantizer(x), expected)
                assert torch.equal(quantizer(x.T), expected.T)
                assert torch.equal(quantizer(x[:, ::2]), expected[:, ::2])
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(quantizer(x.double()), quantizer._fake_quantize(x.double()))
        assert torch.equal(quantizer(x.half()), quantizer(x.half().float()))
        assert quantizer(x[:0]).shape == (0, 50)


@pytest.mark.parametrize("zero_point", [0, 7, -3, 2**16, -(2**16), 2**22 + 1, -(2**30), 2**30])
def test_zero_points_beyond_the_codes(zero_point: int) -> None:
    quantizer = UniformQuantizer(3)
    quantizer.set_parameters(torch.tensor(0.37), torch.tensor(zero_point))
    x = torch.cat([ordered(torch.arange(-FINITE, FINITE, 99_991)), torch.arange(-20, 20) * 0.37 / 2])
    with torch.no_grad():
        assert same_bits(quantizer(x), quantizer.decode(quantizer.encode(x)))


def test_what_is_not_finite_is_no_worse_than_without_a_table() -> None:
    x = torch.tensor([torch.inf, torch.nan, -torch.inf]).repeat(evaluation.LEAST)
    for kind, make in KINDS.items():
        quantizer = make(3)
        quantizer.calibrate(seen_by(kind))
        with torch.no_grad():
            assert torch.equal(quantizer(x)[:3].isnan(), quantizer(x[:3]).isnan())
            assert same_bits(quantizer(x)[:1], quantizer(x[:1]))
