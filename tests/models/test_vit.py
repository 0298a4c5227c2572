"""The adapter of ViT, DeiT and distilled DeiT."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from timm.layers import Attention, GluMlp, RmsNorm, SimpleNorm, SwiGLU
from timm.models import create_model
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import nn

from iasvit.errors import IasvitError
from iasvit.models import Site, build, describe, find_pairs, insert_quantizers, segments
from iasvit.quantizers import Quantizer, UniformQuantizer
from iasvit.spec import QuantSpec

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "qk norm": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "layer scale": {"init_values": 0.1},
    "average pooling": {"global_pool": "avg"},
    "norm before": {"pre_norm": True},
    "registers, no class token": {"global_pool": "avg", "class_token": False, "reg_tokens": 2},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "no position": {"pos_embed": "none"},
    "dynamic size": {"dynamic_img_size": True},
    "no head": {"num_classes": 0},
    "no pooling": {"global_pool": ""},
    "quick GELU": {"act_layer": "quick_gelu"},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "ReLU": {"act_layer": nn.ReLU},
    "MLP width": {"embed_dim": 36, "mlp_ratio": 97 / 36},
    "no bias": {"qkv_bias": False, "proj_bias": False},
    "drop-out": {"drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.1, "patch_drop_rate": 0.5},
    "oblong": {"img_size": (32, 48), "patch_size": (8, 16)},
}


def image_size(variant: str) -> tuple[int, int]:
    return (32, 48) if variant == "oblong" else (32, 32)


@pytest.fixture(params=[*VARIANTS, "distilled"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor]:
    name = request.param
    model = tiny_models.deit() if name == "distilled" else tiny_models.vit(**VARIANTS[name])
    return model, torch.randn(3, 3, *image_size(name), generator=torch.Generator().manual_seed(0))


def run_chain(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for segment in segments(model):
        x = segment.run(x)
    return x


@torch.no_grad()
def test_inserted_quantizers_that_are_off_change_nothing(case: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = case
    expected = model(x)
    assert torch.equal(run_chain(model, x), expected)  # the chain computes the float model too
    quantized = tiny_models.switch(tiny_models.quantizable(model), False)
    torch.testing.assert_close(quantized(x), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(run_chain(quantized, x), quantized(x))


@torch.no_grad()
def test_a_description_rebuilds_the_model(case: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = case
    rebuilt = build(json.loads(json.dumps(describe(model))))
    assert type(rebuilt) is type(model)
    assert not rebuilt.training
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(x), model(x))


def test_every_layer_is_quantized_and_has_its_role() -> None:
    roles: dict[str, list[str]] = {}

    def note(site: Site) -> Quantizer:
        roles.setdefault(site.name, []).append(site.role)
        assert (site.layer is None) == ("matmul" in site.name)
        return UniformQuantizer(site.n_bits)

    model = insert_quantizers(tiny_models.deit(depth=1), QuantSpec(3, 3), note, note)
    assert roles == {
        "patch_embed.proj": ["weight"],  # the image is 8 bits already
        "blocks.0.attn.matmul_qk": ["query", "key"],
        "blocks.0.attn.matmul_av": ["softmax", "value"],
        "blocks.0.attn.qkv": ["weight", "norm"],
        "blocks.0.attn.proj": ["weight", "input"],
        "blocks.0.mlp.fc1": ["weight", "norm"],
        "blocks.0.mlp.fc2": ["weight", "gelu"],
        "head": ["weight", "input"],
        "head_dist": ["weight", "input"],
    }
    assert set(roles) == {
        name.removesuffix(".left_quantizer").removesuffix(".weight_quantizer")
        for name, module in model.named_modules()
        if isinstance(module, Quantizer) and name.endswith(("left_quantizer", "weight_quantizer"))
    }


def test_post_gelu_is_told_from_other_activations() -> None:
    roles = {}
    for act in (nn.GELU, nn.ReLU):
        model = tiny_models.vit(depth=1, act_layer=act)

        def note(site: Site, act: type[nn.Module] = act) -> Quantizer:
            roles[act, site.name, site.role] = True
            return UniformQuantizer(3)

        insert_quantizers(model, QuantSpec(3, 3), note, note)
    assert (nn.GELU, "blocks.0.mlp.fc2", "gelu") in roles
    assert (nn.ReLU, "blocks.0.mlp.fc2", "input") in roles


def test_overrides_reach_layers_products_and_both_kinds_of_bits() -> None:
    spec = "W3A4,head=W8A8,blocks.*.attn.matmul_av=W2A6,blocks.1.mlp.*=W5A7"
    model = tiny_models.quantizable(tiny_models.vit(), spec)
    bits = {name: module.n_bits for name, module in model.named_modules() if isinstance(module, Quantizer)}
    assert bits["patch_embed.proj.weight_quantizer"] == bits["blocks.0.mlp.fc1.weight_quantizer"] == 3
    assert bits["blocks.0.attn.qkv.input_quantizer"] == bits["blocks.0.attn.matmul_qk.left_quantizer"] == 4
    assert bits["head.weight_quantizer"] == bits["head.input_quantizer"] == 8
    assert bits["blocks.1.attn.matmul_av.left_quantizer"] == bits["blocks.1.attn.matmul_av.right_quantizer"] == 6
    assert (bits["blocks.1.mlp.fc2.weight_quantizer"], bits["blocks.1.mlp.fc2.input_quantizer"]) == (5, 7)


def test_an_override_for_no_layer_is_refused() -> None:
    for spec in ("W3A3,blocks.2.*=W8A8", "W3A3,blocks.0.norm1=W8A8"):
        with pytest.raises(IasvitError, match="matches no quantized layer"):
            tiny_models.quantizable(tiny_models.vit(), spec)


def test_pairs_are_the_norms_and_all_that_read_them() -> None:
    model = tiny_models.quantizable(tiny_models.vit())
    pairs = {pair.name: pair for pair in find_pairs(model)}
    assert list(pairs) == ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2"]
    assert pairs["blocks.1.norm1"].norm is model.blocks[1].norm1
    assert pairs["blocks.1.norm1"].linears == (model.blocks[1].attn.qkv,)
    assert pairs["blocks.1.norm2"].linears == (model.blocks[1].mlp.fc1,)
    assert [pair.name for pair in find_pairs(model, "blocks.1.")] == ["blocks.1.norm1", "blocks.1.norm2"]


def with_gates() -> nn.Module:
    model = tiny_models.vit()
    for block in model.blocks:
        block.attn = Attention(32, num_heads=2, qkv_bias=True, gated=True)
    return tiny_models.stir(model)


@torch.no_grad()
def test_a_gate_reads_the_norm_too() -> None:
    model, x = with_gates(), tiny_models.images(2)
    expected = model(x)
    quantized = tiny_models.switch(tiny_models.quantizable(model), False)
    torch.testing.assert_close(quantized(x), expected, atol=1e-5, rtol=1e-5)
    assert find_pairs(quantized)[0].linears == (quantized.blocks[0].attn.qkv, quantized.blocks[0].attn.gate)


def test_segments_name_their_quantizers() -> None:
    model = tiny_models.quantizable(tiny_models.deit())
    chain = segments(model)
    assert [segment.name for segment in chain] == ["patch_embed", "pos_embed", "blocks.0", "blocks.1", "head"]
    named = [name for s in chain for weights in (True, False) for name, _ in s.quantizers(weights=weights)]
    assert sorted(named) == sorted(name for name, m in model.named_modules() if isinstance(m, Quantizer))
    assert [name for name, _ in chain[-1].quantizers(weights=True)] == [
        "head.weight_quantizer",
        "head_dist.weight_quantizer",
    ]
    assert len(chain[2].layers()) == 4
    assert chain[1].layers() == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"global_pool": "map"}, "'attn_pool' is a AttentionPoolLatent"),
        ({"mlp_layer": GluMlp}, r"'blocks\.0\.mlp' is a GluMlp"),
        ({"mlp_layer": SwiGLU}, r"'blocks\.0\.mlp' is a SwiGLU"),
        ({"block_fn": ResPostBlock}, r"'blocks\.0' is a ResPostBlock"),
        ({"block_fn": ParallelScalingBlock}, r"'blocks\.0' is a ParallelScalingBlock"),
        ({"block_fn": ParallelThingsBlock}, r"'blocks\.0' is a ParallelThingsBlock"),
        ({"norm_layer": RmsNorm}, r"'blocks\.0\.norm1' is a RmsNorm"),
        ({"norm_layer": SimpleNorm}, r"'blocks\.0\.norm1' is a SimpleNorm"),
        ({"attn_layer": "diff"}, r"'blocks\.0\.attn' is a DiffAttention"),
    ],
)
def test_unsupported_modules_are_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(IasvitError, match=f"module {named}, which is not supported; expected"):
        tiny_models.quantizable(tiny_models.vit(**changes))
    if "global_pool" not in changes:  # describing comes first in `quantize`: it must not trip over them
        with pytest.raises(IasvitError, match=f"module {named}"):
            describe(tiny_models.vit(**changes))


def test_the_one_odd_block_among_many_is_named() -> None:
    model = tiny_models.vit(depth=3)
    model.blocks[2].norm2 = nn.LayerNorm(32, elementwise_affine=False)
    with pytest.raises(IasvitError, match=r"'blocks\.2\.norm2' is a LayerNorm.*LayerNorm with weight and bias"):
        tiny_models.quantizable(model)


def test_a_layer_that_would_stay_in_float_is_named() -> None:
    model = tiny_models.vit()
    model.fc_norm = nn.Linear(32, 32)
    with pytest.raises(IasvitError, match=r"'fc_norm' \(Linear\) is not in a place"):
        tiny_models.quantizable(model)
    model = tiny_models.vit()
    model.head = nn.utils.parametrizations.weight_norm(model.head)
    with pytest.raises(IasvitError, match="'head' is a ParametrizedLinear"):
        tiny_models.quantizable(model)


@pytest.mark.parametrize("name", ["resnet18", "vit_relpos_small_patch16_224", "swinv2_cr_tiny_224"])
def test_other_models_are_told_what_is_supported(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    for call in (describe, segments, tiny_models.quantizable):
        with pytest.raises(IasvitError, match=f"{type(model).__name__} has no supported attention.*timm.vit"):
            call(model)


def test_an_unknown_description_is_refused() -> None:
    with pytest.raises(IasvitError, match="'ConvNeXt' is not known"):
        build({"adapter": "ConvNeXt"})
    description = {**describe(tiny_models.vit()), "act": "NoSuchActivation"}
    with pytest.raises(
        IasvitError, match="activation 'NoSuchActivation' is not supported; the supported ones are GELU"
    ):
        build(description)


def test_quantizers_are_made_on_the_models_device() -> None:
    """Uncalibrated too: a checkpoint's state is loaded into them, and stays on whatever device they are."""
    model = tiny_models.quantizable(tiny_models.vit().to("meta"))
    devices = {buffer.device.type for m in model.modules() if isinstance(m, Quantizer) for buffer in m.buffers()}
    assert devices == {"meta"}
