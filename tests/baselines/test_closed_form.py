"""Methods in closed form: what their frame promises, on a tiny ViT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from baselines_tiny import METHODS, StopAfter, Stopped, tiny_images, tiny_model
from tiny_models import same_bits
from torch import Tensor, nn

import iasvit
from iasvit.calibration import calibration_store
from iasvit.closed_form.moments import in_order, moments_of
from iasvit.errors import IasvitError
from iasvit.models import segments
from iasvit.nn import quant_layers
from iasvit.progress import Progress
from iasvit.transforms import rotate_heads, rotate_residual

NAMES = ("gptq", "gptaq", "erq")


def quantize(name: str, model: nn.Module | None = None, count: int = 4, **options: object) -> nn.Module:
    model = tiny_model("vit") if model is None else model
    progress = options.pop("progress", None)
    return iasvit.quantize(model, tiny_images(model, count), "W3A4", METHODS[name](**options), progress=progress)


def error(quantized: nn.Module, model: nn.Module) -> float:
    images = tiny_images(model, 16, seed=5)
    return float((quantized(images) - model(images)).square().mean())


def test_they_err_less_than_rounding_to_nearest() -> None:
    model = tiny_model("vit")
    errors = {name: error(quantize(name, model, 16), model) for name in (*NAMES, "repq_vit")}
    assert all(errors[name] < 0.9 * errors["repq_vit"] for name in NAMES), errors


def test_gptaq_without_its_term_is_gptq() -> None:
    assert same_bits(quantize("gptaq", alpha=0.0).state_dict(), quantize("gptq").state_dict())
    assert not same_bits(quantize("gptaq").state_dict(), quantize("gptq").state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_one_image_is_enough_and_leaves_no_nan(name: str) -> None:
    model = tiny_model("vit")
    quantized = quantize(name, model, 1)  # 17 tokens for 24 and 96 columns
    assert all(torch.isfinite(x).all() for x in quantized.state_dict().values())
    assert torch.isfinite(quantized(tiny_images(model, 2))).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_goes_on_after_the_last_segment(name: str, tmp_path: Path) -> None:
    expected = quantize(name)
    with pytest.raises(Stopped):
        quantize(name, progress=StopAfter(tmp_path, 2))
    resumed = quantize(name, progress=Progress(checkpoint=tmp_path))
    assert same_bits(resumed.state_dict(), expected.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_memory_budget_changes_nothing_or_is_too_small(name: str) -> None:
    assert same_bits(quantize(name, memory_budget="2GiB").state_dict(), quantize(name).state_dict())
    with pytest.raises(IasvitError, match=rf"memory_budget is 1 MiB, but {name} needs at least"):
        quantize(name, memory_budget="1MiB")


@pytest.mark.parametrize("name", NAMES)
def test_transforms_compose_with_them(name: str, tmp_path: Path) -> None:
    model = tiny_model("vit")
    rotated = rotate_heads(rotate_residual(model))
    assert error(quantize(name, rotated, 8), model) < 4 * error(quantize(name, model, 8), model)


@pytest.mark.parametrize("name", ["gptq", "erq"])
def test_infinite_moments_name_the_layer(name: str) -> None:
    model = tiny_model("vit")
    model.blocks[1].attn.proj.weight *= 1e30
    with pytest.raises(IasvitError, match=r"layer '(blocks\.1|head)"):
        quantize(name, model)


def test_moments_are_sums_over_quantized_and_full_precision_inputs() -> None:
    model = tiny_model("vit")
    images = tiny_images(model, 5)
    quantized = quantize("gptq", model)
    store = calibration_store(images, torch.device("cpu"))
    chain = segments(quantized)
    inputs = store.map(lambda x: chain[1].run(chain[0].run(x)), 5, "x")
    block = chain[2]
    layers = in_order(block.layers(), block.run, inputs.gather([0]))
    names = {layer: name for name, layer in quant_layers(quantized)}
    assert [names[layer].rpartition(".")[2] for layer in layers] == ["qkv", "proj", "fc1", "fc2"]
    seen: list[Tensor] = []
    layers[2].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    block.run(inputs.gather(range(5)))
    x = seen[0].reshape(-1, 24)
    ours = layers[2].input_quantizer(x).double()
    layers[2]._forward_pre_hooks.clear()
    found = moments_of(layers[2], block, inputs, reference=(layers[2], block, inputs), batch_size=2)
    torch.testing.assert_close(found.quantized, ours.T @ ours, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.mixed, ours.T @ x.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.sums[1], x.double().sum(0), rtol=1e-5, atol=1e-4)
    assert (found.tokens, found.flat) == (len(x), False)
