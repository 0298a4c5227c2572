"""What `iasvit inspect` says of layers: ranges, spread, tail and errors against plain computations."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest
import tiny_models
import torch
from torch import nn

import iasvit
from iasvit.inspection import layer_errors, quantizer_table, with_same_names
from iasvit.nn import quantizers_of


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    return iasvit.quantize(tiny_models.vit(), tiny_models.images(4), "W3A4,head=W8A8", "minmax")


@pytest.fixture(scope="module")
def table(quantized: nn.Module) -> pd.DataFrame:
    return quantizer_table(quantized, tiny_models.images(4)).set_index(["layer", "operand"])


def test_every_quantizer_has_a_row_with_its_bits(quantized: nn.Module, table: pd.DataFrame) -> None:
    count = sum(1 for weights in (True, False) for _ in quantizers_of(quantized, weights=weights))
    assert len(table) == count
    assert table.index.is_unique
    assert table.loc[("blocks.0.attn.qkv", "weight"), "bits"] == 3
    assert table.loc[("blocks.0.attn.qkv", "input"), "bits"] == 4
    assert table.loc[("head", "weight"), "bits"] == 8


def test_ranges_spread_tail_and_error_are_those_of_what_the_quantizer_is_given(
    quantized: nn.Module, table: pd.DataFrame
) -> None:
    seen = {}
    names = ["blocks.1.mlp.fc2.input_quantizer", "blocks.1.attn.matmul_av.left_quantizer"]

    def watch(name: str) -> Callable[..., None]:
        return lambda _module, args, output: seen.update({name: (args[0], output)})

    hooks = [quantized.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    with torch.no_grad():
        quantized(tiny_models.images(4))
    for hook in hooks:
        hook.remove()
    x, out = seen[names[0]]
    row = table.loc[("blocks.1.mlp.fc2", "input")]
    ranges = [float(x[..., c].max() - x[..., c].min()) for c in range(x.shape[-1])]
    assert (row["min"], row["max"]) == (pytest.approx(x.min().item()), pytest.approx(x.max().item()))
    assert row["spread"] == pytest.approx(max(ranges) / float(torch.tensor(ranges).median()), rel=1e-5)
    assert row["error"] == pytest.approx(((out - x).square().sum() / x.square().sum()).item(), rel=1e-5)
    assert pd.isna(row["tail"])
    x, _ = seen[names[1]]
    row = table.loc[("blocks.1.attn.matmul_av", "left")]
    assert row["tail"] == pytest.approx(sum(v < 2**-7 for v in x.flatten().tolist()) / x.numel())
    assert pd.isna(row["spread"])
    weight = quantized.blocks[0].mlp.fc1.weight
    ranges = weight.amax(dim=1) - weight.amin(dim=1)
    assert table.loc[("blocks.0.mlp.fc1", "weight"), "spread"] == pytest.approx((ranges.max() / ranges.median()).item())


def test_a_quantizer_that_is_switched_off_says_so() -> None:
    model = iasvit.quantize(tiny_models.vit(), tiny_models.images(2), "W3A3", "rtn")
    rows = quantizer_table(model, tiny_models.images(2)).set_index(["layer", "operand"])
    assert rows.loc[("blocks.0.attn.qkv", "input"), "quantizer"] == "off"
    assert pd.isna(rows.loc[("blocks.0.attn.qkv", "input"), "error"])
    assert rows.loc[("blocks.0.attn.qkv", "weight"), "quantizer"] == "uniform"


@pytest.mark.parametrize("family", tiny_models.MODELS)
def test_errors_begin_anew_at_each_block_or_accumulate(family: str) -> None:
    model, images = tiny_models.MODELS[family](), tiny_models.images(4)
    plain, changed = with_same_names(model), with_same_names(model)
    assert all(row["own"] == row["streamed"] == 0 for row in layer_errors(plain, changed, images))
    block = "layers.0.blocks.0" if family == "swin" else "blocks.0"
    with torch.no_grad():
        changed.get_submodule(block).mlp.fc1.weight.mul_(1.5)
    rows = {(row["layer"], row["kind"]): row for row in layer_errors(plain, changed, images)}
    assert rows[f"{block}.attn.proj", "attn.proj"]["own"] == 0
    assert rows[f"{block}.mlp.fc1", "mlp.fc1"]["own"] > 0
    assert rows[f"{block}.mlp.fc2", "mlp.fc2"]["own"] > 0
    later = [row for (layer, _), row in rows.items() if layer.endswith("1.mlp.fc2")]
    assert later
    assert all(row["own"] == 0 and row["streamed"] > 0 for row in later)
    assert sum(kind == "block" for _, kind in rows) >= 3
