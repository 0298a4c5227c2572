"""Explicit attention computes what timm's fused attention computes."""

from __future__ import annotations

import operator
from functools import partial

import pytest
import tiny_models
import torch
from timm.layers import Attention, LayerNorm
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from iasvit.errors import IasvitError
from iasvit.models.attention import MATMUL_NAMES, explicit_attention
from iasvit.nn import QuantMatMul
from iasvit.quantizers import Quantizer, SULQuantizer, UniformQuantizer


def products(enabled: bool = False) -> tuple[QuantMatMul, QuantMatMul]:
    pair = QuantMatMul(UniformQuantizer(8), UniformQuantizer(8)), QuantMatMul(SULQuantizer(8), UniformQuantizer(8))
    for product in pair:
        tiny_models.switch(product, enabled)
    return pair


def attention(cls: type[nn.Module] = Attention, **options: object) -> nn.Module:
    module = tiny_models.stir(cls(24, num_heads=3, qkv_bias=True, **options))
    module.fused_attn = True
    return module


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": True, "norm_layer": LayerNorm},
        {"scale_norm": True, "norm_layer": LayerNorm},
        {"gated": True},
        {"attn_head_dim": 4},
        {"attn_drop": 0.5, "proj_drop": 0.5},
    ],
)
def test_equals_timms_fused_attention(options: dict[str, object]) -> None:
    module, x = attention(**options), torch.randn(4, 10, 24, generator=torch.Generator().manual_seed(0))
    expected = module(x)
    explicit = explicit_attention(module, "attn", *products())
    torch.testing.assert_close(explicit(x), expected, atol=1e-5, rtol=1e-5)
    # The block passes these by keyword, always.
    torch.testing.assert_close(explicit(x, attn_mask=None, is_causal=False), expected, atol=1e-5, rtol=1e-5)


def window_mask(windows: int, area: int) -> Tensor:
    """Masks of 0 and -100 that differ from window to window."""
    group = torch.randint(0, 2, (windows, area), generator=torch.Generator().manual_seed(3))
    return (group[:, :, None] != group[:, None, :]).float() * -100


def test_window_attention_equals_timms_without_and_with_a_mask() -> None:
    make = partial(attention, WindowAttention, window_size=4)
    x = torch.randn(6, 16, 24, generator=torch.Generator().manual_seed(0))  # 2 images of 3 windows
    mask = window_mask(3, 16)
    plain, masked = make()(x), make()(x, mask=mask)
    assert (plain - masked).abs().max() > 1e-2  # the mask matters here
    unshifted = explicit_attention(make(), "attn", *products(), absent=("mask",))
    torch.testing.assert_close(unshifted(x, mask=None), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unshifted(x), plain, atol=1e-5, rtol=1e-5)
    shifted = explicit_attention(make(), "attn", *products())
    torch.testing.assert_close(shifted(x, mask=mask), masked, atol=1e-5, rtol=1e-5)


def test_each_operand_reaches_its_quantizer() -> None:
    module, x = attention(), torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    q, k, v = module.qkv(x).view(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)
    explicit = explicit_attention(module, "attn", *products())
    seen: dict[str, Tensor] = {}
    for name, quantizer in explicit.named_modules():
        if isinstance(quantizer, Quantizer):
            quantizer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
    explicit(x)
    torch.testing.assert_close(seen["matmul_qk.left_quantizer"], q * 8**-0.5)
    torch.testing.assert_close(seen["matmul_qk.right_quantizer"], k.transpose(-2, -1))
    probabilities = seen["matmul_av.left_quantizer"]
    torch.testing.assert_close(probabilities, (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1))
    torch.testing.assert_close(seen["matmul_av.right_quantizer"], v)


def test_quantizers_that_are_on_change_the_output() -> None:
    module, x = attention(), torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    explicit = explicit_attention(module, "attn", *products())
    off = explicit(x)
    for quantizer in (m for m in explicit.modules() if isinstance(m, Quantizer)):
        quantizer.calibrate(torch.rand(50))
        quantizer.enabled = True
    assert not torch.allclose(explicit(x), off, atol=1e-3)


def test_submodules_parameters_and_mode_are_kept() -> None:
    module = attention()
    explicit = explicit_attention(module, "attn", *products())
    assert explicit.qkv.weight is module.qkv.weight
    assert {name for name, _ in explicit.named_parameters()} == {name for name, _ in module.named_parameters()}
    assert {name for name, _ in explicit.named_children()} >= {"qkv", "proj", *MATMUL_NAMES}
    assert not explicit.training
    assert explicit_attention(attention().train(), "attn", *products()).training


class ThreeProducts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x.transpose(-2, -1) @ x @ x.transpose(-2, -1)


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x if x.sum() > 0 else operator.matmul(x, -x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (ThreeProducts(), r"module 'blocks\.7\.attn' \(ThreeProducts\) computes 3 matrix products"),
        (nn.Identity(), r"module 'blocks\.7\.attn' \(Identity\) computes 0 matrix products"),
        (DataDependent(), r"module 'blocks\.7\.attn' \(DataDependent\) cannot be made explicit"),
    ],
)
def test_what_is_no_attention_is_named(module: nn.Module, message: str) -> None:
    with pytest.raises(IasvitError, match=message):
        explicit_attention(module, "blocks.7.attn", *products())
