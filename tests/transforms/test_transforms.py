"""Transforms: exact where they say so, described, recorded, and taken by every method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import iasvit
from iasvit.errors import IasvitError
from iasvit.models import adapter_for, build, describe, find_pairs, segments
from iasvit.nn import RMSNorm
from iasvit.reparam import reparameterize
from iasvit.transforms import hadamard, relu_mlps, rotate_heads, rotate_residual, smooth_channels, transforms_of
from tests import tiny_models as tiny

EXACT = 1e-5


def difference(first: nn.Module, second: nn.Module, images: Tensor) -> float:
    """The largest difference of two models' outputs, relative to the largest output."""
    with torch.no_grad():
        expected = first(images)
        return float((second(images) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("width", [1, 2, 16, 12, 24, 192, 384, 768])
def test_hadamard_is_orthogonal_and_flat(width: int) -> None:
    matrix = hadamard(width)
    assert torch.allclose(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, width**-0.5), atol=1e-12)


@pytest.mark.parametrize("width", [10, 36, 20, 0])
def test_hadamard_refuses_other_widths(width: int) -> None:
    with pytest.raises(IasvitError, match=f"a width of {width} has no Hadamard rotation here; it must be 2.k or 12"):
        hadamard(width)


RESIDUAL = {
    "vit": lambda: tiny.vit(),
    "distilled": lambda: tiny.deit(),
    "width 48": lambda: tiny.vit(embed_dim=48, num_heads=3),
    "average pooling": lambda: tiny.vit(global_pool="avg"),
    "norm before pooling": lambda: tiny.vit(global_pool="avg", fc_norm=False),
    "LayerScale, registers": lambda: tiny.vit(init_values=0.1, reg_tokens=2, no_embed_class=True),
    "no biases": lambda: tiny.vit(qkv_bias=False, proj_bias=False),
    "norm of queries": lambda: tiny.vit(qk_norm=True),
    "other sizes": lambda: tiny.vit(dynamic_img_size=True),
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_rotate_residual_is_exact(name: str) -> None:
    model = RESIDUAL[name]()
    before = tiny.bits_of(model)
    rotated = rotate_residual(model, seed=3)
    assert difference(model, rotated, tiny.images(3)) < EXACT
    assert tiny.same_bits(before, model.state_dict())
    left = [path for path, module in rotated.named_modules() if isinstance(module, nn.LayerNorm)]
    assert all("attn" in path for path in left)
    assert type(rotated.blocks[0].norm1) is RMSNorm
    assert not torch.allclose(rotated.blocks[0].attn.proj.weight, model.blocks[0].attn.proj.weight)


def test_rotated_models_have_one_norm_of_channels() -> None:
    """Outliers of one channel are spread: what a rotation is for."""
    model = tiny.vit()
    with torch.no_grad():
        model.blocks[0].norm1.weight[3] = 50.0
        x = tiny.images(4)
        seen: list[Tensor] = []
        for each in (model, rotate_residual(model)):
            handle = each.blocks[0].norm1.register_forward_hook(lambda _m, _a, output: seen.append(output))
            each(x)
            handle.remove()
    peak = [float(y.abs().max() / y.square().mean().sqrt()) for y in seen]
    assert peak[1] < peak[0] / 2


@pytest.mark.parametrize("name", ["vit", "deit", "swin"])
def test_rotate_heads_is_exact(name: str) -> None:
    model = tiny.MODELS[name]()
    rotated = rotate_heads(model, seed=1)
    assert difference(model, rotated, tiny.images(3)) < EXACT
    first = adapter_for(model).heads(model)[0], adapter_for(rotated).heads(rotated)[0]
    assert not torch.allclose(first[0].qkv.weight, first[1].qkv.weight)
    assert not torch.allclose(first[0].proj.weight, first[1].proj.weight)


def test_rotate_heads_leaves_out_the_half_that_does_not_cancel() -> None:
    model = tiny.vit(qk_norm=True)
    rotated = rotate_heads(model)
    assert difference(model, rotated, tiny.images(2)) < EXACT
    rows = slice(0, 2 * model.embed_dim)
    assert torch.equal(rotated.blocks[0].attn.qkv.weight[rows], model.blocks[0].attn.qkv.weight[rows])
    assert difference(model, rotate_heads(tiny.vit(scale_attn_norm=True)), tiny.images(2)) > 0
    scaled = tiny.vit(scale_attn_norm=True)
    assert difference(scaled, rotate_heads(scaled), tiny.images(2)) < EXACT
    with pytest.raises(IasvitError, match=r"'blocks.0.attn' has a norm of queries and keys and a norm"):
        rotate_heads(tiny.vit(qk_norm=True, scale_attn_norm=True))


@pytest.mark.parametrize("name", ["vit", "deit", "swin"])
def test_smooth_channels_is_exact_and_smooths(name: str) -> None:
    model, images = tiny.MODELS[name](), tiny.images(4)
    smooth = smooth_channels(model, images, alpha=1.0)
    assert difference(model, smooth, images) < EXACT
    pair = adapter_for(smooth).pairs(smooth)[0]
    seen: list[Tensor] = []
    pair.norm.register_forward_hook(lambda _m, _a, output: seen.append(output))
    with torch.no_grad():
        smooth(images)
    peaks = seen[0].abs().flatten(0, -2).amax(dim=0)  # alpha = 1: every channel reaches 1
    assert torch.allclose(peaks, torch.ones_like(peaks), rtol=1e-4)


def test_smooth_channels_follows_the_equation() -> None:
    model, images = tiny.vit(), tiny.images(4)
    seen: list[Tensor] = []
    handle = model.blocks[1].norm2.register_forward_hook(lambda _m, _a, output: seen.append(output))
    with torch.no_grad():
        model(images)
    handle.remove()
    smooth = smooth_channels(model, images, alpha=0.3)
    weight = model.blocks[1].mlp.fc1.weight
    scale = seen[0].abs().flatten(0, 1).amax(0) ** 0.3 / weight.abs().amax(0) ** 0.7
    torch.testing.assert_close(smooth.blocks[1].mlp.fc1.weight, weight * scale, rtol=1e-4, atol=1e-6)


def test_filled_windows_stay_exact() -> None:
    model, images = tiny.swin(img_size=40), tiny.images(3, size=40)
    assert difference(model, smooth_channels(model, images), images) < EXACT
    assert difference(model, rotate_heads(model), images) < EXACT


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_all_exact_transforms_together(name: str) -> None:
    model, images = tiny.MODELS[name](), tiny.images(4)
    changed = smooth_channels(rotate_heads(rotate_residual(model)), images)
    assert difference(model, changed, images) < EXACT
    made = transforms_of(changed)
    assert [step.name for step in made.steps] == ["rotate_residual", "rotate_heads", "smooth_channels"]
    assert all(step.exact for step in made.steps)
    assert made.network is None


def test_a_rotated_model_is_described_and_rebuilt() -> None:
    model = tiny.vit(init_values=0.1)
    rotated = rotate_residual(model)
    rebuilt = build(describe(rotated))
    rebuilt.load_state_dict(rotated.state_dict())
    assert difference(rotated, rebuilt, tiny.images(2)) == 0
    assert "norm" not in describe(model)
    with pytest.raises(IasvitError, match="norm 'batch' is not supported; the supported ones are layer, rms"):
        build({**describe(rotated), "norm": "batch"})


def test_a_rotated_model_reparameterizes_exactly() -> None:
    """RMSNorm→Linear pairs fold per-channel scales and zero-points as LayerNorm→Linear pairs do."""
    images = tiny.images(4)
    model = tiny.quantizable(rotate_residual(tiny.vit()))
    tiny.switch(model, False)
    with torch.no_grad():
        expected = model(images)
        x = images
        for segment in segments(model):
            x = segment.run(x)
    pairs = find_pairs(model)
    assert [pair.name for pair in pairs][:2] == ["blocks.0.norm1", "blocks.0.norm2"]
    for pair in pairs:
        for linear in pair.linears:
            linear.input_quantizer.calibrate(torch.randn(50, linear.in_features) * torch.rand(linear.in_features))
            linear.input_quantizer.enabled = False
        reparameterize(pair)
    with torch.no_grad():
        assert (model(images) - expected).abs().max() < EXACT * expected.abs().max()


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_relu_mlps_learns_what_gelu_did(name: str) -> None:
    model, images = tiny.MODELS[name](), tiny.images(16)
    options = {"lr": 1e-2, "batch_size": 8, "seed": 5}
    plain = relu_mlps(model, images, iterations=0, **options)
    learnt = relu_mlps(model, images, iterations=60, **options)
    again = relu_mlps(model, images, iterations=60, **options)
    assert all(isinstance(getattr(*mlp.act), nn.ReLU) for mlp in adapter_for(learnt).mlps(learnt))
    assert all(isinstance(getattr(*mlp.act), nn.GELU) for mlp in adapter_for(model).mlps(model))
    assert difference(model, learnt, images) < 0.7 * difference(model, plain, images)
    assert tiny.same_bits(learnt.state_dict(), again.state_dict())
    made = transforms_of(learnt)
    assert [(step.name, step.exact) for step in made.steps] == [("relu_mlps", False)]
    assert made.network is learnt
    assert describe(learnt)["act"] == "ReLU"
    rebuilt = build(describe(learnt))
    rebuilt.load_state_dict(learnt.state_dict())
    assert difference(learnt, rebuilt, images) == 0


def test_relu_mlps_weights_say_what_counts() -> None:
    model, images = tiny.vit(depth=1), tiny.images(16)
    weight = torch.zeros(1, 32)
    weight[:, :4] = 1
    learnt = relu_mlps(model, images, iterations=150, lr=1e-2, batch_size=8, weights={"blocks.0": weight})

    def error(channels: slice) -> float:
        seen: list[Tensor] = []
        for each in (model, learnt):
            handle = each.blocks[0].mlp.register_forward_hook(lambda _m, _a, output: seen.append(output))
            with torch.no_grad():
                each(images)
            handle.remove()
        return float((seen[0] - seen[1])[..., channels].square().mean())

    assert error(slice(0, 4)) < error(slice(4, None)) / 3


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_transformed_model_is_quantized_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, images = tiny.MODELS[name](), tiny.images(8)
    changed = relu_mlps(model, images, iterations=2)
    changed = rotate_heads(changed if name == "swin" else rotate_residual(changed))
    network = transforms_of(changed).network
    for method in ("minmax", "repq_vit"):
        quantized = iasvit.quantize(changed, images, "W4A4", method)
        assert transforms_of(quantized).network is network
        names = [step["name"] for step in quantized.quantization.transforms]
        assert names == ["relu_mlps", *(["rotate_residual"] if name == "vit" else []), "rotate_heads"]
        iasvit.save(quantized, tmp_path / "model.safetensors")
        loaded = iasvit.load(tmp_path / "model.safetensors")
        assert difference(quantized, loaded, images) == 0
        assert loaded.quantization.transforms == quantized.quantization.transforms


REFUSED = {
    "a SwinTransformer has no residual stream of one width": lambda: rotate_residual(tiny.swin()),
    "the model given is rotated already": lambda: rotate_residual(rotate_residual(tiny.vit())),
    "a width of 40 has no Hadamard": lambda: rotate_residual(tiny.vit(embed_dim=40)),
    "module 'blocks.0.attn': a width of 20 has no": lambda: rotate_heads(tiny.vit(embed_dim=40)),
    "module 'norm_pre' is a timm.layers.norm.LayerNorm": lambda: rotate_residual(tiny.vit(pre_norm=True)),
    "pooling 'max' of the model cannot be rotated": lambda: rotate_residual(tiny.vit(global_pool="max")),
    "ends in one norm and a Linear head": lambda: rotate_residual(tiny.vit(num_classes=0)),
    "module 'blocks.0.mlp.norm' is a timm.layers.norm.LayerNorm": lambda: relu_mlps(
        tiny.vit(scale_mlp_norm=True), tiny.images(2)
    ),
    "'blocks.0.mlp.act' is a ReLU": lambda: relu_mlps(tiny.vit(act_layer=nn.ReLU), tiny.images(2)),
    "weights are given for 'blocks.7'": lambda: relu_mlps(
        tiny.vit(), tiny.images(2), weights={"blocks.7": torch.ones(1)}
    ),
    "clamp_percentile is 0": lambda: relu_mlps(tiny.vit(), tiny.images(2), clamp_percentile=0),
    "iterations of 0 or more": lambda: relu_mlps(tiny.vit(), tiny.images(2), iterations=-1),
    "reached NaN or Inf; give a lower lr": lambda: relu_mlps(tiny.vit(), tiny.images(2), iterations=9, lr=1e30),
    "alpha is 2": lambda: smooth_channels(tiny.vit(), tiny.images(2), alpha=2),
    "quantized already": lambda: rotate_heads(iasvit.quantize(tiny.vit(), tiny.images(2), "W8A8", "minmax")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_gets_one_sentence(message: str) -> None:
    with pytest.raises(IasvitError) as error:
        REFUSED[message]()
    assert message in str(error.value)
