"""iasvit.quantize and what `import iasvit` brings: the model given stays as it is, and what is wrong is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

import iasvit
from iasvit.errors import IasvitError
from iasvit.nn import quantizers_of
from iasvit.sos import IASViT
from iasvit.spec import QuantSpec


def quantize(model: nn.Module, calibration: Any, spec: str = "W3A3", method: str = "ias_vit", **options: Any):  # noqa: ANN201
    return iasvit.quantize(model, calibration, spec, method, iterations=2, batch_size=5, lr=1e-2, **options)


def weights_given(model: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}


# ---- the model given -----------------------------------------------------------------------------------------------


def test_the_model_given_is_left_untouched(model: nn.Module, images: Tensor) -> None:
    modules = {name: (type(module), len(module._forward_hooks)) for name, module in model.named_modules()}
    before, expected = tiny_models.bits_of(model), model(images)
    model.train()
    model.norm.eval()  # a mixture, which eval() and train() alone would not bring back
    modes = {name: module.training for name, module in model.named_modules()}
    quantized = quantize(model, images)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: (type(m), len(m._forward_hooks)) for name, m in model.named_modules()} == modules
    assert tiny_models.same_bits(model.state_dict(), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model.eval()(images), expected)
    assert not weights_given(model) & weights_given(quantized)
    assert not hasattr(model, "quantization")


def test_training_mode_comes_back_also_after_an_error(vit: nn.Module, images: Tensor) -> None:
    vit.train()
    with pytest.raises(IasvitError, match="NaN or Inf"):
        quantize(vit, images * torch.nan)
    assert all(module.training for module in vit.modules())


def test_the_result_is_called_as_the_model_is(model: nn.Module, images: Tensor) -> None:
    quantized = quantize(model, images)
    expected, output = model(images), quantized(images)
    assert type(quantized) is type(model)
    assert (output.shape, output.dtype, output.device) == (expected.shape, expected.dtype, expected.device)
    assert not torch.equal(output, expected)
    assert not any(module.training for module in quantized.modules())
    assert quantized.quantization.method == "ias_vit"
    assert quantized.quantization.spec == "W3A3"
    assert quantized.quantization.options["iterations"] == 2
    for weights in (True, False):
        quantizers = dict(quantizers_of(quantized, weights=weights))
        assert quantizers
        assert all(quantizer.n_bits == 3 and quantizer.enabled for quantizer in quantizers.values())


# ---- calibration images --------------------------------------------------------------------------------------------


def once(images: Tensor) -> Iterator[Tensor]:
    yield from images.split(5)


@pytest.mark.parametrize("given", [lambda x: list(x.split(1)), once, lambda x: [x.double()]])
def test_a_tensor_and_batches_give_equal_results(vit: nn.Module, images: Tensor, given: Callable) -> None:
    expected = quantize(vit, images)
    assert tiny_models.same_bits(quantize(vit, given(images)).state_dict(), expected.state_dict())


@pytest.mark.parametrize(
    ("calibration", "named"),
    [
        (torch.empty(0, 3, 32, 32), "holds no image"),
        ([], "holds no image"),
        (torch.zeros(3, 32, 32), "N×3×H×W"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "float tensors"),
        ([(torch.zeros(2, 3, 32, 32), torch.zeros(2))], "float tensors"),  # a loader that gives labels too
        (7, "calibration is a int"),
    ],
    ids=["empty tensor", "no batch", "three dimensions", "uint8", "with labels", "a number"],
)
def test_what_is_no_calibration_is_named(vit: nn.Module, calibration: object, named: str) -> None:
    with pytest.raises(IasvitError, match=named):
        quantize(vit, calibration)


@pytest.mark.parametrize("method", iasvit.list_methods())
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_every_method_refuses_bad_images_and_one_image_will_do(vit: nn.Module, method: str, bad: float) -> None:
    options = {"iterations": 1} if method == "ias_vit" else {}
    images = tiny_models.images(1)
    assert torch.isfinite(iasvit.quantize(vit, images, "W4A4", method, **options)(images)).all()
    images[0, 1, 2, 3] = bad
    with pytest.raises(IasvitError, match="NaN or Inf"):
        iasvit.quantize(vit, images, "W4A4", method, **options)


@pytest.mark.parametrize("method", iasvit.list_methods())
def test_every_method_names_the_layer_whose_values_are_not_finite(vit: nn.Module, images: Tensor, method: str) -> None:
    options = {"iterations": 1} if method == "ias_vit" else {}
    with torch.no_grad():
        vit.blocks[1].mlp.fc1.bias[3] = torch.inf
    with pytest.raises(IasvitError, match=r"'blocks\.1[.' (]"):
        iasvit.quantize(vit, images, "W4A4", method, **options)


# ---- options, methods, models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"steps": 3}, "no option 'steps'; it knows iterations, batch_size, lr, stage1_share, seed"),
        ({"method": "nope"}, "'nope' is not registered; the registered ones are adalog, adalog_retrained, aphq_vit"),
        ({"method": "ias_vit[-nope]"}, "no ingredient 'nope' to leave out; it has sulq, sos"),
        ({"spec": "W3"}, "'W3'.*such as W3A3"),
        ({"spec": "W3A3,nope=W8A8"}, "'nope' matches no quantized layer"),
    ],
)
def test_bad_arguments_are_told_what_exists(
    vit: nn.Module, images: Tensor, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(IasvitError, match=named):
        iasvit.quantize(vit, images, **arguments)


def test_a_method_object_is_used_as_it_is(vit: nn.Module, images: Tensor) -> None:
    method = IASViT(iterations=2, batch_size=5, lr=1e-2, softmax="log2")
    by_object = iasvit.quantize(vit, images, QuantSpec(3, 3), method)
    by_name = quantize(vit, images, method="ias_vit[-sulq]")
    assert tiny_models.same_bits(by_object.state_dict(), by_name.state_dict())
    assert by_name.quantization.method == "ias_vit[-sulq]"
    assert by_name.quantization.options["softmax"] == "log2"
    with pytest.raises(IasvitError, match="options iterations go with a method's name"):
        iasvit.quantize(vit, images, "W3A3", method, iterations=3)


class WithoutAttention(nn.Module):
    """No transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)


def test_models_that_cannot_be_quantized_are_named(vit: nn.Module, images: Tensor) -> None:
    with pytest.raises(IasvitError, match=r"WithoutAttention has no supported attention.*timm.swin, timm.vit"):
        iasvit.quantize(WithoutAttention(), images)
    with pytest.raises(IasvitError, match=r"give it in float32, as model\.float\(\) is"):
        iasvit.quantize(tiny_models.vit().half(), images)
    with pytest.raises(IasvitError, match="quantized already; give the full-precision one"):
        quantize(quantize(vit, images), images)
    vit.blocks[1].attn = WithoutAttention()
    with pytest.raises(IasvitError, match=r"module 'blocks\.1\.attn' is a WithoutAttention, .*expected Attention"):
        iasvit.quantize(vit, images)


# ---- the caller's surroundings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_matter(
    vit: nn.Module, images: Tensor, mode: Callable[[], AbstractContextManager]
) -> None:
    expected = quantize(vit, images)
    with mode():
        quantized = quantize(vit, images)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert tiny_models.same_bits(quantized.state_dict(), expected.state_dict())
    assert not any(tensor.is_inference() for tensor in quantized.state_dict().values())


def test_import_is_light_and_offers_what_it_names() -> None:
    code = (
        "import iasvit, json, sys; before = set(sys.modules); "
        "missing = [n for n in iasvit.__all__ if not getattr(iasvit, n)]; "
        "print(json.dumps([sorted(before), missing, iasvit.list_methods()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, missing, methods = json.loads(done.stdout)
    assert not {"mmdet", "mmcv", "mmengine", "matplotlib", "pandas", "onnx", "ray"} & set(modules)
    assert missing == []
    assert {"ias_vit", "repq_vit", "ptq4vit", "base_ptq", "minmax", "rtn"} <= set(methods)
    with pytest.raises(AttributeError, match="'nope'"):
        _ = iasvit.nope
