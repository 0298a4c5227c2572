"""The fast search of scales chooses what a plain loop over the paper's equations chooses."""

from __future__ import annotations

import copy
import math

import pytest
import slow_search
import torch
from baselines_tiny import FAMILIES, METHODS, tiny_images, tiny_model
from torch import nn

from baselines.base_ptq import BasePTQ
from baselines.ptq4vit import PTQ4ViT
from iasvit.calibration import scale_search
from iasvit.nn import QuantConv2d, QuantMatMul
from iasvit.progress import Progress
from iasvit.quantizers import TwinGELUQuantizer, TwinSoftmaxQuantizer
from iasvit.spec import QuantSpec
from tasks.mini import zoo

METRICS = {"ptq4vit": "hessian", "base_ptq": "cosine"}


def compare(model: nn.Module, method: PTQ4ViT | BasePTQ, spec: str, images: torch.Tensor) -> tuple[int, int]:
    """Layers and scales compared; every scale and every code must be equal."""
    quantized = method.quantize(model, images, QuantSpec.parse(spec), Progress())
    seen = slow_search.observe(copy.deepcopy(model), method, spec, images, method.seed)
    factors = torch.linspace(method.low, method.high, method.candidates)
    compared = 0
    for name, it in seen.items():
        slow_search.search(it, factors, method.rounds, METRICS[method.name])
        fast = quantized.get_submodule(name)
        for operand, scales in it.scales.items():
            if not scales:
                assert getattr(fast, operand) is None
                continue
            quantizer = getattr(fast, operand)
            if isinstance(quantizer, TwinSoftmaxQuantizer):
                got = (quantizer.scale * 2.0**-quantizer.shift)[None]
            else:
                rows = max(1, quantizer.scale.numel() // len(scales))
                got = quantizer.scale.reshape(-1)[::rows]
            assert torch.equal(got, torch.stack(scales)), f"{name}.{operand}: {got} is not {scales}"
            values = slow_search.codes(it, operand)
            if operand == "weight_quantizer":
                assert torch.equal(fast.weight, values)
            else:
                x = it.inputs[int(operand == "right_quantizer")]
                assert torch.equal(quantizer.decode(quantizer.encode(x)), values)
            compared += len(scales)
    return len(seen), compared


@pytest.mark.parametrize("spec", ["W3A3", "W6A6"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METRICS)
def test_tiny_models_get_the_scales_of_the_plain_loop(name: str, family: str, spec: str) -> None:
    model = tiny_model(family)
    layers, scales = compare(model, METHODS[name](), spec, tiny_images(model, 4))
    # Patch embedding, 6 layers and products a block, head; in Swin 3 blocks and the patch merging.
    assert layers == {"vit": 1 + 2 * 6 + 1, "swin": 1 + 3 * 6 + 1 + 1}[family]
    # A block has 4 weights with 6 scales, 4 inputs and 4 operands of products.
    patch_embed = model.patch_embed.proj.out_channels if name == "ptq4vit" else 1
    assert scales == {"vit": patch_embed + 2 * 14 + 2, "swin": patch_embed + 3 * 14 + 2 + 2}[family]


@pytest.mark.parametrize(("name", "backbone"), zip(METRICS, ("deit_t", "swin_t"), strict=True))
def test_mini_backbones_get_the_scales_of_the_plain_loop(name: str, backbone: str) -> None:
    model = zoo.build(backbone)
    images = torch.randn(1, 3, zoo.IMAGE_SIZE, zoo.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    layers, _ = compare(model, METHODS[name](candidates=8, low=0.3), "W4A4", images)
    assert layers == {"deit_t": 12 * 6 + 2, "swin_t": 12 * 6 + 3 + 2}[backbone]


@pytest.mark.parametrize("budget", [1, 2**12, 2**28])
def test_the_memory_budget_changes_nothing_but_the_pieces(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("vit")
    images = tiny_images(model, 3)
    method = PTQ4ViT(candidates=20)
    before = method.quantize(model, images, QuantSpec.parse("W4A4"), Progress()).state_dict()
    largest = 0
    original = scale_search.HessianGuided.errors

    def errors(self: object, outputs: torch.Tensor, *args: object) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, outputs.numel())
        return original(self, outputs, *args)

    monkeypatch.setattr(scale_search.HessianGuided, "errors", errors)
    monkeypatch.setattr(scale_search, "CPU_BUDGET", budget)
    after = method.quantize(model, images, QuantSpec.parse("W4A4"), Progress()).state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    # One candidate on one row (a matrix of a product) is the least that can be evaluated.
    assert largest <= max(budget // 16, 17 * 17, 4 * 24)


def test_candidates_that_cannot_win_are_dropped_early(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("vit")
    evaluated = 0
    original = scale_search.HessianGuided.errors

    def errors(self: object, outputs: torch.Tensor, *args: object) -> torch.Tensor:
        nonlocal evaluated
        evaluated += outputs.numel()
        return original(self, outputs, *args)

    monkeypatch.setattr(scale_search.HessianGuided, "errors", errors)
    PTQ4ViT().quantize(model, tiny_images(model, 8), QuantSpec.parse("W4A4"), Progress())
    outputs = {"qkv": 17 * 72, "qk": 3 * 17 * 17, "av": 17 * 24, "proj": 17 * 24, "fc1": 17 * 96, "fc2": 17 * 24}
    operands = {"av": 120}  # 20 shifts of the fine range, 100 scales of V
    everything = 8 * 2 * 3 * sum(size * operands.get(name, 200) for name, size in outputs.items())
    assert evaluated < 0.7 * everything


def test_a_layer_whose_gradient_is_zero_is_searched_by_squared_error() -> None:
    model = tiny_model("vit")
    model.head.weight.zero_()  # as timm initialises some heads: no gradient passes
    quantized = PTQ4ViT(candidates=30).quantize(model, tiny_images(model, 4), QuantSpec.parse("W4A4"), Progress())
    fc1 = quantized.blocks[0].mlp.fc1
    error = (fc1.weight - model.blocks[0].mlp.fc1.weight).square().mean() / model.blocks[0].mlp.fc1.weight.var()
    assert error < 0.03  # the first candidate, 0.01 of the range, would leave 0.9


@pytest.mark.parametrize("family", FAMILIES)
def test_ptq4vit_puts_twin_quantizers_after_softmax_and_gelu(family: str) -> None:
    model = tiny_model(family)
    method = PTQ4ViT(candidates=3, rounds=1)
    quantized = method.quantize(model, tiny_images(model, 2), QuantSpec.parse("W4A4"), Progress())
    blocks = [module for module in quantized.modules() if hasattr(module, "attn") and hasattr(module, "mlp")]
    for block in blocks:
        assert isinstance(block.attn.matmul_av.left_quantizer, TwinSoftmaxQuantizer)
        assert isinstance(block.mlp.fc2.input_quantizer, TwinGELUQuantizer)
        assert block.attn.qkv.weight_quantizer.groups == 3
        assert block.attn.qkv.weight_quantizer.scale.unique().numel() == 3
        assert block.attn.proj.weight_quantizer.scale.ndim == 0
    patch_embed = quantized.patch_embed.proj
    assert isinstance(patch_embed, QuantConv2d)
    assert patch_embed.weight_quantizer.scale.unique().numel() > 1
    twins = sum(isinstance(m, (TwinSoftmaxQuantizer, TwinGELUQuantizer)) for m in quantized.modules())
    assert twins == 2 * len(blocks) == sum(isinstance(m, QuantMatMul) for m in quantized.modules())
    assert math.isfinite(float(quantized(tiny_images(model, 1)).sum()))
