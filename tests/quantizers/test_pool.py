"""Values in slices: quantiles and parameters are those of all values at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iasvit.quantizers import (
    SOFTMAX_QUANTIZERS,
    Quantizer,
    SymmetricQuantizer,
    TwinGELUQuantizer,
    TwinSoftmaxQuantizer,
    UniformQuantizer,
    pool,
)
from iasvit.quantizers.pool import Pool
from iasvit.quantizers.search import upper_quantiles

KINDS = {
    "uniform": lambda: UniformQuantizer(4),
    "channels": lambda: UniformQuantizer(4, channel_dim=-1),
    "weight": lambda: UniformQuantizer(4, channel_dim=0),
    "symmetric": lambda: SymmetricQuantizer(4),
    "twin_softmax": lambda: TwinSoftmaxQuantizer(4),
    "twin_gelu": lambda: TwinGELUQuantizer(4),
    **{name: lambda make=make: make(4) for name, make in SOFTMAX_QUANTIZERS.items()},
}


def probabilities(*shape: int) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).softmax(dim=-1)


def parameters(quantizer: Quantizer) -> list[Tensor]:
    return [getattr(quantizer, name) for name in quantizer.parameters_]


@pytest.mark.parametrize("size", [1, 50, 10_000])
@pytest.mark.parametrize("kind", KINDS)
def test_slices_and_parts_give_the_parameters_of_all_values(
    kind: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = probabilities(6, 40, 5)
    whole, sliced = KINDS[kind](), KINDS[kind]()
    whole.calibrate(x)
    monkeypatch.setattr(pool, "CPU_SLICE", size)
    sliced.calibrate(x.mT.contiguous().mT if kind == "weight" else list(x.split([1, 3, 2])))
    for one, other in zip(parameters(whole), parameters(sliced), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("channel_dim", [None, 0, 1, -1])
@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_quantiles_are_those_of_the_sorted_values(
    channel_dim: int | None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "CPU_SLICE", size)
    x = torch.randn(8, 6, 11, generator=torch.Generator().manual_seed(1)).permute(1, 0, 2)
    rows = x.reshape(1, -1) if channel_dim is None else x.movedim(channel_dim, 0).flatten(1)
    levels = (0.7, 0.99, 1.0)
    expected = rows.double().quantile(torch.tensor(levels).double(), dim=1).float()
    torch.testing.assert_close(upper_quantiles(Pool([x], channel_dim), levels), expected)
    low = rows.double().quantile(1 - torch.tensor(levels).double(), dim=1).float()
    torch.testing.assert_close(-upper_quantiles(Pool([x], channel_dim), levels, -1), low)
    values = torch.cat([part for part in Pool([x], channel_dim).slices()], dim=1)
    assert torch.equal(values.sort(dim=1).values, rows.sort(dim=1).values)
    assert torch.equal(Pool([x]).ends(), torch.stack([x.min(), x.max()]))
