"""Layers that the spec leaves in full precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from timm.layers import Attention
from torch import nn

import iasvit
from iasvit.errors import IasvitError
from iasvit.models import find_pairs
from iasvit.nn import quant_layers

METHODS = {"ias_vit": {"iterations": 2, "batch_size": 4}, "base_ptq": {"candidates": 5}, "repq_vit": {}, "rtn": {}}


@pytest.mark.parametrize("method", METHODS)
def test_layers_at_32_bits_are_left_alone(method: str) -> None:
    model, images = tiny_models.vit(), tiny_models.images()
    spec = "W4A4,head=W32A32,blocks.0.mlp.fc1=W32A32,blocks.1.attn.proj=W32A32"
    quantized = iasvit.quantize(model, images, spec, method, **METHODS[method])
    left = ["head", "blocks.0.mlp.fc1", "blocks.1.attn.proj"]
    names = [name for name, _ in quant_layers(quantized)]
    assert len(names) == 10 - len(left)
    assert not set(left) & set(names)
    before = dict(model.named_modules())
    for name in left:
        layer = quantized.get_submodule(name)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, before[name].weight)
        assert torch.equal(layer.bias, before[name].bias)
    norm = quantized.blocks[0].norm2  # what reads it is not quantized: nothing to reparameterize
    assert torch.equal(norm.weight, model.blocks[0].norm2.weight)
    assert torch.isfinite(quantized(images)).all()


def test_pairs_of_such_layers_are_none() -> None:
    quantized = tiny_models.quantizable(tiny_models.vit(), "W3A3,blocks.0.mlp.fc1=W32A32")
    assert [pair.name for pair in find_pairs(quantized)] == ["blocks.0.norm1", "blocks.1.norm1", "blocks.1.norm2"]


def test_layers_that_read_one_norm_are_treated_alike() -> None:
    model = tiny_models.vit()
    model.blocks[0].attn = tiny_models.stir(Attention(32, num_heads=2, qkv_bias=True, gated=True))
    quantized = tiny_models.quantizable(model, "W3A3,blocks.0.attn.gate=W32A32")
    with pytest.raises(IasvitError, match=r"layers that read 'blocks\.0\.norm1' are quantized and some are not"):
        find_pairs(quantized)


def test_products_cannot_stay_in_full_precision() -> None:
    with pytest.raises(IasvitError, match=r"product 'blocks\.1\.attn\.matmul_qk' cannot stay in full precision"):
        tiny_models.quantizable(tiny_models.vit(), "W3A3,blocks.1.*=W32A32")


def test_a_saved_model_with_such_layers_answers_as_before(tmp_path: Path) -> None:
    images = tiny_models.images()
    quantized = iasvit.quantize(tiny_models.swin(), images, "W3A3,head.fc=W32A32", "repq_vit")
    iasvit.save(quantized, tmp_path / "model.safetensors")
    assert torch.equal(iasvit.load(tmp_path / "model.safetensors")(images), quantized(images))
