"""The adapter of Swin: windows, shifts, patch merging."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from timm.layers import GluMlp
from torch import nn

from iasvit.calibration import calibrate_inputs
from iasvit.errors import IasvitError
from iasvit.models import Site, build, describe, find_pairs, insert_quantizers, segments
from iasvit.quantizers import Quantizer, UniformQuantizer
from iasvit.reparam import reparameterize
from iasvit.spec import QuantSpec

VARIANTS: dict[str, tuple[dict[str, object], tuple[int, int]]] = {
    "plain": ({}, (32, 32)),
    "as the paper's, smaller": ({"img_size": 56, "window_size": 7, "patch_size": 2}, (56, 56)),
    "padded windows": ({"img_size": 40}, (40, 40)),
    "odd merging": ({"img_size": 36}, (36, 36)),
    "always partition": ({"always_partition": True, "window_size": 6}, (32, 32)),
    "any size": ({"strict_img_size": False}, (32, 32)),
    "any size, another one": ({"strict_img_size": False}, (48, 40)),
    "head width": ({"head_dim": 4}, (32, 32)),
    "oblong windows": ({"window_size": (4, 2)}, (32, 32)),
    "windows by stage": ({"window_size": ((4, 4), (2, 2))}, (32, 32)),
    "no qkv bias": ({"qkv_bias": False}, (32, 32)),
    "three stages": ({"depths": (1, 2, 1), "num_heads": (1, 2, 4)}, (32, 32)),
    "no head": ({"num_classes": 0}, (32, 32)),
    "MLP ratios": ({"mlp_ratio": (2.0, 97 / 32)}, (32, 32)),
}


@pytest.fixture(params=VARIANTS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor]:
    changes, size = VARIANTS[request.param]
    return tiny_models.swin(**changes), torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))


def run_chain(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for segment in segments(model):
        x = segment.run(x)
    return x


@torch.no_grad()
def test_inserted_quantizers_that_are_off_change_nothing(case: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = case
    expected = model(x)
    assert torch.equal(run_chain(model, x), expected)
    quantized = tiny_models.switch(tiny_models.quantizable(model), False)
    torch.testing.assert_close(quantized(x), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(run_chain(quantized, x), quantized(x))


@torch.no_grad()
def test_reparameterization_is_exact(case: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = case
    model, x = model.double(), x.double()
    expected = model(x)
    quantized = tiny_models.switch(tiny_models.quantizable(model), False)
    pairs = find_pairs(quantized)
    quantizers = [(pair.name, pair.linears[0].input_quantizer) for pair in pairs]
    calibrate_inputs(quantizers, lambda: quantized(x))
    tiny_models.switch(quantized, False)
    for pair in pairs:
        reparameterize(pair)
    torch.testing.assert_close(quantized(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_description_rebuilds_the_model(case: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = case
    rebuilt = build(json.loads(json.dumps(describe(model))))
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(x), model(x))


@torch.no_grad()
def test_windows_set_afterwards_are_described() -> None:
    model = tiny_models.swin()
    model.set_input_size((48, 48))
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    rebuilt = build(json.loads(json.dumps(describe(model))))
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(x), model(x))


@torch.no_grad()
def test_shifted_windows_equal_timms_fused_attention() -> None:
    model, x = tiny_models.swin(), tiny_models.images(3)
    shifts = [any(block.shift_size) for stage in model.layers for block in stage.blocks]
    assert shifts == [False, True, False, False]  # the last stage is one window
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.fused_attn = True
    expected = model(x)
    masks: list[object] = []
    model.layers[0].blocks[1].attn.register_forward_hook(
        lambda _m, _args, kwargs, _out: masks.append(kwargs["mask"]), with_kwargs=True
    )
    model(x)
    assert masks[0] is not None  # given by keyword
    quantized = tiny_models.switch(tiny_models.quantizable(model), False)
    torch.testing.assert_close(quantized(x), expected, atol=1e-5, rtol=1e-5)
    model.layers[0].blocks[1].attn_mask.zero_()
    assert (quantized(x) - expected).abs().max() > 1e-3  # so the mask is in the traced attention


def test_every_layer_is_quantized_and_has_its_role() -> None:
    roles: dict[str, list[str]] = {}

    def note(site: Site) -> Quantizer:
        roles.setdefault(site.name, []).append(site.role)
        return UniformQuantizer(site.n_bits)

    insert_quantizers(tiny_models.swin(depths=(1, 1)), QuantSpec(3, 3), note, note)
    block = {
        "attn.matmul_qk": ["query", "key"],
        "attn.matmul_av": ["softmax", "value"],
        "attn.qkv": ["weight", "norm"],
        "attn.proj": ["weight", "input"],
        "mlp.fc1": ["weight", "norm"],
        "mlp.fc2": ["weight", "gelu"],
    }
    assert roles == {
        "patch_embed.proj": ["weight"],
        **{f"layers.0.blocks.0.{name}": found for name, found in block.items()},
        "layers.1.downsample.reduction": ["weight", "norm"],
        **{f"layers.1.blocks.0.{name}": found for name, found in block.items()},
        "head.fc": ["weight", "input"],
    }


def test_pairs_and_segments() -> None:
    model = tiny_models.quantizable(tiny_models.swin(depths=(1, 1)))
    expected = ["layers.0.blocks.0.norm1", "layers.0.blocks.0.norm2", "layers.1.downsample.norm"]
    expected += ["layers.1.blocks.0.norm1", "layers.1.blocks.0.norm2"]
    pairs = {pair.name: pair for pair in find_pairs(model)}
    assert list(pairs) == expected
    merging = model.layers[1].downsample
    assert (pairs[expected[2]].norm, pairs[expected[2]].linears) == (merging.norm, (merging.reduction,))
    names = ["patch_embed", "layers.0.blocks.0", "layers.1.downsample", "layers.1.blocks.0", "head"]
    chain = segments(model)
    assert [segment.name for segment in chain] == names
    named = [name for s in chain for weights in (True, False) for name, _ in s.quantizers(weights=weights)]
    assert sorted(named) == sorted(name for name, m in model.named_modules() if isinstance(m, Quantizer))


@pytest.mark.parametrize(
    ("path", "module", "named"),
    [
        ("layers.1.blocks.0.mlp", GluMlp(32, 64), r"'layers\.1\.blocks\.0\.mlp' is a GluMlp"),
        ("layers.0.blocks.1.attn", nn.Identity(), r"'layers\.0\.blocks\.1\.attn' is a Identity"),
        ("layers.0.blocks.0.norm2", nn.RMSNorm(16), r"'layers\.0\.blocks\.0\.norm2' is a RMSNorm"),
        ("layers.1.downsample.reduction", nn.LazyLinear(32), r"'layers\.1\.downsample\.reduction' is a LazyLinear"),
    ],
)
def test_unsupported_modules_are_named(path: str, module: nn.Module, named: str) -> None:
    model = tiny_models.swin()
    model.set_submodule(path, module)
    with pytest.raises(IasvitError, match=f"module {named}"):
        tiny_models.quantizable(model)
